"""A model without its weights, whose decoder blocks are filled and emptied one at a time.

In: a checkpoint. Out: the transformers model on the meta device, its decoder blocks and their
prunable linears found by structure, and the inputs that each block is called with, captured from a
real forward pass rather than written by hand. It knows nothing of how a linear is pruned.

Prunable are, inside the blocks: `nn.Linear`, transformers' `Conv1D` (GPT-2, stored transposed), and each
expert of a parameter that holds those of a whole mixture (Llama 4, GPT-OSS, Granite MoE). Never prunable are
embeddings and head (told apart by identity), biases, norms, all that lies outside the blocks, and the routers
of mixtures of experts: linears inside a module named router, and neighbours of `experts` (or linears inside them)
that are named gate or something_gate (Mixtral's `gate`, Qwen's `gate` and `shared_expert_gate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from torch.overrides import TorchFunctionMode

from owl_deploy.checkpoint import Checkpoint, TensorEntry
from owl_deploy.errors import UnsupportedModelError
from owl_deploy.hidden_states import HiddenStates
from owl_deploy.memory import release_free_memory

if TYPE_CHECKING:
    from owl_deploy.methods.method import Role

__all__ = ["BlockInputs", "Prunable", "Skeleton", "attention_options", "open_configuration", "open_skeleton"]

_GATED_MLPS: tuple[dict[str, Role], ...] = (
    {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    {"w1": "gate", "w3": "up", "w2": "down"},  # Mixtral
    {"gate_up_proj": "gate_up", "down_proj": "down"},  # Phi-3, fused experts
    {"input_linear": "gate_up", "output_linear": "down"},  # Granite MoE, JetMoE
)
"""Names of neighbours that make a gated MLP where all of them are there and their shapes fit."""

_INTERLEAVED = ("GptOssExperts",)
"""Their gate_up has a row of gate, one of up, and so on: not what the role gate_up says, so they have none."""

_ROUTERS = ("router", "router_gate")

_PRODUCTS = ("bmm", "matmul", "__matmul__", "mm", "linear")
"""Functions of torch that fused experts call with (inputs, weight)."""


@dataclass(frozen=True, eq=False)
class Prunable:
    """One weight matrix of a block, (out, in) however the model stores it."""

    module: nn.Module
    """Its forward pre-hooks see the inputs, (..., in), as first positional argument. For an expert of a fused
    parameter it stands in: it is called with the rows routed to that expert, and not at all where there are none."""
    owner: nn.Module
    """Holds the parameter."""
    parameter: str
    """Full name in the model; experts of one fused parameter share it."""
    expert: int | None = None
    """First index into a fused parameter."""
    is_transposed: bool = False
    """Whether the model stores (in, out)."""
    is_expert: bool = False
    """Whether it sees only the tokens routed to it; shared experts see all."""
    role: Role = "other"
    mlp: str | None = None
    """The same for the parts of one gated MLP or expert; None for others."""

    @property
    def weight(self) -> torch.Tensor:
        """A view (out, in) of the parameter as it is now; on the meta device while the block is empty."""
        stored: torch.Tensor = getattr(self.owner, self.parameter.rpartition(".")[2])
        if self.expert is not None:
            stored = stored[self.expert]
        return stored.T if self.is_transposed else stored

    @property
    def in_features(self) -> int:
        """Number of columns."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Number of rows."""
        return self.weight.shape[0]

    @torch.no_grad()
    def set_(self, weight: torch.Tensor) -> None:
        """Write (out, in) values into the parameter, in place and in its type.

        Raises:
            ValueError: the shape is another, or the block is empty.
        """
        mine = self.weight
        if weight.shape != mine.shape or mine.is_meta:
            state = "an empty block" if mine.is_meta else "a filled block"
            raise ValueError(f"{self.parameter} takes {tuple(mine.shape)} in {state}, got {tuple(weight.shape)}")
        mine.copy_(weight)


@dataclass(frozen=True)
class BlockInputs:
    """What the blocks are called with for calibration sequences of one length."""

    hidden_states: HiddenStates
    """Entering block 0, one (1, seq_len, hidden) float32 per sequence."""
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """Per block: positional arguments after the hidden states, and keyword arguments."""
    dtype: torch.dtype = torch.float32
    """Of matrix products when a block is run on them; weights, residuals and norms are float32 all the same."""


