"""A model without its weights, whose decoder blocks are filled and emptied one at a time.

In: a checkpoint. Out: the transformers model on the meta device, its decoder blocks and their
prunable linears found by structure, and the inputs that each block is called with, captured from a
real forward pass rather than written by hand. It knows nothing of pruning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from owl_deploy.checkpoint import Checkpoint
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.memory import release_free_memory

__all__ = ["BlockInputs", "Skeleton", "open_skeleton"]


@dataclass(frozen=True)
class BlockInputs:
    """What the blocks are called with for calibration sequences of one length."""

    hidden_states: list[torch.Tensor]
    """Entering block 0, one (1, seq_len, hidden) float32 per sequence."""
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """Per block: positional arguments after the hidden states, and keyword arguments."""


@dataclass(frozen=True)
class Skeleton:
    """The model on the meta device, and where its parts are."""

    checkpoint: Checkpoint
    model: Any
    prefix: str
    """Name of the list of decoder blocks inside the model, such as `model.layers`."""
    blocks: nn.ModuleList

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Return the prunable linears of a block by their full name without `.weight`.

        Embeddings and the head are told apart by identity of the parameter, so that a tied or
        oddly named one is never pruned.
        """
        modules = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        excluded = {id(module.weight) for module in modules if module is not None}
        return {
            f"{self.prefix}.{index}.{name}": module
            for name, module in self.blocks[index].named_modules()
            if isinstance(module, nn.Linear) and id(module.weight) not in excluded
        }

    def n_weights(self) -> list[int]:
        """Return the number of prunable weights of every block."""
        counts = []
        for index in range(len(self.blocks)):
            counts.append(sum(linear.weight.numel() for linear in self.linears(index).values()))
        return counts

    def block_tensors(self, index: int) -> dict[str, str]:
        """Return model parameter name -> checkpoint tensor name for all parameters of a block."""
        prefix = f"{self.prefix}.{index}"
        return {
            f"{prefix}.{name}": self.tensor_name(f"{prefix}.{name}")
            for name, _ in self.blocks[index].named_parameters()
        }

    def tensor_name(self, parameter: str) -> str:
        """Return the checkpoint's name of a model parameter; the base model's prefix may be absent there.

        Raises:
            UnsupportedModelError: the checkpoint has no such tensor.
        """
        base = f"{self.model.base_model_prefix}."
        for name in (parameter, parameter.removeprefix(base), base + parameter):
            if name in self.checkpoint.tensors:
                return name
        raise UnsupportedModelError(
            f"{self.checkpoint.path} has no tensor for {parameter}: the checkpoint is not complete"
        )

    @contextmanager
    def filled(self, index: int) -> Iterator[nn.Module]:
        """Yield a block with its weights in float32, read from the checkpoint; empty it afterwards."""
        block = self.blocks[index]
        names = self.block_tensors(index)
        prefix = f"{self.prefix}.{index}."
        try:
            for parameter, tensor in names.items():
                self.fill_(block, parameter.removeprefix(prefix), self.checkpoint.read(tensor))
            yield block
        finally:
            for parameter in names:
                set_module_tensor_to_device(block, parameter.removeprefix(prefix), "meta")
            release_free_memory()

    @staticmethod
    def fill_(module: nn.Module, name: str, value: torch.Tensor) -> None:
        """Put a value into a parameter of `module`, as float32."""
        set_module_tensor_to_device(module, name, "cpu", value=value.float(), dtype=torch.float32)

    @torch.inference_mode()
    def capture(self, tokens: torch.Tensor) -> BlockInputs:
        """Run everything before block 0, and learn what each block is called with.

        Args:
            tokens: (n_samples, seq_len) int64.
        """
        self._fill_embeddings()
        stubs = [_Recorder() for _ in self.blocks]
        stubs[-1].is_last = True
        parent, _, name = self.prefix.rpartition(".")
        owner = self.model.get_submodule(parent)
        hidden_states: list[torch.Tensor] = []
        setattr(owner, name, nn.ModuleList(stubs))
        try:
            for row in tokens:
                try:
                    self.model(input_ids=row[None], use_cache=False)
                except _AllSeenError:
                    hidden_states.append(stubs[0].hidden_state)
        finally:
            setattr(owner, name, self.blocks)
        if len(hidden_states) != len(tokens):
            raise UnsupportedModelError(
                f"{self.checkpoint.path}: the model does not run its {len(self.blocks)} blocks in turn"
            )
        return BlockInputs(hidden_states, [(stub.args, stub.kwargs) for stub in stubs])

    def _fill_embeddings(self) -> None:
        """Read all that lies outside the blocks, except an untied head."""
        head = self.model.get_output_embeddings()
        head_id = id(head.weight) if head is not None else None
        embedding_id = id(self.model.get_input_embeddings().weight)
        for name, parameter in list(self.model.named_parameters()):
            in_blocks = name.startswith(f"{self.prefix}.")
            is_head = id(parameter) == head_id and head_id != embedding_id
            if not in_blocks and not is_head and parameter.is_meta:
                self.fill_(self.model, name, self.checkpoint.read(self.tensor_name(name)))
        self.model.tie_weights()  # filling replaces the embedding; a tied head must follow, or it would count twice


class _AllSeenError(Exception):
    """The last block was reached: what follows is of no interest."""


class _Recorder(nn.Module):
    """Stands in for a block: remembers how it was called, and passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_state = torch.empty(0)
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.is_last = False

    def forward(self, hidden_state: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.hidden_state, self.args, self.kwargs = hidden_state, args, kwargs
        if self.is_last:
            raise _AllSeenError
        return hidden_state


def open_skeleton(checkpoint: Checkpoint) -> Skeleton:
    """Build the model of a checkpoint's configuration on the meta device and find its blocks.

    Raises:
        UnsupportedModelError: transformers does not know the architecture, it has no decoder blocks, or
            a tensor is missing or of another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        # Buffers stay real: rotary frequencies are computed here and are in no checkpoint.
        with init_empty_weights(include_buffers=False):
            model = (
                AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
                .eval()
                .requires_grad_(False)
            )
    except Exception as error:  # whatever an impossible config.json makes transformers or torch raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(
            f"{checkpoint.path} is not a causal language model that transformers knows: {reason}"
        ) from error
    model.tie_weights()
    prefix, blocks = _decoder_blocks(model, checkpoint)
    skeleton = Skeleton(checkpoint, model, prefix, blocks)
    for name, parameter in model.named_parameters():
        tensor = skeleton.tensor_name(name)
        found, expected = checkpoint.tensors[tensor].shape, tuple(parameter.shape)
        if found != expected:
            raise UnsupportedModelError(
                f"tensor {tensor} does not fit its config.json: its shape is {found}, expected {expected}"
            )
    return skeleton


def _decoder_blocks(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, nn.ModuleList]:
    """Return the list of modules of one class that holds most of the model's linear weights."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(item) for item in module}) != 1:
            continue
        count = sum(item.weight.numel() for item in module.modules() if isinstance(item, nn.Linear))
        # Strictly more: of nested lists (experts inside blocks) the outer one comes first and holds all.
        if count > (best[0] if best else 0):
            best = (count, name, module)
    if best is None:
        kind = checkpoint.config.get("model_type", "?")
        raise UnsupportedModelError(f"{checkpoint.path}: found no decoder blocks with linears in architecture {kind!r}")
    return best[1], best[2]
