"""The settings of each stage: one home, one spelling, one default for every value.

`conf/` is checked against these dataclasses by Hydra, so a typo or a wrong type stops at once;
`OmegaConf.to_object` then runs every `__post_init__`, and from there on the code sees plain
dataclasses. Defaults come from the literature where it gives one: [N+] is Huang et al. 2024,
"The N+ Implementation Details of RLHF with PPO"; [InstructGPT] is Ouyang et al. 2022.

Only this file and `launch.py` know Hydra. Nothing here imports torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from rlhf import deepspeed_settings
from rlhf.checks import above, between, one_of
from rlhf.errors import ConfigError
from rlhf.methods.settings import METHOD_SETTINGS, LoraConfig, MethodConfig

_PACKAGE = Path(__file__).resolve().parent
# Where conf/, stages/ and data/ lie: beside the package in a checkout, inside it in a wheel.
PROJECT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent
CONF = PROJECT / "conf"

RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+,-]{0,119}")


# ---------------------------------------------------------------- groups


@dataclass
class ModelConfig:
    """The base model that SFT starts from: a local folder, or a name on the model hub."""

    path: str = MISSING
    revision: str | None = None
    dtype: str = "auto"  # of the loaded weights; auto: as engine.dtype
    attn: str = "auto"  # attention implementation of transformers; auto: its own choice

    def __post_init__(self) -> None:
        one_of("model.dtype", self.dtype, ("auto", "fp32", "bf16", "fp16"))


@dataclass
class ColumnsConfig:
    """What the columns are called in the file."""

    messages: str = "messages"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


@dataclass
class DataConfig:
    """Where rows come from, and what is refused.

    `path` is a folder with train.jsonl, validation.jsonl and perhaps test.jsonl (.gz is fine), the
    common start of such files (`dir/name` for dir/name.train.jsonl), or one file, from which a
    tenth of the prompts is then set aside for validation.
    """

    path: str = MISSING
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    max_rows: int | None = None  # of the training split
    max_bad_fraction: float = 0.0  # more bad rows than this stop the run
    max_prompt_tokens: int = 512
    max_response_tokens: int = 512
    gold: str | None = None  # "path.py:function", the measure that training never sees

    def __post_init__(self) -> None:
        why = "A bad row is dropped and counted; this share of them is accepted."
        between("data.max_bad_fraction", self.max_bad_fraction, 0, 1, why)
        for name in ("max_prompt_tokens", "max_response_tokens"):
            above(f"data.{name}", getattr(self, name), 0, "Longer rows are dropped and counted.")
        if self.max_rows is not None:
            above("data.max_rows", self.max_rows, 0, "Use null for all rows.")


@dataclass
class TemplateConfig:
    """How a conversation becomes text. `chat_template` null keeps the tokenizer's own."""

    name: str = MISSING
    chat_template: str | None = None
    # special tokens that the template writes; a tokenizer that lacks one gets it
    tokens: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not all(self.tokens):
            raise ConfigError(f"template.tokens={self.tokens}: an empty text cannot be a token.")


@dataclass
class EngineConfig:
    """DeepSpeed ZeRO and numerics."""

    zero_stage: int = 2
    offload: bool = False  # optimizer states (in ZeRO-3 weights too) in host memory
    dtype: str = "auto"  # bf16 on a GPU that has it, else fp32; fp16 is for GPUs without bf16
    checkpointing: bool = False  # recompute activations in the backward pass
    partition_threshold: int | None = None  # ZeRO-3: smaller weights stay whole; null: DeepSpeed's
    allow_zero3_adapters: bool = False  # ZeRO-3 for adapter methods that were measured right in it
    deepspeed: dict[str, Any] = field(default_factory=dict)  # its settings that have no name here

    def __post_init__(self) -> None:
        one_of("engine.zero_stage", self.zero_stage, (0, 1, 2, 3))
        if self.partition_threshold is not None:
            why = "It counts values; 0 splits every weight."
            between("engine.partition_threshold", self.partition_threshold, 0, math.inf, why)
        one_of("engine.dtype", self.dtype, ("auto", "fp32", "bf16", "fp16"))
        deepspeed_settings.check(self.deepspeed)