@dataclass(frozen=True)
class Skeleton:
    """The model on the meta device, and where its parts are."""

    checkpoint: Checkpoint
    model: Any
    prefix: str
    """Name of the list of decoder blocks inside the model, such as `model.layers`."""
    blocks: nn.ModuleList
    expert_inputs: dict[str, list[nn.Module]]
    """Fused parameter -> per expert, the module that is called with the rows routed to it."""
    device: torch.device
    """Where blocks are filled and run."""
    _linears: dict[int, dict[str, Prunable]] = field(default_factory=dict)
    """What `linears` found: walking a block with many experts takes a while."""

    def linears(self, index: int) -> dict[str, Prunable]:
        """Return the prunable linears of a block by their full name without `.weight`.

        An expert of a fused parameter is named by its number: `model.layers.0.mlp.experts.down_proj.3`.
        Embeddings and the head are told apart by identity of the parameter, so that a tied or
        oddly named one is never pruned. The module's docstring says what else is left out.

        Raises:
            UnsupportedModelError: a mixture of experts stores them in a way that is not known here.
        """
        if index not in self._linears:
            self._linears[index] = self._find_linears(index)
        return self._linears[index]

    def _find_linears(self, index: int) -> dict[str, Prunable]:
        modules = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        excluded = {id(module.weight) for module in modules if module is not None}
        block = self.blocks[index]
        prefix = f"{self.prefix}.{index}."
        found: dict[str, Prunable] = {}
        for path, module in block.named_modules():
            name = f"{prefix}{path}"
            if _is_linear(module):
                if id(module.weight) not in excluded and not _is_router(block, path):
                    found[name] = Prunable(
                        module,
                        module,
                        f"{name}.weight",
                        is_transposed=not isinstance(module, nn.Linear),
                        is_expert="experts" in path.split("."),
                    )
                continue
            for attribute, is_transposed in _fused_experts(module).items():
                parameter = f"{name}.{attribute}"
                for expert, inputs in enumerate(self.expert_inputs[parameter]):
                    found[f"{parameter.removesuffix('.weight')}.{expert}"] = Prunable(
                        inputs, module, parameter, expert, is_transposed, is_expert=True
                    )
            self._refuse_unknown_experts(name, module)
        return _with_roles(found)

    def _refuse_unknown_experts(self, name: str, module: nn.Module) -> None:
        known = _fused_experts(module)
        for attribute, parameter in module.named_parameters(recurse=False):
            is_matrix = parameter.dim() >= 2 and not attribute.endswith("bias")
            if is_matrix and attribute not in known and "expert" in type(module).__name__.lower():
                raise UnsupportedModelError(
                    f"{name}.{attribute} holds experts in a way that is not known here "
                    f"({type(module).__name__}, {tuple(parameter.shape)}): this architecture cannot be pruned"
                )

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
        name = self._find_tensor(parameter)
        if name is None:
            raise UnsupportedModelError(
                f"{self.checkpoint.path} has no tensor for {parameter}: the checkpoint is not complete"
            )
        return name

    def _find_tensor(self, parameter: str) -> str | None:
        base = f"{self.model.base_model_prefix}."
        names = (parameter, parameter.removeprefix(base), base + parameter)
        return next((name for name in names if name in self.checkpoint.tensors), None)

    @contextmanager
    def filled(self, index: int) -> Iterator[nn.Module]:
        """Yield a block with its weights in float32, read from the checkpoint; empty it afterwards."""
        block = self.blocks[index]
        names = self.block_tensors(index)
        prefix = f"{self.prefix}.{index}."
        try:
            for parameter, tensor in names.items():
                self.fill_(block, parameter.removeprefix(prefix), self.checkpoint.read(tensor))
            self._fill_buffers_(block, prefix)
            yield block
        finally:
            for parameter in names:
                set_module_tensor_to_device(block, parameter.removeprefix(prefix), "meta")
            release_free_memory()

    def fill_(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        """Put a value into a parameter of `module`, as float32."""
        set_module_tensor_to_device(module, name, self.device, value=value.float(), dtype=torch.float32)

    def _fill_buffers_(self, module: nn.Module, prefix: str) -> None:
        """Read the buffers that a checkpoint has, such as the correction of a router; others are as computed."""
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name, value in module.state_dict().items():
            tensor = self._find_tensor(prefix + name)
            if name not in parameters and tensor is not None:
                set_module_tensor_to_device(
                    module, name, self.device, value=self.checkpoint.read(tensor).to(value.dtype), dtype=value.dtype
                )

    @torch.inference_mode()
    def capture(
        self, tokens: torch.Tensor, *, folder: Path | None = None, dtype: torch.dtype = torch.float32
    ) -> BlockInputs:
        """Run everything before block 0, and learn what each block is called with.

        The embeddings are read for that, and emptied again.

        Args:
            tokens: (n_samples, seq_len) int64.
            folder: for the hidden states, where they are to be on disk.
            dtype: of `BlockInputs`.
        """
        outside = self._fill_embeddings()
        stubs = [_Recorder(block) for block in self.blocks]
        stubs[-1].is_last = True
        parent, _, name = self.prefix.rpartition(".")
        owner = self.model.get_submodule(parent)
        hidden_states = HiddenStates(folder)
        setattr(owner, name, nn.ModuleList(stubs))
        try:
            for row in tokens:
                try:
                    self.model(input_ids=row[None].to(self.device), use_cache=False)
                except _AllSeenError:
                    hidden_states.append(stubs[0].hidden_state)
        finally:
            setattr(owner, name, self.blocks)
            self._empty_(outside)
        if len(hidden_states) != len(tokens):
            raise UnsupportedModelError(
                f"{self.checkpoint.path}: the model does not run its {len(self.blocks)} blocks in turn"
            )
        return BlockInputs(hidden_states, [(stub.args, stub.kwargs) for stub in stubs], dtype)

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Yield what makes logits, (1, seq_len, vocab), of tokens (1, seq_len) and the hidden states after the blocks.

        All that lies outside the blocks is read for that, and emptied again. The model's own code runs, with the
        blocks stood in for, so that norms, scales and caps of the family are those it has.
        """
        outside = self._fill_embeddings(with_head=True)
        stubs = [_Recorder(block) for block in self.blocks]
        parent, _, name = self.prefix.rpartition(".")
        owner = self.model.get_submodule(parent)
        setattr(owner, name, nn.ModuleList(stubs))

        def logits(tokens: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
            stubs[-1].output = hidden_states.to(self.device)
            found: torch.Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
            return found

        try:
            with torch.inference_mode():
                yield logits
        finally:
            setattr(owner, name, self.blocks)
            self._empty_(outside)

    def _empty_(self, parameters: list[str]) -> None:
        for parameter in parameters:
            set_module_tensor_to_device(self.model, parameter, "meta")
        self.model.tie_weights()
        release_free_memory()

    def _fill_embeddings(self, *, with_head: bool = False) -> list[str]:
        """Read all that lies outside the blocks, an untied head if asked to; return the parameters that were filled."""
        head = self.model.get_output_embeddings()
        head_id = id(head.weight) if head is not None else None
        embedding_id = id(self.model.get_input_embeddings().weight)
        filled = []
        for name, parameter in list(self.model.named_parameters()):
            in_blocks = name.startswith(f"{self.prefix}.")
            is_head = id(parameter) == head_id and head_id != embedding_id and not with_head
            if not in_blocks and not is_head and parameter.is_meta:
                self.fill_(self.model, name, self.checkpoint.read(self.tensor_name(name)))
                filled.append(name)
        self.model.tie_weights()  # filling replaces the embedding; a tied head must follow, or it would count twice
        self._fill_buffers_(self.model, "")
        return filled


class _AllSeenError(Exception):
    """The last block was reached: what follows is of no interest."""


class _EitherOutput(torch.Tensor):
    """Hidden states for a model whose blocks return them, and for one that takes item 0 of what they return.

    Which of the two a model expects shows only in its code; item 0 of a plain tensor would lose the batch dimension.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)


