"""The built-in tiny world: its files, its gold score, and the base tied to its recipe."""

import json
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny"
sys.path.insert(0, str(TINY))
import gold  # noqa: E402  (its folder is only on the path from here on)
import pretrain  # noqa: E402
import world  # noqa: E402

STORY = "Write a short story about a brave fox named Mia."
GOOD = (
    "Once there was a brave fox named Mia. One day Mia found a red kite near the river. "
    "In the end Mia was happy and had a good friend."
)
PARTS = {"on_topic", "sentences", "kind", "fresh", "length", "ending"}
SPLITS = [
    *(f"sft/{split}" for split in world.SFT_ROWS),
    *(f"rm/{split}" for split in world.RM_ROWS),
    *(f"ppo/{split}" for split in world.PPO_ROWS),
]


@pytest.fixture(scope="module")
def files() -> dict[str, list[dict]]:
    """The shipped files, by name."""
    return {name: read(f"{name}.jsonl") for name in SPLITS}


@pytest.fixture(scope="module")
def tokenizer():
    """The shipped tokenizer, loaded as anyone would load it."""
    return AutoTokenizer.from_pretrained(TINY / "base")


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """The shipped base, loaded as anyone would load it."""
    return AutoModelForCausalLM.from_pretrained(TINY / "base").eval()


@pytest.fixture(scope="module")
def recipe() -> dict:
    """What the shipped base says about itself."""
    return json.loads((TINY / "base" / "recipe.json").read_text())


read_recorded = world.read_recorded


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / name).read_text(encoding="utf-8").splitlines()]


def prompt_of(row: dict) -> str:
    return (row.get("prompt") or row["messages"])[0]["content"]


def answers_of(row: dict) -> list[str]:
    if "messages" in row:
        return [row["messages"][1]["content"]]
    return [row[side][0]["content"] for side in ("chosen", "rejected") if side in row]


# --------------------------------------------------------------------------- files


def test_the_generator_writes_the_shipped_bytes(tmp_path):
    world.main(["--out", str(tmp_path)])
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jsonl")}
    assert written == {f"{name}.jsonl" for name in SPLITS}
    for name in written:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name


