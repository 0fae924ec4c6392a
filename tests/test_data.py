"""Rows from disk: every shape that is accepted, every row that is refused, and their order."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf import data
from rlhf.config import ColumnsConfig, DataConfig
from rlhf.data import PromptStream, Split
from rlhf.errors import ConfigError, DataError

SFT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
PAIR = {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}
PROMPT = {"prompt": "Hi"}
GOOD: dict[str, dict[str, Any]] = {"sft": SFT, "rm": PAIR, "ppo": PROMPT}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[Any]) -> Path:
    """Rows as lines; a string is a line as it stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {n}"} for n in range(count)]


def texts(split: Split) -> list[str]:
    return [row["prompt"][-1]["content"] for row in split.rows]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`read(stage, row)`: what becomes of one row of the training file."""

    def one(stage: str, row: Any, **settings: Any) -> dict[str, Any]:
        write(tmp_path / "train.jsonl", [row])
        write(tmp_path / "validation.jsonl", [GOOD[stage]])
        return data.load(stage, DataConfig(str(tmp_path), **settings))["train"].rows[0]

    return one


# ---------------------------------------------------------------- shapes that are accepted


def test_an_sft_row_is_the_conversation_and_its_last_answer(read):
    turns = [user("Hi"), assistant("Hello."), user("More"), assistant("Bye.")]
    row = read("sft", {"messages": turns})
    assert row["prompt"] == turns[:3]
    assert row["response"] == "Bye."


def test_a_system_turn_stays_in_the_prompt(read):
    system = {"role": "system", "content": "Be kind."}
    row = read("sft", {"messages": [system, user("Hi"), assistant("Hello.")]})
    assert row["prompt"] == [system, user("Hi")]


def test_plain_strings_stand_for_one_message(read):
    row = read("rm", PAIR)
    assert row == {"prompt": [user("Hi")], "chosen": "Hello.", "rejected": "No."}
    assert read("ppo", PROMPT) == {"prompt": [user("Hi")]}


def test_pairs_of_messages_with_a_prompt(read):
    row = read(
        "rm",
        {
            "prompt": [user("Hi")],
            "chosen": [assistant("Hello.")],
            "rejected": [assistant("No.")],
        },
    )
    assert row == {"prompt": [user("Hi")], "chosen": "Hello.", "rejected": "No."}


def test_the_prompt_of_a_pair_is_what_both_conversations_share(read):
    shared = [user("Hi"), assistant("Hello."), user("More")]
    row = read(
        "rm",
        {"chosen": [*shared, assistant("Yes.")], "rejected": [*shared, assistant("No.")]},
    )
    assert row == {"prompt": shared, "chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_other_columns_are_kept_for_the_gold_score(read, stage):
    assert read(stage, GOOD[stage] | {"topic": "fox"})["topic"] == "fox"


def test_columns_can_have_other_names(tmp_path):
    columns = ColumnsConfig(prompt="question", chosen="better", rejected="worse")
    row = {"question": "Hi", "better": "Hello.", "worse": "No.", "chosen": "not this one"}
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", [row])
    found = data.load("rm", DataConfig(str(tmp_path), columns=columns))["train"].rows[0]
    assert found["prompt"] == [user("Hi")]
    assert (found["chosen"], found["rejected"]) == ("Hello.", "No.")


def test_a_missing_column_is_named_as_the_file_spells_it(read):
    columns = ColumnsConfig(messages="dialogue")
    with pytest.raises(DataError, match=r"train\.jsonl:1: dialogue is missing"):
        read("sft", SFT, columns=columns)


def test_keys_of_a_message_that_no_template_knows_are_left_out(read):
    row = read("ppo", {"prompt": [user("Hi") | {"weight": 3}]})
    assert row["prompt"] == [user("Hi")]


# ---------------------------------------------------------------- files


def test_a_folder_a_common_start_and_compressed_files_give_the_same_rows(tmp_path):
    for split in ("train", "validation", "test"):
        answers = {"chosen": "Yes.", "rejected": "No."}
        rows = [{"prompt": f"{split} {n}"} | answers for n in range(3)]
        write(tmp_path / "folder" / f"{split}.jsonl", rows)
        write(tmp_path / f"start.{split}.jsonl", rows)
        (tmp_path / "packed").mkdir(exist_ok=True)
        packed = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / "packed" / f"{split}.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    loaded = [
        data.load("rm", DataConfig(str(tmp_path / name))) for name in ("folder", "start", "packed")
    ]
    assert list(data.load("ppo", DataConfig(str(tmp_path / "folder")))) == ["train", "validation"]
    for splits in loaded:
        assert list(splits) == ["train", "validation", "test"]
        for name, split in splits.items():
            assert split.name == name
            assert texts(split) == [f"{name} {n}" for n in range(3)]
            assert not split.dropped
    assert loaded[0]["train"].source == str(tmp_path / "folder" / "train.jsonl")
    assert loaded[0]["train"].fingerprint == loaded[1]["train"].fingerprint
    assert loaded[0]["train"].fingerprint != loaded[2]["train"].fingerprint
    assert loaded[0]["train"].fingerprint != loaded[0]["test"].fingerprint


def test_empty_lines_do_not_count(tmp_path):
    write(tmp_path / "train.jsonl", ["", PROMPT, "   ", PROMPT, ""])
    write(tmp_path / "validation.jsonl", [PROMPT])
    assert len(data.load("ppo", DataConfig(str(tmp_path)))["train"].rows) == 2


def test_validation_is_set_aside_from_a_single_file(tmp_path):
    file = write(tmp_path / "rows.jsonl", numbered(1000))
    splits = data.load("ppo", DataConfig(str(file)))
    train, validation = texts(splits["train"]), texts(splits["validation"])
    assert sorted(train + validation) == sorted(row["prompt"] for row in numbered(1000))
    assert 60 < len(validation) < 140  # a tenth, give or take


def test_the_same_prompts_are_set_aside_whatever_their_order_and_spelling(tmp_path):
    rows = numbered(200)
    first = data.load("ppo", DataConfig(str(write(tmp_path / "a.jsonl", rows))))
    changed = [{"prompt": row["prompt"].upper().replace(" ", "  ")} for row in reversed(rows)]
    second = data.load("ppo", DataConfig(str(write(tmp_path / "b.jsonl", changed))))
    again = {text.capitalize().replace("  ", " ") for text in texts(second["validation"])}
    assert again == set(texts(first["validation"]))


def test_one_prompt_is_never_on_both_sides(tmp_path):
    rows = [PAIR | {"prompt": f"Question {n % 40}", "chosen": f"Answer {n}"} for n in range(200)]
    splits = data.load("rm", DataConfig(str(write(tmp_path / "rows.jsonl", rows))))
    assert splits["validation"].rows
    assert not set(texts(splits["train"])) & set(texts(splits["validation"]))


def test_too_few_rows_to_set_any_aside_are_refused(tmp_path):
    file = write(tmp_path / "rows.jsonl", [PROMPT])
    with pytest.raises(DataError, match=r"no usable row for (train|validation)"):
        data.load("ppo", DataConfig(str(file)))


def test_max_rows_cuts_the_training_rows_alone_and_says_so(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", numbered(9))
    splits = data.load("ppo", DataConfig(str(tmp_path), max_rows=4))
    assert texts(splits["train"]) == [f"Question {n}" for n in range(4)]
    assert splits["train"].dropped == {"beyond data.max_rows": 5}
    assert len(splits["validation"].rows) == 9
    assert not data.load("ppo", DataConfig(str(tmp_path), max_rows=9))["train"].dropped


@pytest.mark.parametrize("name", ["nowhere", "nowhere.jsonl", "."])
def test_a_path_without_data_says_what_was_expected(tmp_path, name):
    write(tmp_path / "validation.jsonl", [PROMPT])  # of no use without train.jsonl
    with pytest.raises(DataError, match=r"no data there\. Expected a \.jsonl .*train\.jsonl"):
        data.load("ppo", DataConfig(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.jsonl", '{"prompt": "Grüße"}'.encode("latin-1")),
        ("not-packed.jsonl.gz", b'{"prompt": "Hi"}'),
        ("cut-short.jsonl.gz", gzip.compress(b'{"prompt": "Hi"}' * 99, mtime=0)[:-12]),
        ("damaged.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 30),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: cannot be read: "):
        data.load("ppo", DataConfig(str(file)))


# ---------------------------------------------------------------- rows that are refused

BAD_ROWS = [
    ("ppo", "{'prompt': 1}", "not JSON: Expecting property name .* at column 2"),
    ("ppo", '{"prompt": "Hi"', "not JSON"),
    ("ppo", '["Hi"]', "the line is not a JSON object"),
    ("ppo", {"question": "Hi"}, "prompt is missing"),
    ("ppo", {"prompt": None}, "prompt is missing"),
    ("ppo", {"prompt": 3}, "prompt is missing or is neither text nor a list"),
    ("ppo", {"prompt": []}, "prompt is missing or is neither text nor a list"),
    ("ppo", {"prompt": " \n"}, "prompt is empty"),
    ("ppo", {"prompt": "half \ud800 a pair"}, "prompt has half a surrogate pair"),
    ("ppo", {"prompt": ["Hi"]}, "prompt has a message whose role is not one of system, user"),
    ("ppo", {"prompt": [{"role": "human", "content": "Hi"}]}, "prompt has a message whose role"),
    ("ppo", {"prompt": [{"role": "user", "content": 3}]}, "prompt has a message without text"),
    ("ppo", {"prompt": [{"role": "user"}]}, "prompt has a message without text"),
    ("ppo", {"prompt": [user("Hi"), assistant("Hm")]}, "prompt ends with the assistant; .* user's"),
    ("sft", {"prompt": "Hi"}, "messages is missing"),
    ("sft", {"messages": [assistant("Hi")]}, "messages has an answer but no question"),
    ("sft", {"messages": "Hi"}, "messages has an answer but no question"),
    ("sft", {"messages": [user("Hi"), assistant("")]}, "messages ends with an empty assistant"),
    ("sft", {"messages": [assistant("Hi"), user("Hm")]}, "messages ends with the user; .*assist"),
    ("rm", {"prompt": "Hi", "chosen": "A"}, "rejected is missing"),
    ("rm", {"prompt": "Hi", "rejected": "A"}, "chosen is missing"),
    ("rm", {"chosen": "A", "rejected": "B"}, "prompt is missing, and the two answers share no"),
    ("rm", {"prompt": "Hi", "chosen": " ", "rejected": "B"}, "chosen is empty"),
    ("rm", {"prompt": "", "chosen": "A", "rejected": "B"}, "prompt is empty"),
    ("rm", {"prompt": "Hi", "chosen": "A", "rejected": "A"}, "rejected is the same text"),
    (
        "rm",
        {"chosen": [user("Hi"), assistant("A")], "rejected": [user("Hi"), assistant("A")]},
        "rejected is the same text",
    ),
    (
        "rm",
        {"prompt": "Hi", "chosen": [user("Hi"), assistant("A")], "rejected": "B"},
        "chosen has more than the one answer",
    ),
]


@pytest.mark.parametrize(("stage", "row", "reason"), BAD_ROWS)
def test_a_bad_row_is_named_with_file_line_field_and_reason(tmp_path, stage, row, reason):
    file = write(tmp_path / "train.jsonl", [GOOD[stage], "", row])
    write(tmp_path / "validation.jsonl", [GOOD[stage]])
    with pytest.raises(DataError, match=rf"{re.escape(str(file))}:3: {reason}") as caught:
        data.load(stage, DataConfig(str(tmp_path)))
    assert "1 of 2 rows cannot be used" in str(caught.value)
    assert "data.max_bad_fraction=0.5" in str(caught.value)


def test_the_share_that_the_message_offers_is_enough_and_less_is_not(tmp_path):
    write(tmp_path / "train.jsonl", [PROMPT, "broken", PROMPT, PROMPT, {"prompt": ""}, PROMPT])
    write(tmp_path / "validation.jsonl", [PROMPT])
    with pytest.raises(DataError, match="2 of 6 rows") as caught:
        data.load("ppo", DataConfig(str(tmp_path), max_bad_fraction=0.3))
    with pytest.raises(DataError):
        data.load("ppo", DataConfig(str(tmp_path), max_bad_fraction=1 / 6))
    offered = float(re.findall(r"max_bad_fraction=([\d.]+)", str(caught.value))[0])
    splits = data.load("ppo", DataConfig(str(tmp_path), max_bad_fraction=offered))
    assert len(splits["train"].rows) == 4
    assert splits["train"].dropped == {"bad row": 2}


def test_five_bad_rows_are_shown_and_the_rest_counted(tmp_path):
    file = write(tmp_path / "rows.jsonl", ["broken"] * 8)
    with pytest.raises(DataError, match=r"and 3 more") as caught:
        data.load("ppo", DataConfig(str(file)))
    assert str(caught.value).count("not JSON") == 5


def test_bad_rows_of_the_validation_file_are_refused_too(tmp_path):
    write(tmp_path / "train.jsonl", [PROMPT])
    write(tmp_path / "validation.jsonl", [{"prompt": ""}])
    with pytest.raises(DataError, match=r"validation\.jsonl:1: prompt is empty"):
        data.load("ppo", DataConfig(str(tmp_path)))


# ---------------------------------------------------------------- a function of the user's


def test_the_function_that_a_setting_names_is_loaded(tmp_path):
    file = tmp_path / "measure.py"
    file.write_text("def count(prompts, answers, rows):\n    return [float(len(answers))]\n")
    assert data.gold_function(DataConfig("x")) is None
    gold = data.gold_function(DataConfig("x", gold=f"{file}:count"))
    assert gold is not None
    assert gold([], ["a", "b"], []) == [2.0]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{folder}/absent.py:count", r"no file .*absent\.py\. Write path\.py:function"),
        ("{folder}/measure.py", "no file .*Write path.py:function"),
        ("count", "no file count"),
        ("", "no file"),
        ("{folder}:count", "no file"),
        ("{folder}/measure.txt:count", "no file .*Write path.py:function"),
        ("{folder}/measure.py:cuont", "has no function cuont"),
        ("{folder}/measure.py:", "has no function"),
        ("{folder}/measure.py:NUMBER", "has no function NUMBER"),
        ("{folder}/broken.py:count", "broken.py fails: SyntaxError"),
        ("{folder}/failing.py:count", "failing.py fails: ModuleNotFoundError.*nowhere"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused(tmp_path, value, reason):
    (tmp_path / "measure.py").write_text("NUMBER = 1\n")
    (tmp_path / "measure.txt").write_text("def count(): ...\n")
    (tmp_path / "broken.py").write_text("def count(:\n")
    (tmp_path / "failing.py").write_text("import nowhere\n")
    with pytest.raises(ConfigError, match=rf"^data\.gold=.*{reason}"):
        data.load_function("data.gold", value.format(folder=tmp_path))


# ---------------------------------------------------------------- order


def prompts(count: int) -> list[list[int]]:
    return [[n] for n in range(count)]


def test_every_pass_over_the_prompts_is_a_permutation_and_none_is_like_another():
    stream = PromptStream(prompts(12), seed=0)
    passes = [
        [p for step in range(3 * n + 1, 3 * n + 4) for p in stream.batch(step, 4)] for n in range(3)
    ]
    assert all(sorted(order) == prompts(12) for order in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert passes[0] != prompts(12)


def test_a_batch_that_crosses_the_end_of_a_pass_loses_no_prompt():
    stream = PromptStream(prompts(10), seed=3)
    drawn = [p for step in range(1, 6) for p in stream.batch(step, 4)]  # 20: two passes
    assert sorted(drawn[:10]) == prompts(10)
    assert sorted(drawn[10:]) == prompts(10)


def test_a_batch_larger_than_the_prompts_takes_several_passes():
    drawn = PromptStream(prompts(3), seed=0).batch(1, 9)
    assert sorted(drawn) == sorted(prompts(3) * 3)


def test_a_step_has_its_prompts_whatever_was_asked_before():
    straight, resumed = PromptStream(prompts(10), seed=1), PromptStream(prompts(10), seed=1)
    forward = [straight.batch(step, 4) for step in range(1, 9)]
    assert [resumed.batch(step, 4) for step in range(8, 0, -1)] == forward[::-1]


def test_another_seed_is_another_order():
    first, second = (PromptStream(prompts(30), seed=seed).batch(1, 30) for seed in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_places_are_those_of_the_batch():
    stream = PromptStream(prompts(5), seed=2)
    for step in range(1, 4):  # across two passes
        places = stream.places(step, 3)
        assert stream.batch(step, 3) == [stream.prompts[place] for place in places]


def test_a_file_for_sft_has_prompts_too(tmp_path):
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "#### 4"}]
    row = {"messages": turns, "answer": "4"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "validation.jsonl").write_text(json.dumps(row | {"prompt": "Hi"}) + "\n")
    read = data.load("ppo", DataConfig(str(tmp_path)))
    assert read["train"].rows == [row | {"prompt": turns[:1]}]
    said = [{"role": "user", "content": "Hi"}]  # a prompt of its own comes first
    assert read["validation"].rows == [row | {"prompt": said}]
