"""A model made elsewhere becomes a run: looked at, copied, held against its copy, published.

What can be checked is checked: the folder is whole, holds neither code nor pickles, fits its stage,
and the copy says what the folder said. What it was trained on stays unknown (`data` is empty), and
that a reward model was trained from its `parent` is the word of whoever adopts it.

The copy keeps the folder's dtype. Golden values are computed as a child on this machine computes:
in bf16 on a GPU that has it, else in fp32, so that their tolerance is the one that children need.
Adopt where you train, or name that dtype. What can be refused without torch is refused first, and
nothing is written before every weight was read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open

from rlhf import contract, parts
from rlhf.config import CONF, EngineConfig, TemplateConfig
from rlhf.errors import ConfigError, RegistryError, StoppedByGuard
from rlhf.manifest import PICKLES, BaseModel, Parent, TokenizerFacts, flat, sha256
from rlhf.registry import Absent, Published, Reference, Registry, check_run_name, parse_reference
from rlhf.run import Plan, Run, open_run

if TYPE_CHECKING:  # torch and transformers
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LANGUAGE_MODEL = ("ForCausalLM", "LMHeadModel")
CLASSIFIER = ("ForSequenceClassification",)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = f"{parts.HEAD}weight"  # the only head that `models.token_values` reads
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "n_embd", "n_layer")  # n_: of GPT-2

# A question and an answer, as short as they are so that any model has positions for them.
PROBES = (
    ("What do bees make?", "They make honey."),
    ("Name a color.", "Blue is the color of a clear sky."),
    ("How do I boil an egg?", "Put it in hot water for eight minutes."),
    ("Say hello.", "Hello!"),
    ("Why is bread soft?", "Yeast fills the dough with bubbles."),
    ("Tell me a story.", "Once there was a small boat that loved the sea."),
    ("What is 2 + 3?", "It is 5."),
    ("Is it cold on the moon?", "At night, yes: far below any winter here."),
)


@dataclasses.dataclass(frozen=True)
class Adopted:
    """An adopted run; `new` is False where it was there before, made of the same files."""

    run: Published
    new: bool
    notes: list[str]


def adopt(
    registry: Registry,
    folder: Path,
    *,
    stage: str,
    run_name: str,
    parent: str | None = None,
    template: str | None = None,
    dtype: str = "auto",
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
) -> Adopted:
    """Publish a Hugging Face folder as `<stage>/<run_name>`.

    Args:
        folder: a causal language model for sft, a sequence classifier with one label for rm.
        parent: reference of the run that a reward model was trained from. Without it the reward
            model is a foreign one: PPO takes it with allow_foreign_rm=true.
        template: "chat" (the tokenizer's own), "inherit" (the parent's), another one of
            conf/template, or a file with a chat template. Without it: the tokenizer's own, or
            else the parent's.
        dtype: what children compute in, as their engine.dtype: auto, fp32, bf16 or fp16.
        max_prompt_tokens, max_response_tokens: what it was trained on, where that is known: PPO
            does not let a reward model read longer texts.

    Raises:
        ConfigError: a setting or the folder does not fit.
        RegistryError: the name is taken, or the reward model does not read what its parent writes.
    """
    engine_cfg = EngineConfig(zero_stage=0, dtype=dtype)
    limits = _limits(max_prompt_tokens, max_response_tokens)
    check_run_name(run_name)
    _check_stage(stage, parent)
    files = look(folder, stage)
    parents = {}
    if parent is not None:
        parents["policy"] = _parent(registry, parent, folder)
    chosen = _template(template, folder, parents.get("policy"))
    config = flat(
        {
            "stage": stage,
            "run_name": run_name,
            "adopted_from": str(folder),
            "adopted_sha256": _digest(files),
            "template": dataclasses.asdict(chosen),
            "engine.dtype": dtype,
            **limits,
        }
    )
    if there := _there(registry, stage, run_name, config, parents):
        return Adopted(there, new=False, notes=[])
    started = time.perf_counter()
    source = _read(folder, stage, chosen, parents.get("policy"))
    with open_run(registry, stage, run_name, config, parents) as run:
        try:
            _write(run, source, parents.get("policy"), engine_cfg, started)
        except StoppedByGuard as error:
            _remove(run)
            raise ConfigError(
                f"{folder}: the model in it is not sound, and nothing of it was kept: {error}"
            ) from error
        except (OSError, SafetensorError) as error:
            _remove(run)
            raise RegistryError(
                f"{run.reference}: not written, and nothing of it was kept: {error}. Put this "
                "right, and adopt it again."
            ) from error
        except BaseException:
            _remove(run)
            raise
        assert run.published is not None
        return Adopted(run.published, new=True, notes=run.notes)


def _remove(run: Run) -> None:
    """What was there before lies in .replaced; all that is left was written by this process."""
    shutil.rmtree(run.path, ignore_errors=True)
    with contextlib.suppress(OSError):
        run.path.parent.rmdir()  # where it was the only run


# ---------------------------------------------------------------- settings


def _limits(prompt: int | None, response: int | None) -> dict[str, int]:
    given = {"max_prompt_tokens": prompt, "max_response_tokens": response}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')}={value}: it counts tokens, 1 or more. Leave it out "
                "where it is not known."
            )
    return {f"data.{name}": value for name, value in given.items() if value is not None}


def _check_stage(stage: str, parent: str | None) -> None:
    if stage not in ("sft", "rm"):
        raise ConfigError(
            f"--stage={stage}: cannot be adopted. Choose sft, for a language model (also one that "
            "PPO made: a policy starts from it just so), or rm, for a reward model."
        )
    if parent is not None and stage != "rm":
        raise ConfigError(
            f"--parent={parent}: an SFT run starts a line of work and has no parent. Leave it "
            "out, or give --stage rm."
        )


def _parent(registry: Registry, reference: str, folder: Path) -> Published:
    """The run that the reward model in `folder` is said to come from; one that it can come from."""
    stages = contract.PLAYED_BY["policy_from"]
    if parse_reference(reference).stage not in stages:
        raise ConfigError(
            f"--parent={reference}: a reward model is trained from a run of stage "
            f"{' or '.join(stages)}. Name that one."
        )
    parent = contract.parent(registry, "policy_from", reference)
    ours, theirs = _json(folder / "config.json"), _json(parent.tokenizer_dir / "config.json")
    wrong = [
        f"{key}: {ours.get(key)} and {theirs.get(key)}"
        for key in SHAPE
        if ours.get(key) != theirs.get(key)
    ]
    if wrong:
        listed = "\n  ".join(wrong)
        raise RegistryError(
            f"--parent={reference}: {folder} cannot have been trained from it. They differ in:\n"
            f"  {listed}\nName the run it came from, or leave --parent out: PPO then takes it "
            "with allow_foreign_rm=true."
        )
    return parent


def _template(given: str | None, folder: Path, parent: Published | None) -> TemplateConfig:
    """How conversations become text; `chat_template` None keeps the tokenizer's own."""
    own = (folder / "chat_template.jinja").is_file() or (
        "chat_template" in _json(folder / "tokenizer_config.json", optional=True)
    )
    if given == "inherit" or (given is None and parent is not None):
        if parent is None:
            raise ConfigError(
                "--template=inherit: there is no run to inherit from. Add --parent, or choose "
                "another template."
            )
        if given is None and own:  # compared with the parent's later
            return TemplateConfig("inherit")
        from rlhf import text

        tokenizer = text.load_parent_tokenizer(parent, template=TemplateConfig("inherit"))
        return TemplateConfig("inherit", str(tokenizer.chat_template))
    name = given or "chat"
    if name == "chat" and not own:
        raise ConfigError(
            f"--template={name}: the tokenizer in {folder} has no chat template. --template plain "
            "is prompt, newline, answer; --template FILE reads a chat template of your own. It "
            "must be the text that the model was trained on."
        )
    if (preset := CONF / "template" / f"{name}.yaml").is_file():
        values: Any = OmegaConf.to_container(OmegaConf.load(preset))
        return TemplateConfig(values["name"], values.get("chat_template"), values.get("tokens", []))
    try:
        return TemplateConfig(Path(name).name, Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(path.stem for path in (CONF / "template").glob("*.yaml")))
        raise ConfigError(
            f"--template={name}: cannot be read as a file ({error}), and is none of: {known}."
        ) from error


