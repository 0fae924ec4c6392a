"""SFT and reward modelling by TRL's trainers: the only file that imports trl.

TRL gets token ids and masks from our renderer and is asked to change nothing; that it kept every
row is asserted.
"""

from __future__ import annotations

import inspect
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from rlhf import engine, libraries, losses, models, ranks
from rlhf.checkpointing import Checkpoints
from rlhf.config import EngineConfig, TrainConfig
from rlhf.errors import StoppedByGuard
from rlhf.methods import courses, lora_drop
from rlhf.methods.settings import LoraDropConfig, MethodConfig
from rlhf.state import read_state
from rlhf.tracking import Tracker

Rows = list[dict[str, list[int]]]

NAMES = {  # TRL's name -> ours
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "margin": "train/margin",
    "epoch": "train/epoch",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "eval_loss": "eval/loss",
    "eval_accuracy": "eval/accuracy",
    "eval_margin": "eval/margin",
}

_SFT = {"completion_only_loss": True, "max_length": None}  # settings that TRL adds
_RM = {"max_length": None, "center_rewards_coefficient": None}

# What TRL calls `engine.checkpointing`; transformers 5.24 has a newer name, which is to replace it.
_RECOMPUTES = next(
    name
    for name in ("gradient_checkpointing", "activation_checkpointing")
    if name in SFTConfig.__dataclass_fields__
)


def changed() -> Iterator[str]:
    """What this file relies on in TRL and in transformers' Trainer, and is not there: lines.

    A method that is overridden here and that the Trainer no longer has would never be called, and
    no error would say so.
    """
    for kind in (SFTTrainer, RewardTrainer):
        yield from libraries.lacking(
            kind,
            *("_get_train_sampler", "create_optimizer", "create_scheduler", "compute_loss"),
            *("train", "_save_checkpoint", "evaluate", "save_model", "_prepare_inputs"),
            "compute_loss_context_manager",
        )
        yield from libraries.unmentioned(
            kind,
            *("_tr_loss", "_globalstep_last_logged", "_metrics", "neftune_hook_handle"),
            *("current_gradient_accumulation_steps", "callback_handler", "deepspeed"),
        )
    yield from libraries.refusing(Trainer._save_checkpoint, "model", "trial")
    yield from libraries.refusing(Trainer._get_train_sampler, "train_dataset")
    yield from libraries.refusing(Trainer.create_scheduler, "num_training_steps", "optimizer")
    yield from libraries.refusing(
        Trainer.compute_loss, "model", "inputs", "return_outputs", "num_items_in_batch"
    )
    yield from libraries.refusing(Trainer.save_model, "output_dir", "_internal_call")
    yield from libraries.unmentioned(inspect.getmodule(SFTTrainer), "input_ids", "completion_mask")
    yield from libraries.unmentioned(
        inspect.getmodule(RewardTrainer), "chosen_ids", "rejected_ids", "accuracy", "margin"
    )
    ours = _arguments(TrainConfig(), EngineConfig(), steps=1, micro=1, accumulation=1)
    others = ("output_dir", "max_steps", "eval_on_start", "seed", "deepspeed")
    for config, specific in ((SFTConfig, _SFT), (RewardConfig, _RM)):
        yield from libraries.refusing(config.__init__, *ours, *others, *specific)