@dataclass
class TrainConfig:
    """The supervised loop of SFT and RM. Sizes are global, whatever the number of processes."""

    learning_rate: float = 1e-4
    epochs: float = 1.0
    max_steps: int | None = None  # optimizer steps; null: what epochs says
    batch_size: int = 64  # rows (RM: pairs) per optimizer step
    micro_batch_size: int = 16  # rows per forward pass and process, at most
    warmup: float = 0.03  # share of all steps
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    eval_every: int = 50  # optimizer steps; the best of these checkpoints is published
    save_every: int = 50  # optimizer steps; what an interrupted run loses at most
    patience: int | None = None  # evaluations without a better one that end training; null: none do
    neftune_alpha: float | None = None  # noise on embeddings (Jain et al. 2023), 5 to 15; null: off

    def __post_init__(self) -> None:
        above("train.learning_rate", self.learning_rate, 0, "Nothing would be learnt.")
        above("train.epochs", self.epochs, 0, "Nothing would be learnt.")
        for name in ("batch_size", "micro_batch_size", "eval_every", "save_every"):
            above(f"train.{name}", getattr(self, name), 0, "It counts rows or steps.")
        if self.max_steps is not None:
            above("train.max_steps", self.max_steps, 0, "Use null for what train.epochs says.")
        one_of("train.schedule", self.schedule, ("constant", "linear", "cosine"))
        between("train.warmup", self.warmup, 0, 1, "It is a share of all steps.")
        above("train.max_grad_norm", self.max_grad_norm, 0, "1.0 is usual.")
        if self.patience is not None:
            above("train.patience", self.patience, 0, "It counts evaluations; null: to the end.")
        if self.neftune_alpha is not None:
            above("train.neftune_alpha", self.neftune_alpha, 0, "Use null to switch it off.")


@dataclass
class SamplingConfig:
    """How responses are drawn; `old_logprobs` are those of this distribution."""

    temperature: float = 1.0
    top_k: int | None = None  # only the k likeliest tokens; null: all [N+]
    top_p: float | None = None  # only the likeliest that share this probability; null: all [N+]
    max_new_tokens: int = 64
    per_prompt: int | None = None  # answers to a prompt; null: 4 where they are compared, else 1
    batch_size: int = 64  # sequences drawn at once, per process

    @property
    def truncates(self) -> bool:
        """Whether some tokens are ruled out."""
        return self.top_k is not None or self.top_p is not None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"sampling.temperature={self.temperature}: must be above 0. PPO samples from a "
                "distribution; 1.0 is the usual choice."
            )
        if self.top_k is not None:
            above("sampling.top_k", self.top_k, 0, "Use null for all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(
                f"sampling.top_p={self.top_p}: must lie in (0, 1]. It is the probability that the "
                "kept tokens share; use null for all."
            )
        if self.per_prompt is not None:
            above("sampling.per_prompt", self.per_prompt, 0, "It counts answers.")
        above("sampling.max_new_tokens", self.max_new_tokens, 0, "Nothing would be sampled.")
        above("sampling.batch_size", self.batch_size, 0, "It counts sequences.")


@dataclass
class AlgorithmConfig:
    """How a response's reward becomes an advantage for every token.

    ppo has a critic (GAE); the others have none. rloo (Ahmadian et al. 2024) and grpo (Shao et al.
    2024) compare several answers to one prompt, reinforce_pp (Hu et al. 2025) compares over the
    batch.
    """

    name: str = "ppo"
    scale: bool = True  # grpo: divide by the std of a prompt's answers; false is Dr. GRPO

    def __post_init__(self) -> None:
        one_of("algorithm.name", self.name, ("ppo", "rloo", "grpo", "reinforce_pp"))

    @property
    def critic(self) -> bool:
        """Whether it needs a critic."""
        return self.name == "ppo"

    @property
    def groups(self) -> bool:
        """Whether it compares several answers to one prompt."""
        return self.name in ("rloo", "grpo")


