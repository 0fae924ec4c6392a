"""Soft prompts: what a model with one computes, whatever the padding and the way it is run."""

from __future__ import annotations

import copy
import inspect

import peft
import pytest
import torch
from covering import pairwise
from rounding import TINY
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    DeepseekV3Config,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf import models, rollout, supervised
from rlhf.checkpointing import Checkpoints
from rlhf.config import EngineConfig, SamplingConfig, TrainConfig
from rlhf.console import Console
from rlhf.errors import ConfigError, ShapeError
from rlhf.methods import lora, soft
from rlhf.methods.settings import LoraConfig, PrefixConfig, PromptConfig, PTuningConfig
from rlhf.registry import Registry
from rlhf.run import open_run

pytestmark = pytest.mark.usefixtures("process_group")

P, VOCAB = 5, 64
METHODS = {
    "prefix_tuning": PrefixConfig(tokens=P, hidden=24),
    "p_tuning_v2": PrefixConfig(name="p_tuning_v2", tokens=P),
    "prompt_tuning": PromptConfig(tokens=P),
    "p_tuning_lstm": PTuningConfig(tokens=P, hidden=12),
    "p_tuning_mlp": PTuningConfig(tokens=P, encoder="mlp"),
}
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
KINDS = {
    "llama": lambda: LlamaConfig(**IDS, **SIZES),
    "qwen2": lambda: Qwen2Config(**IDS, **SIZES),
    "qwen3": lambda: Qwen3Config(**IDS, **SIZES, head_dim=16),  # not hidden_size / heads
    "gpt2": lambda: GPT2Config(**IDS, **GPT2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}
TAKEN = inspect.signature(LlamaModel.forward).parameters
CACHE = "cache" if "cache" in TAKEN else "past_key_values"  # before transformers 5.24
ROWS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24]]
CLOSE = {"rtol": 0.0, "atol": TINY}  # a pad that is seen moves them by 0.1

# Keys and values before those of every layer, or embeddings before the first: each kind of model
# once by either way, each method at least once. What makes the vectors knows no kind of model.
PAIRS = [
    ("prefix_tuning", "llama"),
    ("prompt_tuning", "llama"),
    ("p_tuning_v2", "qwen2"),
    ("p_tuning_lstm", "qwen2"),
    ("prefix_tuning", "qwen3"),
    ("p_tuning_mlp", "qwen3"),
    ("p_tuning_v2", "gpt2"),
    ("prompt_tuning", "gpt2"),
]
ATTENTION = ["eager", "sdpa"]

each_method = pytest.mark.parametrize("method", METHODS)
each_pair = pytest.mark.parametrize(("method", "kind"), PAIRS)


def each(names, *axes):
    """Every pair of PAIRS, and any two values of it and of `axes` in some row."""
    rows = [(*pair, *rest) for pair, *rest in pairwise(PAIRS, *axes)]
    return pytest.mark.parametrize(("method", "kind", *names.split()), rows)


def test_every_kind_has_a_prompt_of_either_way_and_every_method_a_kind():
    ways = {(method in ("prefix_tuning", "p_tuning_v2"), kind) for method, kind in PAIRS}
    assert ways == {(way, kind) for way in (True, False) for kind in KINDS}
    assert {method for method, _ in PAIRS} == set(METHODS)


def base(kind="llama", *, head=False, attn="eager", seed=0, config=None):
    """A random model of two layers."""
    config = config or KINDS[kind]()
    config._attn_implementation = attn
    auto = AutoModelForCausalLM
    if head:
        config.num_labels, auto = 1, AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config).eval()


