"""When PPO goes wrong it is stopped, with the cause and the evidence; when not, it is let be.

The two published curves below are of TRL 1.12's PPO on one small model (64 answers a step, limit 64
tokens): one that learns, and one against a reward model of another domain, which breaks.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import ppo_steps
import pytest
import torch
from test_ppo import EOS, PROMPTS, make_roles, ready, stage

from rlhf.config import StopConfig
from rlhf.errors import ConfigError, StoppedByGuard
from rlhf.monitor import likely_causes

__all__ = ["make_roles"]  # fixtures
pytestmark = pytest.mark.usefixtures("process_group")

CALM = {
    "objective/kl": 0.0,
    "objective/kl_coef": 0.05,
    "objective/scores": 0.0,
    "objective/scores_std": 1.3,
    "response/eos_rate": 0.9,
    "response/length": 45.0,
    "response/distinct": 0.5,
    "policy/approxkl": 0.004,
    "policy/ratio": 1.0,
    "policy/clipfrac": 0.05,
}


class Letters:
    """Decodes ids as letters."""

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


def watch(tmp_path, cfg=None, state=None):
    watching = ppo_steps.stopping(cfg or stage(), tmp_path, Letters())
    if state is not None:
        watching.load_state_dict(state)
    return watching


def run(watching, *changes):
    for step, change in enumerate(changes, start=1):
        watching.check(CALM | change, step=step)


# rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"policy/approxkl": 2.7}, "ratio explosion"),  # log(10)^2 / 2 = 2.65
        ({"policy/ratio": 10.5}, "ratio explosion"),
        ({"objective/kl": 8.1}, "KL over budget"),
        ({"objective/scores": -4.0}, "score collapse"),  # 3 x 1.3 = 3.9
        ({"response/eos_rate": 0.44}, "answers no longer end"),
        ({"response/length": 8.9}, "length collapse"),
    ],
)
def test_a_rule_broken_three_times_in_a_row_stops_the_run(tmp_path, change, name):
    cfg = stage(kl_budget=8.0)
    with pytest.raises(StoppedByGuard, match=f"{name}: .*, for 3 steps"):
        run(watch(tmp_path, cfg), {}, change, change, change)
    run(watch(tmp_path, cfg), {}, change, change, {}, change, change, {})


@pytest.mark.parametrize(
    "change",
    [
        {"policy/approxkl": 2.6},
        {"policy/ratio": 9.5},
        {"objective/kl": 8.0},
        {"objective/scores": -3.8},
        {"response/eos_rate": 0.46},
        {"response/length": 9.1},
        {"objective/scores": 30.0, "response/length": 500.0, "response/eos_rate": 1.0},
    ],
)
def test_what_stays_within_the_rules_goes_on(tmp_path, change):
    run(watch(tmp_path, stage(kl_budget=8.0)), {}, *[change] * 9)


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ({"ratio": None}, {"policy/approxkl": 9.0}),
        ({"score_drop": None}, {"objective/scores": -40.0}),
        ({"eos_drop": None}, {"response/eos_rate": 0.0}),
        ({"length_drop": None}, {"response/length": 1.0}),
    ],
)
def test_null_switches_a_rule_off(tmp_path, rule, change):
    run(watch(tmp_path, replace(stage(), stop=StopConfig(**rule))), {}, *[change] * 5)
    with pytest.raises(StoppedByGuard):
        run(watch(tmp_path), {}, *[change] * 5)


def test_without_a_budget_no_kl_is_too_much(tmp_path):
    run(watch(tmp_path), {}, *[{"objective/kl": 500.0}] * 5)


def test_answers_that_never_ended_cannot_stop_ending(tmp_path):
    few = {"response/eos_rate": 0.2}
    run(watch(tmp_path), few, *[{"response/eos_rate": 0.0}] * 5)


def test_while_the_critic_warms_up_there_is_no_ratio(tmp_path):
    numbers = {n: v for n, v in CALM.items() if not n.startswith("policy/")}
    watching = watch(tmp_path)
    for step in (1, 2, 3):
        watching.check(numbers, step=step)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stops_at_once(tmp_path, value):
    with pytest.raises(StoppedByGuard, match=rf"objective/kl is {value} in step 2"):
        run(watch(tmp_path), {}, {"objective/kl": value})


def test_a_resumed_run_counts_on(tmp_path):
    lost = {"response/eos_rate": 0.1}
    before = watch(tmp_path)
    run(before, {}, lost, lost)
    state = json.loads(json.dumps(before.state_dict()))
    with pytest.raises(StoppedByGuard, match="answers no longer end"):
        watch(tmp_path, state=state).check(CALM | lost, step=4)
    watch(tmp_path).check(CALM | lost, step=4)  # anew, it would be the first step


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"patience": 0}, r"stop\.patience=0"),
        ({"ratio": 1.0}, r"stop\.ratio=1"),
        ({"score_drop": 0.0}, r"stop\.score_drop=0"),
        ({"eos_drop": 1.0}, r"stop\.eos_drop=1\.0: must lie in \(0, 1\)"),
        ({"length_drop": 0.0}, r"stop\.length_drop=0\.0"),
    ],
)
def test_rules_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        StopConfig(**settings)


# two real runs -----------------------------------------------------------------------------------

# update: score, its std, KL, EOS rate, length
BREAKS = [
    (1, -1.33, 2.56, 0.0, 0.95, 45.2),
    (5, 0.52, 3.21, 2.6, 0.56, 58.0),
    (9, 3.25, 2.81, 8.3, 0.39, 59.5),
    (10, 2.46, 3.19, 9.7, 0.50, 57.5),
    (11, 3.19, 3.95, 12.4, 0.41, 59.7),
    (12, 4.25, 3.05, 15.2, 0.41, 58.1),
    (13, 4.50, 2.90, 18.1, 0.36, 60.2),
    (14, 5.11, 2.42, 21.0, 0.41, 58.5),
    (20, 7.03, 2.24, 36.1, 0.11, 62.7),
]
LEARNS = [
    (1, -0.03, 1.24, 0.0, 0.95, 45.2),
    (5, 0.85, 1.42, 2.8, 1.0, 40.5),
    (10, 2.57, 1.3, 10.7, 0.95, 38.7),
    (15, 3.38, 0.83, 18.9, 0.98, 36.9),
    (20, 3.55, 0.86, 19.9, 0.97, 43.5),
    (30, 3.79, 0.54, 19.5, 1.0, 43.7),
    (40, 3.94, 0.68, 20.8, 0.98, 44.0),
    (50, 3.92, 0.5, 21.9, 1.0, 47.0),
    (60, 4.03, 0.44, 20.7, 0.98, 44.0),
    (70, 4.19, 0.48, 23.7, 0.98, 45.1),
    (80, 4.17, 0.62, 24.9, 0.98, 44.7),
]


def as_stats(row):
    _, score, std, kl, eos, length = row
    names = ("scores", "scores_std", "kl")
    named = {f"objective/{n}": v for n, v in zip(names, (score, std, kl), strict=True)}
    return CALM | named | {"response/eos_rate": eos, "response/length": length}


def play(watching, rows):
    """The update at which it is stopped, and why; (None, "") where it never is."""
    for row in rows:
        try:
            watching.check(as_stats(row), step=row[0])
        except StoppedByGuard as error:
            return row, str(error)
    return None, ""


def test_the_run_that_breaks_is_stopped_and_the_one_that_learns_is_not(tmp_path):
    assert play(watch(tmp_path), LEARNS) == (None, "")
    row, said = play(watch(tmp_path), BREAKS)
    assert row[0] == 13, "of 45"
    assert said.startswith("answers no longer end: 36% of the answers end, 95% did at first")
    evidence = ppo_steps.evidence(
        replace(stage(kl_coef=0.05), allow_foreign_rm=True),
        first=as_stats(BREAKS[0]),
        last=as_stats(row),
        scores=[1.0, 2.0, 3.0],
        lengths=[64, 64, 64],
    )
    causes = "\n".join(likely_causes(evidence))
    assert "ppo.missing_eos_penalty=1 beside scores that spread by 2.56" in causes
    assert "leaving the reference is cheap" in causes
    assert "allow_foreign_rm=true" in causes


# causes ------------------------------------------------------------------------------------------


def causes(last, *, scores=(0.0, 1.0), lengths=(5, 5), cfg=None, first=None):
    return likely_causes(
        ppo_steps.evidence(
            cfg or stage(kl_coef=0.05),
            first=CALM | (first or {}),
            last=CALM | last,
            scores=list(scores),
            lengths=list(lengths),
        )
    )


@pytest.mark.parametrize(
    ("last", "more", "said"),
    [
        (
            {},
            {"scores": [0.0, math.inf]},
            "1 of 2 scores are no finite numbers (the first in row",
        ),
        ({"policy/clipfrac": 0.5}, {}, "Lower ppo.learning_rate=0.001"),
        ({"policy/approxkl": 0.5}, {}, "the policy's steps are too large"),
        ({"val/explained_variance": -3.0}, {}, "lower ppo.critic_learning_rate=0.001"),
        ({"response/eos_rate": 0.3}, {}, "not ending costs little: ppo.missing_eos_penalty=1"),
        (
            {"response/length": 60.0},
            {"scores": [0.0, 1.0, 2.0], "lengths": [10, 20, 30]},
            "the reward pays for longer answers (its correlation with length is 1.00)",
        ),
        (
            {"response/length": 10.0},
            {"scores": [2.0, 1.0, 0.0], "lengths": [10, 20, 30]},
            "the reward pays for shorter answers",
        ),
        (
            {"objective/kl": 20.0, "objective/scores": 4.0},
            {},
            "the score rose by 4.00 while KL",
        ),
        ({"objective/kl": 20.0, "objective/scores": -1.0}, {}, "wandered 20.0 nats off"),
        (
            {"objective/scores": 2.0, "response/distinct": 0.2},
            {},
            "distinct bigrams fell from 0.50 to 0.20",
        ),
    ],
)
def test_each_cause_is_named_by_what_shows_it_and_no_other_is(last, more, said):
    (found,) = causes(last, **more)
    assert said in found


def test_a_calm_run_has_no_cause():
    assert causes({}) == []
    assert causes({}, scores=[math.nan, math.nan])[0].startswith("2 of 2 scores")


# evidence ----------------------------------------------------------------------------------------


def stopped(watching, policy, error):
    with pytest.raises(StoppedByGuard) as caught, watching.explaining(policy):
        raise error
    return str(caught.value)


def test_the_last_rollout_is_written_token_by_token(make_roles, tmp_path):
    cfg, roles = stage(temperature=0.7), make_roles()
    batch = ready(roles, cfg)
    _, stats = ppo_steps.estimate_advantages(batch, cfg)
    with torch.no_grad():  # as after an update
        for parameter in roles.policy.parameters():
            if parameter.requires_grad:
                parameter += 0.02
    watching = watch(tmp_path, cfg)
    watching.observe(batch, stats, step=7)
    said = stopped(watching, roles.policy, StoppedByGuard("loss/policy became nan."))
    folder = tmp_path / "stopped/step-000007"
    assert said.startswith("loss/policy became nan.\nLikely causes:\n- none of the known ones")
    assert said.endswith(str(folder))
    assert (folder / "why.txt").read_text() in f"{said}\n"
    rows = [json.loads(line) for line in (folder / "batch.jsonl").read_text().splitlines()]
    assert len(rows) == len(PROMPTS)
    for i, row in enumerate(rows):
        mask = batch.response_mask[i]
        ids = batch.responses[i][mask].tolist()
        assert row["prompt"] == Letters().decode(PROMPTS[i])
        assert row["response"] == Letters().decode(ids)
        assert row["response_ids"] == ids
        assert row["ended"] == (ids[-1] == EOS)
        assert row["score"] == pytest.approx(float(batch.scores[i]))
        assert row["kl_sum"] == pytest.approx(float(batch.kl[i].sum()), abs=1e-6)
        for name in ("old_logprobs", "ref_logprobs", "kl", "advantages", "returns"):
            assert row[name] == pytest.approx(getattr(batch, name)[i][mask].tolist()), name
        assert row["values"] == pytest.approx(batch.old_values[i][mask].tolist())
        whole = torch.tensor([PROMPTS[i] + ids])
        now = torch.log_softmax(roles.policy(whole).logits[0, len(PROMPTS[i]) - 1 : -1] / 0.7, -1)
        now = now.gather(-1, whole[0, -len(ids) :, None]).squeeze(-1)
        ratio = (now - batch.old_logprobs[i][mask]).exp().tolist()
        assert row["ratio"] == pytest.approx(ratio, rel=1e-4)
        assert max(abs(r - 1) for r in ratio) > 1e-3
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [7]
    assert steps[0]["objective/scores"] == stats["objective/scores"]


def test_the_last_steps_are_written_and_what_is_no_number_too(make_roles, tmp_path):
    cfg, roles = stage(), make_roles()
    batch = ready(roles, cfg)
    batch.scores[3] = math.nan
    watching = watch(tmp_path, cfg)
    run(watching, *[{}] * 30)
    with pytest.raises(StoppedByGuard) as caught, watching.explaining(roles.policy):
        watching.observe(batch, {"objective/scores": math.nan}, step=31)
    assert "objective/scores is nan in step 31." in str(caught.value)
    assert "1 of 8 scores are no finite numbers (the first in row 3" in str(caught.value)
    folder = tmp_path / "stopped/step-000031"
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [*range(11, 31), 31]
    rows = [json.loads(line) for line in (folder / "batch.jsonl").read_text().splitlines()]
    assert rows[3]["score"] == "nan"


def test_before_any_rollout_there_is_nothing_to_write(make_roles, tmp_path):
    said = stopped(watch(tmp_path), make_roles().policy, StoppedByGuard("early"))
    assert said.startswith("early\nLikely causes:")
    assert not (tmp_path / "stopped").exists()


def test_a_disk_that_refuses_does_not_hide_the_reason(make_roles, tmp_path):
    cfg, roles = stage(), make_roles()
    (tmp_path / "file").write_text("")
    watching = watch(tmp_path / "file", cfg)
    watching.observe(ready(roles, cfg), CALM, step=1)
    said = stopped(watching, roles.policy, StoppedByGuard("loss/policy became nan."))
    assert said.startswith("loss/policy became nan.")
    assert "The dump could not be written: Not a directory" in said


def test_other_errors_pass_as_they_are(make_roles, tmp_path):
    with pytest.raises(ZeroDivisionError), watch(tmp_path).explaining(make_roles().policy):
        raise ZeroDivisionError
