"""PPO with every kind of reward, end to end and one step long, on the built-in tiny world."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ppo_steps
import pytest
import torch
from small_line import ROOT, few_rows, run_stage
from transformers import AutoModelForSequenceClassification

from rlhf import ppo, rollout
from rlhf.config import PPOStage, SamplingConfig
from rlhf.registry import Registry

SMALL = [
    "tracking=off",
    "ppo.steps=1",
    "ppo.batch_size=4",
    "ppo.micro_batch_size=2",
    "ppo.minibatches=1",
    "ppo.epochs=1",
    "ppo.missing_eos_penalty=0",
    "sampling.max_new_tokens=6",
    "evaluation.prompts=3",
]
OWN = """
def worth(prompts, responses, rows):
    return [len(p) + 0.01 * len(r) for p, r in zip(prompts, responses)]

def unsure(prompts, responses, rows):
    return [float("nan") if response else 0.0 for response in responses]
"""


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def alone(tmp_path_factory, patch) -> Path:
    """An SFT run and no reward model."""
    runs = tmp_path_factory.mktemp("runs")
    rows = f"data.path={few_rows(runs / 'rows', 'sft', (16, 16))}"
    small = ["train.max_steps=1", "train.batch_size=8", "train.micro_batch_size=8"]
    fixed = [f"runs_dir={runs}", "tracking=off", rows, *small]
    assert run_stage(patch, "sft", *fixed, "evaluation.prompts=0") == 0
    return runs


@pytest.fixture(scope="module")
def pair(alone, patch) -> Path:
    """Beside it, two reward models that differ."""
    small = ["train.max_steps=2", "train.batch_size=8", "train.micro_batch_size=8"]
    rows = f"data.path={few_rows(alone / 'rows', 'rm', (16, 16))}"
    fixed = [f"runs_dir={alone}", "tracking=off", rows, *small]
    for seed, name in enumerate(("tiny", "other")):
        assert run_stage(patch, "rm", *fixed, f"seed={seed}", f"run_name={name}") == 0
    return alone


@pytest.fixture
def own(tmp_path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


@pytest.fixture
def judged(monkeypatch):
    """What `ppo.score` was asked and what it said, step by step."""
    seen = []

    def spy(drawn, reward, rows, renderer, *, real=ppo.score, **sizes):
        out = real(drawn, reward, rows, renderer, **sizes)
        texts = [renderer.decode(ids) for ids in drawn.answer_ids()]
        prompts = [renderer.prompt(row["prompt"]) for row in rows]
        seen.append((drawn, rows, prompts, texts, *out))
        return out

    monkeypatch.setattr(ppo, "score", spy)
    return seen


def lines(run: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def numbers(run: Path) -> dict[str, object]:
    """Every number of a one-step run."""
    return {key: value for line in lines(run, "metrics.jsonl") for key, value in line.items()}


def expect_own_rows(drawn, rows, prompts):
    """Each row of the data is the one whose prompt was answered there."""
    asked = zip(drawn.prompts, drawn.prompt_mask, strict=True)
    assert prompts == [ids[mask].tolist() for ids, mask in asked]
    assert len(rows) == 4


def said_by(runs: Path, name: str, drawn) -> torch.Tensor:
    """A published reward model's verdict, by plain transformers, each row alone."""
    model = AutoModelForSequenceClassification.from_pretrained(runs / "rm" / name / "model").eval()
    pairs = zip(drawn.ids, drawn.mask, strict=True)
    with torch.no_grad():
        return torch.cat([model(ids[mask][None]).logits[:, 0] for ids, mask in pairs])


def worth(rows, texts) -> torch.Tensor:
    asked = zip(rows, texts, strict=True)
    return torch.tensor([len(r["prompt"][-1]["content"]) + 0.01 * len(t) for r, t in asked])


