"""Classic bugs of PPO and of fine-tuning methods, planted one at a time: named tests must fail.

A test that has never failed proves little. Each row of PLANTED is a bug as somebody would write
it, and the tests that notice. The slow test plants it in a copy of the repository and runs them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Planted:
    """One bug, and who notices.

    Attributes:
        bug: what is wrong then.
        file: where, from the root of the repository.
        old: source text that occurs there once.
        new: what stands there instead.
        caught_by: tests that fail, `file.py::name` under tests/; each in all of its cases, or in
            one where `[case]` follows.
    """

    bug: str
    file: str
    old: str
    new: str
    caught_by: tuple[str, ...]


PLANTED = (
    # 1 and 2: where the score stands
    Planted(
        bug="the score is one position late, in the slot after the EOS",
        file="rlhf/returns.py",
        old="torch.where(positions == last, scores",
        new="torch.where(positions == (last + 1).clamp(max=kl.shape[1] - 1), scores",
        caught_by=(
            "test_returns.py::test_token_rewards_by_hand",
            "test_returns.py::test_the_score_lands_on_the_eos_and_not_on_the_first_pad",
            "test_peer_bugs.py::test_the_eos_gets_the_whole_score_itself",
            "test_ppo_options.py::test_reinforce_pp_is_the_reward_to_come_whitened_over_the_batch",
        ),
    ),
    Planted(
        bug="the score is on the last column, mostly a pad",
        file="rlhf/returns.py",
        old="last = torch.where(response_mask, positions, -1).amax(dim=1, keepdim=True)",
        new="last = torch.full_like(positions[:, :1], kl.shape[1] - 1)",
        caught_by=(
            "test_returns.py::test_the_score_lands_on_the_eos_and_not_on_the_first_pad",
            "test_returns.py::test_rewards_ignore_more_padding_and_row_order",
            "test_peer_bugs.py::test_the_eos_gets_the_whole_score_itself",
        ),
    ),
    Planted(
        bug="the reward model is read at the last column, mostly a pad",
        file="rlhf/models.py",
        old="last = (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)",
        new="last = torch.full_like(mask[:, 0].long(), mask.shape[1] - 1)",
        caught_by=(
            "test_models.py::test_score_reads_the_eos_and_not_a_pad",
            "test_models.py::test_values_and_scores_are_those_of_each_row_alone",
            "test_ppo.py::test_judge_is_each_row_alone[4-1.0]",
        ),
    ),
    # 3: whitening
    Planted(
        bug="advantages are whitened with padding in the moments",
        file="rlhf/ppo.py",
        old="    count = engine.sum_over_ranks(mask.sum())\n    mean =",
        new="    mask = torch.ones_like(mask)\n"
        "    count = engine.sum_over_ranks(mask.sum())\n    mean =",
        caught_by=(
            "test_ppo.py::test_advantages_are_those_of_the_pure_functions[True]",
            "test_ppo_options.py::test_reinforce_pp_is_the_reward_to_come_whitened_over_the_batch",
            "test_ppo_options.py::test_whitened_rewards_have_variance_one_and_keep_their_mean",
        ),
    ),
    Planted(
        bug="the moments that whitening finds itself are of padding too",
        file="rlhf/masking.py",
        old="        mean = masked_mean(x, mask)\n",
        new="        mask = torch.ones_like(mask)\n        mean = masked_mean(x, mask)\n",
        caught_by=(
            "test_masking.py::test_whiten_by_hand",
            "test_masking.py::test_whitening_ignores_more_padding_and_row_order",
        ),
    ),
    # 4: the reference
    Planted(
        bug="SFT publishes its base beside the adapter, so that the reference is the base",
        file="rlhf/models.py",
        old="copied.float().merge_and_unload(adapter_names=[ADAPTER]).to(dtype=model.dtype)",
        new="copied.unload().to(dtype=model.dtype)",
        caught_by=(
            "test_golden.py::test_what_was_published_passes[logits-lora]",
            "test_roles.py::test_what_is_published_is_the_policy_and_nothing_else",
            "test_peer_bugs.py::test_the_reference_is_the_sft_model_and_not_its_base[one backbone]",
            "test_peer_bugs.py::test_the_reference_is_the_sft_model_and_not_its_base[four models]",
        ),
    ),
    Planted(
        bug="the reference is what lies under the SFT adapter",
        file="rlhf/roles.py",
        old="freeze(load_parent(load_causal, sft, tokenizer, dtype))",
        new="freeze(load_causal(sft.under or sft.model_dir, tokenizer, dtype=dtype))",
        caught_by=(
            "test_peer_bugs.py::test_the_reference_is_the_sft_model_and_not_its_base[a checkpoint]",
        ),
    ),
    # 5: gradients
    Planted(
        bug="the policy's loss has a gradient through the advantages",
        file="rlhf/losses.py",
        old="advantages = keep(advantages.detach(), response_mask)",
        new="advantages = keep(advantages, response_mask)",
        caught_by=("test_losses.py::test_only_the_first_tensor_gets_a_gradient[policy]",),
    ),
    Planted(
        bug="on the shared backbone the critic's loss trains the policy's adapter",
        file="rlhf/roles.py",
        old='critic=SharedRole(backbone, "critic", adapter.new_head(like))',
        new="critic=SharedRole(backbone, ADAPTER, adapter.new_head(like))",
        caught_by=(
            "test_roles.py::test_gradients_go_to_the_role_that_was_asked_and_nowhere_else",
            "test_peer_bugs.py::"
            "test_the_critic_trains_its_adapter_and_its_head_and_nothing_else[one backbone]",
        ),
    ),
    # 6: the tokens
    Planted(
        bug="answers are decoded and encoded again before training",
        file="rlhf/rollout.py",
        old="""
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
""",
        new="""
        drawn = sample(
            self.policy,
            [prompt.ids for prompt in prompts],
            keys=[prompt.key for prompt in prompts],
            seed=mix(mix(self.seed) + step),
            cfg=self.cfg,
            pad_id=self.renderer.pad_id,
            eos_id=self.renderer.eos_id,
            device=engine.device(),
        )
        tokenizer = self.renderer.tokenizer
        for row, ids in enumerate(drawn.answer_ids()):
            text = tokenizer.decode(ids)
            again = tokenizer(text, add_special_tokens=False)["input_ids"][: len(ids)]
            drawn.responses[row, : len(again)] = torch.tensor(again)
        return drawn