@torch.no_grad()
def stir(model, seed=7):
    """Give all that is trained numbers that matter."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    return model


def prompted(method, kind="llama", *, head=False, attn="eager", seed=0):
    """The model of `base` with a soft prompt that matters."""
    return stir(soft.attach(base(kind, head=head, attn=attn), METHODS[method], head=head), seed + 7)


def padded(rows, left, width=9, pad=0):
    """([B, T] ids, [B, T] bool mask)."""
    fill = [[pad] * (width - len(row)) for row in rows]
    real = [[True] * len(row) for row in rows]
    void = [[False] * len(some) for some in fill]
    pairs, masks = zip(rows, fill, strict=True), zip(real, void, strict=True)
    ids = [gap + row if left else row + gap for row, gap in pairs]
    mask = [gap + row if left else row + gap for row, gap in masks]
    return torch.tensor(ids), torch.tensor(mask)


# ------------------------------------------------------------------ the slow definition


def direction(table, w, u, b, reverse):
    """One direction of an LSTM layer, token by token (Hochreiter and Schmidhuber 1997)."""
    hidden, cell, out = torch.zeros(u.shape[1]), torch.zeros(u.shape[1]), {}
    for t in reversed(range(len(table))) if reverse else range(len(table)):
        i, f, g, o = (w @ table[t] + u @ hidden + b).chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        out[t] = hidden
    return torch.stack([out[t] for t in range(len(table))])


def network(layers, x):
    """An MLP with ReLU between its layers, by its matrices."""
    for number, layer in enumerate(layers):
        x = (x.relu() if number else x) @ layer.weight.T + layer.bias
    return x


def vectors(model, method):
    """The vectors of virtual tokens, by hand: [P, what one needs]."""
    encoder = model.encoder
    table = encoder.embedding.weight
    if method == "prefix_tuning":
        first, _, last = encoder.transform
        return (table @ first.weight.T + first.bias).tanh() @ last.weight.T + last.bias
    if method == "p_tuning_lstm":
        own = dict(encoder.lstm_head.named_parameters())
        for layer in range(2):
            both = []
            for end in ("", "_reverse"):
                w, u = own[f"weight_ih_l{layer}{end}"], own[f"weight_hh_l{layer}{end}"]
                b = own[f"bias_ih_l{layer}{end}"] + own[f"bias_hh_l{layer}{end}"]
                both.append(direction(table, w, u, b, bool(end)))
            table = torch.cat(both, dim=1)
    if method.startswith("p_tuning_") and method != "p_tuning_v2":
        return network([m for m in encoder.mlp_head if isinstance(m, torch.nn.Linear)], table)
    return table


def given(plain, found, method, row):
    """What a model without hooks is given to compute one row, unpadded, with the prompt."""
    ids = torch.tensor([row])
    if method in ("prefix_tuning", "p_tuning_v2"):
        config, cache = plain.config, DynamicCache()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        parts = found.view(P, config.num_hidden_layers, 2, heads, -1)
        for layer in range(config.num_hidden_layers):
            keys, values = parts[:, layer].permute(1, 2, 0, 3)  # [heads, P, width]
            cache.update(keys[None], values[None], layer)
        mask, places = torch.ones(1, P + len(row)), torch.arange(len(row))[None]
        inputs = {"attention_mask": mask, "position_ids": places, CACHE: cache}
        return {"input_ids": ids} | inputs, 0
    words = plain.get_input_embeddings()(ids)
    return {"inputs_embeds": torch.cat([found[None], words], dim=1)}, P


@torch.no_grad()
def by_hand(plain, model, method, row):
    """Hidden states [T, H] of one row."""
    inputs, skipped = given(plain, vectors(model, method), method, row)
    return getattr(plain, plain.base_model_prefix)(**inputs).last_hidden_state[0, skipped:]


@torch.no_grad()
def logits_by_hand(plain, model, method, row):
    return plain.get_output_embeddings()(by_hand(plain, model, method, row))


# ------------------------------------------------------------------ what is computed


@each("attn", ATTENTION)
@torch.no_grad()
def test_a_model_with_a_prompt_computes_its_definition(method, kind, attn):
    """And that is far from what it computes without."""
    model, plain = prompted(method, kind, attn=attn), base(kind)
    for row in ROWS:
        expected = logits_by_hand(plain, model, method, row)
        ids = torch.tensor([row])
        assert_close(model(input_ids=ids).logits[0], expected, **CLOSE)
        assert_close(model(input_ids=ids, use_cache=False).logits[0], expected, **CLOSE)
        assert (plain(input_ids=ids).logits[0] - expected).abs().max() > 0.5


@each("attn left explicit", ATTENTION, [True, False], [True, False])
@torch.no_grad()
def test_padding_changes_nothing(method, kind, attn, left, explicit):
    """The decoder itself, as `models.hidden_states` calls it, and as TRL does."""
    model, plain = prompted(method, kind, attn=attn), base(kind)
    ids, mask = padded(ROWS, left, pad=33)  # a token like others: only the mask says
    if explicit:
        found = models.hidden_states(model, ids, mask)
    else:
        found = model.backbone(ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    assert found.shape[:2] == ids.shape
    for number, row in enumerate(ROWS):
        expected = by_hand(plain, model, method, row)
        assert_close(found[number][mask[number]], expected, **CLOSE)


@each_pair
@torch.no_grad()
def test_response_logits_are_those_of_the_unpadded_row(method, kind):
    """Prompts padded on the left, answers on the right: `logits_to_keep` counts from the end."""
    model, plain = prompted(method, kind), base(kind)
    ids, mask = padded(ROWS, left=True, width=8)
    ids = torch.cat([ids, torch.tensor([[30, 31, 2], [40, 2, 0], [2, 0, 0]])], dim=1)
    mask = torch.cat([mask, torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()], dim=1)
    found = models.response_logits(model, ids, mask, 3)
    for number, row in enumerate(ROWS):
        answer = ids[number, 8:][mask[number, 8:]].tolist()
        expected = logits_by_hand(plain, model, method, row + answer)
        expected = expected[len(row) - 1 : len(row) + len(answer) - 1]
        assert_close(found[number, : len(answer)], expected, **CLOSE)


@each("left", [True, False])
@torch.no_grad()
def test_scores_are_those_of_the_unpadded_row(method, kind, left):
    """By our reading of the head, and by that of transformers, which TRL's loss uses."""
    model, plain = prompted(method, kind, head=True), base(kind, head=True)
    ids, mask = padded(ROWS, left)
    ours = models.scores(model, ids, mask)
    pooled = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, 0]
    for number, row in enumerate(ROWS):
        hidden = by_hand(plain, model, method, row)[-1]
        expected = model.get_base_model().score.weight[0] @ hidden
        assert_close(ours[number], expected, **CLOSE)
        assert_close(pooled[number], expected, **CLOSE)


