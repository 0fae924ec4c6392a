"""What each fine-tuning method allows. Guards, models and docs follow this table; no torch."""

from __future__ import annotations

from dataclasses import dataclass

ALL = (0, 1, 2, 3)
_UNMEASURED_3 = "it was not measured there; the model is split, and its parts are read elsewhere"
_NO_SCHEDULE = "it follows the schedule of supervised training, which PPO's loop does not have"


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: as in `method=<name>`.
        title: what is trained, for people.
        paper: where it comes from.
        provider: "peft", "optimizer" (LoRA whose weights are updated otherwise) or "ours".
        adapter: trains added weights beside a frozen base, rather than the base itself.
        mergeable: what was trained can be folded into the base, up to rounding. What is published
            is whole weights then; otherwise a base and an adapter, and a run that starts from it
            goes on with that adapter.
        neutral: the model says at first what it said without it, so that PPO may begin with it on
            any SFT model; otherwise only where the SFT run was trained by it.
        shares: several roles of PPO can be adapters of it on one frozen backbone.
        checkpointing: activations may be recomputed (`engine.checkpointing`).
        quantization: its base may be in 4 bits (`method.quantization`).
        new_tokens: it can learn tokens that the base never saw, such as those of a chat template.
        zero_stages: the ZeRO stages under which its training was measured to be right; the others
            are refused (`method-zero-stage` in guards.py).
        zero_reason: what goes wrong under the others; empty where there are none.
        rm_reason, ppo_reason: why the stage refuses it; empty where it does not.
    """

    name: str
    title: str
    paper: str
    provider: str = "peft"
    adapter: bool = True
    mergeable: bool = True
    neutral: bool = True
    shares: bool = False
    checkpointing: bool = True
    quantization: bool = False
    new_tokens: bool = False
    zero_stages: tuple[int, ...] = (0, 1, 2)
    zero_reason: str = _UNMEASURED_3
    rm_reason: str = ""
    ppo_reason: str = ""


def _own(name: str, title: str, paper: str, *, new_tokens: bool = False) -> Method:
    """Weights of the model itself: published whole, and a model for each role of PPO."""
    return Method(
        name,
        title,
        paper,
        provider="ours",
        adapter=False,
        mergeable=False,
        new_tokens=new_tokens,
        zero_stages=ALL,
        zero_reason="",
    )


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        _own("full", "every weight", "-", new_tokens=True),
        _own("freeze", "the last layers, the final norm, the head", "-"),
        Method(
            "lora",
            "low-rank adapters",
            "Hu et al. 2021",
            new_tokens=True,
            shares=True,
            quantization=True,
            zero_stages=ALL,
            zero_reason="",
        ),
        Method(
            "rslora",
            "LoRA scaled by alpha/sqrt(rank)",
            "Kalajdzievski 2023",
            new_tokens=True,
            shares=True,
            quantization=True,
        ),
        Method(
            "dora",
            "LoRA, and the length of each row",
            "Liu et al. 2024",
            new_tokens=True,
            shares=True,
        ),
        Method(
            "pissa",
            "LoRA from the largest singular vectors",
            "Meng et al. 2024",
            ppo_reason=(
                "its first adapter and what it leaves of the weights add up to the SFT model only "
                "up to rounding, which the proof of the first step cannot tell from an error"
            ),
            new_tokens=True,
        ),
        Method(
            "qlora",
            "LoRA on a base in 4 bits",
            "Dettmers et al. 2023",
            new_tokens=True,
            quantization=True,
            ppo_reason=(
                "the SFT weights would be quantised again, and the policy would begin as another "
                "model than the one it is measured against"
            ),
        ),
        Method(
            "adalora",
            "LoRA with ranks that are pruned",
            "Zhang et al. 2023",
            new_tokens=True,
            zero_stages=(0,),
            zero_reason=(
                "ZeRO updates copies of the weights and writes them back, which undoes the pruning"
            ),
            ppo_reason=(
                "pruning changes the policy between two updates, beside PPO's clipped objective, "
                "and its schedule is one of supervised training"
            ),
        ),
        Method(
            "lora_plus",
            "LoRA whose B learns faster",
            "Hayou et al. 2024",
            new_tokens=True,
            provider="optimizer",
            shares=True,
            quantization=True,
        ),
        Method(
            "lora_fa",
            "the B of LoRA",
            "Zhang et al. 2023",
            new_tokens=True,
            provider="optimizer",
            shares=True,
            quantization=True,
        ),
        Method("vera", "vectors on shared random matrices", "Kopiczko et al. 2024"),
        Method(
            "lora_drop",
            "LoRA in the layers that need it",
            "Zhou et al. 2024",
            new_tokens=True,
            provider="ours",
            ppo_reason="its layers are chosen by a first training on demonstrations",
        ),
        Method(
            "plora",
            "LoRA in periods",
            "Meng et al. 2024",
            new_tokens=True,
            provider="ours",
            quantization=True,
            ppo_reason=_NO_SCHEDULE,
        ),
        Method(
            "relora",
            "LoRA with restarts",
            "Lialin et al. 2023",
            new_tokens=True,
            provider="ours",
            quantization=True,
            ppo_reason=_NO_SCHEDULE,
        ),
        Method(
            "prefix_tuning",
            "keys and values of virtual tokens, by an MLP",
            "Li and Liang 2021",
            mergeable=False,
            neutral=False,
            checkpointing=False,
        ),
        Method(
            "prompt_tuning",
            "embeddings of virtual tokens",
            "Lester et al. 2021",
            mergeable=False,
            neutral=False,
        ),
        Method(
            "p_tuning",
            "embeddings of virtual tokens, by an encoder",
            "Liu et al. 2021",
            mergeable=False,
            neutral=False,
        ),
        Method(
            "p_tuning_v2",
            "keys and values of virtual tokens",
            "Liu et al. 2022",
            mergeable=False,
            neutral=False,
            checkpointing=False,
        ),
        Method(
            "houlsby",
            "bottlenecks after attention and MLP",
            "Houlsby et al. 2019",
            provider="ours",
            mergeable=False,
        ),
        Method(
            "pfeiffer",
            "bottlenecks after the MLP",
            "Pfeiffer et al. 2021",
            provider="ours",
            mergeable=False,
        ),
        _own("bitfit", "biases", "Ben Zaken et al. 2022"),
        Method("ia3", "vectors on keys, values, inner activations", "Liu et al. 2022"),
        Method(
            "unipelt",
            "LoRA, prefix and bottleneck, gated",
            "Mao et al. 2022",
            provider="ours",
            mergeable=False,
            neutral=False,
            checkpointing=False,
        ),
    )
}
