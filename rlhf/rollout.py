"""The only sampler. Sampling noise is keyed by (seed, row, position), so that an answer depends
neither on its neighbours in the batch nor on padding nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf import engine, libraries
from rlhf.config import SamplingConfig
from rlhf.data import PromptStream, Row
from rlhf.ranks import rank, world_size
from rlhf.text import Renderer

T = TypeVar("T")


@dataclass(frozen=True)
class Rollout:
    """Prompts and what was sampled after them. Masks: True counts.

    `batch.Judged` and `batch.Batch` add to it what is found out later.

    Attributes:
        prompts: [B, P] token ids, padded on the left.
        prompt_mask: [B, P] bool.
        responses: [B, R] token ids, padded on the right; EOS included where there is one.
        response_mask: [B, R] bool.
        old_logprobs: [B, R] nats, of the distribution that was sampled; 0 on padding.
        ended: [B] bool, the answer ended by EOS rather than at the limit.
        floors: [B, R] nats; tokens less likely than this were ruled out by top-k or top-p, see
            `restrict`; -inf where none was, and on padding.
    """

    prompts: Tensor
    prompt_mask: Tensor
    responses: Tensor
    response_mask: Tensor
    old_logprobs: Tensor
    ended: Tensor
    floors: Tensor

    @property
    def ids(self) -> Tensor:
        """[B, T] prompt and response."""
        return torch.cat([self.prompts, self.responses], dim=1)

    @property
    def mask(self) -> Tensor:
        """[B, T] bool, True on real tokens."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    def __len__(self) -> int:
        return self.prompts.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Every field that has a tensor, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def rows(self, index: Tensor | slice) -> Self:
        """Some rows, without columns that are padding in all of them."""
        part = {name: tensor[index] for name, tensor in self.tensors().items()}
        first = int(part["prompt_mask"].any(0).long().argmax())
        width = int(part["response_mask"].any(0).sum())
        for name, tensor in part.items():
            if name.startswith("prompt"):
                part[name] = tensor[:, first:]
            elif tensor.dim() == 2:
                part[name] = tensor[:, :width]
        return replace(self, **part)

    def micro(self, size: int) -> Iterator[Self]:
        """Consecutive parts of `size` rows."""
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))

    def answer_ids(self) -> list[list[int]]:
        """The sampled token ids of each row, without padding."""
        pairs = zip(self.responses, self.response_mask, strict=True)
        return [row[mask].tolist() for row, mask in pairs]


def changed() -> Iterator[str]:
    """What sampling relies on in transformers, and is not there: lines."""
    from transformers import GenerationMixin

    asked = ("generation_config", "logits_processor", "synced_gpus")
    yield from libraries.refusing(GenerationMixin.generate, *asked)
    given = ("max_new_tokens", "do_sample", "eos_token_id", "pad_token_id", "use_cache")
    yield from libraries.unmentioned(GenerationConfig, *given)


@torch.no_grad()
def sample(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    keys: Sequence[int],
    seed: int,
    cfg: SamplingConfig,
    pad_id: int,
    eos_id: int,
    device: torch.device,
) -> Rollout:
    """Draw one answer per prompt from softmax(logits / temperature), cut by top-k and top-p.

    Args:
        policy: a language model; left in the mode it was in.
        prompts: token ids, B of them.
        keys: one number per row that names its noise; the same key and seed draw the same
            answer, whatever else is in the batch.
        seed: of this rollout.
        cfg: the `sampling` settings.
        pad_id, eos_id: of the tokenizer.
        device: where the policy is.
    """
    training, own = policy.training, policy.generation_config
    policy.eval()
    # generate() fills what our settings leave open from the model's: a repetition penalty, say.
    policy.generation_config = GenerationConfig()  # type: ignore[assignment]
    parts = []
    with engine.whole(policy):
        for start in range(0, len(prompts), cfg.batch_size):
            rows = slice(start, start + cfg.batch_size)
            parts.append(
                _generate(policy, prompts[rows], keys[rows], seed, cfg, pad_id, eos_id, device)
            )
    policy.generation_config = own
    policy.train(training)
    return _stack(parts, pad_id)


@dataclass(frozen=True)
class Prompt:
    """One answer that is asked for.

    Attributes:
        ids: token ids of the prompt.
        row: of the data.
        key: names its noise: its place among all answers of a step, over all processes.
    """

    ids: list[int]
    row: Row
    key: int


