"""A byte that flipped, or a part of another run, is found before anything is trained on it."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_line import ROOT, SMALL, few_rows, run_stage
from test_registry import flip

from rlhf import cli, contract, manifest, models, parts
from rlhf.errors import RegistryError
from rlhf.registry import Registry

ROWS = {  # train, validation, test
    "sft": (32, 8),
    "rm": (32, 8, 8),
    "ppo": (16, 8),
}
FASTER = {
    "sft": ["train.max_steps=2", "evaluation.prompts=2", "sampling.max_new_tokens=12"],
    "rm": ["train.max_steps=2"],
    "ppo": ["ppo.steps=1", "evaluation.prompts=2"],
}
CULPRITS = ("tokenizer", "template", "head", "adapter", "base")


def another_base(folder: Path) -> Path:
    """The tiny base with other weights, another tokenizer and another template."""
    shutil.copytree(ROOT / "data/tiny/base", folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    other = {n: w * (1 + 0.1 * torch.randn(w.shape)) for n, w in weights.items()}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})

    stored = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(stored))

    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content'] + ' '", "''"))
    return folder


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """A factory: the overrides for a stage with `runs` as its registry."""
    data = tmp_path_factory.mktemp("data")
    paths = {stage: few_rows(data, stage, ROWS[stage]) for stage in SMALL}

    def make(runs: Path, stage: str, *more: str) -> list[str]:
        fixed = [f"runs_dir={runs}", "tracking=off"]
        rows = f"data.path={paths[stage]}"
        return [*fixed, *SMALL[stage], *FASTER[stage], rows, *more]

    return make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., list[str]]) -> Path:
    """sft, rm and ppo/tiny; sft and rm/other of another seed; sft and rm/else of another base."""
    runs = tmp_path_factory.mktemp("runs")
    model = another_base(tmp_path_factory.mktemp("models") / "else")
    line = [(stage, "run=tiny") for stage in SMALL]
    line += [("sft", "run=other", "seed=1"), ("rm", "run=other", "seed=1")]
    line += [("sft", "run=else", f"model.path={model}"), ("rm", "run=else")]
    with pytest.MonkeyPatch.context() as patch:
        for stage, *more in line:
            assert run_stage(patch, stage, *command(runs, stage, *more)) == 0
    return runs


@pytest.fixture
def runs(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The line `tiny`, to be damaged at will."""
    copy = tmp_path_factory.mktemp("runs")  # its name is in messages: no culprit's may be
    for stage in SMALL:
        ignore = shutil.ignore_patterns("checkpoints")
        shutil.copytree(made / stage / "tiny", copy / stage / "tiny", ignore=ignore)
    return copy


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """`rlhf verify REF`: exit code, and all it said."""

    def run(runs: Path, reference: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf", "verify", reference, "--runs-dir", str(runs)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capfd.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return run


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a stage that must refuse, and leave nothing: what it said."""

    def run(runs: Path, stage: str, *overrides: str) -> str:
        before = sorted(runs.glob("[a-z]*/*"))  # besides locks
        capfd.readouterr()
        code = run_stage(monkeypatch, stage, *overrides)
        said = capfd.readouterr().err
        assert code == 2, said
        assert sorted(runs.glob("[a-z]*/*")) == before, "something was written"
        assert "step 1/" not in said, "it trained"
        return said[said.index("refused:") :]

    return run


# ---------------------------------------------------------------- one byte


@pytest.mark.parametrize(
    ("reference", "setting"),
    [
        ("sft/tiny", "rm policy_from"),
        ("rm/tiny", "ppo rm_from"),
        pytest.param("sft/tiny", "ppo policy_from", marks=pytest.mark.slow),
        pytest.param("ppo/tiny", "ppo policy_from", marks=pytest.mark.slow),
    ],
)
def test_a_flipped_byte_of_any_immutable_file_stops_verify_and_the_next_stage(
    runs, command, verify, refusal, monkeypatch, reference, setting
):
    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(models, "load_parent", load)
    stage, key = setting.split()
    overrides = command(runs, stage, "run_name=child", f"{key}={reference}")
    run = Registry(runs).resolve(reference)
    draw = random.Random(0)
    names = [*run.manifest.files, "manifest.json"]
    assert {"model/model.safetensors", "model/tokenizer.json", "config.yaml"} < set(names)
    for name in names:
        file = run.path / name
        sound = file.read_bytes()
        flip(file, draw.randrange(len(sound)))
        code, said = verify(runs, reference)
        assert code == 2, name
        assert name in said
        assert name in refusal(runs, stage, *overrides)
        file.write_bytes(sound)
    assert verify(runs, reference)[0] == 0


# ---------------------------------------------------------------- a part of another run


def swap(culprit: str, ours: Path, theirs: Path) -> None:
    """Put one part of the model in `theirs` into the one in `ours`."""
    if culprit in ("tokenizer", "template"):
        names = {"tokenizer": ["tokenizer.json", "tokenizer_config.json"]}
        for name in names.get(culprit, ["chat_template.jinja"]):
            shutil.copyfile(theirs / name, ours / name)
        return
    recorded = json.loads((ours / parts.FILE).read_text())
    weights, others = (load_file(f / "model.safetensors") for f in (ours, theirs))
    chosen = [n for n, about in recorded.items() if about["part"] == culprit and n in weights]
    assert chosen
    weights |= {name: others[name] for name in chosen}
    save_file(weights, ours / "model.safetensors", metadata={"format": "pt"})


def reseal(run: Path) -> None:
    """Give a manifest the sizes, hashes and digest of the files as they are; no other fact."""
    file = run / "manifest.json"
    sealed = manifest.unseal(manifest.Manifest, file.read_bytes(), str(file))
    files = {name: manifest.settle(run / name) for name in manifest.run_files(run)}
    file.write_text(manifest.seal(dataclasses.replace(sealed, files=files)))


def named(message: str) -> set[str]:
    """The culprits that a message names."""
    return {word for word in CULPRITS if re.search(rf"\b{word}\b", message)}


def donor(made: Path, culprit: str) -> Path:
    """Of another seed where only that differs, else of another base."""
    return made / "rm" / ("other" if culprit in ("head", "adapter") else "else") / "model"


@pytest.fixture
def child(runs: Path, command: Callable[..., list[str]]) -> list[str]:
    """The overrides of a new PPO run from sft/tiny and rm/tiny."""
    return command(runs, "ppo", "run_name=child")


@pytest.mark.parametrize("culprit", CULPRITS)
def test_a_part_of_another_reward_model_is_named(made, runs, child, verify, refusal, culprit):
    swap(culprit, runs / "rm/tiny/model", donor(made, culprit))
    assert named(refusal(runs, "ppo", *child)) == {culprit}
    code, _ = verify(runs, "rm/tiny")
    assert code == 2


@pytest.mark.parametrize("culprit", CULPRITS)
def test_a_part_of_another_reward_model_is_named_when_the_manifest_was_resealed(
    made, runs, child, verify, refusal, culprit
):
    """Whoever swaps files can fix their hashes too; what the run recorded besides still tells."""
    swap(culprit, runs / "rm/tiny/model", donor(made, culprit))
    reseal(runs / "rm/tiny")
    assert verify(runs, "rm/tiny")[0] == 0, "the hashes are right"
    assert named(refusal(runs, "ppo", *child)) == {culprit}


def test_another_adapter_beside_the_merged_weights_is_named(made, runs, child, refusal):
    """PPO on one backbone reads this one. The head of a reward model lies in it, too."""
    theirs, ours = (
        f / "adapter/adapter_model.safetensors"
        for f in (made / "rm/other/model", runs / "rm/tiny/model")
    )
    shutil.copyfile(theirs, ours)
    reseal(runs / "rm/tiny")
    assert named(refusal(runs, "ppo", *child)) == {"adapter", "head"}


@pytest.mark.parametrize("culprit", ["tokenizer", "template", "adapter", "base"])
@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_a_part_of_another_policy_is_named_when_the_manifest_was_resealed(
    made, runs, command, refusal, stage, culprit
):
    theirs = made / "sft" / ("other" if culprit == "adapter" else "else") / "model"
    swap(culprit, runs / "sft/tiny/model", theirs)
    reseal(runs / "sft/tiny")
    foreign = ["allow_foreign_rm=true"] if stage == "ppo" else []  # or the digest would tell first
    overrides = command(runs, stage, "run_name=child", *foreign)
    assert named(refusal(runs, stage, *overrides)) == {culprit}


@pytest.mark.parametrize("resealed", [False, True])
def test_all_weights_of_another_line_are_named_by_their_parts(made, runs, child, refusal, resealed):
    shutil.copyfile(
        made / "rm/else/model/model.safetensors", runs / "rm/tiny/model/model.safetensors"
    )
    if resealed:
        reseal(runs / "rm/tiny")
    assert named(refusal(runs, "ppo", *child)) == {"head", "adapter", "base"}


def test_a_whole_other_run_under_the_name_is_found_by_its_children(
    made, runs, command, verify, refusal
):
    """Weights, tensors.json, golden values and manifest all fit: it is a sound run, another one.

    Nothing in it can tell. What can is the digest that each child recorded of its parent.
    """
    adapter = "adapter/adapter_model.safetensors"
    for name in ("model.safetensors", adapter, parts.FILE, parts.GOLDEN):
        shutil.copyfile(made / "rm/other/model" / name, runs / "rm/tiny/model" / name)
    reseal(runs / "rm/tiny")
    assert verify(runs, "rm/tiny")[0] == 0
    contract.parent(Registry(runs), "rm_from", "rm/tiny")
    code, said = verify(runs, "ppo/tiny")
    assert code == 2
    assert "parent reward_model rm/tiny: is not what this run started from" in said
    said = refusal(runs, "ppo", *command(runs, "ppo"))  # the same command again
    assert "parent reward_model: rm/tiny is not what it was: this run is stale" in said


def test_a_resealed_parent_of_the_reward_model_is_no_longer_its_parent(runs, child, refusal):
    file = runs / "sft/tiny/config.yaml"
    file.write_text(file.read_text() + "# more\n")
    reseal(runs / "sft/tiny")
    assert "rm/tiny was trained from an earlier sft/tiny" in refusal(runs, "ppo", *child)
    with pytest.raises(RegistryError, match="no such run"):
        Registry(runs).resolve("ppo/child")
