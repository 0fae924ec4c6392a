"""The settings of every fine-tuning method, a dataclass for each family. No torch.

`table.py` says what each method allows; defaults are those of the papers, where they give one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from rlhf.checks import above, between, one_of

ADAPTER = "default"  # peft's name of the adapter that is trained and published
_COUNT = "It counts virtual tokens; 10 to 100 are usual."


@dataclass
class MethodConfig:
    """Which weights are trained, and how. `rlhf/methods/table.py` says what each method allows."""

    name: str = MISSING

    @property
    def positions(self) -> int:
        """How many of the model's positions it takes before the text."""
        return 0


# ---------------------------------------------------------------- the model's own weights


@dataclass
class FullConfig(MethodConfig):
    """Every weight is trained."""

    name: str = "full"

    def __post_init__(self) -> None:
        one_of("method.name", self.name, ("full",))


@dataclass
class FreezeConfig(MethodConfig):
    """Only the last layers, the final norm and the head are trained."""

    name: str = "freeze"
    layers: int = 2  # the last so many

    def __post_init__(self) -> None:
        one_of("method.name", self.name, ("freeze",))
        above("method.layers", self.layers, 0, "It counts layers from the end.")


@dataclass
class BitFitConfig(MethodConfig):
    """Only biases are trained (Ben Zaken et al. 2022)."""

    name: str = "bitfit"
    add_biases: bool = False  # give a model of the Llama kind, which has none, biases of zero

    def __post_init__(self) -> None:
        one_of("method.name", self.name, ("bitfit",))


# ---------------------------------------------------------------- low-rank adapters


@dataclass
class LoraConfig(MethodConfig):
    """Low-rank adapters on linear layers (Hu et al. 2021): W + alpha/rank * B A, B = 0 at start.

    rslora scales by alpha/sqrt(rank) (Kalajdzievski 2023); dora learns the length of each row of
    the sum apart (Liu et al. 2024); pissa starts from the largest singular vectors of W (Meng et
    al. 2024); lora_fa leaves A as it was drawn (Zhang et al. 2023); qlora puts them on a base in
    4 bits (Dettmers et al. 2023).
    """

    name: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = "all-linear"  # or layer names, comma-separated: q_proj,v_proj
    quantization: str | None = None  # of the frozen base: nf4, fp4 (both 4 bits); null: none
    double_quantization: bool = True  # quantise the constants of the quantisation too

    def __post_init__(self) -> None:
        one_of("method.name", self.name, tuple(_names(type(self))))
        why = "It is the inner size of the two LoRA matrices; 8 to 64 is usual."
        above("method.rank", self.rank, 0, why)
        above("method.alpha", self.alpha, 0, "The update is scaled by alpha / rank.")
        between("method.dropout", self.dropout, 0, 0.99, "It is a probability.")
        one_of("method.quantization", self.quantization, (None, "nf4", "fp4"))


@dataclass
class LoraPlusConfig(LoraConfig):
    """LoRA whose B learns faster than its A (Hayou et al. 2024)."""

    name: str = "lora_plus"
    ratio: float = 16.0  # learning rate of B over that of A

    def __post_init__(self) -> None:
        super().__post_init__()
        above("method.ratio", self.ratio, 0, "B is given ratio times the learning rate of A.")


@dataclass
class AdaLoraConfig(LoraConfig):
    """LoRA as a sum of singular triples, the least important of which are pruned (Zhang et al.
    2023). `rank` is what a layer keeps on average; the update is scaled by alpha/initial_rank."""

    name: str = "adalora"
    initial_rank: int | None = None  # of every layer; null: 1.5 times `rank`
    begin: float = 0.1  # share of all steps after which pruning begins
    end: float = 0.5  # and after which ranks stay as they are
    every: int = 5  # optimizer steps between two prunings
    orthogonality: float = 0.5  # coefficient of the penalty that keeps singular vectors orthogonal

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_rank is not None:
            why = "Ranks are pruned from it down to method.rank."
            above("method.initial_rank", self.initial_rank, self.rank - 1, why)
        between("method.begin", self.begin, 0, 1, "It is a share of all steps.")
        between("method.end", self.end, self.begin, 1, "It is a share of all steps.")
        above("method.every", self.every, 0, "It counts optimizer steps.")
        above("method.orthogonality", self.orthogonality, 0, "0.1 to 0.5 in the paper.")


@dataclass
class LoraDropConfig(LoraConfig):
    """LoRA kept in the layers where its output is largest; the others share one (Zhou et al. 2024).

    A first, short training on a sample of the rows finds those layers.
    """

    name: str = "lora_drop"
    threshold: float = 0.9  # share of all importance that the kept layers have
    sample: float = 0.1  # share of the training rows that it is measured on
    sample_steps: int = 20  # optimizer steps of the first training

    def __post_init__(self) -> None:
        super().__post_init__()
        between("method.threshold", self.threshold, 0, 1, "It is a share; 1 keeps every layer.")
        between("method.sample", self.sample, 0, 1, "It is a share of the training rows.")
        above("method.sample_steps", self.sample_steps, 0, "It counts optimizer steps.")


@dataclass
class PhasedLoraConfig(LoraConfig):
    """LoRA in phases, each of which adds `rank` to the rank of what came before.

    plora begins its whole schedule anew in every phase (Meng et al. 2024, PeriodicLoRA); relora has
    one schedule, with a short warm-up after each restart (Lialin et al. 2023).
    """

    name: str = "relora"
    phases: int = 4
    rewarm: float = 0.1  # relora: share of a phase over which the learning rate comes back

    def __post_init__(self) -> None:
        super().__post_init__()
        above("method.phases", self.phases, 1, "With one phase it is method=lora.")
        between("method.rewarm", self.rewarm, 0, 1, "It is a share of a phase.")