@each_method
@torch.no_grad()
def test_every_output_is_of_the_text_alone(method):
    model = prompted(method)
    ids, mask = padded(ROWS, left=True)
    asked = {"output_hidden_states": True, "output_attentions": True}
    out = model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **asked)
    assert [x.shape for x in out.hidden_states] == [(3, 9, 32)] * 3
    assert_close(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)
    assert [x.shape for x in out.attentions] == [(3, 4, 9, P + 9)] * 2
    assert out.get(CACHE) is None


@each_method
@torch.no_grad()
def test_a_text_may_come_in_two_parts(method):
    """The cache of the first is given back, and the prompt is in it."""
    model, (row,) = prompted(method), ROWS[1:2]
    expected = logits_by_hand(base(), model, method, row)
    first = model(input_ids=torch.tensor([row[:3]]))
    second = model(input_ids=torch.tensor([row[3:]]), **{CACHE: first[CACHE]})
    assert_close(torch.cat([first.logits, second.logits], dim=1)[0], expected, **CLOSE)


@each_method
@torch.no_grad()
def test_training_mode_and_gradients_change_no_bit(method):
    """Whether a pass is one of training, and how many rows it has: the prompt is the same."""
    model, (ids, mask) = prompted(method), padded(ROWS, left=False)
    expected = models.hidden_states(model, ids, mask)
    assert torch.equal(models.hidden_states(model.train(), ids, mask), expected)
    with torch.enable_grad():
        assert torch.equal(models.hidden_states(model, ids, mask), expected)
        found = vectors_used(model)
    assert torch.equal(vectors_used(model.eval()), found)
    assert torch.equal(model.get_prompt_embedding_to_save("default"), found)


def vectors_used(model):
    """What the decoder is given: [P, what one token needs]."""
    if not isinstance(model.active_peft_config, peft.PrefixTuningConfig):
        return model.embeddings()[0]
    parts = [part for pair in model.keys_and_values() for part in pair]  # [1, heads, P, width]
    return torch.stack(parts)[:, 0].permute(2, 0, 1, 3).reshape(P, -1)


def test_a_mask_that_does_not_count_the_text_is_refused():
    model, (ids, mask) = prompted("prompt_tuning"), padded(ROWS, left=True)
    longer = torch.cat([torch.ones(3, P), mask.long()], dim=1)
    with pytest.raises(ShapeError, match=r"attention_mask of shape \(3, 14\).*\(3, 9\)"):
        model(input_ids=ids, attention_mask=longer)


# ------------------------------------------------------------------ generation


@torch.no_grad()
def step_by_step(plain, model, method, row, steps):
    """Greedy answer and its logits, by a whole pass over the unpadded row for each token."""
    row, logits = list(row), []
    for _ in range(steps):
        logits.append(logits_by_hand(plain, model, method, row)[-1])
        row.append(int(logits[-1].argmax()))
    return row[-steps:], torch.stack(logits)


GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
SHOWN = {"return_dict_in_generate": True, "output_logits": True}


@each("attn use_cache", ATTENTION, [True, False])
def test_generation_is_that_of_whole_passes(method, kind, attn, use_cache):
    """With prompts padded on the left, and with none padded, where transformers drops the mask."""
    model, plain = prompted(method, kind, attn=attn), base(kind)
    for rows in (ROWS, [ROWS[2], ROWS[2][::-1]]):
        ids, mask = rollout.pad_left(rows, 0, torch.device("cpu"))
        model.generation_config = GenerationConfig()  # never ends early
        config = GenerationConfig(**GREEDY, **SHOWN, use_cache=use_cache)
        out = model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=config)
        for number, row in enumerate(rows):
            tokens, logits = step_by_step(plain, model, method, row, 4)
            assert out.sequences[number, ids.shape[1] :].tolist() == tokens
            assert_close(torch.stack(out.logits)[:, number], logits, **CLOSE)


@each_method
def test_the_sampler_and_the_update_see_one_distribution(method):
    """log p of each sampled token, in generation and in a pass over prompt and answer."""
    model = prompted(method)
    model.get_base_model().generation_config.repetition_penalty = 9.0  # the sampler knows none
    cfg = SamplingConfig(max_new_tokens=6, batch_size=2)
    places = {"keys": [1, 2, 3], "seed": 0, "pad_id": 0, "eos_id": 2, "device": model.device}
    found = rollout.sample(model, ROWS, cfg=cfg, **places)
    with torch.no_grad():
        logits = models.response_logits(model, found.ids, found.mask, found.responses.shape[1])
    expected = logits.log_softmax(-1).gather(2, found.responses[..., None])[..., 0]
    assert_close(found.old_logprobs, expected.masked_fill(~found.response_mask, 0), **CLOSE)
    assert model.get_base_model().generation_config.repetition_penalty == 9.0


# ------------------------------------------------------------------ what is trained


@each_method
@pytest.mark.parametrize("head", [False, True], ids=["causal", "head"])
def test_gradient_reaches_only_the_prompt_and_the_head(method, head):
    model, (ids, mask) = prompted(method, head=head).train(), padded(ROWS, left=False)
    model(input_ids=ids, attention_mask=mask.long()).logits.pow(2).mean().backward()
    reached = {name for name, w in model.named_parameters() if w.grad is not None and w.grad.any()}
    expected = {f"prompt_encoder.default.{name}" for name, _ in model.encoder.named_parameters()}
    expected |= {"base_model.score.modules_to_save.default.weight"} if head else set()
    assert reached == expected
    assert {name for name, w in model.named_parameters() if w.requires_grad} == expected


@each_method
@pytest.mark.parametrize("head", [False, True], ids=["causal", "head"])
@torch.no_grad()
def test_disabled_it_is_the_base_to_the_bit(method, head):
    model, plain = prompted(method, head=head), base(head=head)
    ids, mask = padded(ROWS, left=True)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    before, expected = model(**inputs).logits, plain(**inputs).logits
    flags = {name: w.requires_grad for name, w in model.named_parameters()}
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, expected)
            assert torch.equal(
                models.hidden_states(model, ids, mask), models.hidden_states(plain, ids, mask)
            )
            if not head:
                assert torch.equal(
                    model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY)
                )
        assert torch.equal(model(**inputs).logits, before)
        assert {name: w.requires_grad for name, w in model.named_parameters()} == flags
        model.requires_grad_(False)  # a frozen head must not wake up
        flags = dict.fromkeys(flags, False)
    with pytest.raises(KeyError, match="within"), model.disable_adapter():
        raise KeyError("within")
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_lstm", "p_tuning_mlp"])
def test_recomputed_activations_give_the_same_gradient(method):
    found = []
    for again in (False, True):
        model = prompted(method).train()
        if again:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        ids, mask = padded(ROWS, left=False)
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        logits.pow(2).mean().backward()
        found.append([w.grad for w in model.encoder.parameters()])
    assert_close(*found, rtol=1e-5, atol=1e-6)


@each_method
@torch.no_grad()
def test_a_copy_has_a_prompt_of_its_own(method):
    model, (ids, mask) = prompted(method), padded(ROWS, left=True)
    twin = copy.deepcopy(model)
    before = models.hidden_states(model, ids, mask)
    assert torch.equal(models.hidden_states(twin, ids, mask), before)
    stir(twin, seed=99)
    assert torch.equal(models.hidden_states(model, ids, mask), before)
    assert (models.hidden_states(twin, ids, mask) - before).abs().max() > 0.1