class Prompts:
    """The prompts of each step, as they are shared out to the processes.

    Args:
        ids: token ids of each prompt, by row of the data.
        rows: of the data.
        seed: of the order.
        answers: per step, over all processes.
        per_prompt: answers to each prompt, in consecutive rows of one process.
    """

    def __init__(
        self, ids: list[list[int]], rows: list[Row], *, seed: int, answers: int, per_prompt: int
    ) -> None:
        self._stream, self._rows = PromptStream(ids, seed), rows
        self._size, self._per_prompt = answers // per_prompt, per_prompt

    def batch(self, step: int) -> list[Prompt]:
        """What this process answers in step 1, 2, ..."""
        places = self._stream.places(step, self._size)
        asked = share(places, per_prompt=self._per_prompt)
        return [Prompt(self._stream.prompts[at], self._rows[at], key) for key, at in asked]


@dataclass(frozen=True)
class Sampler:
    """Draws the answers of a step; the noise depends on (seed, step, key) alone.

    Attributes:
        policy: a language model.
        renderer: has the ids of the pad and the end token.
        cfg: the `sampling` settings.
        seed: of the run.
    """

    policy: nn.Module
    renderer: Renderer
    cfg: SamplingConfig
    seed: int

    def rollout(self, prompts: Sequence[Prompt], *, step: int) -> Rollout:
        """One answer to each prompt, see `sample`."""
        return sample(
            self.policy,
            [prompt.ids for prompt in prompts],
            keys=[prompt.key for prompt in prompts],
            seed=mix(mix(self.seed) + step),
            cfg=self.cfg,
            pad_id=self.renderer.pad_id,
            eos_id=self.renderer.eos_id,
            device=engine.device(),
        )