# ---------------------------------------------------------------- the folder, before any weight


def look(folder: Path, stage: str) -> list[Path]:
    """The files of a model, if it fits `stage`. Reads no weight and imports no torch.

    Raises:
        ConfigError: the folder is not one that can be adopted.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no folder there. adopt takes a folder on this machine; `hf download NAME "
            "--local-dir DIR` makes one of a name on the model hub."
        )
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{folder}: an adapter (adapter_config.json), not a whole model. Load it with peft, "
            "merge_and_unload() it, save that with save_pretrained, and adopt the new folder."
        )
    about = _json(folder / "config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _json(folder / name, optional=True):
            raise ConfigError(
                f"{folder}: {name} has auto_map: it needs code of its own (trust_remote_code), "
                "which is never run here. Convert it to a class of transformers."
            )
    if "quantization_config" in about:
        raise ConfigError(
            f"{folder}: config.json has quantization_config: its weights are packed and cannot be "
            "trained. Adopt the model it was made from, or save it dequantized."
        )
    _check_architecture(folder, about, stage)
    weights = _weights(folder)
    if stage == "rm":
        _check_head(folder, weights)
    kinds = ("tokenizer", "template")
    texts = [file for file in folder.iterdir() if parts.of_file(f"model/{file.name}") in kinds]
    return sorted([folder / "config.json", *weights, *filter(Path.is_file, texts)])


def _check_architecture(folder: Path, about: dict[str, Any], stage: str) -> None:
    names = about.get("architectures") or ["(none)"]
    name = str(names[0])
    where = f"{folder}: config.json names architecture {name}"
    if name.endswith(LANGUAGE_MODEL):
        if stage == "rm":
            raise ConfigError(
                f"{where}: a language model, without a scalar head: its scores would be random. "
                "Give the classifier with one label that was trained from it; --stage sft adopts "
                "it as a policy, and `make rm` trains a reward model from that."
            )
        return
    if not name.endswith(CLASSIFIER):
        raise ConfigError(
            f"{where}: neither a causal language model (...ForCausalLM) nor a sequence classifier "
            "(...ForSequenceClassification). Only these two are read here."
        )
    if stage == "sft":
        raise ConfigError(
            f"{where}: a classifier scores texts and writes none, so it cannot be a policy. "
            "--stage rm adopts it as a reward model."
        )
    labels = len(about["id2label"]) if "id2label" in about else int(about.get("num_labels", 2))
    if labels != 1:
        raise ConfigError(
            f"{where} with {labels} labels: a reward model has one, its score. Which of several "
            "is the reward cannot be known; save a classifier with num_labels=1."
        )


def _weights(folder: Path) -> list[Path]:
    """The safetensors that transformers will load, all of them there."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        names = sorted(set(_json(folder / INDEX).get("weight_map", {}).values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ConfigError(
                f"{folder}: {INDEX} lists {', '.join(missing)}: not there (or a broken link). "
                "Fetch the folder again."
            )
        return [folder / INDEX, *(folder / name for name in names)]
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICKLES)
    if pickles:
        raise ConfigError(
            f"{folder}: its weights are pickles ({', '.join(pickles[:3])}), which can run code "
            "when they are loaded. Load it with transformers where you trust it, save_pretrained "
            "it to a new folder (with safe_serialization=True before transformers 5), and adopt "
            "that."
        )
    raise ConfigError(f"{folder}: no weights: neither {WEIGHTS} nor {INDEX} is there.")