# ------------------------------------------------------------------ saved, and put back


@each("trained", [True, False])
@torch.no_grad()
def test_a_saved_prompt_comes_back_to_the_bit(method, kind, trained, tmp_path):
    """And once more from there; what is not trained has no gradient."""
    model, (ids, mask) = prompted(method, kind), padded(ROWS, left=True)
    expected = models.hidden_states(model, ids, mask)
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(str(folder), selected_adapters=["default"])
        model = soft.load(base(kind), folder, head=False, trained=trained)
        assert torch.equal(models.hidden_states(model, ids, mask), expected)
    wanted = {"prompt_encoder.default.embedding.weight"} if trained else set()
    assert {name for name, w in model.named_parameters() if w.requires_grad} == wanted


@each_pair
@torch.no_grad()
def test_a_saved_head_comes_back_over_another(method, kind, tmp_path):
    model, (ids, mask) = prompted(method, kind, head=True), padded(ROWS, left=True)
    model.save_pretrained(str(tmp_path), selected_adapters=["default"])
    other = base(kind, head=True)
    other.score.weight.fill_(3.0)
    again = soft.load(other, tmp_path, head=True, trained=True)
    assert torch.equal(models.scores(again, ids, mask), models.scores(model, ids, mask))
    assert again.get_base_model().score.modules_to_save["default"].weight.requires_grad
    frozen = soft.load(base(kind, head=True), tmp_path, head=True, trained=False)
    assert not any(weight.requires_grad for weight in frozen.parameters())
    assert torch.equal(models.scores(frozen, ids, mask), models.scores(model, ids, mask))
    causal = soft.load(base(kind), tmp_path, head=False, trained=False)  # its prompt alone
    assert torch.equal(
        models.hidden_states(causal, ids, mask), models.hidden_states(model, ids, mask)
    )


@each_method
@torch.no_grad()
def test_the_prompt_of_sft_goes_on_under_a_head(method, tmp_path):
    """A reward model starts from it; its head is the one it was given, and is trained."""
    model, (ids, mask) = prompted(method), padded(ROWS, left=False)
    model.save_pretrained(str(tmp_path), selected_adapters=["default"])
    start = base(head=True)
    again = soft.load(start, tmp_path, head=True, trained=True)
    expected = models.hidden_states(model, ids, mask)
    assert torch.equal(models.hidden_states(again, ids, mask), expected)
    values = models.token_values(again, ids, mask)
    assert torch.equal(values, (expected @ base(head=True).score.weight.T)[..., 0])
    assert {name for name, w in again.named_parameters() if w.requires_grad} == {
        "prompt_encoder.default.embedding.weight",
        "base_model.score.modules_to_save.default.weight",
    }


@each_method
@torch.no_grad()
def test_a_prompt_in_bf16_comes_back_to_the_bit(method, tmp_path):
    """An engine in bf16 holds all it trains in bf16, the network that makes the prompt too."""
    model, (ids, mask) = prompted(method).bfloat16(), padded(ROWS, left=True)
    model.save_pretrained(str(tmp_path), selected_adapters=["default"])
    again = soft.load(base().bfloat16(), tmp_path, head=False, trained=True)
    expected = models.hidden_states(model, ids, mask)
    assert torch.equal(models.hidden_states(again, ids, mask), expected)
    assert torch.equal(models.hidden_states(again.bfloat16(), ids, mask), expected)


def steps(model, optimizer, count):
    """Plain training on a next token; the loss of each step."""
    ids, mask = padded(ROWS, left=False)
    losses = []
    for _ in range(count):
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        loss = logits.pow(2).mean() if logits.ndim == 2 else -logits.log_softmax(-1)[..., 7].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@each_method
@pytest.mark.parametrize("head", [False, True], ids=["causal", "head"])
def test_a_resumed_run_is_an_unbroken_one_to_the_bit(method, head):
    """With the network that makes the prompt, of which peft's own files know nothing."""

    def begin(seed):
        torch.manual_seed(seed)
        model = soft.attach(base(head=head), METHODS[method], head=head).train()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        return model, torch.optim.AdamW(trained, lr=3e-2)

    model, optimizer = begin(seed=1)
    first = steps(model, optimizer, 4)
    saved = soft.state(model)
    moments = copy.deepcopy(optimizer.state_dict())
    unbroken = steps(model, optimizer, 4)
    assert unbroken[-1] < first[0] - 0.05

    resumed, optimizer = begin(seed=2)
    soft.restore(resumed, saved)
    optimizer.load_state_dict(moments)
    assert steps(resumed, optimizer, 4) == unbroken
    ids, mask = padded(ROWS, left=True)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long()).logits
        assert torch.equal(resumed(input_ids=ids, attention_mask=mask.long()).logits, expected)


