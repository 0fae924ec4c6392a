"""A real pair of small models made elsewhere, with facts about them that were measured elsewhere.

RLHF_ANCHOR names a folder with sft/, rm/, rm_polarity/ (Hugging Face), gold.py (`gold(text)`),
prompts_train.jsonl and prompts_val.jsonl. The numbers below stand in its README: they come from
TRL 1.12 and from scripts that share no code with this project.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from small_line import run_stage

from rlhf import data, evaluate, golden, models, text
from rlhf.adopt import adopt
from rlhf.config import DataConfig, RewardConfig, SamplingConfig, TemplateConfig
from rlhf.registry import Registry
from rlhf.rewards import Rewards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("RLHF_ANCHOR"), reason="RLHF_ANCHOR names no folder"),
]

DRAWS = 4  # answers per validation prompt
SCORE, SPREAD, SAMPLES = -0.014, 1.366, 1272  # of SFT samples, 4 of each of 318 prompts
GOLD, GOLD_CORRELATION = 0.839, 0.873
ENDED = 0.87  # within 64 tokens
LENGTH = 48.6  # tokens
POLARITY, POLARITY_SPREAD = -1.37, 2.97
PAD = 512  # never sampled
UP = 0.67  # half a standard deviation of the score: TRL is there at update 5 or 7

# Its settings of PPO, as ours are spelled. Without a counterpart: Adam's epsilon (1e-8; ours 1e-5)
# and the score one place after EOS (ours is on the EOS). TRL clips no gradient.
PPO = [
    *("ppo.batch_size=64", "ppo.micro_batch_size=64", "ppo.epochs=4", "ppo.minibatches=1"),
    *("ppo.learning_rate=1e-4", "ppo.critic_learning_rate=1e-4", "ppo.schedule=constant"),
    *("ppo.kl_coef=0.05", "ppo.gamma=1", "ppo.lam=0.95", "ppo.vf_coef=0.1"),
    *("ppo.cliprange=0.2", "ppo.cliprange_value=0.2", "ppo.missing_eos_penalty=1"),
    *("ppo.max_grad_norm=1e9", "sampling.max_new_tokens=64", "method=full", "experiment=none"),
    *("data.max_prompt_tokens=48", "evaluation.prompts=128", "tracking=off", "run=anchor"),
]


@pytest.fixture(scope="module")
def anchor() -> Path:
    return Path(os.environ["RLHF_ANCHOR"])


@pytest.fixture(scope="module")
def registry(anchor, tmp_path_factory) -> Registry:
    """sft/anchor, rm/anchor and rm/polarity."""
    torch.set_num_threads(1)
    registry = Registry(tmp_path_factory.mktemp("runs"))
    adopt(registry, anchor / "sft", stage="sft", run_name="anchor", template="plain")
    limits = {"max_prompt_tokens": 48, "max_response_tokens": 64}
    adopt(registry, anchor / "rm", stage="rm", run_name="anchor", parent="sft/anchor", **limits)
    adopt(registry, anchor / "rm_polarity", stage="rm", run_name="polarity", template="plain")
    return registry


@pytest.fixture(scope="module")
def overrides(anchor, registry, tmp_path_factory) -> list[str]:
    """What names the folders: rows and gold in the form that `data` reads."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copyfile(anchor / "prompts_train.jsonl", folder / "train.jsonl")
    shutil.copyfile(anchor / "prompts_val.jsonl", folder / "validation.jsonl")
    wrapped = "\n\ndef scores(prompts, responses, rows):\n    return [gold(r) for r in responses]\n"
    (folder / "gold.py").write_text((anchor / "gold.py").read_text() + wrapped)
    gold = f"data.gold={folder / 'gold.py'}:scores"
    return [f"runs_dir={registry.runs_dir}", f"data.path={folder}", gold]


