"""A seeded two-block model with a byte tokenizer, made in memory of a session's temporary folder."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, PreTrainedTokenizerFast

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
}


def byte_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, and two special ones."""
    specials = ["<bos>", "<eos>", "<a>", "<b>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


def save_tiny_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a seeded Llama with weights large enough that its greedy tokens are no near ties."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "initializer_range": 0.15, **changes}))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what takes minutes, so that workers which take whole files end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _no_garbage_in_imports() -> None:
    """Let garbage collections pass over what the imports made: 0.35 s each, and a stage has up to two."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep generated text and converted models of tests out of the user's cache, but find its engines."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    cache.mkdir(exist_ok=True)
    real = Path(os.environ.get("OWL_DEPLOY_CACHE", Path.home() / ".cache" / "owl-deploy"))
    engines = cache / "engines"
    if not engines.is_symlink():
        engines.symlink_to(real / "engines")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OWL_DEPLOY_CACHE", str(cache))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the seeded two-block model."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def llama_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but the configuration: transformers' defaults have the shape of LLaMA-7B."""
    folder = tmp_path_factory.mktemp("configurations") / "llama-7b"
    LlamaConfig(dtype="float16").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def opt_6_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but the configuration of OPT-6.7B."""
    folder = tmp_path_factory.mktemp("configurations") / "opt-6.7b"
    sizes = {"hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384, "num_hidden_layers": 32}
    OPTConfig(**sizes, num_attention_heads=32, vocab_size=50272, max_position_embeddings=2048).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def six_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but the configuration of a small Llama."""
    folder = tmp_path_factory.mktemp("configurations") / "six"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    LlamaConfig(num_hidden_layers=6, vocab_size=260, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans take a speed for measured: measuring takes a third of a second."""
    from owl_deploy import pruning_time

    monkeypatch.setattr(pruning_time, "_flop_per_second", lambda skeleton, settings: 1e11)


OwlDeploy = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def owl_deploy() -> OwlDeploy:
    """Run the command line in a process of its own, with text output captured."""

    def call(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "owl_deploy", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)

    return call