def _check_head(folder: Path, weights: list[Path]) -> None:
    shapes: dict[str, list[int]] = {}
    for file in weights:
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, "numpy") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{file}: not whole safetensors ({error}). Fetch it again."
            ) from error
    if HEAD not in shapes:
        firsts = Counter(name.split(".")[0] for name in shapes)
        backbone = max(firsts, key=firsts.__getitem__, default="")
        others = sorted(name for name in shapes if name.split(".")[0] != backbone)
        beside = f" What lies beside the backbone: {', '.join(others[:4])}." if others else ""
        raise ConfigError(
            f"{folder}: its weights have no {HEAD}, so the head is missing: it would be random."
            f"{beside} Only a linear head under that name is read here."
        )
    if shapes[HEAD][0] != 1:
        raise ConfigError(
            f"{folder}: {HEAD} has {shapes[HEAD][0]} rows: a reward model has one, its score."
        )


def _json(file: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not file.exists():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file}: cannot be read ({error}). adopt takes a folder that save_pretrained wrote."
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: not a JSON object. Fetch the folder again.")
    return values


def _digest(files: list[Path]) -> str:
    """sha256 over names and contents: the same model, wherever it lies, has the same."""
    lines = [f"{file.name} {sha256(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _there(
    registry: Registry,
    stage: str,
    run_name: str,
    config: dict[str, Any],
    parents: dict[str, Published],
) -> Published | None:
    """The finished run of that name, if it is what this command would make.

    Raises:
        RegistryError: it is another one.
    """
    try:
        made, _ = registry.load(Reference(stage, run_name))
    except Absent:
        return None
    reference = f"{stage}/{run_name}"
    if "adopted_sha256" not in made.config:
        differences = ["it was trained here, not adopted"]
    else:
        plan = Plan(config, [Parent(r, p.reference, p.digest) for r, p in parents.items()])
        found = plan.differences(made)
        differences = [line for line in found if not line.startswith("adopted_from:")]
    if not differences:
        return registry.resolve(reference)
    listed = "\n  ".join(differences)
    raise RegistryError(
        f"--run-name={run_name}: {reference} is finished, and is another run:\n  {listed}\n"
        f"Choose another --run-name, or remove that one: `rlhf rm {reference}`."
    )