def test_the_state_of_another_prompt_is_refused():
    model = prompted("p_tuning_mlp")
    with pytest.raises(ConfigError, match=r"another soft prompt.*lstm_head"):
        soft.restore(model, soft.state(prompted("p_tuning_lstm")))
    longer = soft.attach(base(), PTuningConfig(tokens=9, encoder="mlp"), head=False)
    with pytest.raises(ConfigError, match=r"another soft prompt.*embedding\.weight"):
        soft.restore(model, soft.state(longer))


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    prompted("p_tuning_v2").save_pretrained(str(tmp_path / "prefix"))
    with pytest.raises(ConfigError, match=r"has shape \(5, 64\).*GPT2.* needs \(5, 128\)"):
        soft.load(base("gpt2"), tmp_path / "prefix", head=False, trained=True)
    lora.attach(base(), LoraConfig(), head=False).save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(ConfigError, match=r"LORA, not a soft prompt"):
        soft.load(base(), tmp_path / "lora", head=False, trained=True)


# ------------------------------------------------------------------ how a prompt begins


def test_a_prompt_begins_as_its_text(tiny_model, tiny_tokenizer, new_tokenizer):
    """Not as the special tokens that a tokenizer puts before a text of its own."""
    text = " the fox is happy"
    ids = [i for word in (" the", " fox", " is", " happy") for i in tiny_tokenizer.encode(word)]
    assert len(ids) == 4
    new_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    assert new_tokenizer(text)["input_ids"] == [1, *ids]
    table = tiny_model().get_input_embeddings().weight
    for count, expected in ((3, ids[:3]), (4, ids), (10, ids + ids + ids[:2])):
        cfg = PromptConfig(tokens=count, text=text)
        model = soft.attach(tiny_model(), cfg, head=False, tokenizer=new_tokenizer)
        assert torch.equal(model.embeddings()[0], table[expected])


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_prefix_of_its_own_numbers_hardly_changes_what_is_said(kind):
    """Next to keys and values of zero; one drawn from N(0, 1) would say much."""
    ids = torch.tensor([ROWS[0]])
    prefixed = soft.attach(base(kind), METHODS["p_tuning_v2"], head=False)
    keys, values = (torch.stack(part) for part in zip(*prefixed.keys_and_values(), strict=True))
    for part in (keys, values):
        assert float(part.std()) == pytest.approx(0.02, rel=0.2)
    weight = prefixed.encoder.embedding.weight
    with torch.no_grad():
        # Keys and values of nothing: attention that takes a share and adds nothing.
        own = weight.clone()
        said = prefixed(input_ids=ids).logits
        weight.zero_()
        nothing = prefixed(input_ids=ids).logits
        weight.copy_(own / 0.02)
        loud = prefixed(input_ids=ids).logits
        assert float((said - nothing).abs().max()) < float((loud - nothing).abs().max()) / 10
        assert not torch.equal(said, nothing)


def test_without_text_it_begins_as_tokens_of_the_vocabulary():
    torch.manual_seed(0)
    found = soft.attach(base(), PromptConfig(tokens=20), head=False).embeddings()[0]
    table = base().get_input_embeddings().weight
    drawn = [int((table == row).all(1).nonzero()[0]) for row in found]
    assert len(set(drawn)) > 10
    torch.manual_seed(1)
    other = soft.attach(base(), PromptConfig(tokens=20), head=False).embeddings()[0]
    assert not torch.equal(found, other)


def test_a_text_that_cannot_be_read_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(ConfigError, match=r"method\.text='fox'.*no tokenizer"):
        soft.attach(tiny_model(), PromptConfig(text="fox"), head=False)
    with pytest.raises(ConfigError, match=r"method\.text=''.*no token"):
        soft.attach(tiny_model(), PromptConfig(text=""), head=False, tokenizer=tiny_tokenizer)


