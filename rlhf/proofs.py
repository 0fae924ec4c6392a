"""What PPO proves about itself in every run, printed and logged, or refuses to go on without.

That the reference is the SFT model is proved by its golden logits (`golden.check_roles`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlhf import engine, models
from rlhf.batch import Judged
from rlhf.config import SamplingConfig
from rlhf.data import Row
from rlhf.errors import ConfigError, RegistryError, StoppedByGuard
from rlhf.ppo import logprobs
from rlhf.roles import Roles
from rlhf.text import Renderer

TOLERANCE = {  # nats, |ratio - 1|
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (0.05, 0.05),
    torch.float16: (2**-6, 2**-6),  # the distance between two logits of size 16 to 32
}
PROBES = 8  # rows whose text is compared
ANSWER = "This is an answer."


def same_text(renderer: Renderer, readers: Mapping[str, Renderer], rows: Sequence[Row]) -> str:
    """Padding is never the end token, BOS comes once, and reward models read what is written.

    Args:
        renderer: of the policy.
        readers: reference -> renderer of that reward model, with its own tokenizer and template.
        rows: of the data.

    Returns:
        One line that says so, with the text that a reward model reads.

    Raises:
        ConfigError: the pad token is the end token, or BOS comes twice.
        RegistryError: a reward model would be given other tokens than it was trained on.
    """
    tokenizer = renderer.tokenizer
    if renderer.pad_id == renderer.eos_id:
        raise ConfigError(
            f"tokenizer: its pad token is its end token {tokenizer.eos_token!r}, so the end of an "
            "answer could not be told from padding. Give the SFT run a pad token of its own."
        )
    shown = ""
    for row in rows[:PROBES]:
        ids = _ids(renderer, row)
        if tokenizer.bos_token_id is not None and ids[:2].count(tokenizer.bos_token_id) > 1:
            raise ConfigError("template: it renders the beginning-of-sequence token twice.")
        shown = shown or str(tokenizer.decode(ids))
        for reference, reader in readers.items():
            if (theirs := _ids(reader, row)) != ids:
                raise RegistryError(
                    f"{reference}: it was trained to read\n  {reader.tokenizer.decode(theirs)!r}\n"
                    f"and would be given\n  {shown!r}\nTrain it from this SFT run."
                )
    said = f"text: padding {tokenizer.pad_token!r} is not the end {tokenizer.eos_token!r}"
    if readers:
        said += f"; {', '.join(readers)} and the policy read {_short(shown)}"
    return said


def _ids(renderer: Renderer, row: Row) -> list[int]:
    prompt = row["prompt"]
    return renderer.prompt(prompt) + renderer.response(prompt, ANSWER)


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:120]} ... {text[-60:]}")


@torch.no_grad()
def start(
    roles: Roles, batch: Judged, sampling: SamplingConfig, *, dtype: torch.dtype
) -> dict[str, float]:
    """Before the first update: the policy is the reference, and training sees what was sampled.

    Policy and reference are held against each other in a training pass at other padding and
    another micro-batch size than everything before; so are that pass and the log-probabilities of
    the sampler (cached, whole batch).

    Returns:
        proof/kl, the largest |log policy - log reference| of a token, and proof/ratio, the
        largest |new / old - 1|; `in_words` says them.

    Raises:
        StoppedByGuard: either is beyond the tolerance for the dtype.
    """
    worst = torch.zeros(2)  # |log-ratio to the reference|, |ratio to what was sampled - 1|
    training = roles.policy.training
    roles.policy.train()  # as `update` will have it: dropout shows here
    for micro in batch.micro(7):  # a size that divides no usual batch
        padded = replace(
            micro,
            prompts=nn.functional.pad(micro.prompts, (3, 0), value=int(micro.prompts[0, -1])),
            prompt_mask=nn.functional.pad(micro.prompt_mask, (3, 0), value=False),
        )
        now = logprobs(roles.policy, padded, sampling)
        own, then = (
            logprobs(role, padded, sampling, restricted=False)
            for role in (roles.policy, roles.reference)
        )
        found = torch.stack([own - then, (now - micro.old_logprobs).exp() - 1]).abs().amax((1, 2))
        worst = torch.maximum(worst, found.cpu())  # which keeps a nan, as Python's max does not
    roles.policy.train(training)
    kl, ratio = torch.stack(engine.gather_objects(worst)).amax(0).tolist()
    kl_limit, ratio_limit = TOLERANCE[dtype]
    if not (kl <= kl_limit and ratio <= ratio_limit):
        raise StoppedByGuard(
            f"before the first update the policy differs from its reference by {kl:.2e} nats on a "
            f"token (at most {kl_limit:g}), or a training pass from what was sampled by a ratio of "
            f"1 ± {ratio:.2e} (at most {ratio_limit:g}). PPO would learn from noise. Is the "
            "reference the SFT model, and is dropout off?"
        )
    return {"proof/kl": kl, "proof/ratio": ratio}


def in_words(proof: Mapping[str, float]) -> str:
    """What `start` found, in one line."""
    return (
        f"before the first update: |KL(policy, reference)| <= {proof['proof/kl']:.1e} nats on "
        f"every token, |ratio - 1| <= {proof['proof/ratio']:.1e}"
    )


@dataclass(frozen=True)
class Invariants:
    """What the first update must find, and leave as it was.

    Attributes:
        roles, reward_models: all that take part; reference -> model.
        sampling: the settings of that name.
        micro_batch_size: rows that are asked about after the update.
        dtype: that is trained in.
        note: takes a line for the user.
    """

    roles: Roles
    reward_models: Mapping[str, nn.Module]
    sampling: SamplingConfig
    micro_batch_size: int
    dtype: torch.dtype
    note: Callable[[str], None]

    @contextlib.contextmanager
    def around(self, step: int, batch: Judged) -> Iterator[dict[str, float]]:
        """Prove what holds around the update of the block, in step 1; gives its numbers.

        Raises:
            StoppedByGuard: something does not hold.
        """
        if step > 1:
            yield {}
            return
        found = start(self.roles, batch, self.sampling, dtype=self.dtype)
        self.note(in_words(found))
        frozen = Frozen(
            self.roles,
            self.reward_models,
            batch,
            self.sampling,
            micro_batch_size=self.micro_batch_size,
            dtype=self.dtype,
        )
        yield found
        self.note(frozen.prove())


class Frozen:
    """Reference and reward models, held against themselves after the first update.

    Args:
        roles: before any update.
        reward_models: reference -> model.
        batch: a judged rollout, of which the first rows are asked about.
        sampling: the settings of that name.
        dtype: that is trained in.
    """

    def __init__(
        self,
        roles: Roles,
        reward_models: Mapping[str, nn.Module],
        batch: Judged,
        sampling: SamplingConfig,
        *,
        micro_batch_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._roles, self._reward_models = roles, reward_models
        self._sampling, self._dtype = sampling, dtype
        self._probe = next(batch.micro(micro_batch_size))
        self._before = self._say()

    @torch.no_grad()
    def _say(self) -> dict[str, Tensor]:
        said = {
            name: models.scores(model, self._probe.ids, self._probe.mask)
            for name, model in self._reward_models.items()
        }
        return {"reference": logprobs(self._roles.reference, self._probe, self._sampling)} | said

    def prove(self) -> str:
        """After an update: they say what they said, and no gradient has reached them.

        Raises:
            StoppedByGuard: one of them moved, or could.
        """
        trained = [p for m in (self._roles.policy, self._roles.critic) if m for p in _trained(m)]
        named = {"reference": self._roles.reference, **self._reward_models}
        limit, _ = TOLERANCE[self._dtype]
        now = self._say()
        for name, model in named.items():
            moved = float((now[name] - self._before[name]).abs().max())
            reached = _reached(model, trained)
            if reached or not moved <= limit:
                raise StoppedByGuard(
                    f"the first update moved {name}, which is frozen: its answers differ by "
                    f"{moved:.2e} (at most {limit:g}), {len(reached)} of its weights were in "
                    "reach of a gradient. This is a bug: please report it with config.yaml."
                )
        return f"after the first update: {', '.join(named)} unmoved, in reach of no gradient"


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _reached(model: nn.Module, trained: list[nn.Parameter]) -> list[nn.Parameter]:
    """Weights of a frozen role that learn or hold a gradient; what shares its backbone may."""
    learning = {id(p) for p in trained}
    own = set(map(id, model.parameters()))
    return [
        p
        for p in models.whole(model).parameters()
        if (id(p) in own and id(p) in learning)
        or (id(p) not in learning and (p.requires_grad or p.grad is not None))
    ]
