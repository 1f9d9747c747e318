"""Other engines beside the artifacts: the same weights, the same positions, and a reason where one is missing."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import SMALL_BENCH, call
from conftest import save_tiny_model
from transformers import AutoModelForCausalLM

from owl_deploy.artifact import OnnxArtifact, open_artifact
from owl_deploy.bench.measure import _peer_parity
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.engines import peers
from owl_deploy.engines.gguf_model import write_gguf
from owl_deploy.engines.llama_cpp import LLAMA_CPP
from owl_deploy.engines.openvino import OPENVINO
from owl_deploy.engines.peer import Peer, is_peer, open_peer
from owl_deploy.engines.peers import prepared_peer
from owl_deploy.engines.process import EngineProcess, open_engine
from owl_deploy.errors import EngineFailedError, EngineUnavailableError, RecipeError, UnsupportedModelError
from owl_deploy.evaluation import Evaluation
from owl_deploy.export.writer import export_onnx
from owl_deploy.recipe import BenchSettings, ExportSettings, PeerSettings, Recipe, checked, recipe_from_mapping

TOKENS = np.arange(5, 45, dtype=np.int64)

needs_llama_cpp = pytest.mark.skipif(
    not LLAMA_CPP.status().is_available, reason="llama.cpp is not installed: owl-deploy engines install llama.cpp"
)
needs_openvino = pytest.mark.skipif(
    not OPENVINO.status().is_available, reason="OpenVINO is not installed: owl-deploy engines install openvino"
)
needs_genai = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed"
)


@pytest.fixture(scope="module")
def artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxArtifact:
    out = tmp_path_factory.mktemp("peers") / "dense"
    export_onnx(str(tiny_model), ExportSettings(max_positions=128), out=out, parity=False)
    return open_artifact(out)


@pytest.fixture
def copy(artifact: OnnxArtifact, tmp_path: Path) -> OnnxArtifact:
    """An artifact that a test may damage."""
    return open_artifact(Path(shutil.copytree(artifact.path, tmp_path / "copy")))


@pytest.fixture
def no_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path / "empty-cache"))


def peer(text: str, model: Path | None = None, artifacts: tuple[OnnxArtifact, ...] = ()) -> Peer:
    settings = PeerSettings.model_validate(text)
    return prepared_peer(settings, model=str(model) if model else None, artifacts=artifacts, threads=1)


def expected_logits(model: Path) -> Any:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(model)(torch.from_numpy(TOKENS)[None]).logits[0].numpy()


def check_session(engine: EngineProcess, expected: Any, tolerance: float) -> None:
    """Prefill, steps behind a cache that was longer before, and timing at any depth: one text, the same logits."""
    allowed = tolerance * float(np.abs(expected).max())

    def check(first: int, last: int) -> None:
        found = engine.forward(TOKENS[first:last], first)
        np.testing.assert_allclose(found, expected[first:last], rtol=0, atol=allowed)

    check(0, 40)
    check(20, 40)
    check(30, 31)
    assert len(engine.measure(TOKENS[:1], 30, 3)) == 3
    check(30, 40)  # what was measured stood at position 30, and those before it are still there
    with pytest.raises(EngineFailedError, match="40 tokens after 30 do not fit a cache of 64"):
        engine.forward(TOKENS, 30)
    assert engine.version
    assert engine.load_ms > 0


# Settings.


@pytest.mark.parametrize(
    ("text", "engine", "precision", "artifact", "name"),
    [
        ("llama.cpp:q8_0", "llama.cpp", "q8_0", "", "llama.cpp-q8_0"),
        ("llama.cpp", "llama.cpp", "f32", "", "llama.cpp-f32"),
        ("torch:bf16", "torch", "bf16", "", "torch-bf16"),
        ("openvino", "openvino", "fp32", "", "openvino-fp32"),
        ("openvino:int4", "openvino", "int4", "", "openvino-int4"),
        ("torch-compiled", "torch-compiled", "fp32", "", "torch-compiled-fp32"),
        ("onnxruntime-genai:small", "onnxruntime-genai", "", "small", "onnxruntime-genai-small"),
    ],
)
def test_short_form_is_the_long_one(text: str, engine: str, precision: str, artifact: str, name: str) -> None:
    long = {"engine": engine, "precision": precision, "artifact": artifact, "name": name}
    assert PeerSettings.model_validate(text) == PeerSettings.model_validate(long)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vllm:fp16", "peer.0.engine: .*known are llama.cpp, openvino, torch"),
        ("llama.cpp:q8", "llama.cpp has no precision 'q8'; did you mean q8_0"),
        ("onnxruntime-genai", "runs an artifact as it is: give its name"),
        ("torch:fp32:x", "torch has no precision"),
        ({"engine": "torch", "artifact": "a"}, "torch runs the dense model: leave artifact 'a' out"),
        ({"engine": "torch", "name": "../x"}, "peer.0.name: string should match pattern"),
        ({"engine": 3}, "peer.0.engine"),
        (3, "peer.0"),
    ],
)
def test_impossible_peer_is_refused(text: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        checked(BenchSettings, {"peer": (text,)}, where="command line")


def recipe(*peers_: Any) -> Recipe:
    return recipe_from_mapping(
        {"model": "x", "export": [{"name": "a"}], "bench": {"baseline": "a", "peer": list(peers_)}}
    )


def test_recipe_names_peers_in_either_form_and_reads_back_equal() -> None:
    read = recipe("llama.cpp:q4_0", {"engine": "onnxruntime-genai", "artifact": "a", "name": "genai"})
    assert read.bench is not None
    assert [one.name for one in read.bench.peer] == ["llama.cpp-q4_0", "genai"]
    assert recipe_from_mapping(read.model_dump(mode="json")) == read


def test_recipe_refuses_a_peer_of_an_unknown_artifact_or_of_a_taken_name() -> None:
    with pytest.raises(RecipeError, match=r"bench\.peer: .b. is not among the artifacts"):
        recipe("onnxruntime-genai:b")
    with pytest.raises(RecipeError, match="a peer and an artifact are named a"):
        recipe({"engine": "torch", "name": "a"})


# The GGUF file.


def test_gguf_holds_every_weight_in_llama_cpps_order(tiny_model: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    checkpoint = open_checkpoint(str(tiny_model))
    write_gguf(checkpoint, tmp_path / "model.gguf")
    found = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(found) == len(checkpoint.tensors)
    for name, own in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        np.testing.assert_array_equal(found[name], checkpoint.read(own).numpy())
    for name, own, n_heads in (("blk.1.attn_q.weight", "q_proj", 4), ("blk.1.attn_k.weight", "k_proj", 2)):
        weight = checkpoint.read(f"model.layers.1.self_attn.{own}.weight").numpy()
        half = 16 // 2  # of a head
        order = [16 * head + i + half * part for head in range(n_heads) for i in range(half) for part in range(2)]
        np.testing.assert_array_equal(found[name], weight[order])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"model_type": "opt"}, "no GGUF is written of a opt model: those known are llama, mistral"),
    ],
)
def test_model_that_llama_cpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UnsupportedModelError, match=message):
        write_gguf(open_checkpoint(str(folder)), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


# The engines.


@needs_llama_cpp
@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_computes_the_checkpoint(tied: bool, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", seed=3, tie_word_embeddings=tied)
    with open_engine(peer("llama.cpp:f32", model), threads=1, n_tokens=40, capacity=64) as engine:
        check_session(engine, expected_logits(model), 5e-3)  # keys and values are float16


@needs_llama_cpp
def test_llama_cpp_quantises_the_same_weights(tiny_model: Path) -> None:
    exact = peer("llama.cpp:f32", tiny_model)
    coarse = peer("llama.cpp:q8_0", tiny_model)
    # 32 weights in 34 bytes in place of 128, but for the norms.
    assert 0.25 < coarse.facts.bytes_per_decode_step["dense"] / exact.facts.bytes_per_decode_step["dense"] < 0.28
    expected = expected_logits(tiny_model)
    with open_engine(coarse, threads=1, n_tokens=40, capacity=64) as engine:
        difference = np.abs(engine.forward(TOKENS, 0) - expected).max() / np.abs(expected).max()
    assert 1e-3 < difference < 0.1


@needs_llama_cpp
def test_llama_cpp_gives_the_last_logits_alone(tiny_model: Path) -> None:
    made = peer("llama.cpp:f32", tiny_model)
    with open_engine(made, threads=1, n_tokens=40, capacity=40, last_logits_only=True) as engine:
        found = engine.forward(TOKENS, 0)
    np.testing.assert_allclose(found, expected_logits(tiny_model)[-1:], rtol=0, atol=0.05)


@needs_llama_cpp
def test_llama_cpp_refuses_tokens_that_the_model_has_not(tiny_model: Path) -> None:
    with open_engine(peer("llama.cpp:f32", tiny_model), threads=1, n_tokens=4, capacity=8) as engine:
        for token in (-1, 260):
            with pytest.raises(EngineFailedError, match=r"tokens must be in \[0, 260\)"):
                engine.forward(np.asarray([token]), 0)
        assert engine.forward(TOKENS[:4], 0).shape == (4, 260)


@needs_llama_cpp
@pytest.mark.parametrize("content", [b"", b"GGUF", b"garbage" * 100])
def test_damaged_gguf_is_an_engine_failure(content: bytes, tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(peer("llama.cpp:f32", tiny_model).path, tmp_path / "copy"))
    (folder / "model.gguf").write_bytes(content)
    with (
        pytest.raises(EngineFailedError, match=r"llama\.cpp failed at load: .*cannot load model\.gguf"),
        open_engine(open_peer(folder), threads=1, n_tokens=4, capacity=8),
    ):
        pass


@needs_openvino
@pytest.mark.parametrize("tied", [True, False])
def test_openvino_computes_the_checkpoint(tied: bool, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", seed=3, tie_word_embeddings=tied)
    with open_engine(peer("openvino:fp32", model), threads=1, n_tokens=40, capacity=64) as engine:
        check_session(engine, expected_logits(model), 1e-5)


@needs_openvino
def test_openvino_rounds_the_same_weights(tiny_model: Path) -> None:
    expected = expected_logits(tiny_model)
    sizes, differences = [], []
    for precision in ("fp32", "int8", "int4"):
        made = peer(f"openvino:{precision}", tiny_model)
        sizes.append(made.facts.bytes_dense)
        with open_engine(made, threads=1, n_tokens=40, capacity=64, last_logits_only=True) as engine:
            differences.append(np.abs(engine.forward(TOKENS, 0) - expected[-1:]).max() / np.abs(expected).max())
    assert sizes[0] > sizes[1] > sizes[2]
    assert differences[0] < 1e-5 < 1e-3 < differences[1] < differences[2] < 1


@pytest.mark.usefixtures("no_llama_cpp")
def test_missing_openvino_is_told_before_any_work(tiny_model: Path) -> None:
    with pytest.raises(EngineUnavailableError, match=r"OpenVINO.* run owl-deploy engines install openvino"):
        peer("openvino:int8", tiny_model)


def test_torch_computes_the_checkpoint(tiny_model: Path) -> None:
    with open_engine(peer("torch", tiny_model), threads=1, n_tokens=40, capacity=64) as engine:
        check_session(engine, expected_logits(tiny_model), 1e-5)


@pytest.mark.slow
def test_compiled_torch_computes_the_checkpoint(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", num_hidden_layers=1)
    with open_engine(peer("torch-compiled", model), threads=1, n_tokens=1, capacity=64) as engine:
        check_session(engine, expected_logits(model), 1e-5)


def test_torch_is_not_compiled_without_a_compiler(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(EngineUnavailableError, match="none is on PATH: install g"):
        peer("torch-compiled", tiny_model)


@needs_genai
def test_genai_computes_the_artifact(artifact: OnnxArtifact, tiny_model: Path) -> None:
    made = peer("onnxruntime-genai:dense", artifacts=(artifact,))
    with open_engine(made, threads=1, n_tokens=40, capacity=64) as engine:
        check_session(engine, expected_logits(tiny_model), 1e-5)


@needs_genai
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"custom_ops_library": "../libevil.so"}, "not the one installed here"),
        ({"custom_ops_library": "evil.so"}, "not the one installed here"),
        ({"provider_options": [{"evil": {}}]}, "not as it was exported"),
        ({"ep_library": "evil.so"}, "not as it was exported"),
        ({"custom_ops_library": 3}, "not the one installed here"),
        (None, "not a configuration of onnxruntime-genai"),
    ],
)
def test_genai_is_not_given_code_that_an_artifact_brings(
    options: dict[str, Any] | None, message: str, copy: OnnxArtifact
) -> None:
    (copy.path / "evil.so").write_bytes(b"evil")
    file = copy.path / "genai_config.json"
    config = json.loads(file.read_text())
    if options is None:
        config = [config]
    else:
        config["model"]["decoder"]["session_options"].update(options)
    file.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=message):
        peer("onnxruntime-genai:copy", artifacts=(copy,))


# The cache.


def test_peer_is_made_once_per_model(tiny_model: Path, tmp_path: Path) -> None:
    first = peer("torch", tiny_model)
    assert is_peer(first.path)
    written = (first.path / "owl.json").stat().st_mtime_ns
    again = peer("torch", tiny_model)
    assert again.path == first.path
    assert (again.path / "owl.json").stat().st_mtime_ns == written
    assert peer("torch", save_tiny_model(tmp_path / "other", seed=1)).path != first.path
    assert peer("torch:bf16", tiny_model).path != first.path


def test_failed_preparation_leaves_nothing(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(LLAMA_CPP), "python", lambda self: Path("unused"))
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(peers, "_gguf_facts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        peer("llama.cpp:f32", tiny_model)
    assert list((tmp_path / "cache" / "peers").iterdir()) == []


@pytest.mark.parametrize("content", ["{}", "[]", "garbage", '{"kind": "peer", "evil": 1}'])
def test_damaged_manifest_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "owl.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match="holds no peer"):
        open_peer(tmp_path)


@pytest.mark.usefixtures("no_llama_cpp")
def test_missing_engine_is_told_before_any_work(tiny_model: Path) -> None:
    with pytest.raises(EngineUnavailableError, match=r"llama\.cpp.* run owl-deploy engines install llama\.cpp"):
        peer("llama.cpp:f32", tiny_model)


def test_llama_cpp_without_a_compiler_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_DEPLOY_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(EngineUnavailableError, match="there is no C\\+\\+ compiler on PATH"):
        LLAMA_CPP.install()


# The bench.


@needs_genai
@pytest.mark.usefixtures("no_llama_cpp")
def test_bench_measures_peers_in_the_same_rounds_and_says_why_one_is_missing(
    artifact: OnnxArtifact, tiny_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("An owl hunts at night. " * 10)
    wanted = ("--peer", "onnxruntime-genai:dense", "--peer", "llama.cpp:q8_0")
    given = (*wanted, "--reference", tiny_model, "--text", f"text:{text}")
    out = ("--out", tmp_path / "report", "--json")
    done = call("bench", artifact.path, "--baseline", "dense", *given, *SMALL_BENCH, *out)
    assert done.code == 1
    rows = done.document["rows"]
    names = [("dense", "ok"), ("onnxruntime-genai-dense", "ok"), ("llama.cpp-q8_0", "failed")]
    assert [(row["artifact"], row["status"]) for row in rows] == names * 2
    assert len({frozenset(row) for row in rows}) == 1
    for row in rows:
        if row["engine"] == "onnxruntime-genai":
            assert row["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-4)
            assert row["parity"]["passed"]
            assert len(row["samples_ns"]) == 2
            assert row["speedup"]["p50"] > 0
        if row["status"] == "failed":
            assert "run owl-deploy engines install llama.cpp" in row["reason"]
    assert (tmp_path / "report" / "report.html").is_file()
    assert list(done.document["peers"]) == ["onnxruntime-genai-dense"]


def test_peer_without_a_model_to_run_is_a_row_with_a_reason(artifact: OnnxArtifact, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "report", "--json")
    text = ("--text", f"text:{Path(__file__).resolve()}")
    done = call("bench", artifact.path, "--baseline", "dense", "--peer", "torch", *text, *SMALL_BENCH, *out)
    assert done.code == 1
    assert [row["status"] for row in done.document["rows"]] == ["ok", "failed"] * 2
    assert "give --reference MODEL" in done.document["rows"][1]["reason"]


def test_two_peers_of_one_name_are_refused(artifact: OnnxArtifact, tmp_path: Path) -> None:
    both = ("--peer", "torch", "--peer", "torch:fp32")
    done = call("bench", artifact.path, "--baseline", "dense", *both, "--out", tmp_path / "report")
    assert done.code == 2
    assert "a peer is named torch-fp32 as another row is" in done.sentence


def evaluation(kl: float, top1: float) -> Evaluation:
    return Evaluation(9.0, "t", 8, 1, False, "0", "e", kl_divergence=kl, top1_agreement=top1)


@pytest.mark.parametrize(
    ("precision", "kl", "top1", "passed"),
    [
        ("f32", 1e-5, 0.999, True),
        ("f32", 0.004, 0.999, False),
        ("q8_0", 0.004, 0.97, True),
        ("q8_0", 0.25, 0.75, False),
        ("q4_0", 0.25, 0.75, True),
        ("q4_0", 0.25, 0.5, False),
    ],
)
def test_peer_passes_where_it_is_as_close_as_its_bits_allow(
    precision: str, kl: float, top1: float, passed: bool, tiny_model: Path
) -> None:
    made = peer("torch", tiny_model)
    judged = Peer(made.path, "x", {**made.manifest, "precision": precision})
    parity = _peer_parity(judged, evaluation(kl, top1))
    assert parity is not None
    assert parity["passed"] is passed