# ------------------------------------------------------------------ what cannot work

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
UNFIT = {
    "sliding window": (MistralConfig(**IDS, **SIZES, sliding_window=4), "sliding window"),
    "no positions": (BloomConfig(**IDS, n_layer=2, n_head=4, hidden_size=32), "position_ids"),
    "narrow embeddings": (
        OPTConfig(**IDS, **SMALL, ffn_dim=48, word_embed_proj_dim=16),
        "embeddings have 16 numbers, its hidden states 32",
    ),
}


@pytest.mark.parametrize("why", UNFIT)
def test_a_model_that_cannot_take_a_prompt_is_refused(why):
    config, match = UNFIT[why]
    with pytest.raises(ConfigError, match=rf"method\.name=prompt_tuning: .*{match}"):
        soft.attach(base(config=config), METHODS["prompt_tuning"], head=False)


def test_an_encoder_and_decoder_is_refused():
    config = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ConfigError, match=r"p_tuning_v2: T5.*takes no inputs_embeds"):
        soft.attach(T5ForConditionalGeneration(config), METHODS["p_tuning_v2"], head=False)


def test_a_prompt_that_does_not_fit_is_refused_by_a_rehearsal():
    """More tokens than there are places, and keys of a shape that only a pass brings to light."""
    with pytest.raises(
        ConfigError, match=r"p_tuning: GPT2LMHeadModel.*a pass with 63 virtual tokens"
    ):
        soft.attach(base("gpt2"), PTuningConfig(tokens=63), head=False)
    shapes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    config = DeepseekV3Config(**IDS, **SIZES, **shapes, qk_nope_head_dim=8, n_routed_experts=8)
    with pytest.raises(ConfigError, match=r"p_tuning_v2: DeepseekV3.*pass with 5 virtual tokens"):
        soft.attach(base(config=config), METHODS["p_tuning_v2"], head=False)


@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning_v2"])
def test_a_prefix_refuses_recomputed_activations(method):
    model = prompted(method).train()
    model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match=r"engine\.checkpointing=true.*prefix"):
        model(input_ids=torch.tensor([ROWS[0]]))


# ------------------------------------------------------------------ TRL's trainers


def fresh(tiny_model, method, tmp_path=None, tokenizer=None):
    """A model of the tokenizer's size with a soft prompt, drawn anew but always the same."""
    model = tiny_model(initializer_range=0.1)
    if tmp_path is not None:
        model.save_pretrained(tmp_path)
        model = models.load_scalar(tmp_path, tokenizer, dtype=torch.float32)
        with torch.no_grad():
            model.score.weight.copy_(torch.linspace(-1, 1, 32)[None])
    torch.manual_seed(3)
    return soft.attach(model, METHODS[method], head=tmp_path is not None)


LENGTHS = [(3, 9), (8, 2), (2, 1), (5, 6), (4, 12), (6, 3), (2, 7), (9, 4)]  # prompt, answer


def tokens(count, generator):
    return torch.randint(6, 200, (count,), generator=generator).tolist()


def demonstrations():
    generator, rows = torch.Generator().manual_seed(0), []
    for prompt, answer in LENGTHS:
        ids = [1, *tokens(prompt + answer - 2, generator), 2]
        rows.append({"input_ids": ids, "completion_mask": [0] * prompt + [1] * answer})
    return rows


def preferences():
    generator, rows = torch.Generator().manual_seed(0), []
    for prompt, answer in LENGTHS:
        start = [1, *tokens(prompt, generator)]
        ends = {"chosen_ids": answer, "rejected_ids": 14 - answer}
        rows.append({key: [*start, *tokens(n, generator), 2] for key, n in ends.items()})
    return rows


def train(trainer, model, tokenizer, rows, runs, *, zero_stage=2, **more):
    """Four steps of eight rows; the numbers held out are of the same rows."""
    settings = {"batch_size": 8, "micro_batch_size": 4, "max_steps": 4, "learning_rate": 3e-2}
    cfg = TrainConfig(**settings, warmup=0.0, schedule="constant", eval_every=2)
    console = Console(quiet=True)
    with open_run(Registry(runs), "sft", "t", {}, {}) as run:
        keeper = Checkpoints(
            run, run.checkpoints_dir, console, stage="sft", total=4, every=cfg.save_every, keep=2
        )
        options = {"cfg": cfg, "engine_cfg": EngineConfig(zero_stage=zero_stage), "seed": 0}
        return trainer(model, tokenizer, rows, rows, checkpoints=keeper, **options, **more)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def loss_by_hand(plain, model, method, rows):
    """Mean -log p of answer tokens, one row at a time, with the prompt in front."""
    losses = []
    for row in rows:
        ids, start = row["input_ids"], row["completion_mask"].index(1)
        logprobs = logits_by_hand(plain, model, method, ids).log_softmax(-1)
        losses += [-float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids))]
    return mean(losses)