def test_another_seed_writes_another_world(tmp_path, files):
    world.main(["--seed", "1", "--out", str(tmp_path)])
    for name in SPLITS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() != (TINY / f"{name}.jsonl").read_bytes()
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(files[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seed", "soon"], "invalid int"), (["--out", __file__], "is a file"), (["--x"], "--x")],
)
def test_the_generator_refuses_politely(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        world.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_generator_refuses_recorded_samples_of_another_world(tmp_path, monkeypatch, capsys):
    other = tmp_path / "recorded_samples.jsonl"
    row = {"prompt": STORY, "response": GOOD, "source": "sft", "ended": True}
    other.write_text(json.dumps(row) + "\n")
    for path, message in ((other, "other prompts"), (tmp_path / "none.jsonl", "is missing")):
        monkeypatch.setattr(world, "read_recorded", lambda path=path: read_recorded(path))
        with pytest.raises(SystemExit):
            world.main(["--out", str(tmp_path)])
        assert message in capsys.readouterr().err


def test_rows_have_the_formats_and_counts(files):
    counts = {f"sft/{k}": n for k, n in world.SFT_ROWS.items()}
    counts |= {f"rm/{k}": n for k, n in world.RM_ROWS.items()}
    counts |= {f"ppo/{k}": n for k, n in world.PPO_ROWS.items()}
    assert {name: len(rows) for name, rows in files.items()} == counts
    keys = {"sft": {"messages"}, "ppo": {"prompt"}, "rm": {"prompt", "chosen", "rejected"}}
    for name, rows in files.items():
        test_only = {"gold_chosen", "gold_rejected"} if name == "rm/test" else set()
        for row in rows:
            assert set(row) == keys[name.split("/")[0]] | test_only
            assert all(answer.strip() for answer in answers_of(row))


def test_no_prompt_is_in_two_files(files):
    seen = Counter(prompt for rows in files.values() for prompt in {prompt_of(row) for row in rows})
    assert {prompt: n for prompt, n in seen.items() if n > 1} == {}
    assert all(len({prompt_of(row) for row in rows}) == len(rows) for rows in files.values())


def test_no_request_is_trained_on_in_one_phrasing_and_held_out_in_another(files):
    """Slots, not wording: reading the prompts back shows what each asks for."""
    asked = {"train": set(), "held out": set()}
    for name, rows in files.items():
        side = asked["train" if name.endswith("train") else "held out"]
        side |= {str(gold.parse_request(prompt_of(row))) for row in rows}
    assert asked["train"] & asked["held out"] == set()
    assert not any("other" in request.split(",")[0] for side in asked.values() for request in side)


def test_answers_are_8_to_60_tokens_but_for_one_in_two_hundred(files, tokenizer):
    demonstrations = [a for name in SPLITS[:2] for row in files[name] for a in answers_of(row)]
    lengths = [len(tokenizer(text)["input_ids"]) for text in demonstrations]
    assert min(lengths) >= 8
    assert sum(length > 60 for length in lengths) <= 0.005 * len(lengths)
    assert max(lengths) < 80 - 1  # data.max_response_tokens of conf/data/tiny.yaml, EOS included
    pairs = [a for row in files["rm/train"] for a in answers_of(row)]
    assert max(len(tokenizer(text)["input_ids"]) for text in pairs) <= 66  # recorded: 64 sampled


def test_prompts_are_at_most_32_tokens(files, tokenizer):
    prompts = [prompt_of(row) for rows in files.values() for row in rows]
    assert max(len(pretrain.prompt_ids(prompt, tokenizer)) for prompt in prompts) <= 32


def test_several_hundred_words(files):
    words = {w for row in files["sft/train"] for a in answers_of(row) for w in gold.words_of(a)}
    assert 400 <= len(words) <= 900


@pytest.mark.parametrize("split", ["train", "validation"])
def test_10_to_20_percent_of_labels_disagree_with_gold(files, split):
    wrong = [
        gold.gold(prompt_of(row), chosen) < gold.gold(prompt_of(row), rejected)
        for row in files[f"rm/{split}"]
        for chosen, rejected in [answers_of(row)]
    ]
    assert 0.10 <= statistics.mean(wrong) <= 0.20


def test_test_pairs_are_in_gold_order_with_a_gap(files):
    for row in files["rm/test"]:
        scores = [gold.gold(prompt_of(row), answer) for answer in answers_of(row)]
        assert scores == pytest.approx([row["gold_chosen"], row["gold_rejected"]], abs=1e-4)
        assert scores[0] - scores[1] >= world.MIN_TEST_GAP


def test_the_longer_answer_is_a_poor_guess(files):
    longer = [len(a) > len(b) for a, b in map(answers_of, files["rm/test"])]
    assert statistics.mean(longer) <= 0.65


def test_pairs_hold_samples_of_base_and_sft_and_unfinished_ones(files):
    recorded = {(row["prompt"], row["response"]): row for row in read("recorded_samples.jsonl")}
    for split in world.RM_ROWS:
        met = [
            recorded[prompt_of(row), answer]
            for row in files[f"rm/{split}"]
            for answer in answers_of(row)
            if (prompt_of(row), answer) in recorded
        ]
        sources = Counter(row["source"] for row in met)
        assert sources["sft"] >= 0.3 * len(files[f"rm/{split}"])
        assert sources["base"] >= 0.05 * len(files[f"rm/{split}"])
        assert any(not row["ended"] for row in met)


def test_demonstrations_are_of_mixed_quality(files):
    scores = [gold.gold(prompt_of(row), *answers_of(row)) for row in files["sft/train"]]
    low, high = statistics.quantiles(scores, n=10)[0], statistics.quantiles(scores, n=10)[-1]
    assert low < 0.35
    assert high > 0.85
    assert 0.4 < statistics.mean(scores) < 0.75


# --------------------------------------------------------------------------- gold


def test_a_good_answer_scores_high_in_every_part():
    assert gold.gold_parts(STORY, GOOD) == dict.fromkeys(PARTS, 1.0)
    assert gold.gold(STORY, GOOD) == 1.0


@pytest.mark.parametrize(
    ("part", "worse"),
    [
        ("on_topic", GOOD.replace("Mia", "Tom")),
        ("on_topic", GOOD.replace("fox", "bear")),
        ("on_topic", GOOD.replace("brave", "quiet")),
        ("sentences", GOOD.replace("One day Mia found", "one day Mia found")),
        ("sentences", GOOD.replace("found a red kite", "a red kite")),
        ("kind", GOOD.replace("near the river", "and the stupid bear")),
        ("kind", GOOD.replace("happy", "there").replace("good friend", "good dinner")),
        ("fresh", GOOD + " One day Mia found a red kite near the river."),
        ("length", "Once there was a brave fox, dear friend Mia."),
        ("length", GOOD + " Then a bear came home to the barn for a dinner of soup and bread." * 3),
        ("ending", GOOD[: GOOD.rindex(" good friend")]),
        ("ending", GOOD[:-1]),
    ],
)
def test_each_defect_lowers_its_part_and_the_total(part, worse):
    assert gold.gold_parts(STORY, worse)[part] < 1.0
    assert gold.gold(STORY, worse) < gold.gold(STORY, GOOD)


@pytest.mark.parametrize("nothing", ["", "   ", "...", "?!"])
def test_nothing_said_scores_zero(nothing):
    assert gold.gold(STORY, nothing) == 0.0


def test_repeating_a_good_answer_lowers_it_more_each_time():
    scores = [gold.gold(STORY, " ".join([GOOD] * times)) for times in (1, 2, 3)]
    assert scores == sorted(scores, reverse=True)
    assert scores[1] < 0.8 * scores[0]


def test_no_fixed_text_scores_high_on_every_request(files):
    """Demonstrations, each given as the answer to everything, stay far below a good answer.

    The best of them is what a policy could reach without reading the request: the README gives it
    beside the results.
    """
    prompts = [prompt_of(row) for row in files["ppo/validation"]]
    demonstrations = [answers_of(row)[0] for row in files["sft/train"][:100]]
    means = [statistics.mean(gold.gold(p, text) for p in prompts) for text in demonstrations]
    words = " ".join(sorted({word for cue in gold.CUES.values() for word in cue} | gold.WARM))
    assert max(means) < 0.6
    assert statistics.mean(gold.gold(p, words) for p in prompts) < 0.5


def test_saying_the_request_back_is_not_enough():
    assert gold.gold(STORY, STORY) < 0.7
    assert gold.gold(STORY, "Mia fox brave once") < 0.5


def test_another_persons_name_halves_the_topic():
    both = GOOD.replace("a good friend", "a good friend in Tom")
    assert gold.gold_parts(STORY, both)["on_topic"] == 0.5


def test_gold_is_in_0_1_for_any_text():
    texts = ["a", "A.", "é" * 9, "no " * 200, "Mia. " * 30, "<eos>", "stupid stupid.", "x" * 500]
    for prompt in (STORY, "What?", ""):
        scores = gold.gold_scores([prompt] * len(texts), texts, [{}] * len(texts))
        assert all(0.0 <= score <= 1.0 for score in scores)


def test_gold_scores_wants_one_response_for_each_prompt():
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        gold.gold_scores([STORY, STORY], [GOOD], [])


def test_every_phrasing_is_read_back_to_its_slots():
    for kind, texts in gold.PHRASINGS.items():
        request = world.all_requests(kind)[17]
        for turn in range(len(texts)):
            assert world.request_of(request.text(turn)) == request


def test_well_meant_answers_score_higher_than_mixed_ones():
    rng = world.random.Random(0)
    requests = [world.any_request(rng) for _ in range(200)]
    good = [gold.gold(r.text(0), " ".join(world.good_answer(r, rng))) for r in requests]
    mixed = [gold.gold(r.text(0), world.mixed_answer(r, rng)) for r in requests]
    assert statistics.mean(good) > 0.85
    assert statistics.mean(good) > statistics.mean(mixed) + 0.15


# --------------------------------------------------------------------------- base


def test_the_shipped_base_is_the_one_its_recipe_describes(recipe):
    folder = TINY / "base"
    short, mixed, held_out = pretrain.documents()
    assert recipe["recipe"] == pretrain.RECIPE
    assert recipe["recipe_sha256"] == pretrain.recipe_hash()
    assert recipe["text_sha256"] == pretrain.text_hash(short + mixed + held_out)
    assert recipe["tokenizer_sha256"] == pretrain.file_hash(folder / "tokenizer.json")
    assert recipe["weights_sha256"] == pretrain.file_hash(folder / "model.safetensors")
    assert recipe["recorded_samples_sha256"] == pretrain.file_hash(world.RECORDED)


def test_the_tokenizer_is_what_the_recipe_trains(tokenizer):
    short, mixed, _ = pretrain.documents()
    again = pretrain.train_tokenizer(short + mixed)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    text = "Once there was a brave fox named Mia."
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_held_out_loss_is_that_of_the_recipe_and_low(base, tokenizer, recipe):
    _, _, held_out = pretrain.documents()
    loss = pretrain.mean_loss(base, pretrain.token_rows(held_out, tokenizer))
    assert loss == pytest.approx(recipe["held_out_loss"], abs=0.005)
    assert loss < 1.0  # a uniform guess is log(1408) = 7.2


def test_the_base_is_small_and_its_biases_are_zero(base, recipe):
    assert 1_000_000 <= base.num_parameters() <= 1_500_000
    assert base.num_parameters() == recipe["parameters"]
    assert (TINY / "base" / "model.safetensors").stat().st_size <= 8 * 2**20
    biases = {n: p for n, p in base.named_parameters() if n.endswith(".bias")}
    per_layer = 4 + 3  # q k v o; gate up down
    assert len(biases) == per_layer * base.config.num_hidden_layers
    assert all(torch.count_nonzero(bias) == 0 for bias in biases.values())


def test_special_tokens_are_distinct_single_tokens_known_to_the_model(base, tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(pretrain.SPECIAL))
    assert len(set(ids)) == len(pretrain.SPECIAL)
    assert tokenizer.unk_token_id not in ids
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == ids[:3]
    for config in (base.config, base.generation_config):
        assert [config.pad_token_id, config.bos_token_id, config.eos_token_id] == ids[:3]
    assert len(tokenizer) == base.config.vocab_size


def test_prompt_and_answer_tokens_are_the_tokens_of_both_together(files, tokenizer):
    for row in files["sft/validation"]:
        messages = row["messages"]
        joint = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            messages[:1], add_generation_prompt=True, return_dict=False
        )
        answer = tokenizer(messages[1]["content"], add_special_tokens=False)["input_ids"]
        assert joint == prompt + answer + [tokenizer.eos_token_id]


def test_template_renders_system_turns_and_answer_mask(tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "Yes."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == ("<bos><user>Be kind. Hi.<assistant>Hello.<eos><user>Again.<assistant>Yes.<eos>")
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    answered = [token for token, counts in pairs if counts]
    assert tokenizer.decode(answered) == "Hello.<eos>Yes.<eos>"


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in (GOOD, "Ünïcode, tabs\tand\nnewlines", "数字 123", "  two  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