def optimizer_steps(cfg: TrainConfig, rows: int) -> int:
    """How many updates `train` makes of so many rows.

    An epoch has whole batches only: a rest of rows would weigh more than others, and it cannot be
    shared out alike on every number of processes. Which rows it leaves out is drawn anew each time.
    """
    if cfg.max_steps is not None:
        return cfg.max_steps
    return max(1, round(cfg.epochs * (rows // cfg.batch_size)))


def train_sft(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Rows,
    eval_rows: Rows,
    cfg: TrainConfig,
    engine_cfg: EngineConfig,
    method: MethodConfig | None = None,
    **options: Any,
) -> dict[str, float]:
    """Minimise the mean negative log-likelihood of answer tokens; see `_train`."""
    return _train(
        _SFTTrainer,
        SFTConfig,
        dict(_SFT),
        model,
        tokenizer,
        train_rows,
        eval_rows,
        cfg,
        engine_cfg,
        method,
        best_by="eval/loss",
        **options,
    )


def train_rm(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Rows,
    eval_rows: Rows,
    cfg: TrainConfig,
    engine_cfg: EngineConfig,
    method: MethodConfig | None = None,
    *,
    center_coef: float,
    **options: Any,
) -> dict[str, float]:
    """Minimise the Bradley-Terry loss of preference pairs; see `_train`."""
    return _train(
        _RewardTrainer,
        RewardConfig,
        _RM | {"center_rewards_coefficient": center_coef or None},
        model,
        tokenizer,
        train_rows,
        eval_rows,
        cfg,
        engine_cfg,
        method,
        best_by="eval/accuracy",
        **options,
    )


def _train(
    trainer_class: Any,
    config_class: Any,
    specific: dict[str, Any],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Rows,
    eval_rows: Rows,
    cfg: TrainConfig,
    engine_cfg: EngineConfig,
    method: MethodConfig | None,
    *,
    seed: int,
    best_by: str,
    checkpoints: Checkpoints,
    tracker: Tracker | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Train `model` in place; it ends with the weights of the best evaluation.

    Args:
        model: ready to train (adapters attached, the rest frozen).
        train_rows, eval_rows: token ids as `Renderer.sft` or `Renderer.pairs` gives them.
        best_by: the held-out number that decides: "eval/loss" (lowest) or "eval/accuracy".
        checkpoints: writes them, and knows where an interrupted run goes on.
        tracker: gets every number; None on all processes but the main one.
        method: what made `model` ready, where that does more than to choose what is trained.
        note: gets a line for the user.

    Returns:
        The held-out numbers before ("start/eval/loss", ...) and after training ("eval/loss", ...).

    Raises:
        ConfigError: the method cannot be trained so.
        KeyboardInterrupt, Terminated: asked to stop, after a checkpoint.
        StoppedByGuard: a loss, a gradient norm or a held-out number is not finite, or gradients
            overflow in fp16 whatever the scale of the loss; and no evaluation before that was.
    """
    rows = cfg.batch_size // ranks.world_size()
    micro = ranks.rows_per_pass(rows, cfg.micro_batch_size)
    accumulation = rows // micro
    steps = optimizer_steps(cfg, len(train_rows))
    course, evaluations = courses.of(method, model, cfg, steps), Evaluations()
    state = TrainerState()
    checkpoints.track(trainer=state, course=course, evaluations=evaluations)
    if isinstance(method, LoraDropConfig):
        layers = lora_drop.Sharing()
        checkpoints.track(lora_drop=layers)
        _share(model, tokenizer, train_rows, method, cfg, engine_cfg, seed, micro, layers)
    computing = torch.get_num_threads()
    start = None if state.folder is None else trainer_folder(state.folder)
    converted = start is not None and engine.is_universal(start)
    with tempfile.TemporaryDirectory() as scratch:  # TRL wants a folder; it writes nothing
        args = config_class(
            output_dir=scratch,
            max_steps=steps,
            eval_on_start=checkpoints.step == 0,
            seed=seed,
            deepspeed=engine.deepspeed_config(
                engine_cfg,
                model,
                micro_batch_size=micro,
                accumulation=accumulation,
                max_grad_norm=cfg.max_grad_norm,
            )
            | {"checkpoint": {"load_universal": converted}},
            **_arguments(cfg, engine_cfg, steps, micro, accumulation),
            **specific,
        )
        dtypes = [(p, p.dtype) for p in model.parameters() if p.requires_grad]
        trainer = trainer_class(
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(train_rows),
            eval_dataset=Dataset.from_list(eval_rows),
        )
        torch.set_num_threads(computing)  # on a CPU accelerate takes one for each core
        for parameter, dtype in dtypes:  # TRL makes bf16 of what is trained on a base in 4 bits
            parameter.data = parameter.data.to(dtype)
        trainer.checkpoints, trainer.engine_cfg, trainer.course = checkpoints, engine_cfg, course
        state.trainer = trainer
        trainer.rows_per_epoch = len(train_rows) // cfg.batch_size * cfg.batch_size
        trainer.remove_callback(_printer())
        report = _Report(
            checkpoints, evaluations, tracker, best_by, trainer, cfg, engine_cfg, state.folder
        )
        trainer.add_callback(report)
        kept = (len(trainer.train_dataset), len(trainer.eval_dataset))
        assert kept == (len(train_rows), len(eval_rows)), f"TRL kept {kept} rows"
        try:
            with checkpoints.working():
                if state.folder is None:
                    trainer.train()
                elif checkpoints.step < steps and not report.patience_is_spent:
                    trainer.train(resume_from_checkpoint=str(start))
                else:  # interrupted after the last step
                    assert state.weights is not None
                    models.load_trained(model, state.weights)
        finally:
            course.end()
            trainer.without_noise()
            engine.forget_trainer()
    if report.patience_is_spent and checkpoints.step < steps:
        note(
            f"stopped at step {checkpoints.step} of {steps}: {cfg.patience} evaluations in a row "
            "found nothing better (train.patience)"
        )
    if checkpoints.best.step is None:
        raise StoppedByGuard(
            f"no evaluation of this run gave a finite {best_by}, so there is no best model to "
            f"publish. {_way_out(cfg, engine_cfg)}"
        )
    if best := checkpoints.best_folder():
        models.load_trained(model, best / "model")
    first = {f"start/{name}": value for name, value in evaluations.first.items()}
    return first | checkpoints.best.numbers


@dataclass
class Evaluations:
    """What a trainer's evaluations have found.

    Attributes:
        first: the numbers before training; {} before there are any.
        worse: how many in a row were no better than the best.
    """

    first: dict[str, float] = field(default_factory=dict)
    worse: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        read = read_state(Evaluations, state, self)
        self.first, self.worse = read.first, read.worse


class TrainerState:
    """A trainer's part of a checkpoint: it reads it itself, when training goes on.

    Attributes:
        trainer: set before the first checkpoint.
        folder: what it wrote; None where training is new.
        weights: those that others may load.
    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self.folder: Path | None = None
        self.weights: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"trainer": self.trainer, "model": models.Trained(self.trainer.model)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        read = read_state(_TrainerFolders, state, self)
        self.folder, self.weights = read.trainer, read.model


@dataclass
class _TrainerFolders:
    """Of the two parts of a `TrainerState`."""

    trainer: Path
    model: Path


def _arguments(
    cfg: TrainConfig, engine_cfg: EngineConfig, steps: int, micro: int, accumulation: int
) -> dict[str, Any]:
    """Our settings by the Trainer's names."""
    return {
        "learning_rate": cfg.learning_rate,
        "lr_scheduler_type": (
            "constant_with_warmup" if cfg.schedule == "constant" else cfg.schedule
        ),
        "warmup_steps": round(cfg.warmup * steps),
        "weight_decay": 0.0,
        "max_grad_norm": cfg.max_grad_norm,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "optim": "adamw_torch",
        "bf16": engine.dtype(engine_cfg) == torch.bfloat16,
        "fp16": engine.dtype(engine_cfg) == torch.float16,
        _RECOMPUTES: engine_cfg.checkpointing,
        "use_cpu": engine.device().type == "cpu",
        "dataloader_pin_memory": engine.device().type != "cpu",
        "eval_strategy": "steps",
        "eval_steps": cfg.eval_every,
        "save_strategy": "no",
        "neftune_noise_alpha": cfg.neftune_alpha,
        "logging_steps": max(1, cfg.eval_every // 4),
        "logging_nan_inf_filter": False,  # it puts the mean of others in the place of a nan
        "disable_tqdm": True,
        "report_to": [],
    }


def _refuse_no_number(
    numbers: dict[str, float], step: int, cfg: TrainConfig, engine_cfg: EngineConfig
) -> None:
    """Every process gives the same numbers.

    Raises:
        StoppedByGuard: one of them is not finite.
    """
    bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
    if not bad:
        return
    what = ", ".join(f"{name} is {value}" for name, value in bad.items())
    if step == 0:
        raise StoppedByGuard(
            f"{what} before the first update: the model that training starts from gives no number "
            f"on the held-out rows. Its weights are damaged, or it overflows in engine.dtype="
            f"{engine_cfg.dtype}: start from another model, or use engine.dtype=fp32."
        )
    raise StoppedByGuard(f"{what} in step {step}: training diverged. {_way_out(cfg, engine_cfg)}")


def _way_out(cfg: TrainConfig, engine_cfg: EngineConfig) -> str:
    half = engine.dtype(engine_cfg) == torch.float16
    overflow = f", or engine.dtype={engine_cfg.dtype} overflows: use bf16 or fp32" if half else ""
    return (
        f"Most likely train.learning_rate={cfg.learning_rate:g} is too high for this model: divide "
        f"it by 10, or warm it up for longer (train.warmup={cfg.warmup:g}){overflow}. Start again "
        "with overwrite=true, or beside it with run_name=..."
    )


def _share(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    method: LoraDropConfig,
    cfg: TrainConfig,
    engine_cfg: EngineConfig,
    seed: int,
    micro: int,
    layers: lora_drop.Sharing,
) -> None:
    """Measure which layers may share one LoRA, unless this run did so before, and let them."""
    assert isinstance(model, peft.PeftModel)
    plan = layers.plan
    if plan is None:
        model.to(engine.device())
        models.recompute(model, engine_cfg)
        own = lora_drop.choose(
            model,
            method,
            rows,
            _plain_loss(model, tokenizer),
            batch_size=cfg.batch_size,
            micro_batch_size=micro,
            learning_rate=cfg.learning_rate,
            max_grad_norm=cfg.max_grad_norm,
            seed=seed,
        )
        plan = engine.from_main(lambda: own)  # one for all, whatever rounding did elsewhere
    layers.plan = plan
    lora_drop.apply(model, plan)


def _plain_loss(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> lora_drop.Loss:
    """The loss of SFT or, for pairs, of the reward model, without a trainer."""

    def padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(sequence) for sequence in sequences],
            batch_first=True,
            padding_value=int(tokenizer.pad_token_id or 0),
        ).to(engine.device())
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # [B, T]
        return ids, mask

    def sft(rows: Rows) -> tuple[Tensor, int, Tensor]:
        ids, mask = padded([row["input_ids"] for row in rows])
        counts = nn.utils.rnn.pad_sequence(
            [torch.tensor(row["completion_mask"]) for row in rows], batch_first=True
        ).to(ids.device)
        width = ids.shape[1] - 1
        logits = models.response_logits(model, ids, mask, width)  # [B, T - 1, V]
        logprobs = losses.logprobs_of(logits, ids[:, 1:])
        return -(logprobs * counts[:, 1:]).sum(), int(counts[:, 1:].sum()), mask

    def pairs(rows: Rows) -> tuple[Tensor, int, Tensor]:
        ids, mask = padded([row[name] for name in ("chosen_ids", "rejected_ids") for row in rows])
        chosen, rejected = models.scores(model, ids, mask).chunk(2)
        loss, _ = losses.pairwise_loss(chosen, rejected)
        return loss * len(rows), len(rows), mask

    return lambda rows: pairs(rows) if "chosen_ids" in rows[0] else sft(rows)


def trainer_folder(folder: Path) -> Path:
    """What the Trainer wrote in its part of one of our checkpoints."""
    (written,) = folder.glob("checkpoint-*")
    return written


class _Keeping:
    """A Trainer whose checkpoints are ours: complete or not there, and the sums between two log
    lines in them, so that a resumed run logs what an unbroken one does. Its epochs are whole
    batches; its optimizer is ours where the states are offloaded, or where the method's course has
    groups of its own, and so is its schedule."""

    checkpoints: Checkpoints
    engine_cfg: EngineConfig
    course: courses.Course
    rows_per_epoch: int

    def _get_train_sampler(self, train_dataset: Any = None) -> RandomSampler:
        this: Any = self
        return RandomSampler(this.train_dataset, num_samples=self.rows_per_epoch)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        this: Any = self
        ours: torch.optim.Optimizer | None = this.optimizer
        if ours is not None:  # the Trainer asks twice
            return ours
        made: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        groups = self.course.groups(made.defaults["lr"])
        if self.engine_cfg.offload or groups is not None:
            kept = ("params", "weight_decay")
            made = this.optimizer = engine.adamw(
                groups or [{name: group[name] for name in kept} for group in made.param_groups],
                self.engine_cfg,
                learning_rate=made.defaults["lr"],
                eps=made.defaults["eps"],
                betas=made.defaults["betas"],
            )
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        this: Any = self
        if this.lr_scheduler is None and (factor := self.course.factor()) is not None:
            made = torch.optim.lr_scheduler.LambdaLR(optimizer or this.optimizer, factor)
            this.lr_scheduler = made
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """TRL's and, while the model is trained, what the method adds to the loss of a batch."""
        this: Any = self
        out = super().compute_loss(model, inputs, *args, **options)  # type: ignore[misc]
        if not this.model.training or (penalty := self.course.penalty()) is None:
            return out
        if options.get("num_items_in_batch") is not None:  # micro-batches are parts of a sum
            penalty = penalty / this.current_gradient_accumulation_steps
        return out + penalty

    def without_noise(self) -> None:
        """Take NEFTune's hook off the model; the Trainer does so only where training ends well."""
        if (hook := getattr(self, "neftune_hook_handle", None)) is not None:
            hook.remove()

    def train(self, *args: Any, **options: Any) -> Any:
        with engine.ending_loss_scaling():
            return super().train(*args, **options)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.checkpoints.save()

    def save(self, folder: Path) -> None:
        """This trainer's part of a checkpoint; every process calls it."""
        this: Any = self
        this.args.output_dir = str(folder)
        Trainer._save_checkpoint(this, this.model, None)  # TRL's would add a model card
        sums = {
            "loss": float(this._tr_loss),
            "logged_at": this._globalstep_last_logged,
            "metrics": this._metrics["train"],
            "accumulation": this.args.gradient_accumulation_steps,
        }
        (trainer_folder(folder) / f"sums_{ranks.rank()}.json").write_text(json.dumps(sums))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out means over pairs (RM) or answer tokens (SFT), however they are split.

        The Trainer averages batches, and takes rows twice to make the last one as long as others.
        """
        this: Any = self
        data, size = this.eval_dataset, this.args.per_device_eval_batch_size
        rows = [data[i] for i in range(ranks.rank(), len(data), ranks.world_size())]
        passes = math.ceil(len(data) / (size * ranks.world_size()))  # on every process
        totals: dict[str, Tensor] = {}
        this.model.eval()
        for start in range(0, passes * size, size):
            part = rows[start : start + size]
            inputs = this._prepare_inputs(this.data_collator(part or [data[0]]))
            with torch.no_grad(), this.compute_loss_context_manager():
                sums = this._sums(inputs)
            for name, value in sums.items():
                counted = value.double() * bool(part)
                totals[name] = totals.get(name, torch.zeros_like(counted)) + counted
        totals = {name: engine.sum_over_ranks(total) for name, total in totals.items()}
        count = float(totals.pop("count"))
        metrics = {f"eval_{name}": float(total) / count for name, total in totals.items()}
        this._metrics["eval"].clear()  # TRL's own means, over batches
        this.log(metrics)  # while model.eval() says which kind they are
        this.model.train()
        this.control = this.callback_handler.on_evaluate(
            this.args, this.state, this.control, metrics
        )
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: the trained weights are beside it, in the form that others load."""

    def restore_sums(self, folder: Path) -> None:
        """Go on with the sums that `save` wrote, at the start of training.

        Metrics are means over processes, one for each micro-batch of a step.
        """
        this: Any = self
        paths = sorted(trainer_folder(folder).glob("sums_*.json"))
        all_sums = [json.loads(path.read_text()) for path in paths]
        own = all_sums[ranks.rank() % len(all_sums)]
        if len(all_sums) == ranks.world_size():
            this._tr_loss += own["loss"]
        else:
            this._tr_loss += sum(sums["loss"] for sums in all_sums) / len(all_sums)
        this._globalstep_last_logged = own["logged_at"]
        was, now = own["accumulation"], this.args.gradient_accumulation_steps
        for name, values in own["metrics"].items():
            this._metrics["train"][name] = values if was == now else _regrouped(values, was, now)


def _regrouped(values: list[float], was: int, now: int) -> list[float]:
    """The means of `was` micro-batches a step, `now` times: as heavy as those to come."""
    steps = [values[start : start + was] for start in range(0, len(values), was)]
    return [sum(step) / len(step) for step in steps for _ in range(now)]


class _RewardTrainer(_Keeping, RewardTrainer):
    """TRL's, with our checkpoints and evaluation."""

    def _sums(self, inputs: Any) -> dict[str, Tensor]:
        this: Any = self
        loss, outputs = this.compute_loss(this.model, inputs, return_outputs=True)
        chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)
        return {
            "count": chosen.new_tensor(len(chosen)),
            "loss": loss * len(chosen),
            "accuracy": (chosen > rejected).float().sum(),
            "margin": (chosen - rejected).sum(),
        }


class _SFTTrainer(_Keeping, SFTTrainer):
    """TRL's, with our checkpoints and evaluation."""

    def _sums(self, inputs: Any) -> dict[str, Tensor]:
        this: Any = self
        tokens = (inputs["labels"] != -100).sum()
        return {"count": tokens, "loss": this.compute_loss(this.model, inputs) * tokens}


def _printer() -> type[TrainerCallback]:
    from transformers import PrinterCallback

    return PrinterCallback


class _Report(TrainerCallback):
    """A trainer's numbers to the tracker under our names; its steps to the checkpoints."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        evaluations: Evaluations,
        tracker: Tracker | None,
        best_by: str,
        trainer: Any,
        cfg: TrainConfig,
        engine_cfg: EngineConfig,
        going_on_from: Path | None,
    ) -> None:
        self.going_on_from = going_on_from  # what the trainer wrote before
        self.checkpoints, self.evaluations = checkpoints, evaluations
        self.tracker, self.trainer = tracker, trainer
        self.best_by, self.sign = best_by, -1.0 if best_by == "eval/loss" else 1.0
        self.cfg, self.engine_cfg, self.patience = cfg, engine_cfg, cfg.patience

    @property
    def patience_is_spent(self) -> bool:
        """Whether so many evaluations in a row were no better than one before."""
        return self.patience is not None and self.evaluations.worse >= self.patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine.note_grad_norm(self.trainer.deepspeed)
        if (folder := self.going_on_from) is not None:
            engine.separate_steps(self.trainer.deepspeed)
            self.trainer.restore_sums(folder)
        optimizer = engine.torch_optimizer(self.trainer.deepspeed)
        self.trainer.course.begin(optimizer, self.checkpoints.step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._refuse(self._of_this_step(), state.global_step)  # no checkpoint may hold it
        self.trainer.course.end_step(state.global_step)
        if self.checkpoints.end_step(state.global_step):
            control.should_save = True
        if state.global_step == state.max_steps:
            control.should_evaluate = True
        control.should_training_stop |= self.checkpoints.stopping

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        numbers = {NAMES[name]: value for name, value in (logs or {}).items() if name in NAMES}
        if engine.overflowed(self.trainer.deepspeed):
            numbers.pop("train/grad_norm", None)  # of an update that was skipped
        held_out = {name: value for name, value in numbers.items() if name.startswith("eval/")}
        if "train_runtime" in (logs or {}):  # TRL's own closing line
            return
        numbers = held_out or numbers
        if numbers and self.tracker is not None:
            self.tracker.log(numbers, step=state.global_step)
        if held_out:
            self._refuse(held_out, state.global_step)
            self._held_out(held_out, state.global_step, control)

    def _of_this_step(self) -> dict[str, float]:
        """The loss since the last log line, a sum over all processes, and the gradient's norm."""
        loss = engine.sum_over_ranks(self.trainer._tr_loss.detach())
        numbers = {"train/loss": float(loss)}
        if (norm := engine.last_grad_norm(self.trainer.deepspeed)) is not None:
            numbers["train/grad_norm"] = norm
        return numbers

    def _refuse(self, numbers: dict[str, float], step: int) -> None:
        _refuse_no_number(numbers, step, self.cfg, self.engine_cfg)

    def _held_out(self, numbers: dict[str, float], step: int, control: Any) -> None:
        found = self.evaluations
        found.first = found.first or numbers
        if step == 0:
            return
        if self.checkpoints.consider(self.sign * numbers[self.best_by], numbers):
            found.worse = 0
            control.should_save = True
            return
        found.worse += 1
        if self.patience_is_spent:
            control.should_save = control.should_training_stop = True