@pytest.fixture(scope="module")
def answers(registry, overrides) -> list[evaluate.Answers]:
    """DRAWS answers of the adopted SFT model to each validation prompt, as a stage samples them."""
    sft, rm = registry.resolve("sft/anchor"), registry.resolve("rm/anchor")
    given = dict(override.split("=", 1) for override in overrides)
    cfg = DataConfig(given["data.path"], max_prompt_tokens=48, gold=given["data.gold"])
    tokenizer = text.load_parent_tokenizer(sft, template=TemplateConfig("inherit"))
    policy = models.freeze(models.load_causal(sft.model_dir, tokenizer, dtype=torch.float32))
    scorer = models.freeze(models.load_scalar(rm.model_dir, tokenizer, dtype=torch.float32))
    assert golden.check_logits(policy, sft) < 1e-4
    assert golden.check_scores(scorer, rm) < 1e-4
    reward = Rewards(RewardConfig({"rm": [rm.reference]}), {}, {rm.reference: scorer})
    rows = data.load("ppo", cfg)["validation"].rows
    assert len(rows) == 128
    return [
        evaluate.answer(
            policy,
            text.Renderer(tokenizer),
            rows,
            cfg=SamplingConfig(max_new_tokens=64),
            seed=seed,
            gold=data.gold_function(cfg),
            reward=reward,
            reference=policy,
        )
        for seed in range(1000, 1000 + DRAWS)  # beyond the row numbers: no shared noise
    ]


def mean_and_bound(draws: list[list[float]]) -> tuple[float, float]:
    """Mean, and 4 standard errors of its difference to a mean over 318 other prompts.

    Answers to one prompt are alike, so prompts are what is counted.
    """
    by_prompt = [sum(values) / len(values) for values in zip(*draws, strict=True)]
    error = statistics.stdev(by_prompt) * math.sqrt(1 / len(by_prompt) + 1 / 318)
    return statistics.mean(by_prompt), 4 * error


def spread_bound(spread: float, count: int) -> float:
    """4 standard errors, s / sqrt(2 n), of the difference of two standard deviations."""
    return 4 * spread * math.sqrt(1 / (2 * count) + 1 / (2 * SAMPLES))


def test_the_reward_model_scores_as_it_did_elsewhere(answers, capsys):
    mean, bound = mean_and_bound([draw.scores for draw in answers])
    scores = [score for draw in answers for score in draw.scores]
    spread = statistics.stdev(scores)
    with capsys.disabled():
        print(f"\nscore {mean:.3f} ({SCORE} +- {bound:.3f}), std {spread:.3f} ({SPREAD})")
    assert abs(mean - SCORE) <= bound <= 0.5
    assert abs(spread - SPREAD) <= spread_bound(SPREAD, len(scores))


def test_gold_is_what_it_was_elsewhere(answers, capsys):
    mean, bound = mean_and_bound([draw.gold for draw in answers])
    scores = [score for draw in answers for score in draw.scores]
    gold = [value for draw in answers for value in draw.gold]
    correlation = statistics.correlation(scores, gold)
    with capsys.disabled():
        print(f"\ngold {mean:.3f} ({GOLD} +- {bound:.3f}), correlation {correlation:.3f}")
    assert abs(mean - GOLD) <= bound <= 0.3
    # 4 standard errors on the scale where those of a correlation are 1 / sqrt(n - 3)
    off = abs(math.atanh(correlation) - math.atanh(GOLD_CORRELATION))
    assert off <= 4 * math.sqrt(1 / len(scores) + 1 / SAMPLES)


def test_answers_end_as_often_and_are_as_long(answers, capsys):
    ended, bound = mean_and_bound([[float(e) for e in draw.ended] for draw in answers])
    lengths = [[float(len(ids)) for ids in draw.answer_ids] for draw in answers]
    length, length_bound = mean_and_bound(lengths)
    with capsys.disabled():
        print(f"\nended {ended:.3f} ({ENDED} +- {bound:.3f})")
        print(f"length {length:.1f} ({LENGTH} +- {length_bound:.1f})")
    assert abs(ended - ENDED) <= bound <= 0.15
    assert abs(length - LENGTH) <= length_bound <= 8
    assert not any(PAD in ids for draw in answers for ids in draw.answer_ids)