# ---------------------------------------------------------------- from the folder to a run


@dataclasses.dataclass
class Source:
    """A folder's model and tokenizer in memory; `probes` are what golden values are recorded of."""

    folder: Path
    stage: str
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any]  # as `text.tokenizer_facts`
    probes: list[list[int]]
    model: PreTrainedModel


def _read(folder: Path, stage: str, template: TemplateConfig, parent: Published | None) -> Source:
    from rlhf import engine, models, text

    engine.start(0)  # as a stage does: saving asks DeepSpeed whether it holds the weights
    tokenizer = _tokenizer(folder, template)
    facts = _published_facts(tokenizer, folder)
    if parent is not None:
        _check_same_text(folder, facts, parent)
    probes = _probes(text.Renderer(tokenizer), template, answered=stage == "rm")
    model = _load(folder, stage, tokenizer, None)
    if bad := models.not_finite(folder):
        raise ConfigError(
            f"{folder}: {len(bad)} of its tensors hold nan or infinities ({', '.join(bad[:3])}): "
            "it is damaged, or its training diverged. Adopt an earlier checkpoint of it."
        )
    return Source(folder, stage, tokenizer, facts, probes, model)


def _write(
    run: Run, source: Source, parent: Published | None, engine_cfg: EngineConfig, started: float
) -> None:
    from rlhf import engine, golden, models

    base = BaseModel(str(source.folder), None, models.fingerprint(source.model))
    models.publish(source.model, source.tokenizer, run.model_dir)
    dtype = engine.dtype(engine_cfg)
    if source.model.dtype != dtype:  # not cast: some modules stay in fp32 when loaded as bf16
        source.model = _load(source.folder, run.stage, source.tokenizer, dtype)
    model: Any = source.model.to(engine.device())  # type: ignore[arg-type]
    if run.stage == "rm":
        _check_own_scores(source.folder, model, source.probes, dtype)
    write = golden.write_scores if run.stage == "rm" else golden.write_logits
    said = write(model, source.probes, int(source.facts["pad_id"]), run.model_dir, dtype)
    run.publish(
        base=base if parent is None else parent.manifest.base,
        tokenizer=TokenizerFacts(**source.facts),
        method={"name": "full"},
        data=[],
        metrics={},
        golden=said,
        environment={"world_size": 1, "zero_stage": 0, "seed": 0, **engine.where(engine_cfg)},
        phases={"adopt": {"seconds": time.perf_counter() - started}},
    )
    assert run.published is not None
    del model, source.model  # room for the copy
    _check_copy(run.published, dtype)


def _tokenizer(folder: Path, template: TemplateConfig) -> PreTrainedTokenizerBase:
    from rlhf import text

    tokenizer = text.load_tokenizer(str(folder), template=template)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{folder}: its tokenizer has no tokenizer.json, and none could be made of what is "
            "there. Save it as a fast one: its hash is how two stages know they read the same."
        )
    if lacking := text.add_tokens(tokenizer, template):
        raise ConfigError(
            f"--template={template.name}: {', '.join(lacking)}: the tokenizer in {folder} has no "
            "such tokens, so its model was never trained on this template. Choose the one it was "
            "trained with, or train it: stages/sft.py gives a base model new tokens."
        )
    return tokenizer


