"""SFT and reward modelling by TRL's trainers: the only file that imports trl.

TRL gets token ids and masks from our renderer and is asked to change nothing; that it kept every
row is asserted.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from rlhf import engine, ranks
from rlhf.config import EngineConfig, TrainConfig
from rlhf.console import Pace
from rlhf.errors import ConfigError
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


def optimizer_steps(cfg: TrainConfig, rows: int) -> int:
    """How many updates `train` makes of so many rows."""
    if cfg.max_steps is not None:
        return cfg.max_steps
    return max(1, round(cfg.epochs * -(-rows // cfg.batch_size)))


def train_sft(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Rows,
    eval_rows: Rows,
    **options: Any,
) -> dict[str, float]:
    """Minimise the mean negative log-likelihood of answer tokens; see `_train`."""
    return _train(
        _SFTTrainer,
        SFTConfig,
        {"completion_only_loss": True, "max_length": None},
        model,
        tokenizer,
        train_rows,
        eval_rows,
        **options,
    )


def train_rm(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Rows,
    eval_rows: Rows,
    *,
    center_coef: float,
    **options: Any,
) -> dict[str, float]:
    """Minimise the Bradley-Terry loss of preference pairs; see `_train`."""
    return _train(
        RewardTrainer,
        RewardConfig,
        {"max_length": None, "center_rewards_coefficient": center_coef or None},
        model,
        tokenizer,
        train_rows,
        eval_rows,
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
    *,
    cfg: TrainConfig,
    engine_cfg: EngineConfig,
    seed: int,
    pace: Pace | None = None,
    tracker: Tracker | None = None,
) -> dict[str, float]:
    """Train `model` in place.

    Args:
        model: ready to train (adapters attached, the rest frozen).
        train_rows, eval_rows: token ids as `Renderer.sft` or `Renderer.pairs` gives them.
        pace: advanced once per optimizer step.
        tracker: gets every number; None on all processes but the main one.

    Returns:
        The held-out numbers before ("start/eval/loss", ...) and after training ("eval/loss", ...).

    Raises:
        ConfigError: the batch size cannot be split over the processes.
    """
    per_step = cfg.micro_batch_size * ranks.world_size()
    if cfg.batch_size % per_step:
        raise ConfigError(
            f"train.batch_size={cfg.batch_size} is not a multiple of train.micro_batch_size="
            f"{cfg.micro_batch_size} times {ranks.world_size()} processes. Change one of them."
        )
    accumulation = cfg.batch_size // per_step
    steps = optimizer_steps(cfg, len(train_rows))
    schedule = "constant_with_warmup" if cfg.schedule == "constant" else cfg.schedule
    with tempfile.TemporaryDirectory() as scratch:  # TRL wants a folder; it writes nothing
        args = config_class(
            output_dir=scratch,
            max_steps=steps,
            learning_rate=cfg.learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=round(cfg.warmup * steps),
            weight_decay=0.0,
            max_grad_norm=cfg.max_grad_norm,
            per_device_train_batch_size=cfg.micro_batch_size,
            per_device_eval_batch_size=cfg.micro_batch_size,
            gradient_accumulation_steps=accumulation,
            optim="adamw_torch",
            deepspeed=engine.deepspeed_config(
                engine_cfg,
                micro_batch_size=cfg.micro_batch_size,
                accumulation=accumulation,
                max_grad_norm=cfg.max_grad_norm,
            ),
            bf16=engine.dtype(engine_cfg) == torch.bfloat16,
            gradient_checkpointing=engine_cfg.checkpointing,
            use_cpu=engine.device().type == "cpu",
            dataloader_pin_memory=engine.device().type != "cpu",
            eval_strategy="steps",
            eval_steps=cfg.eval_every,
            eval_on_start=True,
            save_strategy="no",
            logging_steps=max(1, cfg.eval_every // 4),
            disable_tqdm=True,
            report_to=[],
            seed=seed,
            **specific,
        )
        report = _Report(pace, tracker)
        trainer = trainer_class(
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(train_rows),
            eval_dataset=Dataset.from_list(eval_rows),
            callbacks=[report],
        )
        trainer.remove_callback(_printer())
        kept = (len(trainer.train_dataset), len(trainer.eval_dataset))
        assert kept == (len(train_rows), len(eval_rows)), f"TRL kept {kept} rows"
        trainer.train()
        if report.evaluated_at != steps:
            trainer.evaluate()
    first = {f"start/{name}": value for name, value in report.first.items()}
    return first | report.last


class _SFTTrainer(SFTTrainer):
    """Held-out loss per answer token, whatever the micro-batch size.

    The Trainer averages over rows what is a mean over the tokens of each batch; scaled by the
    batch's tokens per row over all rows' tokens per row, that average is the mean over tokens.
    """

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        mask = inputs["labels"] != -100
        loss, *rest = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return (loss * (mask.sum() / mask.shape[0] / self._tokens_per_row), *rest)

    @functools.cached_property
    def _tokens_per_row(self) -> float:
        rows: Any = self.eval_dataset
        return sum(label != -100 for row in rows["labels"] for label in row) / len(rows)


def _printer() -> type[TrainerCallback]:
    from transformers import PrinterCallback

    return PrinterCallback


class _Report(TrainerCallback):
    """Hands a trainer's numbers to the tracker under our names, and its steps to the pace."""

    def __init__(self, pace: Pace | None, tracker: Tracker | None) -> None:
        self.pace, self.tracker = pace, tracker
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.evaluated_at = -1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.pace is not None:
            self.pace.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        numbers = {NAMES[name]: value for name, value in (logs or {}).items() if name in NAMES}
        held_out = {name: value for name, value in numbers.items() if name.startswith("eval/")}
        if held_out:
            self.first = self.first or held_out
            self.last, self.evaluated_at = held_out, state.global_step
            numbers = held_out
        if "train_runtime" in (logs or {}):  # TRL's own closing line
            return
        if numbers and self.tracker is not None:
            self.tracker.log(numbers, step=state.global_step)
