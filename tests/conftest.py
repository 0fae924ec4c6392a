"""What every test stands on: a small tokenizer, a random two-layer model, and a quiet machine.

One thread, no network, a home folder of its own, and no launcher's variables. torch is imported
inside the fixtures that need it, so that the tests of what must answer fast stay fast.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from rlhf.registry import Published

# Before anything imports transformers or torch.
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
for name in tuple(os.environ):
    if name.startswith("WANDB_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NPROC"):
        del os.environ[name]
for name in ("LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RLHF_RUNS"):
    os.environ.pop(name, None)

# <bos> <user> question <assistant> answer <eos>, as often as there are turns.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<system>", "<user>", "<assistant>")
WORDS = (" the", " a", " and", " is", " was", " fox", " kite", " happy", " friend", "Tell", " me")


def cpu_seconds() -> float:
    """Of this process and of every process below it that has ended and was waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests cost, whatever else the machine did; xdist's workers have ended by now."""
    terminalreporter.section("cost")
    terminalreporter.write_line(
        f"{cpu_seconds():.0f} CPU seconds (this process and its children and workers)"
    )


@pytest.fixture(scope="session", autouse=True)
def _a_home_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No key, no settings and no cache of the person who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    """`monkeypatch` for what a module makes once."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A group of one process, as a stage starts it; the environment is put back afterwards."""
    from rlhf import engine

    before = dict(os.environ)
    engine.start(0)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """A connection that would leave this machine fails, loudly and at once."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = str(address[0])
            assert host in ("localhost", "::1") or host.startswith("127."), f"network: {address}"
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


@pytest.fixture(autouse=True)
def _the_same_noise() -> None:
    """What a test draws depends on no test before it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _linear_as_it_was() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 puts a linear layer of its own in torch's place, for the whole process."""
    yield
    if torch := sys.modules.get("torch"):
        torch.nn.functional.linear = torch._C._nn.linear


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens: special ones, all bytes, a few words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        letters = word.replace(" ", "Ġ")
        for end in range(1, len(letters)):
            merge = (letters[:end], letters[end])
            if merge not in merges:
                merges.append(merge)
                tokens.append("".join(merge))
    vocab = {token: index for index, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=["<system>", "<user>", "<assistant>"],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Shared by all tests, so do not change it: `new_tokenizer` gives one of your own."""
    return build_tokenizer()


@pytest.fixture
def new_tokenizer() -> PreTrainedTokenizerFast:
    """As `tiny_tokenizer`, to be changed at will."""
    return build_tokenizer()


@pytest.fixture
def tiny_model(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """A factory: `tiny_model(seed=0)` is a random two-layer Llama in eval mode, fp32.

    Biases are random too, so that a test sees them; other settings of LlamaConfig are keywords.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)

    def make(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
        given: dict[str, Any] = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "initializer_range": 0.3,
            "attn_implementation": "eager",
            "pad_token_id": tiny_tokenizer.pad_token_id,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**(given | settings)))
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
        return model.eval()

    return make


@pytest.fixture
def tiny_model_dir(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_model: Callable[..., LlamaForCausalLM],
) -> Path:
    """A folder with `tiny_model(seed=0)` and `tiny_tokenizer`, as a base model comes."""
    folder = tmp_path / "tiny-model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def publish_run() -> Callable[..., Published]:
    """`publish_run(runs_dir, "sft")`: a finished run with files in it, but no real weights."""
    from rlhf.manifest import BaseModel, DataFacts, TokenizerFacts
    from rlhf.registry import Registry
    from rlhf.run import open_run

    def publish(
        runs_dir: Path, stage: str, parents: dict[str, Published] | None = None
    ) -> Published:
        registry = Registry(runs_dir)
        config = {"stage": stage, "run": "tiny", "seed": 0}
        with open_run(registry, stage, "tiny", config, parents or {}) as run:
            (run.path / "model").mkdir(exist_ok=True)
            (run.path / "model" / "model.safetensors").write_bytes(b"weights")
            run.publish(
                base=BaseModel("base", None, "base-1"),
                tokenizer=TokenizerFacts("tokenizer-1", "template-1", pad_id=0, eos_id=2, bos_id=1),
                method={"name": "lora", "adapter_chain": []},
                data=[DataFacts("rows.jsonl", "train", "data-1", 1, {})],
                metrics={},
                golden={},
                environment={"world_size": 1, "zero_stage": 2, "seed": 0}
                | {"dtype": "float32", "device": "cpu"},
                phases={},
            )
        return registry.resolve(f"{stage}/tiny")

    return publish
