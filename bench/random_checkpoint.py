"""A Llama checkpoint of a real model's shape and random weights, for what depends on sizes alone: memory and speed.

    python -m owl_deploy.bench.random_checkpoint tinyllama random-tinyllama --sparsity 0.7

In: a shape. Out: a folder of bfloat16 weights, one file a block, with a tokenizer of bytes. The weights say nothing:
there is no quality to measure.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from owl_deploy.files import new_folder, write_json

__all__ = ["SHAPES", "LlamaShape", "write_random_llama"]


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama model."""

    n_blocks: int
    hidden: int
    neurons: int
    """Width of the MLP."""
    n_heads: int
    n_kv_heads: int
    vocab: int = 32000
    max_positions: int = 2048


SHAPES = {
    "llama-7b": LlamaShape(n_blocks=32, hidden=4096, neurons=11008, n_heads=32, n_kv_heads=32),
    "tinyllama": LlamaShape(n_blocks=22, hidden=2048, neurons=5632, n_heads=32, n_kv_heads=4),
}
"""Of meta-llama/Llama-2-7b (13.5 GB in bfloat16) and TinyLlama/TinyLlama_v1.1 (2.2 GB)."""


def write_random_llama(folder: Path, shape: LlamaShape, *, sparsity: float = 0.0, seed: int = 0) -> None:
    """Write a Llama checkpoint of random bfloat16 weights, one block in memory at a time; whole or not at all.

    Args:
        folder: new.
        shape: sizes.
        sparsity: about this share of the weights of the blocks' linears is zero, at random places.
        seed: of all weights.
    """
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int, zeros: float = 0.0) -> torch.Tensor:
        weight = torch.empty(sizes, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        return weight.masked_fill_(torch.rand(sizes, generator=generator) < zeros, 0) if zeros else weight

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.neurons,
        num_hidden_layers=shape.n_blocks,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=shape.max_positions,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    hidden, neurons = shape.hidden, shape.neurons
    keys = hidden // shape.n_heads * shape.n_kv_heads
    rows = {"q": hidden, "k": keys, "v": keys, "o": hidden}
    sizes = {f"self_attn.{name}_proj.weight": (n_rows, hidden) for name, n_rows in rows.items()}
    sizes |= {f"mlp.{name}_proj.weight": (neurons, hidden) for name in ("gate", "up")}
    sizes["mlp.down_proj.weight"] = (hidden, neurons)
    with new_folder(folder) as new:
        weight_map: dict[str, str] = {}
        for index in range(shape.n_blocks):
            prefix = f"model.layers.{index}"
            block = {f"{prefix}.{name}": random(*of, zeros=sparsity) for name, of in sizes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                block[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
            name = f"model-{index:05d}.safetensors"
            save_file(block, new / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(block, name)
            click.echo(f"block {index + 1} of {shape.n_blocks}", err=True)
        outside = {name: random(shape.vocab, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
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


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("shape", type=click.Choice(sorted(SHAPES)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--sparsity", type=click.FloatRange(0, 0.99), default=0.0, help="Zeros in the linears of the blocks.")
@click.option("--seed", default=0, help="Of all weights.")
def main(shape: str, out: Path, sparsity: float, seed: int) -> None:
    """Write a checkpoint."""
    write_random_llama(out, SHAPES[shape], sparsity=sparsity, seed=seed)


if __name__ == "__main__":
    main()
