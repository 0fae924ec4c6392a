"""`rlhf eval` on a small line of work: against what the stages measured themselves."""

from __future__ import annotations

import errno
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_line import SMALL, run_line, run_stage
from stub_endpoint import longer, says, serving

from rlhf import cli, contract, endpoint, eval_plan, models, outcomes
from rlhf import evaluate as evaluate_module
from rlhf.errors import ConfigError
from rlhf.registry import Registry

KEY = "sk-very-secret-0123456789"
ROWS = [
    {"prompt": "Please show Lily how to make tea.", "source": "help"},
    {"prompt": "Cheer up Max, who failed a test.", "source": "kind"},
    {"prompt": "Help me thank Leo for a small ball.", "source": "kind"},
    {"prompt": "Describe a round clock in the park."},
]


class Result:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture(scope="module")
def line(tmp_path_factory, module_patch) -> Path:
    """A finished line of work, which no test changes but for eval/."""
    runs = tmp_path_factory.mktemp("runs")
    assert run_line(module_patch, runs) == {"sft": 0, "rm": 0, "ppo": 0}
    return runs


@pytest.fixture
def evaluate(line, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def run(*arguments: str, runs: Path = line) -> Result:
        monkeypatch.setattr(sys, "argv", ["rlhf", "eval", *arguments, "--runs-dir", str(runs)])
        capsys.readouterr()  # of what ran before
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def found(evaluate):
    """The one result of a command that must work."""

    def run(*arguments: str, **keywords) -> dict:
        done = evaluate(*arguments, "--json", **keywords)
        assert done.code == 0, done.err
        (result,) = json.loads(done.out)
        return result

    return run


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def no_weights(monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(models, "load_parent", loaded)


PPO = ("ppo/tiny", "--against", "sft/tiny")


def test_by_gold_it_finds_what_ppo_found(found, line):
    """PPO measured the same prompts with the same noise when it ended."""
    metrics = Registry(line).resolve("ppo/tiny").manifest.metrics
    result = found(*PPO, "--prompts", "6")
    assert result["wins"]["value"] == pytest.approx(metrics["eval/win_rate"])
    assert result["score"]["ours"]["value"] == pytest.approx(metrics["eval/gold"])
    assert result["score"]["theirs"]["value"] == pytest.approx(metrics["eval/gold_sft"])
    assert result["kl"]["ours"]["value"] == pytest.approx(metrics["eval/kl"], abs=1e-4)
    assert result["kl"]["theirs"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_by_its_reward_model_it_finds_the_scores_that_ppo_found(evaluate, line):
    metrics = Registry(line).resolve("ppo/tiny").manifest.metrics
    done = evaluate(*PPO, "--prompts", "6", "--judge", "rm/tiny", "--json")
    (result,) = json.loads(done.out)
    assert result["score"]["ours"]["value"] == pytest.approx(metrics["eval/score"], abs=1e-3)
    assert result["score"]["theirs"]["value"] == pytest.approx(metrics["eval/score_sft"], abs=1e-3)
    assert "rm/tiny is what ppo/tiny was trained to please" in done.err


def test_whoever_was_trained_to_please_a_judge_is_named_on_either_side(evaluate):
    done = evaluate("sft/tiny", "--against", "ppo/tiny", "--prompts", "3", "--judge", "rm/tiny")
    assert "rm/tiny is what ppo/tiny was trained to please" in done.err


def test_a_reward_model_that_only_watched_was_not_pleased():
    def run(role: str) -> SimpleNamespace:
        parents = [SimpleNamespace(role=role, digest="abc")]
        return SimpleNamespace(reference="ppo/a", manifest=SimpleNamespace(parents=parents))

    rm = SimpleNamespace(reference="rm/second", digest="abc")
    assert eval_plan._optimised(rm, [run(contract.WATCHER)]) == []
    assert len(eval_plan._optimised(rm, [run("reward_model")])) == 1
    assert len(eval_plan._optimised(rm, [run("reward_model_2")])) == 1


def test_what_is_stored_is_what_is_printed(found, line):
    result = found(*PPO, "--prompts", "5", "--seed", "3")
    stored = line / "ppo" / "tiny" / "eval" / "sft~tiny-gold.json"
    assert json.loads(stored.read_text()) == result
    assert list(result)[:14] == [
        *("schema", "reference", "against", "judge", "prompts", "seed", "wins", "ties"),
        *("length_controlled", "by_category", "score", "kl", "length", "rows"),
    ]
    assert (result["schema"], result["reference"], result["against"]) == (1, "ppo/tiny", "sft/tiny")
    assert result["judge"].keys() >= {"name", "calls", "failures", "cost"}
    assert (result["prompts"], result["seed"]) == (5, 3)
    keys = {"prompt", "category", "ours", "theirs", "ours_score", "theirs_score", "winner"}
    assert [row.keys() for row in result["rows"]] == [keys] * 5
    won = [row["ours_score"] > row["theirs_score"] for row in result["rows"]]
    assert [row["winner"] == "ours" for row in result["rows"]] == won
    for name in ("wins", "length_controlled"):
        assert result[name]["low"] <= result[name]["value"] <= result[name]["high"]
    assert Registry(line).verify("ppo/tiny") == []


def test_the_same_command_gives_the_same_numbers(found):
    first, second = (found(*PPO, "--prompts", "4") for _ in range(2))
    assert {k: v for k, v in first.items() if k != "finished"} == {
        k: v for k, v in second.items() if k != "finished"
    }


@pytest.mark.parametrize("judge", ["gold", "rm/tiny"])
@pytest.mark.parametrize("other", ["ppo/tiny", "ppo/tiny@last"])
def test_a_run_against_itself_is_all_ties(found, judge, other):
    """@last holds the adapter alone, so it is loaded, merged and sampled again."""
    result = found("ppo/tiny", "--against", other, "--judge", judge, "--prompts", "8")
    half = {"value": 0.5, "low": 0.5, "high": 0.5}
    assert (result["wins"], result["length_controlled"], result["ties"]) == (half, half, 1.0)


def test_the_batch_changes_nothing(found):
    whole, single = (found(*PPO, "--prompts", "5", "--batch-size", size) for size in "81")
    assert [row["ours"] for row in whole["rows"]] == [row["ours"] for row in single["rows"]]
    assert whole["wins"] == single["wins"]


def test_several_runs_in_one_table(evaluate, line):
    names = ("ppo/tiny", "ppo/tiny@step-2", "sft/tiny")
    done = evaluate(*names, "--against", "sft/tiny", "--prompts", "4")
    assert done.code == 0
    first = [text.split("  ")[0] for text in done.out.splitlines() if text]
    assert first[0] == "run"
    runs = [Registry(line).resolve(name).reference for name in names]
    assert first[2:6] == [*runs, "against sft/tiny"]
    assert "4 prompts of" in done.out
    assert "judge gold: 8 answers scored" in done.out
    assert "answers: 4/4 prompts" in done.err  # progress
    assert (line / "sft" / "tiny" / "eval" / "sft~tiny-gold.json").exists()
    stored = [p.name for p in (line / "ppo" / "tiny" / "eval").iterdir()]
    assert "sft~tiny-gold.json" in stored
    assert "step-000002~sft~tiny-gold.json" in stored


def test_categories_of_named_rows(evaluate, found, file):
    result = found(*PPO, "--data", str(file))
    assert [(part["name"], part["prompts"]) for part in result["by_category"]] == [
        *(("(none)", 1), ("help", 1), ("kind", 2)),
    ]
    assert [row["category"] for row in result["rows"]] == ["help", "kind", "kind", "(none)"]
    mean = sum(part["value"] * part["prompts"] for part in result["by_category"]) / 4
    assert mean == pytest.approx(result["wins"]["value"])
    assert result["data"]["split"] == "all"
    shown = evaluate(*PPO, "--data", str(file), "--category", "source").out
    assert "kind       2         " in shown


def test_another_temperature_draws_other_answers_and_has_no_kl(found):
    result = found(*PPO, "--prompts", "4", "--temperature", "0.5")
    assert result["kl"] is None
    assert "no KL: it is a measure of answers at temperature 1" in result["notes"]
    warm = found(*PPO, "--prompts", "4")
    assert [row["ours"] for row in warm["rows"]] != [row["ours"] for row in result["rows"]]


def test_a_function_judges(found, tmp_path):
    (tmp_path / "mine.py").write_text("def brief(p, a, r): return [-len(text) for text in a]\n")
    result = found(*PPO, "--prompts", "4", "--judge", f"{tmp_path / 'mine.py'}:brief")
    assert result["judge"]["name"] == "mine.py:brief"
    for row in result["rows"]:
        shorter = len(row["ours"]) < len(row["theirs"])
        same = len(row["ours"]) == len(row["theirs"])
        assert row["winner"] == ("tie" if same else "ours" if shorter else "theirs")


def test_a_reward_model_whose_scores_are_no_numbers(evaluate, line, monkeypatch):
    """One prompt is left out and counted; where all are, there is nothing to show."""
    score_all, bad = evaluate_module.score_all, [0]

    def broken(model, sequences, pad_id, batch_size):
        found = score_all(model, sequences, pad_id, batch_size)
        return [math.nan if n in bad else score for n, score in enumerate(found)]

    monkeypatch.setattr(evaluate_module, "score_all", broken)
    given = (*PPO, "--prompts", "5", "--judge", "rm/tiny")
    (result,) = json.loads(evaluate(*given, "--json").out)
    assert result["prompts"] < 5
    assert result["judge"]["failures"] == 5 - result["prompts"]
    assert "no number" in evaluate(*given).out
    bad += range(100)
    done = evaluate(*given)
    assert done.code == 2
    assert "on no prompt it gives both answers a score that is a number" in done.err


# an endpoint -------------------------------------------------------------------------------------


def test_an_endpoint_judges_and_the_key_is_nowhere(evaluate, line, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with serving() as stub:
        given = ("--judge", "openai:judge-1", "--judge-url", stub.url, "--judge-key-env", "MY_KEY")
        done = evaluate(*PPO, "--prompts", "5", *given, "--price-in", "2", "--price-out", "8")
        assert done.code == 0, done.err
        assert set(stub.keys) == {f"Bearer {KEY}"}
    stored = line / "ppo" / "tiny" / "eval" / "sft~tiny-openai~judge-1.json"
    result = json.loads(stored.read_text())
    for row in result["rows"]:
        a, b = len(row["ours"]), len(row["theirs"])
        assert row["winner"] == ("tie" if a == b else "ours" if a > b else "theirs")
        assert (row["ours_score"], row["theirs_score"]) == (None, None)
    assert result["score"] is None
    asked = result["judge"]["calls"]
    assert result["judge"]["cost"] == pytest.approx(asked * (100 * 2 + 5 * 8) / 1e6)
    assert f"{asked} requests (0 of them retries), 0 failures" in done.out
    written = [p for p in line.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert written == []
    assert KEY not in done.out + done.err


def test_a_judge_that_always_says_a_gives_ties(evaluate):
    with serving(lambda body: says("[[A]]")) as stub:
        given = ("--judge", "openai:first", "--judge-url", stub.url, "--json")
        (result,) = json.loads(evaluate(*PPO, "--prompts", "6", *given).out)
    assert (result["ties"], result["wins"]["value"]) == (1.0, 0.5)


def test_prompts_without_a_verdict_are_left_out_and_counted(evaluate, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    first: list[str] = []

    def fails_on_one(body):
        shown = body["messages"][-1]["content"].partition("## Answer A")[0]
        first.append(shown)
        return (500, {}, "") if shown == first[0] else longer(body)

    with serving(fails_on_one) as stub:
        given = ("--judge", "openai:m", "--judge-url", stub.url, "--concurrency", "1", "--json")
        (result,) = json.loads(evaluate(*PPO, "--prompts", "4", *given).out)
    assert (result["prompts"], len(result["rows"])) == (3, 3)
    assert result["judge"]["failures"] == 1
    assert "1 of 4 prompts have no verdict: left out" in result["notes"]


def test_an_endpoint_that_fails_for_ever(evaluate, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    with serving(lambda body: (500, {}, "out of order")) as stub:
        done = evaluate(*PPO, "--prompts", "4", "--judge", "openai:m", "--judge-url", stub.url)
    assert (done.code, done.out) == (2, "")
    assert "no verdict came from" in done.err
    assert "HTTP 500: out of order" in done.err


# other tokenizers, other methods -----------------------------------------------------------------


@pytest.mark.parametrize("judge", ["gold", "rm/tiny"])
def test_each_reads_its_own_prompts(found, line, tiny_model_dir, monkeypatch, judge):
    """Another tokenizer, another base: texts are compared, and the reward model reads them anew."""
    if not (line / "sft" / "other").exists():
        adopting = ["rlhf", "adopt", str(tiny_model_dir), "--stage", "sft", "--run-name", "other"]
        limits = ["--max-prompt-tokens", "200", "--max-response-tokens", "40"]
        monkeypatch.setattr(sys, "argv", [*adopting, *limits, "--runs-dir", str(line)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
    result = found("ppo/tiny", "--against", "sft/other", "--judge", judge, "--prompts", "4")
    assert result["prompts"] == 4
    own = found("ppo/tiny", "--against", "sft/tiny", "--judge", judge, "--prompts", "4")
    assert [row["ours"] for row in result["rows"]] == [row["ours"] for row in own["rows"]]
    # An answer of the same tokenizer goes in as tokens, so its scores are the same beside anyone.
    assert [row["ours_score"] for row in result["rows"]] == pytest.approx(
        [row["ours_score"] for row in own["rows"]], abs=1e-4
    )


def test_a_run_that_is_a_base_and_an_adapter(found, line, monkeypatch):
    fixed = [f"runs_dir={line}", "tracking=off", *SMALL["sft"], "method=prompt_tuning"]
    assert run_stage(monkeypatch, "sft", *fixed, "run_name=soft") == 0
    assert (line / "sft" / "soft" / "model" / "base").is_dir()
    result = found("sft/soft", "--against", "sft/tiny", "--prompts", "4")
    assert result["prompts"] == 4
    soft = found("sft/soft", "--against", "sft/soft", "--prompts", "4")
    assert soft["ties"] == 1.0


# what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("ppo/none", "--against", "sft/tiny"), "ppo/none: no such run"),
        (("ppo/tiny", "--against", "sft/none"), "sft/none: no such run"),
        (("ppo/tiny@step-99", "--against", "sft/tiny"), "no such checkpoint"),
        (("tiny", "--against", "sft/tiny"), "not a reference"),
        (("rm/tiny", "--against", "sft/tiny"), "writes no answers.*--judge rm/tiny lets it judge"),
        ((*PPO, "--judge", "best"), "--judge=best: no such judge. Choose gold"),
        ((*PPO, "--judge", "rm/none"), "rm/none: no such run"),
        ((*PPO, "--judge", "none.py:f"), "no file none.py"),
        ((*PPO, "--judge", "openai:m"), "no endpoint. Give --judge-url"),
        ((*PPO, "--judge", "openai:m", "--judge-url", "http://127.0.0.1:9/v1"), "no endpoint answ"),
        ((*PPO, "--judge", "openai:m", "--judge-url", "nowhere"), "no address"),
        ((*PPO, "--category", "topic"), "--category=topic: no row .* There are: prompt"),
        ((*PPO, "--data", "none.jsonl"), "--data=none.jsonl: no data there"),
        ((*PPO, "--split", "test"), "it has no test split, but train, validation"),
        ((*PPO, "--split", "train"), "--split=train: choose one of validation, test"),
        ((*PPO, "--prompts", "0"), "--prompts=0"),
        ((*PPO, "--temperature", "0"), "--temperature=0: must be above 0"),
        ((*PPO, "--seed", "-1"), "--seed=-1"),
        ((*PPO, "--batch-size", "0"), "--batch-size=0: must be above 0"),
        ((*PPO, "--device", "tpu"), "--device=tpu: choose one of auto, cpu, cuda"),
        ((*PPO, "--max-new-tokens", "9999"), "has positions for 512. Lower --max-new-tokens"),
        (
            (*PPO, "--judge", "rm/tiny", "--max-new-tokens", "90"),
            "trained with.*=80.*Set --max-new",
        ),
    ],
)
def test_refused_before_a_weight_is_loaded(evaluate, no_weights, given, said):
    import re

    done = evaluate(*given)
    assert (done.code, done.out) == (2, "")
    assert re.search(said, " ".join(done.err.split())), done.err
    assert "Traceback" not in done.err


def test_no_gpu(evaluate, no_weights, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU here" in evaluate(*PPO, "--device", "cuda").err


def test_data_without_gold(evaluate, line, tmp_path, no_weights, monkeypatch):
    cfg = eval_plan._data
    without = lambda *given: eval_plan.DataConfig(**vars(cfg(*given)) | {"gold": None})  # noqa: E731
    monkeypatch.setattr(eval_plan, "_data", without)
    done = evaluate(*PPO)
    assert done.code == 2
    assert "there is no gold score for these prompts" in done.err


def test_a_damaged_run_is_refused(evaluate, line, tmp_path, no_weights):
    runs = tmp_path / "runs"
    shutil.copytree(line, runs)
    weights = runs / "sft" / "tiny" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    done = evaluate(*PPO, runs=runs)
    assert done.code == 2
    assert "sft/tiny" in done.err


# where results go --------------------------------------------------------------------------------


def test_who_stops_reading_loses_no_result(evaluate, line, monkeypatch):
    """As in `rlhf eval ... | head -1`."""

    def gone(results):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(outcomes, "show", gone)
    assert evaluate(*PPO, "--prompts", "3", "--seed", "7").code == 1
    stored = line / "ppo" / "tiny" / "eval" / "sft~tiny-gold.json"
    assert json.loads(stored.read_text())["seed"] == 7


def test_what_cannot_be_stored_is_shown_all_the_same(evaluate, line, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(line, runs, ignore=shutil.ignore_patterns("eval"))
    (runs / "ppo" / "tiny" / "eval").write_text("in the way")
    done = evaluate(*PPO, "--prompts", "3", runs=runs)
    assert done.code == 0
    assert "ppo/tiny" in done.out
    assert "not stored: " in done.err


def test_a_parent_that_is_gone_leaves_no_kl(found, line, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(line, runs, ignore=shutil.ignore_patterns("eval"))
    shutil.copytree(runs / "ppo", runs / "kept")
    shutil.rmtree(runs / "sft" / "tiny")
    result = found("ppo/tiny", "--against", "ppo/tiny", "--prompts", "3", runs=runs)
    assert result["kl"] is None
    assert any(note.startswith("no KL: ") for note in result["notes"])


@pytest.mark.parametrize(
    ("reference", "against", "judge", "name"),
    [
        ("ppo/a", "sft/a", "rm/b-gold", "sft~a-rm~b-gold.json"),
        ("ppo/a", "sft/a-rm-b", "gold", "sft~a-rm-b-gold.json"),
        ("ppo/a@step-000010", "sft/a", "gold", "step-000010~sft~a-gold.json"),
        ("ppo/a", "sft/a", "openai:org/../../x", "sft~a-openai~org~..~..~x.json"),
    ],
)
def test_names_of_files(reference, against, judge, name):
    result = {"reference": reference, "against": against, "judge": {"name": judge}}
    assert outcomes.file_name(result) == name


def test_options_are_checked():
    with pytest.raises(ConfigError, match="--temperature=inf"):
        eval_plan.Options(temperature=float("inf"))
