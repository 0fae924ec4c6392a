"""What PPO starts from: parents, rows, reward functions; checked without torch, then read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf import contract, data, rewards
from rlhf.config import (
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    PPOConfig,
    RewardConfig,
    TemplateConfig,
)
from rlhf.contract import Reading
from rlhf.data import Gold, Split
from rlhf.methods.settings import MethodConfig
from rlhf.registry import Published, Registry
from rlhf.rewards import Function

if TYPE_CHECKING:
    from rlhf.text import Renderer


@dataclass(frozen=True)
class PPOInputs:
    """Everything that PPO reads.

    Attributes:
        sft: where policy and reference come from.
        reward_runs: the reward models that are optimised; the critic starts from the first.
        watching: the one that only watches, or none.
        splits: prompts, "train" and "validation".
        demonstrations: {"ptx": rows of SFT} where they are mixed in.
        functions: term -> reward function.
        gold: the measure that training never sees, where there is one.
    """

    sft: Published
    reward_runs: list[Published]
    watching: list[Published]
    splits: dict[str, Split]
    demonstrations: dict[str, Split]
    functions: dict[str, Function]
    gold: Gold | None

    @property
    def readers(self) -> list[Published]:
        """The runs of all reward models."""
        return [*self.reward_runs, *self.watching]

    @property
    def data(self) -> dict[str, Split]:
        """What the manifest records of rows and code."""
        return self.splits | self.demonstrations | rewards.as_data(self.functions)

    @property
    def parents(self) -> dict[str, Published]:
        """role -> run."""
        return {"policy": self.sft} | contract.reward_roles(self.reward_runs, self.watching)

    @property
    def notes(self) -> list[str]:
        """The verdict on each reward model's report card."""
        return contract.card_notes(self.readers)

    def render(self, template: TemplateConfig, cfg: DataConfig, *, room: int) -> Texts:
        """Prompts to token ids; every reward model would make the same ones.

        Args:
            template, cfg: the settings `template` and `data`.
            room: positions that are needed beside those of a prompt.

        Raises:
            ConfigError: template, tokenizer or lengths cannot work.
            RegistryError: a reward model would be given other tokens than it was trained on.
        """
        from rlhf import proofs, text  # torch

        renderer, readers = text.renderers(self.sft, self.readers, template)
        prompts = {name: renderer.prompts(split, cfg) for name, split in self.splits.items()}
        proof = proofs.same_text(renderer, readers, self.splits["train"].rows)
        lower = "sampling.max_new_tokens or data.max_prompt_tokens"
        contract.check_positions(self.sft, text.longest(prompts) + room, lower)
        return Texts(renderer, prompts, proof)


@dataclass(frozen=True)
class Texts:
    """Prompts as the policy reads them.

    Attributes:
        prompts: split -> token ids of each row.
        proof: that they are what reward models read, in one line.
    """

    renderer: Renderer
    prompts: dict[str, list[list[int]]]
    proof: str


def prepare_ppo(
    registry: Registry,
    policy_from: str,
    *,
    reward: RewardConfig,
    data_cfg: DataConfig,
    ppo: PPOConfig,
    evaluation: EvaluationConfig,
    method: MethodConfig,
    engine: EngineConfig,
    reading: Reading,
    share_backbone: bool | None,
) -> PPOInputs:
    """Find and check what PPO starts from. Loads no weights and no torch.

    Raises:
        ConfigError, RegistryError, DataError: something is missing, damaged, or does not fit.
    """
    functions = rewards.load_functions(reward)
    sft, rms = contract.ppo_parents(registry, policy_from, reward.references, reading)
    contract.check_beginning(sft, rms, method, engine, share_backbone=share_backbone)
    watching = contract.watcher(registry, evaluation.second_rm, sft, rms, reading)
    splits = data.load("ppo", data_cfg)
    shown = data.demonstrations(ppo, data_cfg, sft.manifest.config, named=policy_from)
    gold = data.gold_function(data_cfg)
    rewards.rehearse(functions, splits["train"].rows[:1])
    return PPOInputs(sft, rms, watching, splits, shown, functions, gold)
