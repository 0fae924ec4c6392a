"""Rebuild the tiny base from nothing: tokenizer, pre-training, recorded samples, recipe.

    python data/tiny/pretrain.py        (a few CPU minutes; then `python data/tiny/world.py`)

1. Text: `world.headlines`, then `world.mixed_texts`, at a fixed seed. After <assistant> comes
   an answer to some other request, so the base learns the language and the role tokens but not
   to obey.
2. Tokenizer: byte-level BPE, with <pad> <bos> <eos> <user> <assistant> as tokens of their own.
3. Model: a small Llama with random weights, trained on that text. Its attention and MLP biases
   are exactly zero and stay frozen, so that bias-only tuning (BitFit) later starts from zero.
4. Samples: the base and a quickly fine-tuned LoRA model answer a fixed list of prompts
   (`world.record_prompts`). `world.py` pairs what they wrote, so that a reward model meets text
   at the level a policy writes. The LoRA model is thrown away.
5. base/recipe.json ties the shipped files together: hashes, held-out loss, CPU seconds.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import world  # noqa: E402  (its folder is only on the path from here on)

BASE = HERE / "base"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>")

# Every number that shapes the shipped base; hashed, with this file, into the recipe.
RECIPE = {
    "seed": 0,
    "headlines": 14000,
    "documents": 28000,
    "held_out_documents": 400,
    "vocab_size": 1280,
    "hidden_size": 128,
    "intermediate_size": 384,
    "layers": 5,
    "heads": 4,
    "kv_heads": 2,
    "initializer_range": 0.06,
    "batch_documents": 16,
    "learning_rate": 2e-3,
    "warmup_steps": 40,
    "weight_decay": 0.05,
    "sft_learning_rate": 2e-3,
    "sft_rank": 16,
    "sft_epochs": 2,
    "sft_batch": 16,
    "max_new_tokens": 64,
}

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set system = namespace(text='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% set system.text = message['content'] + ' ' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ '<user>' + system.text + message['content'] }}"
    "{% set system.text = '' %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<assistant>' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def main() -> None:
    """Build everything and write it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    torch.set_num_threads(1)  # the same numbers whatever the machine is busy with
    torch.manual_seed(RECIPE["seed"])
    started = time.process_time()
    short, mixed, held_out = documents()
    tokenizer = train_tokenizer(short + mixed)
    model = new_model(tokenizer)
    tokens = pretrain(model, token_rows(short, tokenizer), token_rows(mixed, tokenizer))
    loss = mean_loss(model, token_rows(held_out, tokenizer))
    model.save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)
    seconds = time.process_time() - started
    print(f"held-out loss {loss:.4f} nats/token after {seconds:.0f} CPU seconds")
    parameters = model.num_parameters()  # before `record` wraps the model
    record(model, tokenizer)
    recipe = {
        "recipe": RECIPE,
        "recipe_sha256": recipe_hash(),
        "text_sha256": text_hash(short + mixed + held_out),
        "tokenizer_sha256": file_hash(BASE / "tokenizer.json"),
        "weights_sha256": file_hash(BASE / "model.safetensors"),
        "recorded_samples_sha256": file_hash(world.RECORDED),
        "parameters": parameters,
        "train_tokens": tokens,
        "held_out_loss": round(loss, 4),
        "pretraining_cpu_seconds": round(seconds, 1),
        "all_cpu_seconds": round(time.process_time() - started, 1),
    }
    (BASE / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------- hashes


def recipe_hash() -> str:
    """Hash of how the base is made: this file and the hyper-parameters in it."""
    return hashlib.sha256(Path(__file__).read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def text_hash(documents: list[tuple[str, ...]]) -> str:
    """Hash of the pre-training text, in order."""
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------- text to tokens


def documents() -> tuple[list[tuple[str, ...]], ...]:
    """(headlines, mixed texts, held-out mixed texts): all the text the base is made from."""
    held_out = RECIPE["held_out_documents"]
    mixed = list(world.mixed_texts(RECIPE["seed"], RECIPE["documents"] + held_out))
    short = list(world.headlines(RECIPE["seed"], RECIPE["headlines"]))
    return short, mixed[held_out:], mixed[:held_out]


def train_tokenizer(documents: list[tuple[str, ...]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with our special tokens and the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=RECIPE["vocab_size"],
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for turns in documents for text in turns), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def render(turns: tuple[str, ...]) -> str:
    """A document with its special tokens: a text, a text and a note, or a conversation."""
    if len(turns) < 3:
        return "<bos>" + "".join(f"{turn}<eos>" for turn in turns)
    triples = zip(turns[::3], turns[1::3], turns[2::3], strict=True)
    return "<bos>" + "".join(
        f"<user>{ask}<assistant>{answer}<eos>" + (f"{note}<eos>" if note else "")
        for ask, answer, note in triples
    )


def token_rows(texts: list[tuple[str, ...]], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of each document."""
    return tokenizer([render(turns) for turns in texts], add_special_tokens=False)["input_ids"]


def batches_of(rows: list[list[int]], size: int) -> list[list[list[int]]]:
    """Rows in random order, in batches of about the same length, so that little is padding."""
    batches = []
    for part in torch.randperm(len(rows)).split(16 * size):
        part = sorted(part.tolist(), key=lambda i: len(rows[i]))
        batches += [[rows[i] for i in part[at : at + size]] for at in range(0, len(part), size)]
    return [batches[i] for i in torch.randperm(len(batches))]


# --------------------------------------------------------------------------- pre-training


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights; biases exist, are zero and are frozen."""
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=RECIPE["hidden_size"],
        intermediate_size=RECIPE["intermediate_size"],
        num_hidden_layers=RECIPE["layers"],
        num_attention_heads=RECIPE["heads"],
        num_key_value_heads=RECIPE["kv_heads"],
        max_position_embeddings=512,
        initializer_range=RECIPE["initializer_range"],
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.zero_()
            parameter.requires_grad_(False)
    return model


def pretrain(model: LlamaForCausalLM, *stages: list[list[int]]) -> int:
    """Each stage's rows once, the stages in order; AdamW, warm-up, then a cosine to zero.

    Returns how many tokens were trained on.
    """
    batches = [batch for rows in stages for batch in batches_of(rows, RECIPE["batch_documents"])]
    optimizer, schedule = optimizer_for(model, RECIPE["learning_rate"], len(batches))
    clock = Progress("pre-training", len(batches), RECIPE["batch_documents"], "documents")
    model.train()
    for batch in batches:
        ids, labels, mask = collate([(row, row) for row in batch], model.config.pad_token_id)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        update(model, loss, optimizer, schedule)
        clock.tick(loss.item())
    return sum(len(row) for rows in stages for row in rows)


def optimizer_for(
    model: torch.nn.Module, learning_rate: float, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW on what is trainable, with warm-up and cosine."""
    warmup = min(RECIPE["warmup_steps"], steps // 5)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=learning_rate, betas=(0.9, 0.95), weight_decay=RECIPE["weight_decay"]
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def update(model: torch.nn.Module, loss: torch.Tensor, optimizer, schedule) -> None:
    """One optimizer step, gradients clipped at norm 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows: list[list[int]]) -> float:
    """Mean next-token loss in nats per token, over all of the rows."""
    model.eval()
    total = count = 0.0
    for at in range(0, len(rows), 50):
        batch = [(row, row) for row in rows[at : at + 50]]
        ids, labels, mask = collate(batch, model.config.pad_token_id)
        tokens = sum(len(row) - 1 for row, _ in batch)
        total += float(model(input_ids=ids, attention_mask=mask, labels=labels).loss) * tokens
        count += tokens
    return total / count


# --------------------------------------------------------------------------- recorded samples


def record(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Sample the base and the quick SFT model on the fixed prompts; write what they said."""
    plan = world.record_prompts()
    wanted = [(prompt, source) for prompt, sources in plan.items() for source in sources]
    written: dict[tuple[int, str], dict] = {}
    for source in ("base", "sft"):
        places = [i for i, (_, model_name) in enumerate(wanted) if model_name == source]
        writer = quick_sft(model, tokenizer) if source == "sft" else model
        samples = sample(writer, tokenizer, [wanted[i][0] for i in places])
        for place, (text, ended) in zip(places, samples, strict=True):
            row = {"prompt": wanted[place][0], "response": text, "source": source, "ended": ended}
            written[place] = row
    lines = [json.dumps(written[i], ensure_ascii=False) + "\n" for i in range(len(wanted))]
    world.RECORDED.write_bytes("".join(lines).encode())


def quick_sft(base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """LoRA on the demonstrations, loss on the answer only. Wraps `base` in place."""
    rows = world.build(RECIPE["seed"], [])["sft/train"]
    rank = RECIPE["sft_rank"]
    model = get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    )
    examples = [sft_example(row["messages"], tokenizer) for row in rows]
    batches = [
        batch
        for _ in range(RECIPE["sft_epochs"])
        for batch in torch.randperm(len(examples)).split(RECIPE["sft_batch"])
    ]
    optimizer, schedule = optimizer_for(model, RECIPE["sft_learning_rate"], len(batches))
    clock = Progress("quick SFT", len(batches), RECIPE["sft_batch"], "rows")
    model.train()
    for batch in batches:
        ids, labels, mask = collate([examples[i] for i in batch], tokenizer.pad_token_id)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        update(model, loss, optimizer, schedule)
        clock.tick(loss.item())
    return model


def sft_example(messages: list[dict], tokenizer: PreTrainedTokenizerFast) -> tuple[list, list]:
    """(token ids, labels) of one demonstration; -100 where the prompt is."""
    prompt = prompt_ids(messages[0]["content"], tokenizer)
    answer = tokenizer(messages[1]["content"] + "<eos>", add_special_tokens=False)["input_ids"]
    return prompt + answer, [-100] * len(prompt) + answer


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids up to and including <assistant>."""
    text = f"<bos><user>{prompt}<assistant>"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def collate(examples: list[tuple[list, list]], pad: int) -> tuple[torch.Tensor, ...]:
    """(ids, labels, attention mask), right-padded."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples])
    return ids, labels, mask


@torch.no_grad()
def sample(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> list[tuple[str, bool]]:
    """(answer, whether it ended with <eos>) per prompt, at temperature 1."""
    model.eval()
    found = []
    clock = Progress("sampling", math.ceil(len(prompts) / 64), 64, "answers")
    for start in range(0, len(prompts), 64):
        rows = [prompt_ids(prompt, tokenizer) for prompt in prompts[start : start + 64]]
        width = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=RECIPE["max_new_tokens"],
        )[:, width:]
        for row in out:
            ended = tokenizer.eos_token_id in row
            found.append((tokenizer.decode(row, skip_special_tokens=True).strip(), ended))
        clock.tick(0.0)
    return found


class Progress:
    """Prints step, loss, rate and time left, about every two seconds."""

    def __init__(self, name: str, steps: int, per_step: int, unit: str = "tokens") -> None:
        self.name, self.steps, self.per_step, self.unit = name, steps, per_step, unit
        self.done, self.started, self.printed = 0, time.monotonic(), time.monotonic()

    def tick(self, loss: float) -> None:
        """Count one step."""
        self.done += 1
        now = time.monotonic()
        if now - self.printed < 2 and self.done < self.steps:
            return
        self.printed = now
        rate = self.done / max(now - self.started, 1e-9)
        left = (self.steps - self.done) / rate
        note = f" loss {loss:.3f}" if loss else ""
        print(
            f"{self.name} {self.done}/{self.steps}{note}"
            f" {rate * self.per_step:.0f} {self.unit}/s, {left:.0f} s left",
            flush=True,
        )


if __name__ == "__main__":
    main()