def test_the_polarity_model_scores_as_it_did_elsewhere(registry, answers, capsys):
    rm = registry.resolve("rm/polarity")
    tokenizer = text.load_parent_tokenizer(rm, template=TemplateConfig("inherit"))
    scorer = models.freeze(models.load_scalar(rm.model_dir, tokenizer, dtype=torch.float32))
    draws = []
    for draw in answers:
        pairs = zip(draw.prompt_ids, draw.answer_ids, strict=True)
        sequences = [prompt + answer for prompt, answer in pairs]
        draws.append(evaluate.score_all(scorer, sequences, tokenizer.pad_token_id, 64))
    mean, bound = mean_and_bound(draws)
    spread = statistics.stdev(score for draw in draws for score in draw)
    with capsys.disabled():
        print(f"\npolarity {mean:.2f} ({POLARITY} +- {bound:.2f}), std {spread:.2f}")
    assert abs(mean - POLARITY) <= bound <= 1.2
    assert abs(spread - POLARITY_SPREAD) <= spread_bound(POLARITY_SPREAD, DRAWS * len(draws[0]))


def test_a_sequence_is_what_the_anchor_says(registry, anchor):
    """<s> + tokens(prompt + newline) + tokens(response) + </s>, by the anchor's own tokenizer."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(anchor / "sft/tokenizer.json"))
    sft = registry.resolve("sft/anchor")
    tokenizer = text.load_parent_tokenizer(sft, template=TemplateConfig("inherit"))
    renderer = text.Renderer(tokenizer)
    asked = [{"role": "user", "content": "Once upon a time there was a little boy named Ben."}]
    prompt = plain.encode(asked[0]["content"] + "\n", add_special_tokens=False).ids
    answer = plain.encode("She was happy.", add_special_tokens=False)
    assert renderer.prompt(asked) == [1, *prompt]
    assert renderer.response(asked, "She was happy.") == [*answer.ids, 2]
    assert answer.tokens[0].startswith("▁")
    assert (renderer.pad_id, renderer.eos_id) == (512, 2)


def numbers(registry, name: str) -> list[dict[str, float]]:
    lines = (registry.runs_dir / "ppo" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_five_updates_bring_the_score_up(registry, overrides, monkeypatch, capfd):
    steps = ["ppo.steps=5", "ppo.eval_every=5", "run_name=five"]
    assert run_stage(monkeypatch, "ppo", *overrides, *PPO, *steps) == 0
    said = capfd.readouterr().err
    assert "|KL(policy, reference)| <= " in said
    first, *_, last = numbers(registry, "five")
    assert abs(first["objective/kl"]) < 1e-4
    made = registry.resolve("ppo/five").manifest
    before, after = made.metrics["eval/score_sft"], made.metrics["eval/score"]
    with capfd.disabled():
        print(f"\nscore {before:.3f} -> {after:.3f} after 5 updates, KL {last['eval/kl']:.2f}")
    assert after > before + UP
    assert 0.5 < made.metrics["eval/kl"] < 15


def test_a_reward_model_of_another_start_needs_permission(registry, overrides, monkeypatch, capfd):
    steps = ["ppo.steps=1", "run_name=polarity", "rm_from=rm/polarity"]
    assert run_stage(monkeypatch, "ppo", *overrides, *PPO, *steps) == 2
    assert "sft/anchor and rm/polarity differ in:\n  base model" in capfd.readouterr().err
    assert not (registry.runs_dir / "ppo/polarity").exists()
    assert run_stage(monkeypatch, "ppo", *overrides, *PPO, *steps, "allow_foreign_rm=true") == 0
    assert "reward model = rm/polarity" in capfd.readouterr().err