def share(asked: Sequence[T], *, per_prompt: int) -> list[tuple[int, T]]:
    """This process's part of the answers to `asked`, each with its place among all of them."""
    mine = (n for n in range(len(asked) * per_prompt) if n // per_prompt % world_size() == rank())
    return [(place, asked[place // per_prompt]) for place in mine]


def _generate(
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    seed: int,
    cfg: SamplingConfig,
    pad_id: int,
    eos_id: int,
    device: torch.device,
) -> Rollout:
    ids, mask = pad_left(prompts, pad_id, device)
    sampler = KeyedSampler(keys, seed=seed, cfg=cfg, width=ids.shape[1])
    out = policy.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask.long(),
        generation_config=GenerationConfig(
            max_new_tokens=cfg.max_new_tokens,
            do_sample=False,  # the sampler leaves one token to choose
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            use_cache=True,
        ),
        logits_processor=LogitsProcessorList([sampler]),
        synced_gpus=False,  # see engine.whole: no process waits for another's token
    )
    responses = out[:, ids.shape[1] :]
    is_eos = responses == eos_id
    response_mask = is_eos.cumsum(1) - is_eos.long() == 0  # up to and including the first EOS
    return Rollout(
        prompts=ids,
        prompt_mask=mask,
        responses=responses.masked_fill(~response_mask, pad_id),
        response_mask=response_mask,
        old_logprobs=torch.stack(sampler.logprobs, dim=1).masked_fill(~response_mask, 0.0),
        ended=is_eos.any(1),
        floors=torch.stack(sampler.floors, dim=1).masked_fill(~response_mask, -torch.inf),
    )


class KeyedSampler(LogitsProcessor):
    """Draws each token by inverting the distribution function at a number keyed by its row.

    It leaves the drawn token as the only choice and keeps its log-probability, so that nothing of
    size [B, V] outlives a step.
    """

    def __init__(self, keys: Sequence[int], *, seed: int, cfg: SamplingConfig, width: int) -> None:
        self.keys = torch.tensor([mix(mix(seed) + key) for key in keys])  # not symmetric in the two
        self.cfg = cfg
        self.width = width
        self.logprobs: list[Tensor] = []
        self.floors: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.width
        noise = uniform(self.keys, position).to(scores.device)  # [B]
        logprobs = torch.log_softmax(scores.float() / self.cfg.temperature, dim=-1)  # [B, V]
        floors = torch.full_like(logprobs[:, 0], -torch.inf)  # [B]
        if self.cfg.truncates:
            floors = find_floors(logprobs, top_k=self.cfg.top_k, top_p=self.cfg.top_p)
            logprobs = logprobs.masked_fill(logprobs < floors[:, None], -torch.inf)
            logprobs = torch.log_softmax(logprobs, dim=-1)
        cumulative = logprobs.double().exp().cumsum(-1)
        target = noise * cumulative[:, -1]  # the total is 1 up to rounding
        token = torch.searchsorted(cumulative, target[:, None], right=True)
        token = token.clamp(max=scores.shape[1] - 1)
        self.logprobs.append(logprobs.gather(1, token).squeeze(1))
        self.floors.append(floors)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def find_floors(logprobs: Tensor, *, top_k: int | None, top_p: float | None) -> Tensor:
    """The log-probability below which top-k, then top-p (Holtzman et al. 2020) rule tokens out.

    top-p keeps the fewest of the likeliest tokens whose share of what top-k kept is at least
    top_p. Tokens as likely as the last one kept are kept too. The floor lies halfway between it
    and the next, so that rounding in another pass moves no token across.

    Args:
        logprobs: [B, V], temperature applied.
        top_k: tokens kept at most; None for all.
        top_p: share of the probability that is kept; None for all.

    Returns:
        [B] in nats; -inf where every token is kept.
    """
    size = logprobs.shape[1]
    ranked = logprobs.sort(dim=1, descending=True).values
    kept = torch.full_like(ranked[:, :1], size, dtype=torch.long)  # [B, 1]
    if top_k is not None:
        kept = kept.clamp(max=top_k)
    if top_p is not None:
        share = ranked.double().exp().cumsum(1)
        share = share / share.gather(1, kept - 1)
        kept = torch.minimum(kept, (share < top_p).sum(1, keepdim=True) + 1)
    last = ranked.gather(1, kept - 1)  # [B, 1]
    kept = (ranked >= last).sum(1, keepdim=True)
    following = ranked.gather(1, kept.clamp(max=size - 1))
    return torch.where(kept == size, -torch.inf, (last + following) / 2).squeeze(1)


def restrict(logits: Tensor, tokens: Tensor, floors: Tensor) -> Tensor:
    """Logits of the distribution that was sampled: what is below its floor is ruled out.

    At the weights that sampled, these are the tokens that top-k and top-p ruled out. The token
    that was drawn stays possible as the weights move, so that its probability never becomes 0.
    Floors mean something for the policy alone.

    Args:
        logits: [B, R, V] of the policy, temperature applied.
        tokens: [B, R] the sampled tokens.
        floors: [B, R] as the sampler found them.

    Returns:
        [B, R, V] with -inf on what is ruled out.
    """
    with torch.no_grad():
        out = logits.float().log_softmax(-1) < floors.unsqueeze(-1)
        out.scatter_(-1, tokens.unsqueeze(-1), False)
    return logits.masked_fill(out, -torch.inf)


MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """A 64-bit hash (splitmix64: Steele et al. 2014), as a signed number that fits int64."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x


def uniform(keys: Tensor, position: int) -> Tensor:
    """One number in [0, 1) per key and position, in float64; integer arithmetic up to the end."""
    bits = [mix((int(key) & MASK) ^ mix(position)) & MASK for key in keys]
    return torch.tensor([(b >> 11) / (1 << 53) for b in bits], dtype=torch.float64)


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """([B, P] ids, [B, P] bool mask) of ragged rows, padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[False] * (width - len(r)) + [True] * len(r) for r in rows], device=device)
    return ids, mask


def _stack(parts: list[Rollout], pad_id: int) -> Rollout:
    """Several rollouts as one, padded to the longest prompt and response."""
    if len(parts) == 1:
        return parts[0]
    prompt_width = max(part.prompts.shape[1] for part in parts)
    width = max(part.responses.shape[1] for part in parts)

    def join(name: str, to: int, left: bool, fill: float) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        pads = [(to - t.shape[1], 0) if left else (0, to - t.shape[1]) for t in tensors]
        return torch.cat(
            [nn.functional.pad(t, pad, value=fill) for t, pad in zip(tensors, pads, strict=True)]
        )

    return Rollout(
        prompts=join("prompts", prompt_width, True, pad_id),
        prompt_mask=join("prompt_mask", prompt_width, True, False),
        responses=join("responses", width, False, pad_id),
        response_mask=join("response_mask", width, False, False),
        old_logprobs=join("old_logprobs", width, False, 0.0),
        ended=torch.cat([part.ended for part in parts]),
        floors=join("floors", width, False, -torch.inf),
    )