class _Recorder(nn.Module):
    """Stands in for a block: remembers how it was called, and passes the hidden states on, or others.

    What the model asks of a block besides, such as Gemma's `attention_type` or Jamba's class, the real one answers.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.real = (block,)  # in a tuple: no child
        self.hidden_state = torch.empty(0)
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.is_last = False
        self.output: torch.Tensor | None = None
        """Returned in place of the hidden state."""

    def forward(self, hidden_state: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.hidden_state, self.args, self.kwargs = hidden_state, args, kwargs
        if self.is_last:
            raise _AllSeenError
        return (hidden_state if self.output is None else self.output).as_subclass(_EitherOutput)

    @property  # type: ignore[misc]  # isinstance asks this
    def __class__(self) -> type:
        return type(self.real[0])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.real[0], name)


class _ExpertInputs(nn.Module):
    """Is called with the inputs of one expert of a fused parameter, for whoever hooks it."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs


class _Products(TorchFunctionMode):
    """Watches the matrix products with fused parameters, and passes their inputs on, expert by expert.

    So the inputs are those of the model's own code, routing and activation included.
    """

    def __init__(self, owner: nn.Module, inputs: dict[str, list[nn.Module]]) -> None:
        super().__init__()
        self.owner, self.inputs = owner, inputs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _PRODUCTS and len(args) > 1 and isinstance(args[1], torch.Tensor):
            for attribute, modules in self.inputs.items():
                whole = getattr(self.owner, attribute)
                if args[1].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                    _pass_on(args[0], args[1], whole, modules)
        return func(*args, **(kwargs or {}))