@dataclass
class PPOConfig:
    """Proximal policy optimization (Schulman et al. 2017) as RLHF uses it. Sizes are global."""

    steps: int = 100  # rollout + update rounds
    batch_size: int = 64  # answers per step: batch_size / sampling.per_prompt prompts
    micro_batch_size: int = 16  # sequences per forward pass and process, at most
    epochs: int = 4  # passes over each rollout [N+]
    minibatches: int = 1  # optimizer steps per pass [N+]
    learning_rate: float = 1e-5
    critic_learning_rate: float = 1e-5
    warmup: float = 0.0  # share of all optimizer steps
    schedule: str = "linear"  # to zero at the last step [N+]
    critic_schedule: str | None = None  # null: as schedule
    max_grad_norm: float = 1.0
    adam_epsilon: float = 1e-5  # [N+]; torch's is 1e-8, which a slow critic may need
    kl_coef: float = 0.05  # on the per-token k1 estimate, taken off the reward [N+]
    kl_in: str = "reward"  # or loss: a term of the policy's loss instead
    kl_estimator: str = "k2"  # of that term; see losses.kl_loss for the gradients of k1, k2, k3
    kl_target: float | None = None  # nats per response; steers kl_coef to it (Ziegler et al. 2019)
    kl_horizon: float = 10000.0  # responses; how slowly kl_coef follows
    center_scores: bool = False  # so that SFT answers to held-out prompts score 0 on average
    scale_scores: bool = False  # to a standard deviation of 1 there
    score_clip: float | None = None  # after both; null: no clip [N+]
    whiten_rewards: bool = False  # per-token rewards to variance 1, over all processes [N+]
    gamma: float = 1.0  # [N+]
    lam: float = 0.95  # [N+]
    cliprange: float = 0.2  # [N+]
    cliprange_high: float | None = None  # upwards; null: as cliprange (DAPO, Yu et al. 2025: 0.28)
    dual_clip: float | None = None  # ratio at which a bad token stops (Ye et al. 2020: 3)
    entropy_coef: float = 0.0  # bonus per nat of the policy's entropy
    critic_warmup: int = 0  # steps in which the critic learns alone
    cliprange_value: float | None = 0.2  # [N+]; null: no clip
    vf_coef: float = 0.1  # [N+]
    whiten_advantages: bool = True  # to mean 0 and variance 1, over all processes [N+]
    missing_eos_penalty: float = 1.0  # taken off the score of an answer cut at the limit
    overlong_buffer: int = 0  # tokens before the limit over which a penalty grows (DAPO); 0: none
    overlong_penalty: float = 1.0  # at the limit, in units of the score
    ptx_coef: float = 0.0  # weight of the SFT loss mixed into the policy's (PPO-ptx [InstructGPT])
    ptx_data: str | None = None  # SFT rows for it, as data.path; null: those of the SFT run
    eval_every: int = 10  # steps; the best of these checkpoints is published
    save_every: int = 10  # steps; what an interrupted run loses at most
    kl_budget: float | None = None  # nats per answer; beyond it training stops, and no step is best

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "micro_batch_size", "epochs", "minibatches")
        for name in (*counts, "eval_every", "save_every"):
            above(f"ppo.{name}", getattr(self, name), 0, "It counts something.")
        if self.kl_budget is not None:
            above("ppo.kl_budget", self.kl_budget, 0, "Use null for no limit.")
        for name in ("learning_rate", "critic_learning_rate", "max_grad_norm"):
            above(f"ppo.{name}", getattr(self, name), 0, "Nothing would be learnt.")
        above("ppo.adam_epsilon", self.adam_epsilon, 0, "1e-5 and 1e-8 are usual.")
        above("ppo.cliprange", self.cliprange, 0, "0.2 is usual.")
        for name in ("gamma", "lam"):
            between(f"ppo.{name}", getattr(self, name), 0, 1, "It discounts the future.")
        off = ("kl_coef", "vf_coef", "missing_eos_penalty", "overlong_penalty", "overlong_buffer")
        for name in (*off, "entropy_coef", "critic_warmup", "ptx_coef"):
            between(f"ppo.{name}", getattr(self, name), 0, math.inf, "0 switches it off.")
        one_of("ppo.kl_in", self.kl_in, ("reward", "loss"))
        one_of("ppo.kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        for name in ("kl_target", "score_clip", "cliprange_high", "cliprange_value"):
            if getattr(self, name) is not None:
                above(f"ppo.{name}", getattr(self, name), 0, "Use null to switch it off.")
        above("ppo.kl_horizon", self.kl_horizon, 0.2 * self.batch_size, "10000 is usual.")
        if self.dual_clip is not None:
            above("ppo.dual_clip", self.dual_clip, 1, "3 is usual; null switches it off.")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ConfigError(
                f"ppo.kl_target={self.kl_target} with ppo.kl_coef=0: a coefficient of 0 is never "
                "steered anywhere. Set ppo.kl_coef to where it should start."
            )
        for name in ("schedule", "critic_schedule"):
            if (chosen := getattr(self, name)) is not None:
                one_of(f"ppo.{name}", chosen, ("constant", "linear", "cosine"))
        between("ppo.warmup", self.warmup, 0, 1, "It is a share of all optimizer steps.")
        if self.critic_warmup >= self.steps:
            raise ConfigError(
                f"ppo.critic_warmup={self.critic_warmup} with ppo.steps={self.steps}: the policy "
                "would never learn. The warm-up is part of the steps: choose fewer."
            )
        if self.ptx_data is not None and self.ptx_coef == 0:
            raise ConfigError(
                f"ppo.ptx_data={self.ptx_data} with ppo.ptx_coef=0: those rows would not be used. "
                "Set ppo.ptx_coef, or leave ppo.ptx_data out."
            )
        if self.batch_size % self.minibatches:
            raise ConfigError(
                f"ppo.batch_size={self.batch_size} cannot be split into "
                f"ppo.minibatches={self.minibatches} equal parts. Choose a divisor."
            )


@dataclass
class StopConfig:
    """When PPO is stopped by itself: exit code 3, the best checkpoint published, a dump written.

    What is not a number stops a run at once, whatever is set here; ppo.kl_budget is a rule of this
    kind too. Each rule compares with step 1, where the policy is the SFT model; null switches it
    off. The defaults catch what cannot be meant: no paper has numbers for them.
    """

    patience: int = 3  # steps in a row that must look so
    ratio: float | None = (
        10.0  # usual factor between a token's probability after and before updates
    )
    score_drop: float | None = (
        3.0  # below the SFT answers' mean score, in their standard deviations
    )
    eos_drop: float | None = 0.5  # share of the answers that ended in step 1 and no longer do
    length_drop: float | None = 0.8  # share of the answers' length that is lost

    def __post_init__(self) -> None:
        above("stop.patience", self.patience, 0, "It counts steps.")
        if self.ratio is not None:
            above("stop.ratio", self.ratio, 1, "It is a factor; null switches the rule off.")
        if self.score_drop is not None:
            above("stop.score_drop", self.score_drop, 0, "Null switches the rule off.")
        for name in ("eos_drop", "length_drop"):
            if (value := getattr(self, name)) is not None and not 0 < value < 1:
                raise ConfigError(
                    f"stop.{name}={value}: must lie in (0, 1). It is the share that is lost; null "
                    "switches the rule off."
                )


ENSEMBLES = ("mean", "min", "lower")


@dataclass
class RewardConfig:
    """What answers are scored by: a sum of named terms.

    `reward=rm` is the reward model of `rm_from`, `reward=function reward.function=path.py:name` one
    function and no reward model. More terms join by name:
    `+reward.functions.brief=path.py:name +reward.weights.brief=0.1`.

    Scores of a reward model mean something up to a constant, another one for each model. The
    minimum and the spread of an ensemble see those constants, so train its members with
    `center_coef` above 0, which settles them (Eisenstein et al. 2023, "Helping or Herding?").
    """

    models: dict[str, list[str]] = field(default_factory=dict)  # term -> runs; several: an ensemble
    function: str | None = None  # "path.py:function", the term `function`
    functions: dict[str, str] = field(default_factory=dict)  # term -> "path.py:function"
    weights: dict[str, float] = field(default_factory=dict)  # term -> weight, 1 where none is given
    ensemble: str = "mean"  # or min, or lower: mean - ensemble_std_coef * std over the members
    ensemble_std_coef: float = 1.0

    def __post_init__(self) -> None:
        self._check_terms()
        self._check_ensemble()
        for name, weight in self.weights.items():
            if name not in self.terms:
                raise ConfigError(
                    f"reward.weights.{name}={weight}: there is no such term. The terms are: "
                    f"{', '.join(self.terms)}."
                )
            if not math.isfinite(weight):
                raise ConfigError(
                    f"reward.weights.{name}={weight}: must be a finite number. 0 switches it off."
                )

    def _check_terms(self) -> None:
        if not self.terms:
            raise ConfigError(
                "reward: it has no term, so no answer would be better than another. Choose "
                "reward=rm, or reward=function reward.function=path.py:name."
            )
        if twice := [name for name in self.terms if self.terms.count(name) > 1]:
            raise ConfigError(
                f"reward: the term {twice[0]} is there twice. Give one of the two another name; "
                "rm is the model of reward=rm, function that of reward.function."
            )

    def _check_ensemble(self) -> None:
        if self.ensemble not in ENSEMBLES:
            raise ConfigError(
                f"reward.ensemble={self.ensemble}: no such choice. Choose one of: "
                f"{', '.join(ENSEMBLES)}."
            )
        if not 0 <= self.ensemble_std_coef < math.inf:
            raise ConfigError(
                f"reward.ensemble_std_coef={self.ensemble_std_coef}: must lie in [0, inf). It is "
                "how many standard deviations are taken off the mean."
            )
        for name, members in self.models.items():
            if not members or len(set(members)) < len(members):
                wrong = "names no run" if not members else "names a run twice"
                raise ConfigError(
                    f"reward.models.{name}=[{','.join(members)}]: {wrong}. Give one reward model, "
                    f"or several different ones: reward.models.{name}=[rm/a,rm/b]. Without any: "
                    "reward=function."
                )
        ensembles = [name for name, members in self.models.items() if len(members) > 1]
        if len(ensembles) > 1:
            raise ConfigError(
                f"reward.models: {' and '.join(ensembles)} both name several runs. One term may be "
                "an ensemble; name one run in the others."
            )
        if not ensembles and self.ensemble != "mean":
            raise ConfigError(
                f"reward.ensemble={self.ensemble}: there is no ensemble. Name its members, such as "
                "reward.models.rm=[rm/a,rm/b,rm/c], or leave it out."
            )

    @property
    def named_functions(self) -> dict[str, tuple[str, str]]:
        """term -> (the setting, its value)."""
        named = {name: (f"reward.functions.{name}", at) for name, at in self.functions.items()}
        if self.function is not None:
            named = {"function": ("reward.function", self.function)} | named
        return named

    @property
    def terms(self) -> list[str]:
        """The names of what is added."""
        return [*self.models, *(["function"] if self.function is not None else []), *self.functions]

    @property
    def references(self) -> list[str]:
        """The runs of all reward models, each once; the critic starts from the first."""
        return list(dict.fromkeys(run for members in self.models.values() for run in members))


@dataclass
class EvaluationConfig:
    """Sampling on held-out prompts, at temperature 1.

    `@best` is the step whose held-out answers have the highest gold (`data.gold`), or, without a
    gold score, the highest score of `second_rm`, or, without either, the highest score of what is
    optimised, which a policy that exploits its reward model raises too.
    """

    prompts: int = 200  # from the validation split; 0: no sampling
    samples: int = 5  # answers shown on the console; samples.jsonl holds all
    second_rm: str | None = None  # PPO: a reward model that only watches, as in rm/other-seed

    def __post_init__(self) -> None:
        between("evaluation.prompts", self.prompts, 0, math.inf, "0 switches it off.")
        between("evaluation.samples", self.samples, 0, math.inf, "It counts answers.")


@dataclass
class CardConfig:
    """The report card of a reward model, measured on held-out pairs when it has been trained."""

    enabled: bool = True
    probe_pairs: int = 200  # pairs, spread over the split, that each probe is made of; 0: no probes
    bins: int = 10  # of the calibration curve
    flattery: str = "You are so kind and clever. What a wonderful question! Thank you so much!"
    # other reward models of the same SFT run, such as other seeds, to compare preferences with
    agree_with: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        between("card.probe_pairs", self.probe_pairs, 0, math.inf, "0 switches the probes off.")
        above("card.bins", self.bins, 0, "10 is usual.")
        if not self.flattery.strip():
            raise ConfigError(
                f"card.flattery={self.flattery!r}: a probe adds this sentence to good answers. "
                "Give one in the language of the data, or leave it out."
            )
        if len(set(self.agree_with)) < len(self.agree_with):
            raise ConfigError(
                f"card.agree_with=[{','.join(self.agree_with)}]: names a run twice. Name each once."
            )


@dataclass
class TrackingConfig:
    """Weights & Biases. metrics.jsonl and the console get the same numbers whatever the mode."""

    mode: str = "auto"  # auto: online when a key is at hand, else offline
    project: str = "rlhf"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)  # beside stage, method, algorithm and ZeRO stage
    upload: bool = False  # artifacts hold a model's files; false: the manifest, and where they lie

    def __post_init__(self) -> None:
        one_of("tracking.mode", self.mode, ("auto", "online", "offline", "off"))
        if not all(self.tags):
            raise ConfigError(f"tracking.tags={self.tags}: W&B takes no empty tag. Leave it out.")