""",
        caught_by=("test_peer_bugs.py::test_the_tokens_that_were_drawn_are_trained_on",),
    ),
    # 7: the end
    Planted(
        bug="the EOS is not in the response mask",
        file="rlhf/rollout.py",
        old="response_mask = is_eos.cumsum(1) - is_eos.long() == 0",
        new="response_mask = is_eos.cumsum(1) == 0",
        caught_by=(
            "test_rollout.py::test_the_answer_ends_with_its_eos",
            "test_rollout.py::test_an_answer_may_be_its_eos_alone",
            "test_ppo_options.py::test_eos_is_a_token_like_any_other_to_the_options",
            "test_peer_bugs.py::test_a_pad_that_is_the_eos_hides_no_end",
        ),
    ),
    Planted(
        bug="SFT does not train the EOS",
        file="rlhf/text.py",
        old="[0] * len(prompt) + [1] * len(answer)",
        new="[0] * len(prompt) + [1] * (len(answer) - 1) + [0]",
        caught_by=("test_text.py::test_the_mask_is_one_on_exactly_the_answer_and_its_eos",),
    ),
    # 8: the temperature
    Planted(
        bug="old log-probabilities are those of temperature 1",
        file="rlhf/rollout.py",
        old="self.logprobs.append(logprobs.gather(1, token).squeeze(1))",
        new="self.logprobs.append(scores.float().log_softmax(-1).gather(1, token).squeeze(1))",
        caught_by=(
            "test_rollout.py::test_logprobs_are_those_of_a_teacher_forced_pass[0.7]",
            "test_rollout.py::test_a_training_pass_gives_the_logprobs_that_were_sampled",
            "test_peer_bugs.py::test_the_ratio_is_one_before_any_update",
        ),
    ),
    Planted(
        bug="a training pass is at temperature 1",
        file="rlhf/ppo.py",
        old="    return logits / cfg.temperature\n",
        new="    return logits\n",
        caught_by=(
            "test_ppo.py::test_judge_is_each_row_alone[1-0.7]",
            "test_ppo.py::test_first_update_is_on_policy",
            "test_peer_bugs.py::test_the_kl_starts_at_zero_and_then_is_positive[temperature 0.7]",
        ),
    ),
    # Fine-tuning methods
    Planted(
        bug="after a soft prompt padding counts as positions",
        file="rlhf/methods/soft.py",
        old='            kwargs["position_ids"] = positions + self.tokens\n',
        new=(
            "            columns = torch.ones_like(mask).cumsum(1) - 1\n"
            '            kwargs["position_ids"] = columns[:, -positions.shape[1] :] + self.tokens\n'
        ),
        caught_by=(
            "test_soft.py::test_padding_changes_nothing[prompt_tuning-gpt2-eager-True-True]",
            "test_soft.py::test_response_logits_are_those_of_the_unpadded_row[p_tuning_lstm-qwen2]",
            "test_soft.py::test_scores_are_those_of_the_unpadded_row[prompt_tuning-llama-True]",
        ),
    ),
    Planted(
        bug="a prefix without position ids",
        file="rlhf/methods/soft.py",
        old='            kwargs["position_ids"] = positions\n',
        new='            kwargs.pop("position_ids", None)\n',
        caught_by=(
            "test_soft.py::test_padding_changes_nothing[prefix_tuning-llama-eager-True-True]",
            "test_soft.py::test_response_logits_are_those_of_the_unpadded_row[p_tuning_v2-qwen2]",
            "test_soft.py::test_scores_are_those_of_the_unpadded_row[prefix_tuning-llama-True]",
        ),
    ),
    Planted(
        bug="a checkpoint of p_tuning without the network that makes the prompt",
        file="rlhf/methods/soft.py",
        old='if name.startswith("prompt_encoder.") or',
        new='if name.endswith("embedding.weight") or',
        caught_by=(
            "test_soft.py::test_a_resumed_run_is_an_unbroken_one_to_the_bit[causal-p_tuning_lstm]",
            "test_soft.py::test_a_resumed_run_is_an_unbroken_one_to_the_bit[causal-p_tuning_mlp]",
        ),
    ),
    Planted(
        bug="AdaLoRA without the term that keeps singular vectors orthogonal",
        file="rlhf/methods/courses.py",
        old="return self._coefficient * torch.stack(norms).mean()",
        new="return 0 * torch.stack(norms).mean()",
        caught_by=(
            "test_courses.py::test_adalora_is_the_loop_of_peft",
            "test_courses.py::test_the_penalty_is_part_of_the_training_loss_alone",
        ),
    ),
    Planted(
        bug="a PiSSA adapter on the base as it came, of which PiSSA took a part",
        file="rlhf/methods/lora.py",
        old='if (start := getattr(model, "pissa_start", None)) is not None and adapter == ADAPTER:',
        new="if (start := None) is not None:",
        caught_by=(
            "test_lora_family.py::test_a_saved_adapter_is_the_same_on_a_fresh_base[causal-pissa]",
            "test_lora_family.py::test_a_pissa_file_is_an_ordinary_lora_of_twice_the_rank",
        ),
    ),
    Planted(
        bug="ReLoRA goes on training what it has merged",
        file="rlhf/methods/courses.py",
        old="        out.narrow(*at).copy_(grad.narrow(*at))\n        return out",
        new="        out.narrow(*at).copy_(grad.narrow(*at))\n        return grad",
        caught_by=(
            "test_courses.py::test_phases_are_merging_and_starting_anew",
            "test_courses.py::test_a_finished_block_stays_bit_for_bit",
        ),
    ),
    Planted(
        bug="ReLoRA restarts without resetting the optimizer",
        file="rlhf/methods/courses.py",
        old="                        value.zero_()",
        new="                        pass",
        caught_by=(
            "test_courses.py::test_phases_are_merging_and_starting_anew",
            "test_courses.py::test_a_finished_block_stays_bit_for_bit",
        ),
    ),
    Planted(
        bug="LoRA-drop's plan is not saved, and a reload shares nothing",
        file="rlhf/methods/lora_drop.py",
        old='(folder / FILE).write_text(json.dumps(chosen, indent=1) + "\\n", encoding="utf-8")',
        new='(folder / FILE).write_text("{}", encoding="utf-8")',
        caught_by=("test_lora_drop.py::test_files_hold_a_copy_for_each_layer_and_the_plan",),
    ),
    Planted(
        bug="LoRA-drop's layers share one matrix of two",
        file="rlhf/methods/lora_drop.py",
        old="            layers[name].lora_B[ADAPTER] = layers[names[0]].lora_B[ADAPTER]",
        new="            pass",
        caught_by=("test_lora_drop.py::test_shared_weights_train_as_in_plain_torch",),
    ),
    Planted(
        bug="BitFit on a model without biases trains nothing",
        file="rlhf/methods/weights.py",
        old="    if not biases:\n",
        new="    if False:\n",
        caught_by=("test_weights.py::test_bitfit_without_biases_is_refused_with_the_way_out",),
    ),
    Planted(
        bug="biases that were added are dropped when the model is loaded",
        file="rlhf/methods/weights.py",
        old="        setattr(model.config, name, True)",
        new="        pass",
        caught_by=("test_weights.py::test_added_biases_are_zero_and_a_plain_load_keeps_them",),
    ),
)
NAMED = sorted({name for row in PLANTED for name in row.caught_by})


def bare(name: str) -> str:
    """Without its case."""
    return name.split("[")[0]


# How a test fails that did its work: by an assert, or by an error of ours that nothing caught. A
# planted name that does not exist, say, would be no proof of anything.
NOTICED = ("assert ", "AssertionError", "rlhf.errors.", "Failed: DID NOT RAISE")

RUN = """
import sys
from pathlib import Path

