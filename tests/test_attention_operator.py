"""The operator library's GroupQueryAttention against ONNX Runtime's own, and its GatedLinearUnit against numpy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from owl_deploy.kernels import library_path

HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 6, 2, 32, 96

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Attention:
    """What a node says, and how many positions its rows have."""

    lengths: tuple[int, ...] = (1,)
    """Of each row, new tokens included."""
    n_tokens: int = 1
    window: int = -1
    softcap: float = 0.0
    n_rotated: int = HEAD_DIM
    """Values of a head that are turned; 0 for none."""
    has_norms: bool = False
    is_ours: bool = True

    def session(self) -> onnxruntime.InferenceSession:
        names = ["past_key", "past_value", "seqlens_k", "total_sequence_length"]
        tables = ["cos_cache", "sin_cache"] if self.n_rotated else []
        settings: dict[str, Any] = {
            "num_heads": HEADS,
            "kv_num_heads": KV_HEADS,
            "scale": 0.25,
            "softcap": self.softcap,
            "local_window_size": self.window,
        }
        if self.is_ours:
            norms = ["query_norm", "key_norm"] if self.has_norms else []
            inputs = ["qkv", *names, *(tables or ["", ""]), *norms]
            node = helper.make_node(
                "GroupQueryAttention", inputs, OUTPUTS, domain="owl_deploy", epsilon=1e-6, **settings
            )
        else:
            inputs = ["qkv", "", "", *names, *tables]
            node = helper.make_node(
                "GroupQueryAttention", inputs, OUTPUTS, domain="com.microsoft", do_rotary=int(bool(tables)), **settings
            )
        return session(node, {name: dims_of(name) for name in inputs if name}, OUTPUTS)

    def arrays(self, *, capacity: int) -> Arrays:
        """Inputs, with `capacity` positions of cache of which those behind a row's past are no numbers."""
        random = np.random.default_rng(0)
        n = len(self.lengths)

        def numbers(*shape: int) -> NDArray[np.float32]:
            return random.standard_normal(shape, np.float32)

        past = [numbers(n, KV_HEADS, capacity, HEAD_DIM) for _ in range(2)]
        for row, length in enumerate(self.lengths):
            for cache in past:
                cache[row, :, max(0, length - self.n_tokens) :] = np.nan
        angles = numbers(POSITIONS, self.n_rotated // 2)
        return {
            "qkv": numbers(n, self.n_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
            "past_key": past[0],
            "past_value": past[1],
            "seqlens_k": np.array(self.lengths, np.int32) - 1,
            "total_sequence_length": np.array(max(*self.lengths, self.n_tokens), np.int32),
            "cos_cache": np.cos(angles),
            "sin_cache": np.sin(angles),
            "query_norm": numbers(HEAD_DIM),
            "key_norm": numbers(HEAD_DIM),
        }


OUTPUTS = ["y", "present_key", "present_value"]


def dims_of(name: str) -> tuple[int, list[str | int]]:
    if name == "qkv":
        return TensorProto.FLOAT, ["batch", "tokens", "columns"]
    if name.startswith("past"):
        return TensorProto.FLOAT, ["batch", "heads", "past", HEAD_DIM]
    if name == "seqlens_k":
        return TensorProto.INT32, ["batch"]
    if name == "total_sequence_length":
        return TensorProto.INT32, []
    return TensorProto.FLOAT, ["positions", "pairs"] if name.endswith("cache") else ["size"]


def session(
    node: onnx.NodeProto, inputs: dict[str, tuple[int, list[str | int]]], outputs: list[str]
) -> onnxruntime.InferenceSession:
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 21), ("com.microsoft", 1))]
    model = helper.make_model(graph, opset_imports=[*opsets, helper.make_opsetid("owl_deploy", 1)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(loaded: onnxruntime.InferenceSession, arrays: Arrays) -> list[NDArray[np.float32]]:
    names = {entry.name for entry in loaded.get_inputs()}
    return list(loaded.run(None, {name: array for name, array in arrays.items() if name in names}))


def run_in_place(loaded: onnxruntime.InferenceSession, arrays: Arrays) -> list[NDArray[np.float32]]:
    """Run with past and present in one place."""
    arrays = {name: array.copy() for name, array in arrays.items()}
    binding = loaded.io_binding()
    for entry in loaded.get_inputs():
        binding.bind_cpu_input(entry.name, arrays[entry.name])
    binding.bind_output("y")
    for name in ("key", "value"):
        cache = arrays[f"past_{name}"]
        binding.bind_output(f"present_{name}", "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
    loaded.run_with_iobinding(binding)
    return [binding.copy_outputs_to_cpu()[0], arrays["past_key"], arrays["past_value"]]


CASES = {
    "first token": Attention(),
    "prompt": Attention(lengths=(40,), n_tokens=40),
    "long prompt behind a cache": Attention(lengths=(90,), n_tokens=70),
    "decode": Attention(lengths=(80,)),
    "rows of several lengths": Attention(lengths=(80, 3, 17, 1)),
    "prompts padded behind": Attention(lengths=(9, 30, 1), n_tokens=30),
    "window": Attention(lengths=(80, 20), window=16),
    "window of a prompt": Attention(lengths=(60,), n_tokens=60, window=16),
    "softcap": Attention(lengths=(70,), n_tokens=3, softcap=2.0),
    "part of a head turned": Attention(lengths=(30, 12), n_rotated=16),
    "nothing turned": Attention(lengths=(30, 12), n_rotated=0),
}


@pytest.mark.parametrize("is_in_place", [True, False], ids=["in place", "apart"])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_onnxruntime(name: str, is_in_place: bool) -> None:
    case = CASES[name]
    n_past = max(0, max(case.lengths) - case.n_tokens)
    arrays = case.arrays(capacity=POSITIONS if is_in_place else n_past)
    compute = run_in_place if is_in_place else run
    found = compute(case.session(), arrays)
    expected = compute(replace(case, is_ours=False).session(), arrays)
    for row, length in enumerate(case.lengths):
        n_kept = min(length, case.n_tokens)
        np.testing.assert_allclose(found[0][row, :n_kept], expected[0][row, :n_kept], rtol=2e-5, atol=2e-5)
        for mine, theirs in zip(found[1:], expected[1:], strict=True):
            assert mine.shape == theirs.shape
            np.testing.assert_allclose(mine[row, :, :length], theirs[row, :, :length], rtol=1e-6, atol=1e-6)


def test_present_of_its_own_holds_no_leftovers() -> None:
    _, key, value = run(
        CASES["rows of several lengths"].session(), CASES["rows of several lengths"].arrays(capacity=79)
    )
    for row, length in enumerate(CASES["rows of several lengths"].lengths):
        assert not key[row, :, length:].any()
        assert not value[row, :, length:].any()


def test_norms_of_heads_come_before_they_are_turned() -> None:
    case = Attention(lengths=(50,), n_tokens=7)
    arrays = case.arrays(capacity=43)
    heads = arrays["qkv"].reshape(1, 7, HEADS + 2 * KV_HEADS, HEAD_DIM).copy()
    for part, norm in ((heads[:, :, :HEADS], "query_norm"), (heads[:, :, HEADS:-KV_HEADS], "key_norm")):
        part *= arrays[norm] / np.sqrt(np.mean(part**2, axis=-1, keepdims=True) + 1e-6)
    expected = run(case.session(), {**arrays, "qkv": heads.reshape(1, 7, -1)})
    found = run(replace(case, has_norms=True).session(), arrays)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seqlens_k": np.array([-1], np.int32)}, "row 0 of 0 positions"),
        ({"seqlens_k": np.array([2**31 - 1], np.int32)}, "row 0 of 2147483648 positions"),
        ({"seqlens_k": np.array([60], np.int32)}, "does not fit: past 9, present 10"),
        ({"total_sequence_length": np.array(9, np.int32)}, "does not fit: past 9, present 9"),
        ({"seqlens_k": np.array([9, 9], np.int32)}, "one number a row"),
        ({"qkv": np.zeros((1, 1, 321), np.float32)}, r"QKV must be \[B, T, 10 D\]"),
        ({"qkv": np.zeros((2, 1, 320), np.float32)}, "past_key and past_value must be"),
        ({"past_value": np.zeros((1, KV_HEADS, 8, HEAD_DIM), np.float32)}, "past_key and past_value must be"),
        ({"cos_cache": np.zeros((5, 16), np.float32), "sin_cache": np.zeros((5, 16), np.float32)}, "angles for 5"),
        ({"cos_cache": np.zeros((96, 17), np.float32), "sin_cache": np.zeros((96, 17), np.float32)}, "2 R at most D"),
        ({"sin_cache": np.zeros((96, 8), np.float32)}, "cos_cache and sin_cache must be"),
        ({"key_norm": np.zeros(31, np.float32)}, r"weights of norms must be \[32\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes: Arrays, words: str) -> None:
    case = Attention(lengths=(10,), has_norms=True)
    with pytest.raises(Exception, match=words):
        run(case.session(), {**case.arrays(capacity=9), **changes})


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 4), (0, 0), (2, 4), (-6, -2), (1 << 40, 2)])
def test_heads_that_do_not_divide_are_refused(heads: int, kv_heads: int) -> None:
    inputs = ["qkv", "past_key", "past_value", "seqlens_k", "total_sequence_length"]
    node = helper.make_node(
        "GroupQueryAttention",
        inputs,
        OUTPUTS,
        domain="owl_deploy",
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=1.0,
        softcap=0.0,
        local_window_size=-1,
        epsilon=0.0,
    )
    with pytest.raises(Exception, match="num_heads must be a multiple of kv_num_heads"):
        session(node, {name: dims_of(name) for name in inputs}, OUTPUTS)


def gated(activation: str) -> onnxruntime.InferenceSession:
    node = helper.make_node("GatedLinearUnit", ["x"], ["y"], domain="owl_deploy", activation=activation)
    return session(node, {"x": (TensorProto.FLOAT, ["batch", "tokens", "columns"])}, ["y"])


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 74), (1, 40, 3072)])
def test_gated_unit_is_its_formula(shape: tuple[int, ...]) -> None:
    x = 3 * np.random.default_rng(0).standard_normal(shape, np.float32)
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    silu = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(gated("silu").run(None, {"x": x})[0], silu, rtol=2e-6, atol=1e-7)
    gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    np.testing.assert_allclose(gated("gelu_tanh").run(None, {"x": x})[0], gelu, rtol=1e-5, atol=1e-6)


def test_gated_unit_refuses_what_it_cannot_halve() -> None:
    with pytest.raises(Exception, match=r"even last dimension, found shape \[1, 1, 3\]"):
        gated("silu").run(None, {"x": np.zeros((1, 1, 3), np.float32)})
    for name in ("relu", "a name longer than any of them", ""):
        with pytest.raises(Exception, match=f"activation must be silu or gelu_tanh, found {name}"):
            gated(name)