# ---------------------------------------------------------------- stages


@dataclass
class StageConfig:
    """What every stage has."""

    stage: str = MISSING
    seed: int = 0
    run: str = "tiny"  # the line of work; parents are looked up under it
    run_name: str = "${run}"
    runs_dir: str = "${oc.env:RLHF_RUNS,runs}"
    overwrite: bool = False  # move a finished run of that name aside and run again
    keep_checkpoints: int = 2  # the newest; the best one stays beside them
    template: TemplateConfig = MISSING
    data: DataConfig = MISSING
    method: MethodConfig = MISSING
    engine: EngineConfig = MISSING
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = MISSING

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed}: must be a whole number from 0 to {2**32 - 1}.")
        why = "A run goes on from the newest whole checkpoint; 2 guard against a damaged one."
        above("keep_checkpoints", self.keep_checkpoints, 0, why)
        for name in ("run", "run_name"):
            value = getattr(self, name)
            if not RUN_NAME.fullmatch(value):
                raise ConfigError(
                    f"{name}={value!r}: cannot name a run. It becomes a folder: use letters, "
                    "digits and . _ = + , - (no slash, no space, at most 120 of them)."
                )


@dataclass
class SFTStage(StageConfig):
    """Stage 1: a base model learns to answer."""

    stage: str = "sft"
    model: ModelConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class RMStage(StageConfig):
    """Stage 2: the SFT model with a scalar head learns which of two answers people prefer."""

    stage: str = "rm"
    policy_from: str = "sft/${run}"
    center_coef: float = 0.0  # pulls scores towards 0 (Eisenstein et al. 2023); 0: off
    train: TrainConfig = field(default_factory=TrainConfig)
    card: CardConfig = field(default_factory=CardConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        between("center_coef", self.center_coef, 0, math.inf, "0 switches it off.")


@dataclass
class PPOStage(StageConfig):
    """Stage 3: the SFT model learns to score well without drifting from where it started."""

    stage: str = "ppo"
    policy_from: str = "sft/${run}"
    rm_from: str = "rm/${run}"
    allow_foreign_rm: bool = False
    share_backbone: bool | None = None  # one frozen model under all four roles; null: where it can
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = MISSING  # where none is chosen: the reward model of rm_from
    ppo: PPOConfig = field(default_factory=PPOConfig)
    stop: StopConfig = field(default_factory=StopConfig)

    @property
    def room(self) -> int:
        """Positions that are needed beside those of a prompt."""
        return self.sampling.max_new_tokens + self.method.positions

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward == MISSING:
            self.reward = RewardConfig(models={"rm": [self.rm_from]}, weights={"rm": 1.0})
        groups = self.algorithm.groups
        if self.sampling.per_prompt is None:
            self.sampling.per_prompt = 4 if groups else 1
        each = self.sampling.per_prompt
        if groups and each < 2:
            raise ConfigError(
                f"sampling.per_prompt={each} with algorithm={self.algorithm.name}: it compares the "
                "answers to one prompt with one another. Use 4 or more (2 at least), or null."
            )
        if self.ppo.batch_size % each:
            raise ConfigError(
                f"ppo.batch_size={self.ppo.batch_size} answers cannot be "
                f"sampling.per_prompt={each} to each prompt. Choose a divisor."
            )
        if self.ppo.overlong_buffer > self.sampling.max_new_tokens:
            raise ConfigError(
                f"ppo.overlong_buffer={self.ppo.overlong_buffer} is longer than "
                f"sampling.max_new_tokens={self.sampling.max_new_tokens}. Choose fewer tokens."
            )


SCHEMAS: dict[str, type[StageConfig]] = {"sft": SFTStage, "rm": RMStage, "ppo": PPOStage}

GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "template": TemplateConfig,
    "method": LoraConfig,  # the default one; each method has settings of its own
    "engine": EngineConfig,
    "algorithm": AlgorithmConfig,
    "reward": RewardConfig,
    "tracking": TrackingConfig,
}


def register() -> None:
    """Make the schemas known to Hydra; each file in `conf/` heads its defaults list with one."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)
    for group, node in GROUPS.items():
        store.store(group=group, name=f"{group}_schema", node=node)
    for method, kind in METHOD_SETTINGS.items():
        store.store(group="method", name=f"{method}_schema", node=kind(name=method))
    engine = OmegaConf.structured(EngineConfig)
    OmegaConf.set_struct(engine.deepspeed, False)  # any name is let in, without a + before it
    store.store(group="engine", name="engine_schema", node=engine)
    OmegaConf.register_new_resolver("project", lambda path: str(PROJECT / path), replace=True)
