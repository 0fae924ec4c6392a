"""What a resumed run goes on with: one protocol, typed, versioned, and nothing left out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf.checkpointing import Best, Checkpoints
from rlhf.config import PPOConfig, SamplingConfig, StopConfig
from rlhf.console import Console
from rlhf.controllers import AdaptiveKL, FixedKL
from rlhf.errors import RegistryError
from rlhf.methods.lora_drop import Sharing
from rlhf.monitor import StoppingRules
from rlhf.overoptimisation import GOLD, Course, Evaluation
from rlhf.registry import Registry
from rlhf.run import Run, open_run
from rlhf.state import FILE, VERSION, Stateful
from rlhf.supervised import Evaluations


def of(run: Run | None, total: int = 4) -> Checkpoints:
    assert run is not None
    quiet = Console(quiet=True)
    return Checkpoints(run, run.checkpoints_dir, quiet, stage="sft", total=total, every=1, keep=2)


class Weights:
    """Too large for JSON."""

    def __init__(self, text: str) -> None:
        self.text = text

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "weights.txt").write_text(self.text)


class Model:
    def __init__(self, text: str = "", count: int = 0) -> None:
        self.text, self.count = text, count

    def state_dict(self) -> dict[str, Any]:
        return {"weights": Weights(self.text), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.text = (state["weights"] / "weights.txt").read_text()
        self.count = state["count"]


def write(runs: Path, **objects: Stateful) -> None:
    """A run that was interrupted after its second step."""
    with open_run(Registry(runs), "sft", "t", {}, {}) as run:
        checkpoints = of(run)
        checkpoints.track(**objects)
        with checkpoints.working():
            for step in checkpoints.steps():
                if step == 2:
                    checkpoints.consider(0.5, {"eval/loss": 2.0})
                if step == 3:
                    break


# ---------------------------------------------------------------- checkpoints


def test_every_tracked_object_comes_back(tmp_path):
    kl = FixedKL(0.7)
    write(tmp_path, model=Model("trained", 3), kl=kl)
    with open_run(Registry(tmp_path), "sft", "t", {}, {}) as run:
        checkpoints, model, again = of(run), Model(), FixedKL(0.1)
        assert checkpoints.step == 2
        assert checkpoints.best == Best(2, 0.5, {"eval/loss": 2.0})
        checkpoints.track(model=model, kl=again)
        assert (model.text, model.count, again.coef) == ("trained", 3, 0.7)
        with checkpoints.working():
            assert next(checkpoints.steps()) == 3


def test_what_is_no_longer_tracked_is_named(tmp_path):
    write(tmp_path, model=Model(), kl=FixedKL(0.1))
    with open_run(Registry(tmp_path), "sft", "t", {}, {}) as run:
        checkpoints = of(run)
        checkpoints.track(kl=FixedKL(0.1))
        with (
            pytest.raises(RegistryError, match="holds the state of model, which this run does not"),
            checkpoints.working(),
        ):
            pass


def test_two_objects_cannot_keep_their_files_in_one_folder(tmp_path):
    with pytest.raises(AssertionError, match="two objects keep their files in weights"):
        write(tmp_path, model=Model(), another=Model())


def test_what_was_not_tracked_is_named(tmp_path):
    write(tmp_path, kl=FixedKL(0.1))
    lacking = pytest.raises(RegistryError, match="it holds no state of 'model'")
    with open_run(Registry(tmp_path), "sft", "t", {}, {}) as run, lacking:
        of(run).track(kl=FixedKL(0.1), model=Model())


@pytest.mark.parametrize(
    ("stored", "version"),
    [
        ({"state": {"lines": 3}, "best": None, "world_size": 1}, 1),  # as it was without a version
        ({"version": VERSION + 1, "world_size": 1, "objects": {}}, VERSION + 1),
    ],
)
def test_a_checkpoint_of_another_version_is_refused_with_the_ways_out(tmp_path, stored, version):
    with (
        open_run(Registry(tmp_path), "rm", "t", {}, {}) as run,
        run.checkpoint(1, best=True) as folder,
    ):
        (folder / FILE).write_text(json.dumps(stored))
    refused = pytest.raises(RegistryError)
    with open_run(Registry(tmp_path), "rm", "t", {}, {}) as run, refused as caught:
        of(run)
    said = str(caught.value)
    assert f"rm/t/checkpoints/step-000001: its {FILE} is of version {version}, " in said
    assert "overwrite=true" in said
    assert "run_name=" in said


# ---------------------------------------------------------------- states


def stopping() -> StoppingRules:
    calm = {"objective/kl": 1.0, "objective/scores": 0.5, "objective/scores_std": 1.0}
    rules = StoppingRules(StopConfig(), PPOConfig(), SamplingConfig(), Path(), None)
    rules.check(calm | {"response/eos_rate": 1.0, "response/length": 9.0}, step=1)
    return rules


def course() -> Course:
    out = Course(GOLD)
    for step in (0, 5, 10):
        scores, gold = [float(step), 1.0], [step / 10, math.inf if step == 10 else 0.5]
        out.see(Evaluation(step, 0.1 * step, scores, gold, 9.0, 1.0, 0.5, 0.1, 2.0))
    return out


STATES = {
    "fixed": (lambda: FixedKL(0.3), lambda: FixedKL(0.1)),
    "adaptive": (lambda: AdaptiveKL(0.3, 2.0, 640), lambda: AdaptiveKL(0.1, 2.0, 640)),
    "best": (lambda: Best(3, 0.5, {"eval/loss": 2.0}), Best),
    "no best": (Best, lambda: Best(1, 0.1, {})),
    "stopping": (
        stopping,
        lambda: StoppingRules(StopConfig(), PPOConfig(), SamplingConfig(), Path(), None),
    ),
    "course": (course, lambda: Course(None)),
    "evaluations": (lambda: Evaluations({"eval/loss": 1.0}, 2), Evaluations),
    "layers": (lambda: Sharing({"kept": ["a"], "q 4x4": ["b", "c"]}), Sharing),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_is_json_and_comes_back_whole(name):
    made, fresh = STATES[name][0](), STATES[name][1]()
    state = made.state_dict()
    before = json.dumps(state)
    assert json.dumps(fresh.state_dict()) != before, "the test could not tell"
    fresh.load_state_dict(json.loads(before))
    assert json.dumps(fresh.state_dict()) == before


@pytest.mark.parametrize("name", STATES)
def test_a_key_that_is_missing_unknown_or_of_another_type_is_refused(name):
    made, one = (STATES[name][0]() for _ in range(2))
    state = json.loads(json.dumps(made.state_dict()))
    kind = type(made).__name__
    with pytest.raises(RegistryError, match=rf"state of {kind}\.more: no such field"):
        one.load_state_dict(state | {"more": 1})
    for key in state:
        without = {name: value for name, value in state.items() if name != key}
        with pytest.raises(RegistryError, match=rf"state of {kind}\.{key}: missing"):
            one.load_state_dict(without)
        with pytest.raises(RegistryError, match=rf"state of {kind}\.{key}\S*: expected"):
            one.load_state_dict(state | {key: object()})
    assert json.dumps(one.state_dict()) == json.dumps(state), "it is as it was"