@each_method
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_sft_trains_on_the_loss_of_answers_after_the_prompt(
    method, zero_stage, tiny_model, tiny_tokenizer, tmp_path
):
    rows, plain = demonstrations(), tiny_model(initializer_range=0.1)
    model = fresh(tiny_model, method)
    start = loss_by_hand(plain, model, method, rows)
    frozen = {name: w.clone() for name, w in model.named_parameters() if not w.requires_grad}
    found = train(
        supervised.train_sft, model, tiny_tokenizer, rows, tmp_path, zero_stage=zero_stage
    )
    assert found["start/eval/loss"] == pytest.approx(start, abs=TINY)
    assert found["eval/loss"] < start - 0.01
    end = loss_by_hand(plain, model, method, rows)
    assert found["eval/loss"] == pytest.approx(end, abs=TINY), "of the weights at the end"
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], weight) for name, weight in frozen.items())


@each_method
def test_a_reward_model_trains_on_scores_after_the_prompt(
    method, tiny_model, tiny_tokenizer, tmp_path
):
    rows, plain = preferences(), tiny_model(initializer_range=0.1)
    model = fresh(tiny_model, method, tmp_path / "base", tiny_tokenizer)

    @torch.no_grad()
    def lead():
        """Mean of score of chosen minus score of rejected."""
        score = model.get_base_model().score.modules_to_save["default"].weight[0]
        ends = [
            [
                by_hand(plain, model, method, row[name])[-1]
                for name in ("chosen_ids", "rejected_ids")
            ]
            for row in rows
        ]
        return mean(float(score @ (chosen - rejected)) for chosen, rejected in ends)

    start = lead()
    found = train(
        supervised.train_rm, model, tiny_tokenizer, rows, tmp_path / "runs", center_coef=0.0
    )
    assert found["start/eval/margin"] == pytest.approx(start, abs=TINY)
    assert found["eval/margin"] == pytest.approx(lead(), abs=TINY)
    assert found["eval/loss"] < found["start/eval/loss"] - 0.05


# ------------------------------------------------------------------ a decoder of another release


def renamed(name):
    """A class of decoder that takes its keys and values by `name` alone, and gives them back so."""

    class Renamed(LlamaModel):
        def forward(self, **kwargs):
            assert {"cache", "past_key_values"} & kwargs.keys() <= {name}
            out = super().forward(**{CACHE if key == name else key: kwargs[key] for key in kwargs})
            return Output({name if key == CACHE else key: out[key] for key in out})

    kept = [p.replace(name=name) if p.name == CACHE else p for p in TAKEN.values()]
    Renamed.forward.__signature__ = inspect.Signature(kept)
    return Renamed


class Output(dict):
    """An output of a model, by names."""

    def __init__(self, pairs=(), **named):
        super().__init__(pairs, **named)

    __getattr__ = dict.get


@pytest.mark.parametrize("method", ["p_tuning_v2", "prompt_tuning"])
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_keys_and_values_enter_by_the_name_that_the_decoder_knows(method, name):
    """Whatever the caller says: transformers 5.24 calls `cache` what was `past_key_values`."""
    plain, other = base(), base()
    other.model.__class__ = renamed(name)
    model = stir(soft.attach(other, METHODS[method], head=False))
    expected = by_hand(plain, model, method, ROWS[0])
    for called in ("cache", "past_key_values"):
        first = model.backbone(input_ids=torch.tensor([ROWS[0][:2]]), use_cache=True)
        rest = {"input_ids": torch.tensor([ROWS[0][2:]]), called: first[name]}
        second = model.backbone(**rest)
        found = torch.cat([first["last_hidden_state"], second["last_hidden_state"]], dim=1)
        assert_close(found[0], expected, **CLOSE)
    kept = model.backbone(input_ids=torch.tensor([ROWS[0]]), use_cache=False)
    assert kept.get(name) is None


def test_a_decoder_that_takes_them_by_no_name_we_know_is_refused():
    model = base()
    model.model.__class__ = renamed("memory")
    with pytest.raises(ConfigError, match="its decoder takes no cache or past_key_values"):
        soft.attach(model, METHODS["p_tuning_v2"], head=False)
