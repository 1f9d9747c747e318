"""Recipes: everything a run depends on, as plain frozen values.

In: a YAML file, or keyword arguments from the command line. Out: a `Recipe`. Unknown keys and
impossible values raise `RecipeError` naming key, value and what is allowed. Defaults are written
here once; the command line shows them and overrides them.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from owl_deploy.condition import parse_condition
from owl_deploy.errors import RecipeError, shown
from owl_deploy.pattern import parse_pattern

__all__ = [
    "ArtifactSettings",
    "BenchSettings",
    "DepthSettings",
    "EvalSettings",
    "ExportSettings",
    "PeerSettings",
    "Precision",
    "PruneSettings",
    "Recipe",
    "RecoverSettings",
    "Settings",
    "SettingsT",
    "StructureSettings",
    "SweepSettings",
    "checked",
    "expanded_grid",
    "load_recipe",
    "recipe_from_mapping",
]

_LARGEST = 2**31 - 1
"""Of every count in a recipe: what no machine can do is refused as a number, before it is multiplied by others."""

Precision = Literal["fp32", "fp16", "int8", "int4"]
Threads = Literal["auto"] | Annotated[int, Field(ge=1, le=1024)]


def _is_finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _is_sparsity(value: float) -> float:
    if not 0 <= value < 1:  # also refuses NaN
        raise ValueError("must be in [0, 1)")
    return value


_ALLOCATIONS = ("uniform", "owl", "dlp", "alphapruning", "isc", "ramp", "evopress")


def _is_allocation(value: str) -> str:
    if value not in _ALLOCATIONS and not (value.startswith("file:") and len(value) > len("file:")):
        raise ValueError(f"must be file:PATH or one of {', '.join(_ALLOCATIONS)}{_nearest(value, list(_ALLOCATIONS))}")
    return value


def _is_pattern(value: str) -> str:
    parse_pattern(value)
    return value


def _is_condition(value: str) -> str:
    parse_condition(value)
    return value


Sparsity = Annotated[float, AfterValidator(_is_sparsity)]


def _seconds(value: Any) -> Any:
    """Turn 90s, 30m or 2h into seconds; numbers are seconds already."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh])", value.strip()) if isinstance(value, str) else None
    return value if match is None else float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0), AfterValidator(_is_finite)]
"""Seconds; in recipes and flags a number with s, m or h behind it will do."""