@dataclass
class VeraConfig(MethodConfig):
    """Vectors that scale two random matrices, shared by all layers (Kopiczko et al. 2024)."""

    name: str = "vera"
    rank: int = 256
    dropout: float = 0.0
    targets: str = "all-linear"
    d_initial: float = 0.1  # of the vector between the two matrices

    def __post_init__(self) -> None:
        one_of("method.name", self.name, ("vera",))
        above("method.rank", self.rank, 0, "It is the inner size of the two random matrices.")
        between("method.dropout", self.dropout, 0, 0.99, "It is a probability.")
        above("method.d_initial", self.d_initial, 0, "0.1 in the paper.")


@dataclass
class IA3Config(MethodConfig):
    """Vectors that scale keys, values and the inner activations (Liu et al. 2022)."""

    name: str = "ia3"
    targets: str = "auto"  # keys, values and the last layer of each MLP; or layer names
    feedforward: str = "auto"  # which of them are scaled at their input; or layer names

    def __post_init__(self) -> None:
        one_of("method.name", self.name, ("ia3",))


# ---------------------------------------------------------------- soft prompts


@dataclass
class PrefixConfig(MethodConfig):
    """Keys and values of virtual tokens before the text, in every layer.

    prefix_tuning makes them by an MLP (Li and Liang 2021); p_tuning_v2 trains them themselves (Liu
    et al. 2022), with a learning rate near 0.1.
    """

    name: str = "prefix_tuning"
    tokens: int = 20
    hidden: int = 512  # prefix_tuning: inner size of the MLP

    def __post_init__(self) -> None:
        one_of("method.name", self.name, ("prefix_tuning", "p_tuning_v2"))
        above("method.tokens", self.tokens, 0, _COUNT)
        above("method.hidden", self.hidden, 0, "It is the inner size of the MLP; 512 in the paper.")


@dataclass
class PromptConfig(MethodConfig):
    """Embeddings of virtual tokens before the text (Lester et al. 2021)."""

    name: str = "prompt_tuning"
    tokens: int = 20
    text: str | None = None  # begin as the embeddings of this text; null: of tokens drawn at random

    @property
    def positions(self) -> int:
        return self.tokens

    def __post_init__(self) -> None:
        one_of("method.name", self.name, ("prompt_tuning",))
        above("method.tokens", self.tokens, 0, _COUNT)


@dataclass
class PTuningConfig(MethodConfig):
    """Embeddings of virtual tokens, made by an encoder (Liu et al. 2021, P-Tuning)."""

    name: str = "p_tuning"
    tokens: int = 20
    encoder: str = "lstm"  # or mlp
    hidden: int | None = None  # inner size of the encoder; null: that of the model

    @property
    def positions(self) -> int:
        return self.tokens

    def __post_init__(self) -> None:
        one_of("method.name", self.name, ("p_tuning",))
        above("method.tokens", self.tokens, 0, _COUNT)
        one_of("method.encoder", self.encoder, ("lstm", "mlp"))
        if self.hidden is not None:
            above("method.hidden", self.hidden, 0, "Use null for the size of the model.")


# ---------------------------------------------------------------- bottlenecks


@dataclass
class BottleneckConfig(MethodConfig):
    """Small networks, down to `size` and up again, added after sublayers.

    houlsby has one after attention and one after the MLP (Houlsby et al. 2019), pfeiffer only the
    latter (Pfeiffer et al. 2021).
    """

    name: str = "houlsby"
    size: int = 64
    activation: str = "gelu"

    def __post_init__(self) -> None:
        one_of("method.name", self.name, ("houlsby", "pfeiffer"))
        above("method.size", self.size, 0, "It is the inner size; 8 to 256 in the paper.")
        one_of("method.activation", self.activation, ("gelu", "relu", "silu", "tanh"))


@dataclass
class UniPELTConfig(MethodConfig):
    """LoRA, a prefix and a bottleneck in every layer, each with a gate (Mao et al. 2022)."""

    name: str = "unipelt"
    rank: int = 8
    alpha: float = 16.0
    tokens: int = 10  # of the prefix
    size: int = 48  # of the bottleneck

    def __post_init__(self) -> None:
        one_of("method.name", self.name, ("unipelt",))
        above("method.rank", self.rank, 0, "It is the inner size of the two LoRA matrices.")
        above("method.alpha", self.alpha, 0, "The update is scaled by alpha / rank.")
        above("method.tokens", self.tokens, 0, _COUNT)
        above("method.size", self.size, 0, "It is the inner size of the bottleneck.")


# ---------------------------------------------------------------- by name

FAMILIES: dict[type[MethodConfig], tuple[str, ...]] = {
    FullConfig: ("full",),
    FreezeConfig: ("freeze",),
    LoraConfig: ("lora", "rslora", "dora", "pissa", "qlora", "lora_fa"),
    AdaLoraConfig: ("adalora",),
    LoraPlusConfig: ("lora_plus",),
    VeraConfig: ("vera",),
    LoraDropConfig: ("lora_drop",),
    PhasedLoraConfig: ("plora", "relora"),
    PrefixConfig: ("prefix_tuning", "p_tuning_v2"),
    PromptConfig: ("prompt_tuning",),
    PTuningConfig: ("p_tuning",),
    BottleneckConfig: ("houlsby", "pfeiffer"),
    BitFitConfig: ("bitfit",),
    IA3Config: ("ia3",),
    UniPELTConfig: ("unipelt",),
}


def _names(kind: type[MethodConfig]) -> tuple[str, ...]:
    return FAMILIES[kind]


# method -> its settings, made with `name=`
METHOD_SETTINGS: dict[str, type[Any]] = {
    name: kind for kind, names in FAMILIES.items() for name in names
}
