"""Does pruning keep its promise of memory? A model of a real size, random weights, pruned in a process of its own.

    python -m owl_deploy.bench.memory --max-memory 6GiB                       # OWL and Wanda, LLaMA-7B's shape
    python -m owl_deploy.bench.memory --max-memory 8GiB --method sparsegpt --allocation uniform

In: a shape. Out: the peak that was predicted and the one that was measured. The weights are written once, as bfloat16
(13.5 GB for LLaMA-7B), and used again; they say nothing, so no quality is measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from owl_deploy.files import new_folder, write_json

__all__ = ["write_random_llama"]


def write_random_llama(folder: Path, *, n_blocks: int, hidden: int, neurons: int, vocab: int, seed: int = 0) -> None:
    """Write a Llama checkpoint of random bfloat16 weights, one block in memory at a time; whole or not at all."""
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=neurons,
        num_hidden_layers=n_blocks,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    square, wide = (hidden, hidden), (neurons, hidden)
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj.weight": square for name in "qkvo"}
    shapes |= {"mlp.gate_proj.weight": wide, "mlp.up_proj.weight": wide, "mlp.down_proj.weight": (hidden, neurons)}
    with new_folder(folder) as new:
        weight_map: dict[str, str] = {}
        for index in range(n_blocks):
            block = {f"model.layers.{index}.{name}": random(*shape) for name, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                block[f"model.layers.{index}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
            name = f"model-{index:05d}.safetensors"
            save_file(block, new / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(block, name)
            click.echo(f"block {index + 1} of {n_blocks}", err=True)
        outside = {"model.embed_tokens.weight": random(vocab, hidden), "lm_head.weight": random(vocab, hidden)}
        outside["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        save_file(outside, new / "model-outside.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(outside, "model-outside.safetensors")
        write_json(new / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        config.save_pretrained(new)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(new)


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True, "show_default": True})
@click.option("--max-memory", default="6GiB", help="The promise.")
@click.option("--model", type=click.Path(path_type=Path), help="Where the random checkpoint is, or is to be written.")
@click.option("--n-blocks", default=32, help="Decoder blocks; the peak hardly depends on them.")
@click.option("--hidden", default=4096, help="Width of the hidden states.")
@click.option("--neurons", default=11008, help="Width of the MLP.")
@click.option("--vocab", default=32000, help="Tokens of the vocabulary.")
@click.option("--n-samples", default=8, help="Calibration sequences.")
@click.option("--seq-len", default=256, help="Tokens per sequence.")
@click.argument("prune_options", nargs=-1, type=click.UNPROCESSED)
def main(
    max_memory: str, model: Path | None, n_samples: int, seq_len: int, prune_options: tuple[str, ...], **shape: Any
) -> None:
    """Prune, and print prediction and peak."""
    with tempfile.TemporaryDirectory() as scratch:
        source = model or Path(scratch) / "random-llama"
        if not source.exists():
            write_random_llama(source, **shape)
        command = [sys.executable, "-m", "owl_deploy", "prune", "--model", str(source), "--max-memory", max_memory]
        command += ["--calibration", "python-docs", "--n-samples", str(n_samples), "--seq-len", str(seq_len)]
        command += ["--out", str(source.with_name(f"{source.name}-pruned")), "--force", "--json", *prune_options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(done.stdout)
    click.echo(
        f"peak {report['peak_rss_bytes'] / 2**30:.2f} GiB of {max_memory}, {report['seconds']:.0f} s, "
        f"sparsity {report['sparsity']['linears']:.4f}, {report['method']}, {report['allocation']}"
    )


if __name__ == "__main__":
    main()