class Settings(BaseModel):
    """Frozen, and an unknown key is an error. The text under each field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PruneSettings(Settings):
    """What the `prune` stage does to the model."""

    method: Literal["magnitude", "wanda", "ria", "dass", "sparsegpt", "isc", "alps", "foundation"] = "wanda"
    """What goes and what becomes of the rest. Scores only: magnitude, wanda, ria, dass (gated MLPs; attention by
    wanda). With an update of the kept weights: sparsegpt, isc, alps, foundation."""
    refine: Literal["none", "dsnot"] = "none"
    """What improves the mask afterwards: nothing, or dsnot (swaps that lower the expected output error of each row;
    kept weights have their dense values then, whatever the method made of them)."""
    allocation: Annotated[str, AfterValidator(_is_allocation)] = "owl"
    """How the target is shared among decoder blocks: uniform, owl (outliers), dlp (median scores), alphapruning
    (spectra, no data), isc (ranked sensitivities), ramp (arithmetic, by depth), evopress (searched, a sparsity for
    every linear; the whole model is in memory for that) or file:PATH."""
    allocation_per: Literal["block", "linear"] = "block"
    """Whether all linears of a block get one sparsity, or each its own (owl, dlp, alphapruning, isc)."""
    sparsity: Sparsity = 0.7
    """Target: zeros over elements of all pruned linears together, 0 <= sparsity < 1."""
    pattern: Annotated[str, AfterValidator(_is_pattern)] = "unstructured"
    """Which positions may be zero: unstructured, or "keep N of M" successive inputs, which sets the sparsity."""
    owl_m: Annotated[float, Field(gt=0), AfterValidator(_is_finite)] = 5.0
    """owl: a score is an outlier above owl_m times the mean score of its block."""
    owl_lambda: Annotated[float, Field(ge=0, lt=0.5), AfterValidator(_is_finite)] = 0.08
    """owl: half the spread of the block sparsities around the target."""
    owl_pattern_spread: Annotated[float, Field(ge=0, le=8), AfterValidator(_is_finite)] = 2.0
    """owl with a pattern "keep N of 8": difference of kept weights between the extreme blocks, before rounding."""
    dlp_alpha: Annotated[float, Field(ge=0, lt=0.5), AfterValidator(_is_finite)] = 0.15
    """dlp: half the spread of the block sparsities around the target."""
    alpha_epsilon: Annotated[float, Field(ge=0, lt=1), AfterValidator(_is_finite)] = 0.3
    """alphapruning: sparsities are in the proportion (1 - epsilon) to (1 + epsilon)."""
    alpha_estimator: Literal["peak", "mid"] = "peak"
    """alphapruning: where the tail of a spectrum starts; peak (by Kolmogorov-Smirnov distance) or mid (its upper
    half, steadier on small matrices)."""
    alpha_aspect_ratio: Annotated[float, Field(gt=0), AfterValidator(_is_finite)] | None = None
    """alphapruning: take spectra of windows of this aspect ratio, so that shapes do not matter (FARMS uses 1)."""
    isc_half_width: Annotated[float, Field(ge=0, lt=0.5), AfterValidator(_is_finite)] = 0.1
    """isc allocation: largest deviation from the target."""
    isc_sensitivity: Literal["layerwise", "hutchinson"] = "layerwise"
    """isc allocation: trace of the Hessian of each linear's own output error (cheap), or of the loss of the whole
    model, which is in memory for that."""
    isc_probes: Annotated[int, Field(ge=1, le=1000)] = 4
    """isc allocation, hutchinson: random probes per trace."""
    ramp_slope: Annotated[float, Field(ge=0, lt=0.5), AfterValidator(_is_finite)] | None = None
    """ramp: by how much each block is sparser than the one before; tuned on calibration text when not given."""
    evopress_start: Literal["uniform", "owl"] = "uniform"
    """evopress: the allocation that the search starts from; the result is never worse on the searched tokens."""
    evopress_generations: Annotated[int, Field(ge=0, le=_LARGEST)] = 400
    """evopress: most generations; the search ends earlier when its time is up."""
    evopress_budget_seconds: Annotated[float, Field(gt=0), AfterValidator(_is_finite)] | None = 600.0
    """evopress: time of the search; None leaves it to the generations, so that a faster machine finds the same."""
    evopress_offspring: Annotated[int, Field(ge=1, le=_LARGEST)] = 8
    """evopress: candidates per generation."""
    evopress_tokens: Annotated[int, Field(ge=2, le=_LARGEST)] = 2048
    """evopress: calibration tokens on which the fittest of a generation is compared with its parent."""
    evopress_step: Annotated[float, Field(gt=0, le=1), AfterValidator(_is_finite)] = 0.2
    """evopress: weights that a linear gains or loses in one step, as a share of the mean linear's; linears too small
    for that stay as they are (a longer search can do with less)."""
    block_size: Annotated[int, Field(ge=1, le=_LARGEST)] = 128
    """sparsegpt, isc: columns after which their errors are passed on to the others."""
    dampening: Annotated[float, Field(gt=0, le=1), AfterValidator(_is_finite)] = 0.01
    """sparsegpt, isc, alps, foundation: share of the Hessian's mean diagonal that is added to it."""
    true_sequential: bool = False
    """Whether linears of a block see the pruned ones before them, not the dense block: one more pass per group."""
    forward_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products while calibration sequences run: bfloat16 takes half the time on AMD processors that have
    it, and longer on Intel ones without AMX. Weights, residuals and statistics are float32 all the same."""
    min_expert_tokens: Annotated[int, Field(ge=0, le=_LARGEST)] = 64
    """Experts that see fewer calibration tokens are pruned by magnitude, on record."""
    calibration: str = "generated"
    """Calibration text: generated, python-docs, wikitext2, c4, text:PATH, jsonl:PATH[:field] or hf:NAME."""
    n_samples: Annotated[int, Field(ge=1, le=_LARGEST)] = 128
    """Calibration sequences."""
    seq_len: Annotated[int, Field(ge=2, le=_LARGEST)] = 2048
    """Tokens per calibration sequence; never taken from the model's longest context."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin-of-sequence token: auto (as the model's own tokenizer, per document), always (every sequence), never."""

    @model_validator(mode="before")
    @classmethod
    def _pattern_decides(cls, values: Any) -> Any:
        """A pattern has one sparsity, the same everywhere: fill in what was not given."""
        if not isinstance(values, dict) or not isinstance(values.get("pattern"), str):
            return values
        try:
            pattern = parse_pattern(values["pattern"])
        except ValueError:
            return values  # said of the key itself
        if pattern is None:
            return values
        return {"sparsity": pattern.sparsity, "allocation": "uniform", **values}

    @model_validator(mode="after")
    def _settings_fit(self) -> PruneSettings:
        if self.method == "dass" and self.true_sequential:
            raise ValueError(
                "dass scores gate and up by the inputs of down, which come later: not with true_sequential"
            )
        if self.allocation_per == "linear" and self.allocation == "evopress":
            raise ValueError("allocation evopress is by linear always: leave allocation_per out")
        if self.allocation_per == "linear" and self.allocation not in ("owl", "dlp", "alphapruning", "isc"):
            raise ValueError(f"allocation {self.allocation} knows no linears: use allocation_per block")
        pattern = parse_pattern(self.pattern)
        if pattern is None:
            return self
        if abs(self.sparsity - pattern.sparsity) > 1e-9:
            raise ValueError(f"pattern {pattern} has sparsity {pattern.sparsity:g}, got sparsity {self.sparsity:g}")
        if self.allocation == "owl" and pattern.of == 8:
            if self.allocation_per == "linear":
                raise ValueError("owl shares out patterns among blocks: use allocation_per block")
        elif self.allocation != "uniform":
            raise ValueError(
                f"pattern {pattern} leaves nothing to share out: use allocation uniform, or owl with groups of 8"
            )
        if self.method == "dass":
            raise ValueError("dass compares whole columns of gate and up, which no pattern along the inputs can follow")
        return self


class DepthSettings(Settings):
    """Which decoder blocks the `depth` stage removes."""

    n_blocks: Annotated[int, Field(ge=1, le=_LARGEST)]
    """Decoder blocks to remove."""
    method: Literal["shortgpt", "shortened", "tail"] = "shortgpt"
    """Which go: shortgpt (those that turn the hidden states least), shortened (those without which the loss rises
    least, by criterion) or tail (the last ones, no data)."""
    criterion: Literal["perplexity", "taylor"] = "perplexity"
    """shortened: perplexity of the model without the block, or taylor (weights times gradients; holds the whole model
    and its gradients in memory)."""
    protect_first: Annotated[int, Field(ge=0, le=_LARGEST)] = 4
    """shortened: so many of the first blocks stay."""
    protect_last: Annotated[int, Field(ge=0, le=_LARGEST)] = 2
    """shortened: so many of the last blocks stay."""
    calibration: str = "generated"
    """Calibration text: generated, python-docs, wikitext2, c4, text:PATH, jsonl:PATH[:field] or hf:NAME."""
    n_samples: Annotated[int, Field(ge=1, le=_LARGEST)] = 32
    """Calibration sequences."""
    seq_len: Annotated[int, Field(ge=2, le=_LARGEST)] = 512
    """Tokens per calibration sequence."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin-of-sequence token: auto (as the model's own tokenizer, per document), always (every sequence), never."""

    @model_validator(mode="after")
    def _settings_fit(self) -> DepthSettings:
        for name in ("criterion", "protect_first", "protect_last"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.method != "shortened" and value != default:
                raise ValueError(f"{name} {value} needs method shortened, got method {self.method}")
        return self


class StructureSettings(Settings):
    """Which attention heads and MLP channels the `structure` stage removes; the same number in every block."""

    heads_kept: Annotated[float, Field(gt=0, le=1), AfterValidator(_is_finite)] = 1.0
    """Share of attention heads that stays, in whole groups: a key/value head with all query heads that share it;
    at least one group."""
    channels_kept: Annotated[float, Field(gt=0, le=1), AfterValidator(_is_finite)] = 0.8
    """Share of MLP channels (rows of gate and up, columns of down) that stays."""
    channel_multiple: Annotated[int, Field(ge=1, le=_LARGEST)] = 16
    """The number of channels kept is rounded to the nearest multiple of this."""
    n_steps: Annotated[int, Field(ge=0, le=_LARGEST)] = 200
    """Steps of the search; 0 keeps what the metric alone keeps."""
    budget_seconds: Annotated[float, Field(gt=0), AfterValidator(_is_finite)] | None = None
    """The search ends after this time (plus at most one step), however many steps were done."""
    n_masks: Annotated[int, Field(ge=2, le=_LARGEST)] = 2
    """Masks drawn in every step; each costs a forward pass over the batch."""
    batch_size: Annotated[int, Field(ge=1, le=_LARGEST)] = 8
    """Calibration sequences in every step."""
    learning_rate: Annotated[float, Field(gt=0), AfterValidator(_is_finite)] = 0.1
    """How far a step moves the logits of removal, for a mask of ordinary advantage."""
    sharpness: Annotated[float, Field(gt=0), AfterValidator(_is_finite)] = 4.0
    """How near the first masks drawn are to what the metric keeps."""
    baseline_window: Annotated[int, Field(ge=1, le=_LARGEST)] = 5
    """Window of the moving averages that losses are compared with, in steps."""
    check_every: Annotated[int, Field(ge=1, le=_LARGEST)] = 20
    """Steps after which the most probable heads and channels are tried on the held-out sequences."""
    held_out: Annotated[float, Field(gt=0, lt=1), AfterValidator(_is_finite)] = 0.25
    """Share of the calibration sequences that only judge the result, at least one; with fewer than 4 there is no
    search."""
    calibration: str = "generated"
    """Calibration text: generated, python-docs, wikitext2, c4, text:PATH, jsonl:PATH[:field] or hf:NAME."""
    n_samples: Annotated[int, Field(ge=2, le=_LARGEST)] = 64
    """Calibration sequences, those held out included."""
    seq_len: Annotated[int, Field(ge=2, le=_LARGEST)] = 256
    """Tokens per calibration sequence."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin-of-sequence token: auto (as the model's own tokenizer, per document), always (every sequence), never."""


class RecoverSettings(Settings):
    """How the surviving weights of a sparse checkpoint are trained."""

    method: Literal["blockwise", "bias", "distill", "spp", "lora"] = "blockwise"
    """blockwise (block by block, to give again what the dense block gives; a few blocks in memory), bias (no training:
    biases that give the outputs of linears their mean back, where a family can have them) or, with both models in
    memory, to predict tokens again as the dense one does: distill (all surviving weights), spp (adapters that keep
    zeros) or lora (adapters that fill them; pruned again after merging, at a loss that is measured)."""
    rank: Annotated[int, Field(ge=1, le=_LARGEST)] = 16
    """spp, lora: rank of the adapters."""
    targets: Literal["dense", "prefix"] = "dense"
    """blockwise, bias: what a block is to give on the inputs that the recovered blocks before it leave: the hidden
    states of the dense model, which makes up for those blocks too, or what the dense block makes of the same inputs."""
    epochs: Annotated[int, Field(ge=1, le=_LARGEST)] = 8
    """Passes over the training sequences."""
    batch_size: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    """Training sequences per step; their gradients are added up one by one. When not given, 1 for blockwise and 4 for
    the others."""
    learning_rate: Annotated[float, Field(gt=0), AfterValidator(_is_finite)] | None = None
    """Of AdamW, at its highest: it rises during the first tenth of the work and falls to zero in the rest. When not
    given, 1e-3 for spp and lora; for blockwise and distill each parameter has its own, a share (0.02 and 0.005) of the
    root mean square of what pruning left of it, because weights of one model are ten times as large as another's."""
    budget: Duration | None = None
    """Time such as 90s, 30m or 2h after which training ends with the best values so far (blockwise shares it among the
    blocks); a run of fewer epochs ends earlier."""
    forward_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products: auto is bfloat16 where that is the faster one. Weights, gradients and the state of
    the optimiser are float32 all the same."""
    temperature: Annotated[float, Field(gt=0), AfterValidator(_is_finite)] = 1.0
    """All but blockwise: of both distributions."""
    cross_entropy: Annotated[float, Field(ge=0, le=1), AfterValidator(_is_finite)] = 0.0
    """All but blockwise: share of the text's own cross-entropy in the loss, beside the KL divergence."""
    gradient_checkpointing: bool = False
    """All but blockwise: whether activations are computed again, not kept: less memory, a third more time."""
    n_checks: Annotated[int, Field(ge=1, le=_LARGEST)] = 16
    """All but blockwise: how often the held-out sequences judge, and a stopped run can go on from there."""
    held_out: Annotated[float, Field(gt=0, lt=1), AfterValidator(_is_finite)] = 0.1
    """Share of the sequences that only judge, at least one."""
    calibration: str = "generated"
    """Text to train on: generated (by the dense model), python-docs, wikitext2, c4, text:PATH, jsonl:PATH[:field] or
    hf:NAME."""
    n_samples: Annotated[int, Field(ge=2, le=_LARGEST)] = 64
    """Sequences, those held out included."""
    seq_len: Annotated[int, Field(ge=2, le=_LARGEST)] = 512
    """Tokens per sequence."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin-of-sequence token: auto (as the model's own tokenizer, per document), always (every sequence), never."""

    @property
    def rate(self) -> float:
        """The learning rate, by default that of the method; see `is_rate_relative`."""
        if self.learning_rate is not None:
            return self.learning_rate
        return {"blockwise": 0.02, "bias": 0.0, "distill": 0.005, "spp": 1e-3, "lora": 1e-3}[self.method]

    @property
    def is_rate_relative(self) -> bool:
        """Whether `rate` is a share of the root mean square of a parameter's surviving weights."""
        return self.learning_rate is None and self.method in ("blockwise", "distill")

    @property
    def rate_words(self) -> str:
        """The learning rate as people read it."""
        return f"{self.rate:g}" + (" of the root mean square of each parameter" if self.is_rate_relative else "")

    @property
    def sequences_per_step(self) -> int:
        """The batch size, by default that of the method."""
        if self.batch_size is not None:
            return self.batch_size
        return 1 if self.method == "blockwise" else 4

    @model_validator(mode="after")
    def _settings_fit(self) -> RecoverSettings:
        of_training = ("epochs", "batch_size", "learning_rate", "budget")
        of_models = ("temperature", "cross_entropy", "gradient_checkpointing", "n_checks", "rank")
        others = {
            "bias": (*of_training, *of_models),
            "blockwise": of_models,
            "distill": ("targets", "rank"),
            "spp": ("targets",),
            "lora": ("targets",),
        }
        for name in others[self.method]:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(f"{name} {value} is not for method {self.method}")
        return self


class EvalSettings(Settings):
    """How the quality of a model is measured."""

    text: str = "python-docs"
    """Text source of the evaluation tokens (same names as calibration; its held-out part)."""
    window: Annotated[int, Field(ge=2, le=_LARGEST)] = 2048
    """Tokens per window; windows do not overlap and the tail is dropped."""
    max_windows: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    """Windows to use, from the start of the text; all when not given."""


class ExportSettings(Settings):
    """One ONNX artifact: for which engine, with which weights."""

    target: Literal["onnxruntime", "deepsparse"] = "onnxruntime"
    """The engine whose dialect of ONNX is written."""
    weights: Literal["dense", "sparse-initializer", "sparse-operator"] = "dense"
    """How matrices are stored: dense, as ONNX sparse initializers where that is smaller, or packed for the operator
    SparseMatMul, which multiplies them without their zeros (onnxruntime only)."""
    precision: Precision = "fp32"
    """Number format of the stored values. With weights sparse-operator: fp32, fp16, int8 or int4 (which keeps queries,
    keys and values in int8). In onnxruntime besides, with weights dense: int8 and int4 by MatMulNBits in blocks of 32;
    with weights dense or sparse-initializer: fp16, for a smaller file that runs as fp32. In deepsparse: fp32, or int8
    with weights dense."""
    head_precision: Literal["auto", "fp32", "fp16", "int8", "int4"] = "auto"
    """The same for head and embedding: auto is the precision, int8 in int4 artifacts."""
    symmetric: bool = True
    """Whether dense int8 and int4 have a scale alone for each block of 32, and no zero point."""
    accuracy_level: Literal[1, 4] = 4
    """Arithmetic of dense int8 and int4: 4 rounds the inputs of a product to int8 in blocks of 32, as the fastest
    kernels do; 1 keeps them float32."""
    encoding: Literal["auto", "dense", "bitmask", "index16"] = "auto"
    """How sparse-operator packs each matrix; auto is what the cost model predicts to be fastest. A head that is also
    the embedding is always dense."""
    machine: Literal["auto", "x86-avx512-vbmi2", "x86-avx2", "arm-neon", "portable"] = "auto"
    """Machine class for which the cost model decides; auto is that of the machine that exports."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """How int8 and int4 values of weights sparse-operator are found: each weight rounded to nearest, or one column
    after the other on calibration text, the kept weights still to come making up for the error (GPTQ)."""
    calibration: str = "python-docs"
    """Text on which int8 in target deepsparse learns the ranges of inputs, and rounding gptq the inputs themselves:
    python-docs, generated, wikitext2, c4, text:PATH, jsonl:PATH[:field] or hf:NAME."""
    n_samples: Annotated[int, Field(ge=1, le=_LARGEST)] = 16
    """Its sequences."""
    seq_len: Annotated[int, Field(ge=2, le=_LARGEST)] = 256
    """Tokens in each."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin-of-sequence token in it: auto (as the model's own tokenizer), always, never."""
    max_positions: Annotated[int, Field(ge=16, le=_LARGEST)] = 4096
    """Longest context of the artifact in tokens (rows of its rotary tables), capped by the model's own."""

    @property
    def is_nbits(self) -> bool:
        """Whether products are ONNX Runtime's MatMulNBits."""
        return self.target == "onnxruntime" and self.weights == "dense" and self.precision in ("int8", "int4")

    @property
    def is_integer(self) -> bool:
        """Whether products are of 8-bit integers in DeepSparse's form."""
        return self.target == "deepsparse" and self.precision == "int8"

    @model_validator(mode="after")
    def _settings_fit(self) -> ExportSettings:
        if not self.is_integer and self.rounding == "nearest":
            needed = "rounding gptq, or target deepsparse of precision int8"
            self._refuse("calibration", "n_samples", "seq_len", "bos", needed=needed)
        if self.weights != "sparse-operator" or self.precision not in ("int8", "int4"):
            self._refuse("rounding", needed="weights sparse-operator of precision int8 or int4")
        if self.weights == "sparse-operator":
            if self.target != "onnxruntime":
                raise ValueError(f"weights sparse-operator runs in target onnxruntime only, got target {self.target}")
            if self.encoding == "index16" and self.precision == "int4":
                raise ValueError("encoding index16 holds no int4 values: choose bitmask, dense or auto")
            if self.head_precision == "int4":
                raise ValueError("head precision int4 needs weights dense: packed int4 rows cannot be gathered")
            self._refuse("symmetric", "accuracy_level", needed="weights dense of precision int8 or int4")
            return self
        self._refuse("encoding", "machine", needed="weights sparse-operator")
        if self.is_integer and self.weights != "dense":
            raise ValueError("precision int8 in target deepsparse needs weights dense: the engine drops zeros itself")
        if not self.is_nbits:
            if not self.is_integer and (self.precision != "fp16" or self.target != "onnxruntime"):
                self._refuse("precision", needed="weights sparse-operator, or dense in target onnxruntime")
            self._refuse("head_precision", needed="weights sparse-operator, or dense in int8 or int4")
            self._refuse("symmetric", "accuracy_level", needed="weights dense of precision int8 or int4")
        elif self.head_precision == "fp16":
            raise ValueError("head precision fp16 needs weights sparse-operator: choose fp32, int8 or int4")
        return self

    def _refuse(self, *names: str, needed: str) -> None:
        """Raise ValueError where one of these settings is not its default."""
        for name in names:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(f"{name} {value} needs {needed}, got weights {self.weights}")


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class ArtifactSettings(ExportSettings):
    """One artifact of a recipe."""

    name: Name
    """Name of the artifact's folder and of its rows in the report."""
    checkpoint: Literal["dense", "pruned", "recovered"] = "pruned"
    """Which model is exported: the one the recipe starts from, the pruned one, or what `recover` made of that."""


_PEER_PRECISIONS = {
    "llama.cpp": ("f32", "q8_0", "q4_0"),
    "openvino": ("fp32", "int8", "int4"),
    "torch": ("fp32", "bf16"),
    "torch-compiled": ("fp32", "bf16"),
}


def generation_lengths(text: str) -> tuple[int, int]:
    """Return the tokens of the prompt and the new ones of `128x64`; raises ValueError."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)
    if found is None or found[2] == "1":
        raise ValueError(f"must be PROMPTxNEW in tokens such as 128x64, at least two of them new; got {shown(text)}")
    return int(found[1]), int(found[2])


def _is_generation(text: str) -> str:
    generation_lengths(text)
    return text


class PeerSettings(Settings):
    """Another engine that is measured beside the artifacts; ENGINE:PRECISION or onnxruntime-genai:ARTIFACT will do."""

    engine: Literal["llama.cpp", "openvino", "torch", "torch-compiled", "onnxruntime-genai"]
    """llama.cpp, openvino, torch (eager) and torch-compiled run the dense model, onnxruntime-genai an artifact."""
    precision: str = ""
    """Of the weights, by the engine's own name: llama.cpp f32, q8_0 or q4_0, openvino fp32, int8 or int4, torch fp32 or
    bf16; the first one when not given."""
    artifact: str = ""
    """onnxruntime-genai: name of the artifact."""
    name: Name = ""
    """Of its rows in the report; made of the engine and the rest when not given."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Take the short form apart, and fill in what was not given."""
        if isinstance(values, str):
            engine, _, rest = values.partition(":")
            values = {"engine": engine, **({"artifact" if engine == "onnxruntime-genai" else "precision": rest})}
        if not isinstance(values, dict) or not isinstance(values.get("engine"), str):
            return values
        if (known := _PEER_PRECISIONS.get(values["engine"])) and not values.get("precision"):
            values = {**values, "precision": known[0]}
        if not values.get("name"):
            name = f"{values['engine']}-{values.get('artifact') or values.get('precision')}"
            values = {**values, "name": re.sub(r"[^A-Za-z0-9._-]", "_", name)[:64]}
        return values

    @model_validator(mode="after")
    def _settings_fit(self) -> PeerSettings:
        known = _PEER_PRECISIONS.get(self.engine)
        if known is None and (self.precision or not self.artifact):
            raise ValueError(f"{self.engine} runs an artifact as it is: give its name and no precision")
        if known is not None and self.artifact:
            raise ValueError(f"{self.engine} runs the dense model: leave artifact {shown(self.artifact)} out")
        if known is not None and self.precision not in known:
            raise ValueError(
                f"{self.engine} has no precision {shown(self.precision)}{_nearest(self.precision, list(known))}"
            )
        return self


class BenchSettings(Settings):
    """What is timed, and for how long."""

    past_len: tuple[Annotated[int, Field(ge=1, le=_LARGEST)], ...] = (256,)
    """Context depths, in tokens, at which single-token decode is timed."""
    prompt_len: tuple[Annotated[int, Field(ge=1, le=_LARGEST)], ...] = (256,)
    """Prompt lengths, in tokens, at which prefill is timed."""
    rounds: Annotated[int, Field(ge=2, le=_LARGEST)] = 8
    """Interleaved rounds: in each one every artifact is timed once, in turn."""
    decode_samples: Annotated[int, Field(ge=1, le=_LARGEST)] = 16
    """Timed decode steps per artifact and round."""
    prefill_samples: Annotated[int, Field(ge=1, le=_LARGEST)] = 2
    """Timed prefills per artifact and round."""
    generate: tuple[Annotated[str, AfterValidator(_is_generation)], ...] = ()
    """Greedy generation end to end, once per artifact and round, as PROMPTxNEW in tokens, such as 128x64: the times to
    the first token, between tokens and per token, one sequence at a time."""
    batch: tuple[Annotated[int, Field(ge=1, le=_LARGEST)], ...] = (1,)
    """Equal sequences that decode and prefill run at once."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after which a silent engine counts as hung."""
    fail_if: tuple[Annotated[str, AfterValidator(_is_condition)], ...] = ()
    """Condition on the rows such as speedup<1.5 or perplexity>30: where one holds, the report is written and the exit
    code is 3."""
    peer: tuple[PeerSettings, ...] = ()
    """Another engine that is measured in the same rounds: llama.cpp:f32, llama.cpp:q8_0, llama.cpp:q4_0,
    openvino:fp32 (int8, int4), torch:fp32, torch-compiled:fp32 (bf16) run the dense model, onnxruntime-genai:ARTIFACT
    an artifact."""


class RecipeBenchSettings(BenchSettings):
    """The bench stage of a recipe."""

    baseline: str
    """Name of the artifact that the others are compared with."""


_MAX_CELLS = 10_000
"""A slip in a grid should be a sentence, not weeks of work."""


def _as_list(value: Any) -> Any:
    """Let one value stand for a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def _has_known_keys(block: dict[str, Any]) -> dict[str, Any]:
    for key in block:
        if key not in PruneSettings.model_fields:
            raise ValueError(f"unknown key {shown(key)}{_nearest(str(key), list(PruneSettings.model_fields))}")
    return block


def _is_not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("must not be empty")
    return values


Choices = Annotated[tuple[Any, ...], BeforeValidator(_as_list), AfterValidator(_is_not_empty)]
GridBlock = Annotated[dict[str, Choices], AfterValidator(_has_known_keys)]


class TaskSettings(Settings):
    """Zero-shot or few-shot tasks of lm-evaluation-harness."""

    names: Annotated[tuple[str, ...], AfterValidator(_is_not_empty)]
    """Tasks, groups or tags of the harness, or tasks of `path`."""
    path: str | None = None
    """Folder of task files with local data."""
    limit: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    """Samples of each task, from its start; all when not given."""
    num_fewshot: Annotated[int, Field(ge=0, le=_LARGEST)] | None = None
    """Examples before each question; the task's own number when not given."""


class SweepSettings(Settings):
    """A grid of pruned checkpoints, each measured for quality."""

    grid: Annotated[tuple[GridBlock, ...], AfterValidator(_is_not_empty)]
    """Blocks of cells. A block is the product of its lists; its keys are those of `prune`, which it overrides."""
    evals: tuple[EvalSettings, ...] = ()
    """Texts on which every cell is measured; the recipe's `eval` when none is given."""
    keep_checkpoints: bool = False
    """Whether the checkpoint of a cell stays after it was measured; each is as large as the model."""


def expanded_grid(prune: PruneSettings, sweep: SweepSettings) -> list[PruneSettings]:
    """Return the settings of every cell, block after block, each one once.

    Args:
        prune: what all cells share.
        sweep: its grid; the last list of a block runs fastest.

    Raises:
        RecipeError: the settings of a cell are impossible, or there are more than 10 000.
    """
    n_cells = sum(math.prod(len(values) for values in block.values()) for block in sweep.grid)
    if n_cells > _MAX_CELLS:
        raise RecipeError(f"sweep.grid has {n_cells} cells, and at most {_MAX_CELLS} are made: shorten its lists")
    shared = prune.model_dump(mode="json", exclude_unset=True)
    cells: list[PruneSettings] = []
    seen: set[str] = set()
    for index, block in enumerate(sweep.grid):
        for values in itertools.product(*block.values()):
            chosen = dict(zip(block, values, strict=True))
            where = f"sweep.grid.{index} with {', '.join(f'{key} {shown(value)}' for key, value in chosen.items())}"
            cell = checked(PruneSettings, {**shared, **chosen}, where=where)
            if (key := cell.model_dump_json()) not in seen:
                seen.add(key)
                cells.append(cell)
    return cells


class Recipe(Settings):
    """All stages of one run."""

    model: str
    """A local Hugging Face folder, a .gguf file, a hub id, or demo:smollm2-135m."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random: calibration samples, generated text, bootstrap."""
    threads: Threads = "auto"
    """Threads of torch and of the engines; auto is what affinity and cgroup quota allow."""
    device: str = "auto"
    """Where blocks are pruned and trained: auto (all accelerators, else the CPU), cpu, or names such as cuda:0,cuda:1.
    Several share the calibration sequences, and the training of a whole model."""
    max_memory: Annotated[ByteSize, Field(gt=0)] | None = None
    """What pruning may take of memory, such as 6GiB; what cannot be done in it is refused before work starts."""
    prune: PruneSettings = PruneSettings()
    recover: RecoverSettings | None = None
    """Training of what pruning left, for artifacts of checkpoint recovered."""
    export: tuple[ArtifactSettings, ...] = ()
    eval: EvalSettings = EvalSettings()
    tasks: TaskSettings | None = None
    """Tasks that every benched artifact answers too: their accuracy stands beside perplexity."""
    bench: RecipeBenchSettings | None = None
    sweep: SweepSettings | None = None
    """What `owl-deploy sweep` makes; `run` does not read it."""

    @model_validator(mode="after")
    def _names_fit(self) -> Recipe:
        names = [artifact.name for artifact in self.export]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"export: two artifacts are named {twice[0]}")
        if self.tasks is not None and self.bench is None:
            raise ValueError("tasks: benched artifacts answer them, and the recipe has no bench stage")
        if self.bench is not None and self.bench.baseline not in names:
            raise ValueError(f"bench.baseline: {self.bench.baseline!r} is not among the artifacts {names}")
        for peer in self.bench.peer if self.bench is not None else ():
            if peer.artifact and peer.artifact not in names:
                raise ValueError(f"bench.peer: {peer.artifact!r} is not among the artifacts {names}")
            if peer.name in names:
                raise ValueError(f"bench.peer: a peer and an artifact are named {peer.name}")
        return self

    @model_validator(mode="after")
    def _recovery_fits(self) -> Recipe:
        if self.recover is None:
            wants = [artifact.name for artifact in self.export if artifact.checkpoint == "recovered"]
            if wants:
                raise ValueError(f"export: {wants[0]} is of checkpoint recovered, and the recipe has no recover stage")
            return self
        for evaluation in (self.eval, *(self.sweep.evals if self.sweep is not None else ())):
            if evaluation.text == self.recover.calibration:
                raise ValueError(
                    f"recover.calibration and eval.text are both {evaluation.text}: a model that was trained on a text "
                    "is not judged by it; name another for one of them"
                )
        return self

    @model_validator(mode="after")
    def _every_cell_is_possible(self) -> Recipe:
        if self.sweep is not None:
            if self.bench is not None and self.sweep.evals:
                raise ValueError(
                    "sweep.evals: cells that are benched are measured on the recipe's eval; leave evals out"
                )
            dense = [item.name for item in self.export if item.checkpoint == "dense"]
            if self.bench is not None and self.bench.baseline not in dense:
                raise ValueError(
                    f"bench.baseline: that of a sweep is one of the dense artifacts {dense}, which all cells share"
                )
            try:
                expanded_grid(self.prune, self.sweep)
            except RecipeError as error:
                raise ValueError(str(error)) from error
        return self