def _pass_on(inputs: torch.Tensor, weight: torch.Tensor, whole: torch.Tensor, modules: list[nn.Module]) -> None:
    """Call the modules of the experts that a product is for with the rows routed to them."""
    if weight.dim() == 3:  # all experts at once: (experts, tokens, in), zeros where a token is not routed to an expert
        for rows, module in zip(inputs, modules, strict=True):
            routed = rows[rows.any(dim=1)]
            if len(routed):
                module(routed)
    elif inputs.numel():
        expert = (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
        modules[expert](inputs.reshape(-1, inputs.shape[-1]))


def _watch_experts(prefix: str, blocks: nn.ModuleList) -> dict[str, list[nn.Module]]:
    """Let every fused parameter pass on the inputs of its experts; return by parameter who is called with them."""
    found: dict[str, list[nn.Module]] = {}
    for path, owner in blocks.named_modules():
        inputs: dict[str, list[nn.Module]] = {
            attribute: [_ExpertInputs() for _ in getattr(owner, attribute)] for attribute in _fused_experts(owner)
        }
        if inputs:
            owner.forward = _watched(owner, inputs)
            found |= {f"{prefix}.{path}.{attribute}": modules for attribute, modules in inputs.items()}
    return found


def _watched(owner: nn.Module, inputs: dict[str, list[nn.Module]]) -> Callable[..., Any]:
    run = owner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Products(owner, inputs):
            return run(*args, **kwargs)

    return forward


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _is_router(block: nn.Module, path: str) -> bool:
    """Say whether a linear of a block chooses among experts, or weighs one; see the module's docstring."""
    names = path.split(".")
    if any(name in _ROUTERS for name in names):
        return True
    for depth, name in enumerate(names):
        parent = block.get_submodule(".".join(names[:depth]))
        if isinstance(getattr(parent, "experts", None), nn.Module) and (name == "gate" or name.endswith("_gate")):
            return True
    return False


def _fused_experts(module: nn.Module) -> dict[str, bool]:
    """Return the parameters of a module that hold a matrix per expert -> whether as (experts, in, out)."""
    parameters = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    if {"gate_up_proj", "down_proj"} <= parameters.keys():
        n, first, second = parameters["gate_up_proj"].shape
        for is_transposed, out, size in ((True, second, first), (False, first, second)):
            down = (n, out // 2, size) if is_transposed else (n, size, out // 2)
            if out % 2 == 0 and parameters["down_proj"].shape == down:
                return {"gate_up_proj": is_transposed, "down_proj": is_transposed}
    sizes = [getattr(module, name, None) for name in ("num_experts", "output_size", "input_size")]
    if "weight" in parameters and list(parameters["weight"].shape) == sizes:
        return {"weight": False}
    return {}


def _with_roles(found: dict[str, Prunable]) -> dict[str, Prunable]:
    """Add role and MLP to the linears of a block that are parts of a gated MLP."""
    neighbours: dict[tuple[str, int | None], dict[str, str]] = {}
    for name, linear in found.items():
        parent, _, own = linear.parameter.removesuffix(".weight").rpartition(".")
        neighbours.setdefault((parent, linear.expert), {})[own] = name
    for (parent, expert), names in neighbours.items():
        for roles in _GATED_MLPS:
            parts = {role: found[names[own]] for own, role in roles.items() if own in names}
            if len(parts) == len(roles) and _is_gated(parts):
                mlp = parent if expert is None else f"{parent}.{expert}"
                found |= {names[own]: replace(found[names[own]], role=role, mlp=mlp) for own, role in roles.items()}
    return found


def _is_gated(parts: dict[Role, Prunable]) -> bool:
    neurons = parts["down"].in_features
    if type(parts["down"].owner).__name__ in _INTERLEAVED:
        return False
    if "gate_up" in parts:
        return parts["gate_up"].out_features == 2 * neurons
    return parts["gate"].out_features == parts["up"].out_features == neurons


def open_skeleton(checkpoint: Checkpoint, device: torch.device | None = None) -> Skeleton:
    """Build the model of a checkpoint's configuration on the meta device and find its blocks.

    Args:
        checkpoint: where the weights are.
        device: where blocks are filled and run; None is the CPU.

    Raises:
        UnsupportedModelError: transformers does not know the architecture, it has no decoder blocks, or
            a tensor is missing or of another shape.
    """
    model, _ = _empty_model(checkpoint.path)
    prefix, blocks = _decoder_blocks(model, checkpoint)
    device = torch.device("cpu") if device is None else device
    for name, buffer in model.named_buffers() if device.type != "cpu" else ():
        set_module_tensor_to_device(model, name, device, value=buffer)
    skeleton = Skeleton(checkpoint, model, prefix, blocks, _watch_experts(prefix, blocks), device)
    for name, parameter in model.named_parameters():
        tensor = skeleton.tensor_name(name)
        found, expected = checkpoint.tensors[tensor].shape, tuple(parameter.shape)
        if found != expected:
            raise UnsupportedModelError(
                f"tensor {tensor} does not fit its config.json: its shape is {found}, expected {expected}"
            )
    return skeleton


def open_configuration(folder: Path) -> Checkpoint:
    """Open a folder that has a config.json and no weights: what a checkpoint of that model would look like.

    Tensors are those of the model that transformers builds, in the type that config.json names (float32 where it
    names none). Reading one fails.

    Raises:
        UnsupportedModelError: transformers does not know the architecture.
    """
    model, dtype = _empty_model(folder)
    kind = {torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}.get(dtype, "F32")
    file = folder / "config.json"
    tensors = {name: TensorEntry(file, tuple(p.shape), kind) for name, p in model.named_parameters()}
    return Checkpoint(folder, str(folder), tensors)


def attention_options(config: Any) -> dict[str, str]:
    """Return what to build a model with so that its attention is all that its configuration says.

    Where torch's fused attention is taken (sdpa, the default of transformers 4.57), caps on scores are passed over
    without a word: Gemma 2 then gives other logits.
    """
    return {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}


def _empty_model(folder: Path) -> tuple[Any, Any]:
    """Build the model of a config.json on the meta device; return it with the type that the file names, if any."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        dtype = config.dtype  # building changes it
        # Buffers stay real: rotary frequencies are computed here and are in no checkpoint.
        with init_empty_weights(include_buffers=False):
            model = (
                AutoModelForCausalLM.from_config(
                    config, trust_remote_code=False, dtype=torch.float32, **attention_options(config)
                )
                .eval()
                .requires_grad_(False)
            )
    except Exception as error:  # whatever an impossible config.json makes transformers or torch raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(
            f"{folder} is not a causal language model that transformers knows: {reason}"
        ) from error
    model.tie_weights()
    return model, dtype


def _decoder_blocks(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, nn.ModuleList]:
    """Return the list of modules that holds most of the model's weights of linears and experts.

    Its items may be of several classes, as where attention and state space blocks alternate (Jamba).
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        count = sum(_n_linear_weights(item) for item in module.modules())
        # Strictly more: of nested lists (experts inside blocks) the outer one comes first and holds all.
        if count > (best[0] if best else 0):
            best = (count, name, module)
    if best is None:
        kind = checkpoint.config.get("model_type", "?")
        raise UnsupportedModelError(f"{checkpoint.path}: found no decoder blocks with linears in architecture {kind!r}")
    return best[1], best[2]


def _n_linear_weights(module: nn.Module) -> int:
    names = ("weight",) if _is_linear(module) else tuple(_fused_experts(module))
    return sum(getattr(module, name).numel() for name in names)