def _published_facts(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Hashes and special ids of the tokenizer as children will load it: written, and read again."""
    from rlhf import text

    with tempfile.TemporaryDirectory() as copy:
        shutil.copyfile(folder / "config.json", Path(copy) / "config.json")
        tokenizer.save_pretrained(copy)
        return text.published_facts(Path(copy))


def _check_same_text(folder: Path, facts: dict[str, Any], parent: Published) -> None:
    theirs = dataclasses.asdict(parent.manifest.tokenizer)
    wrong = [
        f"{name.removesuffix('_hash')}: {facts[name]} and {theirs[name]}"
        for name in theirs
        if facts[name] != theirs[name]
    ]
    if wrong:
        listed = "\n  ".join(wrong)
        raise RegistryError(
            f"{folder} and {parent.reference} differ in:\n  {listed}\nThe reward model is given "
            f"the token ids that the policy writes, so it would read another text. Name the run "
            "it was trained from with --parent; --template inherit takes that run's template."
        )


def _probes(renderer: Any, template: TemplateConfig, *, answered: bool) -> list[list[int]]:
    """Token ids to record golden values of; that the template serves all stages is seen here."""
    out = []
    for question, answer in PROBES:
        asked = [{"role": "user", "content": question}]
        try:
            prompt, end = renderer.prompt(asked), renderer.response(asked, answer)
        except TemplateError as error:
            raise ConfigError(
                f"--template={template.name}: it does not render a question and its answer: "
                f"{error}. Mend it, or choose another."
            ) from error
        out.append(prompt + end if answered else prompt)
    return out


def _load(
    folder: Path, stage: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model of the folder, every tensor of it from there; in its own dtype where none is given.

    Raises:
        ConfigError: it does not load, a tensor is missing or left over, or the tokenizer is of
            another model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf import loading

    auto: Any = AutoModelForCausalLM if stage == "sft" else AutoModelForSequenceClassification
    try:
        model, report = loading.model(auto, folder, named=str(folder), dtype=dtype or "auto")
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{folder}: no model could be loaded: {first}") from error
    for what, names in (
        ("lack tensors that would be random", report["missing_keys"]),
        ("hold tensors that would be dropped", report["unexpected_keys"]),
    ):
        if names:
            raise ConfigError(
                f"{folder}: its weights {what}: {', '.join(sorted(names)[:4])} ({len(names)} in "
                f"all). {type(model).__name__} is what config.json names; save the model with "
                "that class, whole."
            )
    size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > size:
        raise ConfigError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens but the model has embeddings "
            f"for {size}. They do not belong together."
        )
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    model.config.update({name: getattr(tokenizer, name) for name in names})
    return model.eval()


def _check_own_scores(
    folder: Path, model: PreTrainedModel, sequences: list[list[int]], dtype: torch.dtype
) -> None:
    """Our scores (the head at the last token) are those of the model's own forward pass."""
    import torch

    from rlhf import golden, models

    worst = torch.zeros(())
    with torch.no_grad():
        for sequence in sequences:
            ids = torch.tensor([sequence], device=model.device)
            ours = models.scores(model, ids, torch.ones_like(ids, dtype=torch.bool))
            theirs = model(input_ids=ids).logits.float().flatten()
            worst = torch.maximum(worst, (ours - theirs).abs().max().cpu())  # which keeps a nan
    off = float(worst)
    if not off <= golden.TOLERANCE[dtype]:
        raise ConfigError(
            f"{folder}: {type(model).__name__} gives scores that differ by {off:.3g} from its "
            f"{HEAD} on the last token, which is how rewards are read here. Its scores would mean "
            "something else; convert it, or use a model that scores that way."
        )


def _check_copy(run: Published, dtype: torch.dtype) -> None:
    """What a child will load says what the folder said.

    Raises:
        RegistryError: it does not.
    """
    from rlhf import engine, golden, models, text

    tokenizer = text.load_parent_tokenizer(run, template=TemplateConfig("inherit"))
    load = models.load_scalar if run.stage == "rm" else models.load_causal
    model = models.load_parent(load, run, tokenizer, dtype)
    child = models.freeze(model).to(engine.device())
    (golden.check_scores if run.stage == "rm" else golden.check_logits)(child, run)
