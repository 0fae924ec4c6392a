"""What the report card asks a reward model: held-out pairs, the same pairs under an empty prompt,
and probes, which are worse answers made from the chosen ones.

Every process asks for all of it, in one order, as ZeRO-3 needs it: so each has the same card.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from torch import nn

from rlhf import card, engine, evaluate, models, roles
from rlhf.card import Agreement, Card, Probe
from rlhf.config import CardConfig, EngineConfig
from rlhf.data import Split
from rlhf.pairwise import Pair
from rlhf.registry import Published
from rlhf.text import Renderer

Scores = tuple[list[float], list[float]]  # of the chosen and of the rejected answers

PROBES = {  # what each is, as it stands behind "the chosen answer scores above ..."
    "empty answer": "no answer at all",
    "truncated": "its own first half",
    "repeated": "itself said twice",
    "another prompt": "the chosen answer to another prompt",
    "flattery": "itself with flattery added",
    "prompt echoed": "the user's last words said back",
}


@dataclass(frozen=True)
class HeldOutPairs:
    """Pairs that a reward model was not trained on.

    Attributes:
        split: its rows stand in the order of `ids`.
        ids: "chosen_ids" and "rejected_ids" of each, as `Renderer.pairs` gives them.
        cfg, engine_cfg: the settings `card` and `engine`.
        positions_taken: by the method, before the text.
        max_response_tokens: of a probe.
        batch_size: sequences per forward pass.
    """

    split: Split
    ids: list[dict[str, list[int]]]
    renderer: Renderer
    cfg: CardConfig
    engine_cfg: EngineConfig
    positions_taken: int
    max_response_tokens: int
    batch_size: int

    def scores(self, reward_model: nn.Module) -> Scores:
        """Of every pair."""
        return self._pair_scores(reward_model, self.ids)

    def measure(
        self, reward_model: nn.Module, others: Sequence[Published], positions: int | None
    ) -> tuple[dict[str, float], Card | None]:
        """Accuracy and margin on the pairs, with what the card measures, and the card.

        Args:
            others, positions: as in `card`.
        """
        with engine.whole(reward_model):
            scores = self.scores(reward_model)
            metrics = evaluate.pairs(self.ids, *scores)
            report = self.card(reward_model, scores, others, positions)
        return metrics | (report.metrics if report is not None else {}), report

    def card(
        self,
        reward_model: nn.Module,
        scores: Scores,
        others: Sequence[Published],
        positions: int | None,
    ) -> Card | None:
        """The report card; None where it is switched off.

        Args:
            scores: what `scores` gave.
            others: reward models whose preferences are compared.
            positions: how many the model has; what does not fit is not asked.
        """
        if not self.cfg.enabled:
            return None
        pairs = self._pairs(scores)
        room = None if positions is None else positions - self.positions_taken
        return card.make(
            pairs,
            split=self.split.name,
            removed=self._without_prompt(reward_model, pairs),
            probes=self._probes(reward_model, scores[0], room),
            agreement=[
                agreement
                for rm in others
                if (agreement := self._agreement(rm, pairs, positions)) is not None
            ],
            bins=self.cfg.bins,
        )

    def _pairs(self, scores: Scores) -> list[Pair]:
        out = []
        for row, ids, chosen, rejected in zip(self.split.rows, self.ids, *scores, strict=True):
            before = len(self._prompt(row)) + 1  # and the end token
            source = row.get("source")
            out.append(
                Pair(
                    chosen,
                    rejected,
                    len(ids["chosen_ids"]) - before,
                    len(ids["rejected_ids"]) - before,
                    sum(message["role"] == "user" for message in row["prompt"]),
                    source if isinstance(source, str) else None,
                )
            )
        return out

    def _without_prompt(self, reward_model: nn.Module, pairs: list[Pair]) -> list[Pair] | None:
        """The pairs as they score under an empty user turn; None where the template refuses it."""
        try:
            empty = self.renderer.prompt([{"role": "user", "content": ""}])
        except TemplateError:
            return None
        bare = []
        for row, ids in zip(self.split.rows, self.ids, strict=True):
            before = len(self._prompt(row))
            bare.append({name: empty + sequence[before:] for name, sequence in ids.items()})
        scores = zip(pairs, *self._pair_scores(reward_model, bare), strict=True)
        return [dataclasses.replace(p, chosen=chosen, rejected=rest) for p, chosen, rest in scores]

    def _agreement(
        self, rm: Published, pairs: list[Pair], positions: int | None
    ) -> Agreement | None:
        """On the pairs that the other model has positions for; None where it has for none."""
        other = roles.load_reward_model(rm, self.renderer.tokenizer, self.engine_cfg)
        taken = models.read_method(rm).positions
        fits = [
            place
            for place, ids in enumerate(self.ids)
            if positions is None or max(map(len, ids.values())) + taken <= positions
        ]
        scores = self._pair_scores(other, [self.ids[place] for place in fits])
        ours = [pairs[place] for place in fits]
        theirs = [
            dataclasses.replace(pair, chosen=chosen, rejected=rejected)
            for pair, chosen, rejected in zip(ours, *scores, strict=True)
        ]
        return card.agree(rm.reference, ours, theirs) if theirs else None

    # ------------------------------------------------------------ probes

    def _probes(
        self, reward_model: nn.Module, chosen: list[float], room: int | None
    ) -> list[Probe]:
        """Each probe on pairs spread over the split; one that fits none of them is left out."""
        n = len(self.ids)
        count = min(n, self.cfg.probe_pairs)
        places = [turn * n // count for turn in range(count)]
        made = [(place, self.worse(place)) for place in places]
        out = []
        for name, what in PROBES.items():
            asked = {
                place: prompt + answer
                for place, (prompt, answers) in made
                if (answer := answers.get(name)) is not None
                and len(answer) <= self.max_response_tokens
                and (room is None or len(prompt) + len(answer) <= room)
            }
            if asked:
                worse = self._score(reward_model, list(asked.values()))
                out.append(card.probe(name, what, [chosen[place] for place in asked], worse))
        return out

    def worse(self, place: int) -> tuple[list[int], dict[str, list[int]]]:
        """The prompt of a pair, and name -> token ids of an answer that is worse than the chosen.

        A probe that would leave the chosen answer as it is, or has no other prompt, is left out.
        """
        row, ids, end = self.split.rows[place], self.ids[place], self.renderer.eos_id
        prompt, text = self._prompt(row), row["chosen"]
        chosen = ids["chosen_ids"][len(prompt) :]
        messages = row["prompt"]
        made = {
            "empty answer": [end],
            "truncated": [*chosen[: (len(chosen) - 1) // 2], end],
            "repeated": self.renderer.response(messages, f"{text} {text}"),
            "flattery": self.renderer.response(messages, f"{text} {self.cfg.flattery}"),
            "prompt echoed": self.renderer.response(messages, messages[-1]["content"]),
        }
        if (other := self._another(place)) is not None:
            before = len(self._prompt(self.split.rows[other]))
            made["another prompt"] = self.ids[other]["chosen_ids"][before:]
        return prompt, {name: answer for name, answer in made.items() if answer != chosen}

    def _another(self, place: int) -> int | None:
        """A pair with another prompt, from half the split away: neighbours are often alike."""
        rows = self.split.rows
        for turn in range(len(rows)):
            other = (place + len(rows) // 2 + turn) % len(rows)
            if rows[other]["prompt"] != rows[place]["prompt"]:
                return other
        return None

    # ------------------------------------------------------------ asking

    def _prompt(self, row: dict[str, object]) -> list[int]:
        return self.renderer.prompt(row["prompt"])  # type: ignore[arg-type]

    def _pair_scores(self, reward_model: nn.Module, ids: list[dict[str, list[int]]]) -> Scores:
        size = self.batch_size
        return evaluate.pair_scores(reward_model, ids, self.renderer.pad_id, batch_size=size)

    def _score(self, reward_model: nn.Module, sequences: list[list[int]]) -> list[float]:
        size = self.batch_size
        return evaluate.score_all(reward_model, sequences, self.renderer.pad_id, size)