# ---------------------------------------------------------------- functions


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_a_function_needs_no_reward_model(alone, own, judged, monkeypatch, algorithm):
    name = f"function-{algorithm}"
    given = ["reward=function", f"reward.function={own}:worth", f"algorithm={algorithm}"]
    fixed = [f"runs_dir={alone}", *SMALL, "rm_from=rm/nowhere", *given, f"run_name={name}"]
    assert run_stage(monkeypatch, "ppo", *fixed) == 0
    manifest = Registry(alone).resolve(f"ppo/{name}").manifest
    assert [parent.role for parent in manifest.parents] == ["policy"]
    assert set(manifest.fingerprints) == {"train", "validation", "reward.function"}
    [(drawn, rows, prompts, texts, verdict, means)] = judged
    expect_own_rows(drawn, rows, prompts)
    assert len({tuple(ids) for ids in prompts}) == (4 if algorithm == "ppo" else 1)
    torch.testing.assert_close(verdict.scores, worth(rows, texts))
    assert means == {"objective/scores/function": pytest.approx(float(verdict.scores.mean()))}
    found = numbers(alone / "ppo" / name)
    assert found["objective/scores"] == pytest.approx(float(worth(rows, texts).mean()), rel=1e-5)
    assert ("val/error" in found) == (algorithm == "ppo")
    samples = lines(alone / "ppo" / name, "samples.jsonl")
    for who in ("sft", "ppo"):
        for row in samples:
            expected = len(row["prompt"]) + 0.01 * len(row[who])
            assert row[f"{who}_score"] == pytest.approx(expected, rel=1e-5)
    mean = sum(row["ppo_score"] for row in samples) / len(samples)
    assert found["eval/score"] == pytest.approx(mean)


def test_an_edited_function_is_another_run(alone, own, monkeypatch, capfd):
    given = ["reward=function", f"reward.function={own}:worth", "algorithm=rloo"]
    fixed = [f"runs_dir={alone}", *SMALL, *given, "run_name=edited"]
    assert run_stage(monkeypatch, "ppo", *fixed) == 0
    capfd.readouterr()
    assert run_stage(monkeypatch, "ppo", *fixed) == 0
    assert "nothing to do" in capfd.readouterr().err
    own.write_text(OWN + "# edited\n")
    assert run_stage(monkeypatch, "ppo", *fixed) == 2
    said = capfd.readouterr().err
    assert "data reward.function: other code (fingerprint " in said
    assert "run_name=" in said


def test_a_function_that_gives_no_number_stops_the_run_and_is_named(alone, own, monkeypatch, capfd):
    given = ["reward=function", f"reward.function={own}:unsure", "run_name=unsure"]
    assert run_stage(monkeypatch, "ppo", f"runs_dir={alone}", *SMALL, *given) == 2
    said = capfd.readouterr().err
    assert f"refused: reward.function={own}:unsure: gave nan for row 0" in said
    assert not (alone / "ppo/unsure/manifest.json").exists()


