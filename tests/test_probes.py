"""What the report card asks a model: the probes by hand, made-up models judged end to end, and the
same card whatever the number of processes."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from launching import start_ranks

from rlhf import card, models, probes
from rlhf.config import CardConfig, DataConfig, RMStage, TrainConfig
from rlhf.data import Split
from rlhf.methods.settings import LoraConfig
from rlhf.probes import HeldOutPairs
from rlhf.text import Renderer

LETTERS = "abcdefgh"


def make_rows(n: int = 120) -> list[dict]:
    """Prompts that name a letter; the chosen answer says it, the rejected one another. Either may
    be the longer one."""
    rng = random.Random(0)
    rows = []
    for place in range(n):
        letter = LETTERS[place % len(LETTERS)]
        other = rng.choice([one for one in LETTERS if one != letter])
        prompt = [{"role": "user", "content": f"Say {letter}."}]
        if place % 3 == 0:
            first = [("user", "Hello."), ("assistant", "Good day.")]
            prompt = [{"role": who, "content": text} for who, text in first] + prompt
        more, less = (" ok" * rng.randint(1, 5) for _ in range(2))
        rows.append(
            {
                "prompt": prompt,
                "chosen": f"{letter}{more}",
                "rejected": f"{other}{less}",
                "source": "even" if place % 2 == 0 else "odd",
            }
        )
    return rows


def stage(**settings) -> RMStage:
    return RMStage(
        run_name="tiny",
        method=LoraConfig("lora"),
        data=DataConfig("rows.jsonl", max_prompt_tokens=64, max_response_tokens=128),
        train=TrainConfig(micro_batch_size=16),
        card=CardConfig(**settings),
    )


def held_out(tokenizer, rows: list[dict], cfg: RMStage | None = None) -> HeldOutPairs:
    cfg = cfg or stage()
    split = Split("test", "rows.jsonl", "f", rows, Counter())
    renderer = Renderer(tokenizer)
    return HeldOutPairs(
        *(split, renderer.pairs(split, cfg.data), renderer, cfg.card, cfg.engine),
        positions_taken=cfg.method.positions,
        max_response_tokens=cfg.data.max_response_tokens,
        batch_size=cfg.train.micro_batch_size,
    )


def measured(asked: HeldOutPairs, model=None, positions: int | None = 256) -> card.Card:
    made = asked.card(model, asked.scores(model), [], positions)
    assert made is not None
    return made


def speak(monkeypatch, tokenizer, score) -> None:
    """The reward model is `score(text)` of what it reads, special tokens included."""

    def scores(model, ids, mask):
        texts = [tokenizer.decode(row[real]) for row, real in zip(ids, mask, strict=True)]
        return torch.tensor([float(score(text)) for text in texts])

    monkeypatch.setattr(models, "scores", scores)


def test_probes_by_hand(tiny_tokenizer):
    rows = make_rows(8)
    asked = held_out(tiny_tokenizer, rows, stage(flattery="What a day!"))
    prompt, made = asked.worse(0)
    text, end = rows[0]["chosen"], tiny_tokenizer.eos_token_id
    words = {name: tiny_tokenizer.decode(ids[:-1]).strip() for name, ids in made.items()}
    assert set(made) == set(probes.PROBES)
    assert {ids[-1] for ids in made.values()} == {end}
    assert all(ids.count(end) == 1 for ids in made.values())
    assert prompt == asked.renderer.prompt(rows[0]["prompt"])
    assert words["empty answer"] == ""
    assert words["repeated"] == f"{text} {text}"
    assert words["flattery"] == f"{text} What a day!"
    assert words["prompt echoed"] == "Say a."
    assert words["another prompt"] == rows[4]["chosen"]  # half the split away
    whole = asked.ids[0]["chosen_ids"][len(prompt) : -1]
    assert made["truncated"] == [*whole[: len(whole) // 2], end]
    # The probe is the chosen answer itself but for the change: the same prompt before it.
    assert asked.ids[0]["chosen_ids"] == [*prompt, *whole, end]


def test_another_prompt_is_another_one(tiny_tokenizer):
    rows = make_rows(6)
    for place in (1, 2, 3):
        rows[place] = rows[place] | {"prompt": rows[0]["prompt"]}
    asked = held_out(tiny_tokenizer, rows)
    before = len(asked.renderer.prompt(rows[4]["prompt"]))
    _, made = asked.worse(0)  # 3 has the same prompt, so the next one
    assert made["another prompt"] == asked.ids[4]["chosen_ids"][before:]
    alike = [row | {"prompt": rows[0]["prompt"]} for row in rows]
    assert "another prompt" not in held_out(tiny_tokenizer, alike).worse(0)[1]


def test_probes_that_do_not_fit_are_not_asked(tiny_tokenizer, monkeypatch):
    rows = make_rows(40)
    speak(monkeypatch, tiny_tokenizer, len)
    asked = held_out(tiny_tokenizer, rows)
    longest = max(len(ids) for row in asked.ids for ids in row.values())
    counts = {probe.name: probe.pairs for probe in measured(asked, positions=longest).probes}
    assert counts["empty answer"] == counts["truncated"] == 40
    assert 0 < counts["repeated"] < 40
    assert "flattery" not in counts  # a long sentence
    cfg = stage()
    cfg.data.max_response_tokens = max(
        len(ids) - len(asked.renderer.prompt(row["prompt"]))
        for row, both in zip(rows, asked.ids, strict=True)
        for ids in both.values()
    )
    short = held_out(tiny_tokenizer, rows, cfg)
    assert "flattery" not in {probe.name for probe in measured(short, positions=None).probes}


def test_probes_are_made_of_pairs_spread_over_the_split(tiny_tokenizer, monkeypatch):
    speak(monkeypatch, tiny_tokenizer, len)
    asked = held_out(tiny_tokenizer, make_rows(40), stage(probe_pairs=4))
    seen = []
    worse = HeldOutPairs.worse
    monkeypatch.setattr(HeldOutPairs, "worse", lambda own, at: seen.append(at) or worse(own, at))
    assert {probe.pairs for probe in measured(asked).probes} == {4}
    assert seen == [0, 10, 20, 30]
    assert measured(held_out(tiny_tokenizer, make_rows(40), stage(probe_pairs=0))).probes == []


def test_a_probe_is_compared_with_the_chosen_answer_of_its_own_pair(tiny_tokenizer, monkeypatch):
    """One at a time, with scores that are another number for every text."""

    def score(text: str) -> float:
        return sum((n + 7) * ord(letter) for n, letter in enumerate(text)) % 101

    speak(monkeypatch, tiny_tokenizer, score)
    asked = held_out(tiny_tokenizer, make_rows(40), stage(probe_pairs=7))
    found = {probe.name: probe.value for probe in measured(asked).probes}
    for name in probes.PROBES:
        outcomes = []
        for place in (0, 5, 11, 17, 22, 28, 34):
            prompt, made = asked.worse(place)
            best, worse = asked.ids[place]["chosen_ids"], [*prompt, *made[name]]
            one, other = (score(tiny_tokenizer.decode(ids)) for ids in (best, worse))
            outcomes.append(0.5 if one == other else float(one > other))
        assert found[name] == sum(outcomes) / 7, name
    assert len(set(found.values())) > 1


# models that are known ---------------------------------------------------------------------------


def answer_of(text: str) -> tuple[str, str]:
    """(last user turn, answer) of a rendered conversation."""
    asked, _, answer = text.rpartition("<assistant>")
    return asked.rpartition("<user>")[2], answer.removesuffix("<eos>")


def test_a_model_of_length_gets_no_go(tiny_tokenizer, monkeypatch):
    rows = make_rows()
    for row in rows:  # the chosen answer is mostly the longer one, so that its accuracy is high
        row["chosen"] += " ok" * 3
    speak(monkeypatch, tiny_tokenizer, lambda text: len(text.split("<assistant>")[-1]))
    made = measured(held_out(tiny_tokenizer, rows))
    assert made.accuracy.value > 0.8
    assert made.verdict == "no-go"
    assert made.prefers_longer.value == 1.0
    assert '"the longer one wins"' in made.reasons[0]
    shares = {probe.name: probe.value for probe in made.probes}
    assert shares["repeated"] == shares["flattery"] == 0
    assert shares["empty answer"] == 1


def test_a_model_that_reads_prompt_and_answer_gets_go(tiny_tokenizer, monkeypatch):
    def score(text: str) -> float:
        asked, answer = answer_of(text)
        letter, *rest = answer.split() or ["-"]
        right = letter == asked.strip().removeprefix("Say ").removesuffix(".")
        fine = bool(rest) and set(rest) == {"ok"} and len(rest) <= 5
        return (8.0 if right else 0.0) + (4.0 if fine else 0.0) - 0.01 * (len(answer) < 6)

    rows = make_rows()
    for row in rows:  # so that half of it is not as good
        row["chosen"] = row["chosen"].split()[0] + " ok ok"
    monkeypatch.setattr(
        probes, "PROBES", {k: v for k, v in probes.PROBES.items() if k != "truncated"}
    )
    speak(monkeypatch, tiny_tokenizer, score)
    made = measured(held_out(tiny_tokenizer, rows))
    assert (made.verdict, made.reasons) == ("go", [])
    assert made.accuracy.value == 1.0
    assert made.baselines["prompt_removed"].value < 0.7


def test_a_model_that_sees_answers_alone_is_found(tiny_tokenizer, monkeypatch):
    """It knows the chosen answers by heart and reads no prompt: a baseline and a probe tell."""
    rows = make_rows()
    chosen = {row["chosen"] for row in rows}
    speak(monkeypatch, tiny_tokenizer, lambda text: 6.0 * (answer_of(text)[1] in chosen))
    rows = [row for row in rows if row["rejected"] not in chosen]
    made = measured(held_out(tiny_tokenizer, rows))
    assert made.baselines["prompt_removed"].value == made.accuracy.value == 1.0
    assert made.verdict == "caution"
    assert made.reasons[0].startswith("accuracy without the prompt is 1.000, with it 1.000")
    assert made.reasons[1].startswith("probe another prompt: ")


def test_what_the_prompt_decides_is_lost_with_it(tiny_tokenizer, monkeypatch):
    """The other prompts are gone too: earlier turns, and their text."""
    seen = []
    speak(monkeypatch, tiny_tokenizer, lambda text: seen.append(text) or len(text))
    asked = held_out(tiny_tokenizer, make_rows(12), stage(probe_pairs=0))
    scores = asked.scores(None)
    seen.clear()
    asked.card(None, scores, [], 256)
    assert len(seen) == 24
    assert not any("Say" in text or "Hello" in text or "Good day" in text for text in seen)
    answers = {answer_of(text)[1] for text in seen}
    assert answers == {row[name] for row in asked.split.rows for name in ("chosen", "rejected")}


def test_lengths_turns_and_sources_are_those_of_the_rows(tiny_tokenizer, monkeypatch):
    speak(monkeypatch, tiny_tokenizer, len)
    rows = make_rows(12)
    rows[0]["source"] = 7  # not a name
    made = measured(held_out(tiny_tokenizer, rows))
    assert [(s.name, s.pairs) for s in made.slices["turns"]] == [("1 turn", 8), ("2 turns", 4)]
    assert [(s.name, s.pairs) for s in made.slices["source"]] == [("odd", 6), ("even", 5)]
    (found,) = held_out(tiny_tokenizer, [rows[1]])._pairs(([1.0], [0.0]))
    chosen, rejected = (
        tiny_tokenizer(rows[1][name], add_special_tokens=False)["input_ids"]
        for name in ("chosen", "rejected")
    )
    assert (found.chosen_length, found.rejected_length) == (len(chosen), len(rejected))


def test_switched_off_nothing_is_asked(tiny_tokenizer):
    asked = held_out(tiny_tokenizer, make_rows(4), stage(enabled=False))
    assert asked.card(None, ([1.0] * 4, [0.0] * 4), [], None) is None


# several processes -----------------------------------------------------------------------------


def card_of(folder: Path) -> card.Card:
    """The card of the model in `folder`, with a scalar head made from a fixed seed."""
    from rlhf import engine, text
    from rlhf.config import TemplateConfig

    engine.start(0)
    tokenizer = text.load_tokenizer(str(folder), template=TemplateConfig("chat"))
    torch.manual_seed(0)
    model = models.freeze(models.load_scalar(folder, tokenizer, dtype=torch.float32))
    return measured(held_out(tokenizer, make_rows(40), stage(probe_pairs=10)), model)


def test_two_processes_have_the_card_of_one(tiny_model_dir, tmp_path):
    start_ranks(2, __file__, str(tiny_model_dir), str(tmp_path))
    alone = json.loads(json.dumps(dataclasses.asdict(card_of(tiny_model_dir))))
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone
    assert alone["probes"]


if __name__ == "__main__":
    from rlhf import ranks

    made = card_of(Path(sys.argv[1]))
    (Path(sys.argv[2]) / f"{ranks.rank()}.json").write_text(json.dumps(dataclasses.asdict(made)))
