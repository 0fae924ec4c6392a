"""When PPO goes wrong: stop it, say why in the field's terms, and leave the evidence.

`StoppingRules.check` compares every step with the first one, where the policy is the SFT model. A
run that breaks a rule ends with `StoppedByGuard` (exit code 3); on the way out
`StoppingRules.explaining` names the known causes that match and writes the last rollout beside the
run.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf import engine
from rlhf.batch import Batch
from rlhf.config import PPOConfig, SamplingConfig, StopConfig
from rlhf.errors import StoppedByGuard
from rlhf.manifest import plain, step_name
from rlhf.ppo import logprobs
from rlhf.ranks import is_main
from rlhf.state import read_state
from rlhf.text import Renderer

Stats = dict[str, float]
FOLDER = "stopped"  # in the run
KEPT = 20  # steps that are remembered
# The beginnings of numbers that no reward takes part in.
OF_MODELS = ("objective/kl", "objective/entropy", "eval/kl", "policy/", "val/", "loss/")

# ---------------------------------------------------------------- rules


def _ratio(first: Stats, now: Stats, cfg: StopConfig, ppo: PPOConfig) -> str | None:
    limit = cfg.ratio
    if limit is None or "policy/ratio" not in now:  # the critic warms up alone
        return None
    usual = math.sqrt(2 * now["policy/approxkl"])  # root mean square of log ratio
    size = max(usual, math.log(max(now["policy/ratio"], 1e-12)))
    if size <= math.log(limit):
        return None
    return (
        f"one update changes a token's probability by a factor of {math.exp(min(size, 700)):.3g} "
        f"(stop.ratio={limit:g})"
    )


def _kl(first: Stats, now: Stats, cfg: StopConfig, ppo: PPOConfig) -> str | None:
    budget, kl = ppo.kl_budget, now["objective/kl"]
    if budget is None or kl <= budget:
        return None
    return f"KL to the reference is {kl:.2f} nats per answer (ppo.kl_budget={budget:g})"


def _score(first: Stats, now: Stats, cfg: StopConfig, ppo: PPOConfig) -> str | None:
    drop, spread = cfg.score_drop, first["objective/scores_std"]
    if drop is None or spread == 0:
        return None
    lost = (first["objective/scores"] - now["objective/scores"]) / spread
    if lost <= drop:
        return None
    return (
        f"the score fell from {first['objective/scores']:.3f} to {now['objective/scores']:.3f}, "
        f"{lost:.1f} standard deviations of the SFT answers' (stop.score_drop={drop:g})"
    )


def _eos(first: Stats, now: Stats, cfg: StopConfig, ppo: PPOConfig) -> str | None:
    drop, before, rate = cfg.eos_drop, first["response/eos_rate"], now["response/eos_rate"]
    if drop is None or before < 0.25 or rate >= (1 - drop) * before:  # few ended anyway
        return None
    return f"{rate:.0%} of the answers end, {before:.0%} did at first (stop.eos_drop={drop:g})"


def _length(first: Stats, now: Stats, cfg: StopConfig, ppo: PPOConfig) -> str | None:
    drop, before, length = cfg.length_drop, first["response/length"], now["response/length"]
    if drop is None or length >= (1 - drop) * before:
        return None
    return f"answers have {length:.1f} tokens, {before:.1f} at first (stop.length_drop={drop:g})"


RULES: dict[str, Callable[[Stats, Stats, StopConfig, PPOConfig], str | None]] = {
    "ratio explosion": _ratio,
    "KL over budget": _kl,
    "score collapse": _score,
    "answers no longer end": _eos,
    "length collapse": _length,
}

# ---------------------------------------------------------------- causes


@dataclass(frozen=True)
class Evidence:
    """What is known when a run is stopped.

    Attributes:
        cfg: the `ppo` settings.
        dtype: `engine.dtype`.
        foreign: whether a foreign reward model was let in.
        first, last: the numbers of step 1 and of the last step that has any; {} before those.
        scores, lengths: of each answer of the last rollout.
    """

    cfg: PPOConfig
    dtype: str
    foreign: bool
    first: Stats
    last: Stats
    scores: list[float]
    lengths: list[int]

    def rise(self, name: str) -> float:
        """By how much a number grew since step 1; 0 where it is not known."""
        return self.last.get(name, 0.0) - self.first.get(name, 0.0)


def _broken_scores(e: Evidence) -> str | None:
    bad = [i for i, score in enumerate(e.scores) if not math.isfinite(score)]
    if not bad:
        return None
    return (
        f"{len(bad)} of {len(e.scores)} scores are no finite numbers (the first in row {bad[0]} "
        "of the batch): the reward model or function overflows on that text."
    )


def _numbers_are_lost(e: Evidence) -> str | None:
    lost = [n for n, x in e.last.items() if n.startswith(OF_MODELS) and not math.isfinite(x)]
    if not lost or _broken_scores(e) is not None:
        return None
    return (
        f"the models' own numbers are lost ({', '.join(lost[:3])}): their weights diverged. Divide "
        f"ppo.learning_rate={e.cfg.learning_rate:g} (and ppo.critic_learning_rate="
        f"{e.cfg.critic_learning_rate:g}) by 10, or use engine.dtype=fp32 where "
        f"engine.dtype={e.dtype} overflows."
    )


def _steps_too_large(e: Evidence) -> str | None:
    clipped, size = e.last.get("policy/clipfrac", 0.0), e.last.get("policy/approxkl", 0.0)
    if not (clipped > 0.3 or size > 0.1):
        return None
    return (
        f"the policy's steps are too large: policy/clipfrac {clipped:.2f} (0.1 is usual), "
        f"policy/approxkl {size:.3g}. Lower ppo.learning_rate={e.cfg.learning_rate:g} by 3 to "
        f"10, or ppo.epochs={e.cfg.epochs}."
    )


def _critic_diverged(e: Evidence) -> str | None:
    explained = e.last.get("val/explained_variance", 0.0)
    if explained > -1.0:
        return None
    return (
        f"the critic is worse than a constant (val/explained_variance {explained:.2f}): lower "
        f"ppo.critic_learning_rate={e.cfg.critic_learning_rate:g}, or let it learn alone first "
        "(ppo.critic_warmup)."
    )


def _ends_are_cheap(e: Evidence) -> str | None:
    spread = e.first.get("objective/scores_std", 0.0)
    penalty, before = e.cfg.missing_eos_penalty, e.first.get("response/eos_rate", 0.0)
    if not (e.last.get("response/eos_rate", 1.0) < 0.8 * before and penalty < spread):
        return None
    return (
        f"not ending costs little: ppo.missing_eos_penalty={penalty:g} beside scores that spread "
        f"by {spread:.2f}. Set it to two or three of those, or ppo.scale_scores=true."
    )


def _length_pays(e: Evidence) -> str | None:
    known = [(n, s) for n, s in zip(e.lengths, e.scores, strict=True) if math.isfinite(s)]
    if len({n for n, _ in known}) < 2 or len({s for _, s in known}) < 2:
        return None
    pays = statistics.correlation(*zip(*known, strict=True))
    grew = e.rise("response/length") > 0
    if not abs(pays) > 0.4 or (pays > 0) != grew:
        return None
    kind = "longer" if pays > 0 else "shorter"
    return (
        f"the reward pays for {kind} answers (its correlation with length is {pays:.2f}): train "
        "the reward model on pairs of like length, or use ppo.overlong_buffer."
    )


def _distance_is_cheap(e: Evidence) -> str | None:
    gain, kl = e.rise("objective/scores"), e.last.get("objective/kl", 0.0)
    cost = e.last.get("objective/kl_coef", 0.0) * kl
    if not (kl > 5 and gain > 2 * cost):
        return None
    return (
        f"leaving the reference is cheap: the score rose by {gain:.2f} while KL cost {cost:.2f} "
        f"({kl:.1f} nats). Raise ppo.kl_coef={e.cfg.kl_coef:g}, or steer it: ppo.kl_target."
    )


def _distance_does_not_pay(e: Evidence) -> str | None:
    gain, kl = e.rise("objective/scores"), e.last.get("objective/kl", 0.0)
    if not (kl > 5 and gain <= 0):
        return None
    return (
        f"the policy wandered {kl:.1f} nats off and scores no better: the signal is lost in noise. "
        "Lower ppo.learning_rate, or take a larger ppo.batch_size."
    )


def _reward_is_exploited(e: Evidence) -> str | None:
    spread = e.first.get("objective/scores_std", 0.0)
    variety, before = e.last.get("response/distinct", 1.0), e.first.get("response/distinct", 1.0)
    if not (spread > 0 and e.rise("objective/scores") > spread and variety < 0.7 * before):
        return None
    return (
        f"the reward model is being exploited: the score rose by {e.rise('objective/scores'):.2f} "
        f"while distinct bigrams fell from {before:.2f} to {variety:.2f}. Read the answers in the "
        "dump; an earlier checkpoint, a higher ppo.kl_coef or another reward model helps."
    )


def _reward_is_foreign(e: Evidence) -> str | None:
    if not e.foreign:
        return None
    return (
        "allow_foreign_rm=true: the reward model never learnt on this policy's answers, so its "
        "scores of them may mean nothing. Train one from this SFT run."
    )


CAUSES = (
    _broken_scores,
    _numbers_are_lost,
    _steps_too_large,
    _critic_diverged,
    _ends_are_cheap,
    _length_pays,
    _distance_is_cheap,
    _distance_does_not_pay,
    _reward_is_exploited,
    _reward_is_foreign,
)


def likely_causes(evidence: Evidence) -> list[str]:
    """The known causes that match, one sentence each with what to do."""
    return [text for cause in CAUSES if (text := cause(evidence)) is not None]


# ---------------------------------------------------------------- at work


@dataclass
class _State:
    """What a resumed run goes on with.

    Attributes:
        first: the numbers of step 1.
        recent: those of the last steps.
        strikes: rule -> how often in a row it was broken.
    """

    first: Stats
    recent: list[Stats]
    strikes: dict[str, int]


class StoppingRules:
    """Watches one run. Every process has one and gives it the same numbers.

    Args:
        cfg, ppo, sampling: the settings `stop`, `ppo` and `sampling`.
        folder: of the run.
        renderer: makes text of tokens.
        dtype: `engine.dtype`.
        foreign: whether a foreign reward model was let in.
    """

    def __init__(
        self,
        cfg: StopConfig,
        ppo: PPOConfig,
        sampling: SamplingConfig,
        folder: Path,
        renderer: Renderer,
        *,
        dtype: str = "auto",
        foreign: bool = False,
    ) -> None:
        self.cfg, self.ppo, self.sampling = cfg, ppo, sampling
        self.folder, self.renderer = folder, renderer
        self._dtype, self._foreign = dtype, foreign
        self._batch: Batch | None = None
        self._now: Stats = {}
        self._first: Stats = {}
        self._recent: list[Stats] = []
        self._strikes: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "recent": self._recent, "strikes": self._strikes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        read = read_state(_State, state, self)
        self._first, self._recent, self._strikes = read.first, read.recent, read.strikes

    def observe(self, batch: Batch, stats: Stats, *, step: int) -> None:
        """Remember the rollout at work, before anything is learnt from it.

        Raises:
            StoppedByGuard: one of its numbers is not finite.
        """
        self._batch = batch
        self._look(stats, step)

    def check(self, stats: Stats, *, step: int) -> None:
        """Judge a step by all its numbers.

        Raises:
            StoppedByGuard: one is not finite, or a rule was broken `stop.patience` times in a row.
        """
        self._look(stats, step)
        self._recent = [*self._recent[1 - KEPT :], self._now]
        self._first = self._first or dict(stats)
        for name, rule in RULES.items():
            broken = rule(self._first, stats, self.cfg, self.ppo)
            self._strikes[name] = self._strikes.get(name, 0) + 1 if broken else 0
            if broken and self._strikes[name] >= self.cfg.patience:
                times = f", for {self._strikes[name]} steps" if self.cfg.patience > 1 else ""
                raise StoppedByGuard(f"{name}: {broken}{times}.")

    def check_held_out(self, stats: Stats, *, step: int) -> None:
        """Look at the numbers of an evaluation.

        What only watches (gold, a second reward model) stops nothing: it chooses no step then.

        Raises:
            StoppedByGuard: the score that is learnt from, or KL, is not finite.
        """
        own = {name: value for name, value in stats.items() if name in ("eval/score", "eval/kl")}
        self._now = self._now | own
        self._refuse(own, step)

    def _look(self, stats: Stats, step: int) -> None:
        self._now = {"step": step, **stats}
        self._refuse(stats, step)

    def _refuse(self, stats: Stats, step: int) -> None:
        for name, value in stats.items():
            if not math.isfinite(value):
                raise StoppedByGuard(f"{name} is {value} in step {step}.")

    @contextlib.contextmanager
    def explaining(self, policy: nn.Module) -> Iterator[None]:
        """A guard's stop inside the block is explained, and its evidence written.

        Raises:
            StoppedByGuard: the one of the block, with the likely causes and where the dump is.
        """
        try:
            yield
        except StoppedByGuard as error:
            raise StoppedByGuard(self._explain(str(error), policy)) from error

    def _explain(self, why: str, policy: nn.Module) -> str:
        rows = []
        if self._batch is not None:
            size = self.ppo.micro_batch_size
            rows = describe(self._batch, policy, self.sampling, self.renderer, size)
        rows = [row for part in engine.gather_objects(rows) for row in part]
        evidence = Evidence(
            cfg=self.ppo,
            dtype=self._dtype,
            foreign=self._foreign,
            first=self._first,
            last=self._now,
            scores=[row["score"] for row in rows],
            lengths=[len(row["response_ids"]) for row in rows],
        )
        causes = likely_causes(evidence) or ["none of the known ones matches; read the dump."]
        said = "\n".join([why, "Likely causes:", *(f"- {cause}" for cause in causes)])
        if is_main() and rows:
            said += "\n" + self._dump(said, rows)
        return said

    def _dump(self, said: str, rows: list[dict[str, Any]]) -> str:
        folder = self.folder / FOLDER / step_name(int(self._now.get("step", 0)))
        steps = self._recent if self._now in self._recent else [*self._recent, self._now]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "why.txt").write_text(said + "\n", encoding="utf-8")
            for name, lines in (("batch.jsonl", rows), ("steps.jsonl", steps)):
                text = "".join(json.dumps(plain(line), ensure_ascii=False) + "\n" for line in lines)
                (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            return f"The dump could not be written: {error.strerror}."
        return f"The last rollout token by token, and the last steps' numbers: {folder}"


@torch.no_grad()
def describe(
    batch: Batch,
    policy: nn.Module,
    sampling: SamplingConfig,
    renderer: Renderer,
    micro_batch_size: int,
) -> list[dict[str, Any]]:
    """A rollout in plain values: text, score and per-token numbers of each row.

    `ratio` is that of the policy as it is now to the one that sampled.
    """
    rows = []
    for part in batch.micro(micro_batch_size):
        now = logprobs(policy, part, sampling)
        ratio = (now - part.old_logprobs).exp()
        for i, mask in enumerate(part.response_mask):
            ids = part.responses[i][mask].tolist()
            per_token = {
                "old_logprobs": part.old_logprobs,
                "ref_logprobs": part.ref_logprobs,
                "kl": part.kl,
                "ratio": ratio,
                "advantages": part.advantages,
                "returns": part.returns,
            }
            if part.old_values is not None:
                per_token["values"] = part.old_values
            rows.append(
                {
                    "prompt": renderer.decode(part.prompts[i][part.prompt_mask[i]].tolist()),
                    "response": renderer.decode(ids),
                    "ended": bool(part.ended[i]),
                    "score": float(part.scores[i]),
                    "kl_sum": float(part.kl[i].sum()),
                    "response_ids": ids,
                    **{name: x[i][mask].tolist() for name, x in per_token.items()},
                }
            )
    return rows