import pytest

import rlhf

assert Path(rlhf.__file__).parent.parent == Path.cwd(), f"not the copy: {rlhf.__file__}"
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy to plant in; data, which no bug touches, is the original."""
    copied = tmp_path.resolve() / "copy"
    for name in ("rlhf", "stages", "conf", "tests"):
        shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copied)
    for name in ("data", "examples"):
        (copied / name).symlink_to(ROOT / name)
    return copied


def run(repository: Path, names: tuple[str, ...] | list[str]) -> tuple[int, dict[str, str | None]]:
    """pytest's exit code, and of each case what it failed with; None where it passed."""
    report = repository / "report.xml"
    done = subprocess.run(
        [
            *(sys.executable, "-c", RUN, "-p", "no:cacheprovider", f"--junitxml={report}"),
            *(f"tests/{name}" for name in names),
        ],
        cwd=repository,
        env={k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
        | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout + done.stderr
    found: dict[str, str | None] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').split('.')[-1]}.py::{case.get('name')}"
        outcome = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        if outcome is None:
            found[name] = None
        else:
            prefix = "" if outcome.tag == "failure" else f"{outcome.tag}: "
            found[name] = prefix + outcome.get("message", "")
    return done.returncode, found


@pytest.mark.parametrize("row", PLANTED, ids=lambda row: row.bug)
def test_each_bug_still_has_its_place_and_its_tests(row: Planted):
    assert (ROOT / row.file).read_text().count(row.old) == 1
    assert row.caught_by
    for name in row.caught_by:
        file, test = bare(name).split("::")
        source = (ROOT / "tests" / file).read_text()
        assert f"\ndef {test}(" in source, name
        before = source.split(f"\ndef {test}(")[0].rsplit("\n\n", 1)[-1]  # its decorators
        assert "mark.slow" not in before, f"{name} is not in the quick suite"


@pytest.mark.slow
@pytest.mark.parametrize("row", PLANTED, ids=lambda row: row.bug)
def test_each_planted_bug_is_caught_by_every_test_named_for_it(row: Planted, repository: Path):
    source = (repository / row.file).read_text()
    assert source.count(row.old) == 1
    (repository / row.file).write_text(source.replace(row.old, row.new))
    code, found = run(repository, row.caught_by)
    assert code == 1, found
    for name in row.caught_by:
        assert any(name in (case, bare(case)) for case in found), f"{name} was not run"
    for case, said in found.items():
        assert said is not None, f"{case} passes in spite of it"
        assert said.startswith(NOTICED), f"{case}: {said}"


@pytest.mark.slow
def test_without_a_bug_all_those_tests_pass(repository: Path):
    code, found = run(repository, NAMED)
    assert {case: said for case, said in found.items() if said is not None} == {}
    assert code == 0
    assert {bare(case) for case in found} == {bare(name) for name in NAMED}