SettingsT = TypeVar("SettingsT", bound=Settings)


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe.

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown, or a value is impossible.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    try:
        mapping = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date like 2025-02-30 is a ValueError
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return recipe_from_mapping(mapping, where=str(path))


def recipe_from_mapping(mapping: Any, *, where: str = "recipe") -> Recipe:
    """Check a parsed recipe. `where` names it in messages. Raises RecipeError."""
    if not isinstance(mapping, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys, found {type(mapping).__name__}")
    return checked(Recipe, mapping, where=where)


def checked(kind: type[SettingsT], mapping: dict[str, Any], *, where: str) -> SettingsT:
    """Build settings from untrusted values; every problem becomes one sentence in one RecipeError."""
    try:
        return kind.model_validate(mapping)
    except ValidationError as error:
        problems = "; ".join(_sentence(kind, dict(problem)) for problem in error.errors())
        raise RecipeError(f"{where}: {problems}") from error


def _sentence(kind: type[BaseModel], problem: dict[str, Any]) -> str:
    """Say what is wrong with one key, what was found, and what is allowed."""
    # Union branches ("int", "literal[...]") appear in the location; keys and indices are what users wrote.
    location = [part for part in problem["loc"] if isinstance(part, int) or str(part).isidentifier()]
    key = ".".join(str(part) for part in location if part not in ("int", "function-after"))
    if problem["type"] == "extra_forbidden":
        *parents, word = problem["loc"]  # the unknown key as it was written, be it an identifier or not
        text = str(word) if word and str(word).isprintable() else shown(word)
        key = ".".join([*map(str, parents), text])
        return f"unknown key {key}{_nearest(str(word), _known_keys(kind, parents))}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not key:
        return message
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):  # several keys do not fit together
        return f"{key}: {message}"
    hint = ""
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        hint = _nearest(
            problem["input"], str(problem["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        )
    return f"{key}: {message[0].lower()}{message[1:]}, got {shown(problem['input'])}{hint}"


def _known_keys(kind: type[BaseModel], location: list[Any]) -> list[str]:
    """Return the keys that are valid at `location` inside settings of `kind`."""
    for part in location:
        if isinstance(part, int):
            continue
        annotation = kind.model_fields[part].annotation
        kind = next(candidate for candidate in _models_in(annotation))
    return list(kind.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the settings classes mentioned in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]


def _nearest(word: str, known: list[str]) -> str:
    """Return `; did you mean X?`, or what is allowed when nothing is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