BEFORE_TORCH = """
import runpy, sys
sys.argv = ["stages/ppo.py", *sys.argv[1:]]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stopped:
    sys.exit(9 if "torch" in sys.modules else stopped.code)
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["reward=function", "reward.function=no.py:f"], "reward.function=no.py:f: no file no.py."),
        (["reward=function"], "reward: it has no term"),
        (["reward=no.py:f"], "function, rm. Write reward=function reward.function=no.py:f"),
        (["reward.models.rm=[rm/tiny,rm/no]"], "rm/no"),
        (["reward.weights.function=0.5"], "reward.weights.function"),
    ],
)
def test_what_cannot_work_is_refused_before_torch(pair, given, said):
    command = [sys.executable, "-c", BEFORE_TORCH, f"runs_dir={pair}", *SMALL, *given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr


def test_a_column_that_a_function_misses_is_named_before_anything_is_written(
    alone, monkeypatch, capfd
):
    given = ["reward=function", f"reward.function={ROOT}/examples/gsm8k_reward.py:exact_answer"]
    fixed = [f"runs_dir={alone}", *SMALL, *given, "run_name=column"]
    assert run_stage(monkeypatch, "ppo", *fixed) == 2
    assert "no number in `answer` or `messages`" in capfd.readouterr().err
    assert not (alone / "ppo/column").exists()


def test_the_example_pays_for_right_answers(alone, tmp_path, judged, monkeypatch):
    folder, example = tmp_path / "gsm8k", ROOT / "examples" / "gsm8k_reward.py"
    folder.mkdir()
    rows = [
        {"question": f"{n} + 1?", "answer": f"It is one more.\n#### {n + 1}"} for n in (1, 2, 5)
    ]
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    fixed = [f"runs_dir={alone}", *SMALL, "data=default", "data.max_prompt_tokens=64"]
    given = [
        f"data.path={folder}",
        "data.columns.prompt=question",
        "reward=function",
        f"reward.function={example}:exact_answer",
        f"+reward.functions.format={example}:well_formed",
        "+reward.weights.format=0.25",
        "run_name=gsm8k",
    ]
    monkeypatch.setattr("rlhf.text.Renderer.decode", lambda *_: "so\n#### 3")
    assert run_stage(monkeypatch, "ppo", *fixed, *given) == 0
    [(drawn, asked, prompts, _, verdict, _)] = judged
    expect_own_rows(drawn, asked, prompts)
    names = set(Registry(alone).resolve("ppo/gsm8k").manifest.fingerprints)
    assert names == {"train", "validation", "reward.function", "reward.functions.format"}
    assert {row["question"] for row in asked} == {row["question"] for row in rows}
    # 3 is the answer to one of the questions, and well formed under each.
    expected = [1.25 if row["question"] == "2 + 1?" else 0.25 for row in asked]
    assert verdict.scores.tolist() == expected
    assert 1.25 in expected


# ---------------------------------------------------------------- reward models


@pytest.mark.parametrize("share", ["null", "false"])
def test_a_reward_model_and_a_function_are_added(pair, own, judged, monkeypatch, share):
    given = [f"reward.function={own}:worth", "+reward.weights.function=0.5"]
    fixed = [f"runs_dir={pair}", *SMALL, *given, f"share_backbone={share}", f"run_name=sum-{share}"]
    assert run_stage(monkeypatch, "ppo", *fixed) == 0
    manifest = Registry(pair).resolve(f"ppo/sum-{share}").manifest
    roles = [(parent.role, parent.reference) for parent in manifest.parents]
    assert roles == [("policy", "sft/tiny"), ("reward_model", "rm/tiny")]
    [(drawn, rows, _, texts, verdict, _)] = judged
    terms = {"rm": said_by(pair, "tiny", drawn), "function": worth(rows, texts)}
    expected = terms["rm"] + 0.5 * terms["function"]
    torch.testing.assert_close(verdict.scores, expected, rtol=1e-4, atol=1e-4)
    found = numbers(pair / "ppo" / f"sum-{share}")
    for name, values in terms.items():  # before its weight
        mean = pytest.approx(float(values.mean()), abs=1e-4)
        assert found[f"objective/scores/{name}"] == mean
        assert manifest.metrics[f"objective/scores/{name}"] == mean


def test_an_ensemble_is_lowered_by_what_its_members_disagree_on(pair, judged, monkeypatch):
    given = ["reward.models.rm=[rm/tiny,rm/other]", "reward.ensemble=lower"]
    fixed = [f"runs_dir={pair}", *SMALL, *given, "run_name=lower"]
    assert run_stage(monkeypatch, "ppo", *fixed) == 0
    manifest = Registry(pair).resolve("ppo/lower").manifest
    roles = {parent.role: parent.reference for parent in manifest.parents}
    assert roles == {
        "policy": "sft/tiny",
        "reward_model": "rm/tiny",
        "reward_model_2": "rm/other",
    }
    [(drawn, _, _, _, verdict, _)] = judged
    one, other = (said_by(pair, name, drawn) for name in ("tiny", "other"))
    assert float((one - other).abs().min()) > 1e-3
    # Of two, the mean less one standard deviation is the lower one.
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(verdict.scores, torch.minimum(one, other), **close)
    found = numbers(pair / "ppo/lower")["objective/scores_spread"]
    assert found == pytest.approx(float((one - other).abs().mean() / 2), abs=1e-4)


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("each", [1, 4])
def test_the_rows_are_shared_as_the_answers_are(monkeypatch, each):
    cfg = PPOStage(run_name="t", sampling=SamplingConfig(per_prompt=each))
    prompts, found, asked = [[n] for n in range(4)], {}, {}
    rows = [{"ids": ids} for ids in prompts]

    def sample(policy, prompts, *, keys, **_):
        return dict(zip(keys, prompts, strict=True))

    class Renderer:
        pad_id = eos_id = 0

    monkeypatch.setattr(rollout, "sample", sample)
    monkeypatch.setattr(rollout, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(rollout, "rank", lambda rank=rank: rank)
        drawn = ppo_steps.draw(None, prompts, cfg, Renderer(), step=1)
        mine = rollout.Prompts(prompts, rows, seed=0, answers=4 * each, per_prompt=each).batch(1)
        assert [prompt.key for prompt in mine] == list(drawn)
        assert all(prompt.row["ids"] == prompt.ids for prompt in mine)
        asked |= {prompt.key: prompt.ids for prompt in mine}
        found |= drawn
    assert [found[place] for place in range(4 * each)] == [
        [n] for n in range(4) for _ in range(each)
    ]
    order = [asked[place] for place in range(0, 4 * each, each)]
    assert sorted(order) == prompts
    assert [asked[place] for place in range(4 * each)] == [
        ids for ids in order for _ in range(each)
    ]


def test_a_stage_made_by_hand_scores_by_the_reward_model_of_rm_from():
    cfg = PPOStage(run_name="t", rm_from="rm/a")
    assert (cfg.reward.models, cfg.reward.function) == ({"rm": ["rm/a"]}, None)


# ---------------------------------------------------------------- a reward model that only watches


def test_a_second_reward_model_watches_and_chooses_the_best(pair, monkeypatch):
    watched = ["evaluation.second_rm=rm/other", "data.gold=null", "ppo.eval_every=1"]
    many = [*SMALL, *watched, "ppo.steps=4", "ppo.learning_rate=1e-2", "keep_checkpoints=9"]
    assert run_stage(monkeypatch, "ppo", f"runs_dir={pair}", "run_name=watched", *many) == 0
    run = Registry(pair).resolve("ppo/watched")
    roles = {parent.role: parent.reference for parent in run.manifest.parents}
    assert roles["watching_reward_model"] == "rm/other"
    seen = [line for line in lines(run.path, "metrics.jsonl") if "eval/second" in line]
    assert [line["step"] for line in seen] == [1, 2, 3, 4]
    best = max(seen, key=lambda line: line["eval/second"])
    assert run.manifest.metrics["eval/second"] == pytest.approx(best["eval/second"], abs=1e-4)
    course = json.loads((run.path / "overoptimisation.json").read_text())
    assert course["measure"] == "second reward model"
    assert [point["step"] for point in course["points"]] == [0, 1, 2, 3, 4]
    for point, line in zip(course["points"][1:], seen, strict=True):
        for ours, theirs in (("gold", "second"), ("score", "score"), ("kl", "kl")):
            assert point[ours] == line[f"eval/{theirs}"]
    # The published model answers, and plain transformers says what the second one makes of it.
    answers = lines(run.path, "samples.jsonl")
    assert len(answers) == 3
    assert Registry(pair).verify("ppo/watched") == []


def test_the_reward_model_at_work_cannot_watch_itself(pair, monkeypatch, capfd):
    given = [f"runs_dir={pair}", "run_name=blind", "evaluation.second_rm=rm/tiny"]
    assert run_stage(monkeypatch, "ppo", *SMALL, *given) == 2
    said = capfd.readouterr().err
    assert "evaluation.second_rm=rm/tiny: PPO optimises this reward model" in said
    missing = [f"runs_dir={pair}", "run_name=blind", "evaluation.second_rm=rm/nowhere"]
    assert run_stage(monkeypatch, "ppo", *SMALL, *missing) == 2
    assert "refused: rm/nowhere: " in capfd.readouterr().err
    assert not (pair / "ppo" / "blind").exists()
