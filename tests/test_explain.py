"""What `owl-deploy explain` says of an artifact: figures against hand-computed bytes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from command_line import call
from onnx import TensorProto
from random_models import random_model, save

from owl_deploy import explain, explain_matrices, explain_nodes
from owl_deploy.artifact import MANIFEST, open_artifact
from owl_deploy.bench.measure import Workload, _bytes_per_step
from owl_deploy.engines.status import EngineStatus
from owl_deploy.errors import EngineUnavailableError, UnsupportedModelError
from owl_deploy.explain import Explanation, explain_artifact
from owl_deploy.explain_matrices import break_even
from owl_deploy.export import writer
from owl_deploy.export.cost_model import choose_encoding
from owl_deploy.export.packing import Precision
from owl_deploy.export.writer import export_onnx
from owl_deploy.kernels import library_path
from owl_deploy.recipe import ExportSettings

SPARSITY = 0.6
MACHINE = "x86-avx512-vbmi2"
PAST_LEN = 10
# Weights of the two blocks of a tiny Llama, and of its head, which is the embedding too.
QKV, OUTPUT, GATE_UP, DOWN, HEAD = 2 * 128 * 64, 2 * 64 * 64, 2 * 192 * 64, 2 * 64 * 96, 260 * 64
NORMS = 5 * 64
CACHE_BYTES = 4 * 2 * 2 * 2 * 16 * PAST_LEN  # keys and values of 2 blocks with 2 heads of 16
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "fp16": {"precision": "fp16"},
    "dense-int8": {"precision": "int8"},
    "dense-int4": {"precision": "int4"},
    "sparse-initializer": {"weights": "sparse-initializer"},
    "operator-fp32": {"weights": "sparse-operator"},
    "operator-int8": {"weights": "sparse-operator", "precision": "int8"},
    "operator-int4": {"weights": "sparse-operator", "precision": "int4"},
    "deepsparse": {"target": "deepsparse"},
}


def has_library() -> bool:
    try:
        library_path()
    except EngineUnavailableError:
        return False
    return True


Make = Callable[..., Path]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Folders of artifacts of seeded models whose blocks have 60 % zeros at random places."""
    folder = tmp_path_factory.mktemp("explain")
    library = folder / "library.so"
    library.write_bytes(b"\x7fELF")

    def export(kind: str = "dense", family: str = "llama", sparsity: float = SPARSITY, **settings: Any) -> Path:
        source = folder / f"{family}-{sparsity}"
        if not source.exists():
            save(random_model(family, sparsity=sparsity), source)
        chosen: dict[str, Any] = {"max_positions": 64, **KINDS[kind], **settings}
        if kind.startswith("operator"):
            chosen["machine"] = MACHINE
        out = folder / "-".join([source.name, *(f"{key}={value}" for key, value in sorted(chosen.items()))])
        if not out.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(writer, "library_path", lambda: library)  # exports only copy it
                export_onnx(str(source), ExportSettings(**chosen), out=out, threads=1, parity=False)
        return out

    return export


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that reads a gigabyte in a second: a megabyte takes a millisecond."""
    monkeypatch.setattr(explain, "memory_bandwidth", lambda n_threads: 1e9)
    for module in (explain, explain_matrices):
        monkeypatch.setattr(module, "this_machine_class", lambda: MACHINE)


@pytest.fixture
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ONNX Runtime be missing, which saves a process where nodes do not matter."""
    missing = EngineStatus("onnxruntime", False, "", "ONNX Runtime is not installed: pip install onnxruntime", "MIT")
    monkeypatch.setattr(explain, "onnxruntime_status", lambda: missing)


def explained(path: Path, past_len: int = PAST_LEN) -> Explanation:
    return explain_artifact(path, past_len=past_len, threads=1)


def read_bytes(explanation: Explanation) -> dict[str, int]:
    return {part.name: part.read_bytes for part in explanation.parts}


def data_bytes(folder: Path, suffix: str) -> dict[str, int]:
    """Return the bytes of external initializers by name, without `suffix`, where they end in it."""
    graph = onnx.load_model(folder / "model.onnx", load_external_data=False).graph
    return {
        tensor.name.removesuffix(suffix): int(next(e.value for e in tensor.external_data if e.key == "length"))
        for tensor in graph.initializer
        if tensor.name.endswith(suffix) and tensor.data_location == TensorProto.EXTERNAL
    }


# Bytes of a step.


@pytest.mark.parametrize("kind", ["dense", "fp16", "sparse-initializer"])
@pytest.mark.usefixtures("_no_engine")
def test_onnxruntime_reads_every_weight_as_float32(kind: str, make: Make) -> None:
    explanation = explained(make(kind))
    assert read_bytes(explanation) == {
        "qkv": 4 * QKV,
        "o": 4 * OUTPUT,
        "gate_up": 4 * GATE_UP,
        "down": 4 * DOWN,
        "head": 4 * HEAD,
        "embedding rows": 4 * 64,
        "vectors": 4 * NORMS,
        "KV cache": CACHE_BYTES,
    }
    assert [part.name for part in explanation.parts if part.is_pruned] == ["qkv", "o", "gate_up", "down"]


@pytest.mark.parametrize("kind", ["operator-fp32", "operator-int8", "operator-int4"])
@pytest.mark.usefixtures("_no_engine")
def test_packed_matrices_are_read_as_they_lie_in_the_file(kind: str, make: Make) -> None:
    folder = make(kind)
    lengths = data_bytes(folder, ".weight.packed")
    found = read_bytes(explained(folder))
    roles = {"qkv": "q_k_v_proj", "o": "o_proj", "gate_up": "gate_up_proj", "down": "down_proj", "head": "embed_tokens"}
    for part, module in roles.items():
        assert found[part] == sum(n_bytes for name, n_bytes in lengths.items() if name.endswith(f".{module}"))


@pytest.mark.usefixtures("_no_engine")
def test_matmulnbits_reads_codes_and_scales(make: Make) -> None:
    found = read_bytes(explained(make("dense-int4")))
    assert found["qkv"] == QKV // 2 + 4 * QKV // 32
    assert found["head"] == HEAD + 4 * HEAD // 32  # int8


@pytest.mark.usefixtures("_no_engine")
def test_deepsparse_is_counted_by_its_nonzeros(make: Make) -> None:
    folder = make("deepsparse")
    explanation = explained(folder)
    state = random_model("llama", sparsity=SPARSITY).state_dict()
    nonzeros = sum(int(state[f"model.layers.{i}.mlp.down_proj.weight"].count_nonzero()) for i in range(2))
    assert read_bytes(explanation)["down"] == 4 * nonzeros
    assert {matrix.pays for matrix in explanation.matrices} == {None}
    assert any("lower bounds" in note for note in explanation.notes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("_no_engine")
def test_matrices_and_cache_are_those_of_the_latency_report(kind: str, make: Make) -> None:
    folder = make(kind)
    kept = {"embedding rows", "vectors"}
    found = sum(n_bytes for name, n_bytes in read_bytes(explained(folder)).items() if name not in kept)
    workload = Workload("decode", n_tokens=1, past_len=PAST_LEN, n_samples=1)
    assert found == _bytes_per_step(open_artifact(folder), workload)


@pytest.mark.parametrize(
    ("kind", "family", "expected"),
    [
        ("operator-int8", "llama", 64 + 4),
        ("dense-int8", "llama", 64 + 2 * 4),
        ("dense", "opt", 2 * 64 * 4),  # of the token and of its position
        ("deepsparse", "llama", 64 * 4 + 2 * 16 * 4),  # and a cosine and a sine for each value of a head
    ],
)
@pytest.mark.usefixtures("_no_engine")
def test_rows_of_one_token_are_counted(kind: str, family: str, expected: int, make: Make) -> None:
    assert read_bytes(explained(make(kind, family)))["embedding rows"] == expected


@pytest.mark.usefixtures("_no_engine")
def test_biases_count_as_vectors(make: Make) -> None:
    # 5 norms with a weight and a bias each; biases of 4 projections to 64, of the first linear to 96, of the second.
    assert read_bytes(explained(make(family="opt")))["vectors"] == 4 * (5 * 2 * 64 + 2 * (4 * 64 + 96 + 64))


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("opt", {"qkv", "o", "up", "down", "head"}),
        ("phi3", {"qkv", "o", "gate_up", "down", "head"}),
        ("gemma2", {"qkv", "o", "gate_up", "down", "head"}),
    ],
)
@pytest.mark.usefixtures("_no_engine")
def test_every_family_has_its_matrices_in_their_parts(family: str, names: set[str], make: Make) -> None:
    assert {matrix.part for matrix in explained(make(family=family)).matrices} == names


@pytest.mark.usefixtures("_no_engine")
def test_milliseconds_and_shares_follow_from_bytes(make: Make) -> None:
    explanation = explained(make())
    total = sum(read_bytes(explanation).values())
    for part in explanation.parts:
        assert part.ms == pytest.approx(part.read_bytes / 1e6)
        assert part.share == pytest.approx(part.read_bytes / total)
    assert explanation.floor_ms == pytest.approx(total / 1e6)


@pytest.mark.usefixtures("_no_engine")
def test_longer_context_reads_more_of_the_cache_alone(make: Make) -> None:
    before, after = (read_bytes(explained(make(), past_len)) for past_len in (0, 20))
    assert (before.pop("KV cache"), after.pop("KV cache")) == (0, 2 * CACHE_BYTES)
    assert before == after


# Matrices.


@pytest.mark.parametrize("shape", [(192, 64), (576, 1536)])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("machine", ["x86-avx512-vbmi2", "x86-avx2", "arm-neon"])
def test_break_even_is_where_the_choice_of_the_cost_model_turns(
    shape: tuple[int, int], precision: Precision, machine: Any
) -> None:
    def is_dense(n_nonzeros: int) -> bool:
        return choose_encoding(shape, n_nonzeros, precision, machine_class=machine) == "dense"

    needed = break_even(shape, precision, machine)
    if needed is None:
        assert is_dense(0)
        return
    n_nonzeros = round((1 - needed) * shape[0] * shape[1])
    assert not is_dense(n_nonzeros)
    assert is_dense(n_nonzeros + 1)


def test_there_is_no_break_even_where_even_zeros_take_as_long() -> None:
    # In fp16 ARM expands a mask in more time than it reads a dense row.
    assert break_even((576, 1536), "fp16", "arm-neon", "bitmask") is None


@pytest.mark.usefixtures("_no_engine")
def test_matrix_with_enough_zeros_pays(make: Make) -> None:
    matrices = explained(make("operator-int8")).matrices
    in_blocks = [matrix for matrix in matrices if matrix.is_in_block]
    assert [(matrix.pays, matrix.reason) for matrix in in_blocks] == [(True, None)] * 8
    for matrix in in_blocks:
        assert matrix.break_even is not None
        assert matrix.break_even < matrix.sparsity
        assert matrix.bytes < matrix.bytes_dense
    assert {matrix.shape for matrix in in_blocks} == {(128, 64), (64, 64), (192, 64), (64, 96)}


@pytest.mark.usefixtures("_no_engine")
def test_matrix_below_its_break_even_says_so(make: Make) -> None:
    matrices = explained(make("operator-int8", sparsity=0.02)).matrices
    matrix = next(matrix for matrix in matrices if matrix.part == "qkv")
    assert (matrix.pays, matrix.encoding) == (False, "packed-dense")
    assert matrix.bytes == matrix.bytes_dense
    assert matrix.reason == (f"fewer zeros than the {matrix.break_even:.1%} from which int8 on {MACHINE} pays")


@pytest.mark.usefixtures("_no_engine")
def test_encoding_that_was_asked_for_and_loses_is_named(make: Make) -> None:
    matrices = explained(make("operator-int8", sparsity=0.02, encoding="bitmask")).matrices
    assert {str(matrix.reason).partition(", ")[2] for matrix in matrices if matrix.is_in_block} == {
        "but packed as bitmask"
    }


@pytest.mark.usefixtures("_no_engine")
def test_dense_that_was_asked_for_is_named(make: Make) -> None:
    matrices = explained(make("operator-int8", encoding="dense")).matrices
    assert {matrix.reason for matrix in matrices if matrix.is_in_block} == {"packed dense, as asked"}


@pytest.mark.usefixtures("_no_engine")
def test_head_whose_rows_are_gathered_is_always_dense(make: Make) -> None:
    head = next(matrix for matrix in explained(make("operator-int8")).matrices if matrix.part == "head")
    assert head.reason == "always dense, because its rows are gathered as the embedding"


@pytest.mark.usefixtures("_no_engine")
def test_sparse_initializers_save_bytes_of_the_file_alone(make: Make) -> None:
    explanation = explained(make("sparse-initializer"))
    for matrix in explanation.matrices:
        assert matrix.pays is False
        assert (matrix.bytes < matrix.bytes_dense) == matrix.is_in_block
    # Of 16640 positions 128 take a byte, 16256 two and 256 three: 2.008 on average, beside 4 of a value.
    head = next(matrix for matrix in explanation.matrices if matrix.part == "head")
    assert head.reason == "fewer zeros than the 33.4% from which its file is smaller"
    assert any("a smaller file, no speed" in note for note in explanation.notes)


@pytest.mark.usefixtures("_no_engine")
def test_zeros_that_would_pay_are_pointed_at(make: Make) -> None:
    assert any(note.startswith("14 of 14 matrices in the blocks") for note in explained(make()).notes)
    assert not any("zeros enough" in note for note in explained(make(sparsity=0.0)).notes)


@pytest.mark.usefixtures("_no_engine")
def test_encodings_of_another_machine_are_pointed_at(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "this_machine_class", lambda: "arm-neon")
    assert any("this machine is arm-neon" in note for note in explained(make("operator-int8")).notes)


# Limits.


@pytest.mark.usefixtures("_no_engine")
def test_limit_of_pruning_is_what_it_leaves_alone(make: Make) -> None:
    explanation = explained(make())
    left = 4 * (HEAD + NORMS + 64) + CACHE_BYTES
    dense = left + 4 * (QKV + OUTPUT + GATE_UP + DOWN)
    assert (explanation.unpruned_bytes, explanation.read_bytes_dense) == (left, dense)
    assert explanation.largest_speedup == pytest.approx(dense / left)


@pytest.mark.usefixtures("_no_engine")
def test_limit_of_packed_matrices_is_taken_in_their_own_precision(make: Make) -> None:
    sparse, dense = (explained(make("operator-int8", encoding=encoding)) for encoding in ("auto", "dense"))
    assert sparse.read_bytes_dense == dense.read_bytes
    assert sparse.largest_speedup == dense.largest_speedup
    assert sparse.read_bytes < dense.read_bytes


@pytest.mark.parametrize("kind", ["dense", "dense-int8", "dense-int4"])
@pytest.mark.usefixtures("_no_engine")
def test_floor_of_a_dense_artifact_is_what_others_are_compared_with(kind: str, make: Make) -> None:
    sparse, dense = explained(make("operator-int8")), explained(make(kind))
    name = "fp32" if kind == "dense" else kind.removeprefix("dense-")
    step = next(step for step in sparse.against if step.precision == name)
    # Rows are those of the artifact itself.
    rows = read_bytes(sparse)["embedding rows"] - read_bytes(dense)["embedding rows"]
    assert step.read_bytes == dense.read_bytes + rows
    assert step.speedup == pytest.approx(step.read_bytes / sparse.read_bytes)


# Nodes.


def test_nodes_are_those_of_the_file_and_all_run_on_the_processor(make: Make) -> None:
    folder = make()
    nodes = explained(folder).nodes
    graph = onnx.load_model(folder / "model.onnx", load_external_data=False).graph
    assert nodes.n_in_file == sum(row.n_assigned or 0 for row in nodes.rows) == len(graph.node)
    assert {row.provider for row in nodes.rows} == {"CPUExecutionProvider"}
    attention = next(row for row in nodes.rows if row.operator == "GroupQueryAttention")
    assert (attention.domain, attention.n_in_file, attention.n_run) == ("com.microsoft", 2, 2)
    assert (nodes.per_block, nodes.missing) == ((12, 12), None)
    assert str(nodes.engine).startswith("onnxruntime ")


def test_fusions_after_the_assignment_show_in_what_runs(make: Make) -> None:
    # Biases are added within SkipLayerNormalization, of the attention and of the MLP in each of two blocks.
    add = next(row for row in explained(make(family="opt")).nodes.rows if row.operator == "Add")
    assert (add.n_in_file, add.n_assigned) == (10, 10)
    assert add.n_run == 10 - 4


def test_operator_that_only_the_engine_knows_has_no_domain(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FastGelu, which is what a traced GPT-2's eight operators of GELU become."""
    found = explain_nodes.RunNodes("1", {}, {("CPUExecutionProvider", "FastGelu"): 2})
    monkeypatch.setattr(explain, "run_nodes", lambda *_, **__: found)
    rows = {row.operator: row for row in explained(make()).nodes.rows}
    assert (rows["FastGelu"].domain, rows["FastGelu"].n_in_file, rows["FastGelu"].n_run) == (None, 0, 2)
    assert (rows["MatMul"].provider, rows["MatMul"].n_run) == (None, 0)


@pytest.mark.skipif(not has_library(), reason="no operator library")
def test_operator_of_the_library_runs_in_every_product(make: Make) -> None:
    nodes = explained(make("operator-int8")).nodes
    row = next(row for row in nodes.rows if row.operator == "SparseMatMul")
    assert (row.domain, row.n_in_file, row.n_assigned, row.n_run) == ("owl_deploy", 9, 9, 9)
    assert nodes.per_block == (8, 8)


@pytest.mark.usefixtures("_no_engine")
def test_without_onnxruntime_all_else_is_explained(make: Make) -> None:
    explanation = explained(make())
    assert explanation.nodes.engine is None
    assert explanation.nodes.n_in_file > 0
    assert {row.n_run for row in explanation.nodes.rows} == {None}
    assert explanation.notes[0] == "Not known where nodes run: ONNX Runtime is not installed: pip install onnxruntime."


def test_without_the_operator_library_all_else_is_explained(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def library_path() -> Path:
        raise EngineUnavailableError("the operator library is missing")

    monkeypatch.setattr(explain, "library_path", library_path)
    explanation = explained(make("operator-int8"))
    assert explanation.nodes.missing == "where nodes run: the operator library is missing"
    assert read_bytes(explanation)["qkv"] > 0


def test_deepsparse_is_not_started(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    status = EngineStatus("deepsparse", False, "", "DeepSparse is not installed", "evaluation only")
    monkeypatch.setattr(explain, "bridge_status", lambda: status)
    nodes = explained(make("deepsparse")).nodes
    assert nodes.engine is None
    assert "DeepSparse is not installed" in str(nodes.missing)


# Bad input.


@pytest.fixture
def artifact(make: Make, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    folder = tmp_path / "artifact"
    shutil.copytree(make(), folder)
    return folder


def change_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def refusal(folder: Path) -> str:
    """Return the one sentence with which the command fails."""
    done = call("explain", folder, "--past-len", str(PAST_LEN), "--quiet")
    assert (done.code, done.stdout) == (1, "")
    return done.sentence


def test_folder_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    assert "is not an artifact: it has no model.onnx" in refusal(tmp_path)


def test_manifest_of_another_version_is_refused(artifact: Path) -> None:
    change_manifest(artifact, format_version=1)
    assert "has format_version 1, and this owl-deploy reads" in refusal(artifact)


@pytest.mark.parametrize("matrices", [None, {}, [{"name": "a"}], [{"name": "a", "shape": [0.5, 1]}]])
def test_manifest_without_its_matrices_is_refused(matrices: object, artifact: Path) -> None:
    change_manifest(artifact, matrices=matrices)
    assert "does not describe its matrices as this version does" in refusal(artifact)


def test_manifest_of_another_graph_is_refused(artifact: Path) -> None:
    change_manifest(artifact, matrices=open_artifact(artifact).manifest["matrices"][:-1])
    assert "tells of other matrices than its model.onnx multiplies" in refusal(artifact)


@pytest.mark.parametrize("content", [b"", b"not a protobuf", b"\x08\x0a" * 100])
def test_damaged_model_is_refused(content: bytes, artifact: Path) -> None:
    (artifact / "model.onnx").write_bytes(content)
    sentence = refusal(artifact)
    assert "model.onnx is damaged" in sentence
    assert sentence.endswith("export the model again")


def test_model_that_is_cut_short_is_refused(artifact: Path) -> None:
    content = (artifact / "model.onnx").read_bytes()
    (artifact / "model.onnx").write_bytes(content[: len(content) // 2])
    assert "model.onnx is damaged" in refusal(artifact)


@pytest.mark.parametrize(
    "change", [(b"layers.1.", b"layers.\xff."), (b"offset", b"ofsset"), (b"location", b"locatiom")]
)
def test_flipped_bytes_in_a_model_are_one_sentence(change: tuple[bytes, bytes], artifact: Path) -> None:
    content = (artifact / "model.onnx").read_bytes()
    assert change[0] in content
    (artifact / "model.onnx").write_bytes(content.replace(*change))
    assert "model.onnx" in refusal(artifact)


def test_missing_weights_are_named(artifact: Path) -> None:
    (artifact / "model.onnx.data").unlink()
    assert "model.onnx.data is missing, which holds the weights" in refusal(artifact)


def test_weights_that_are_cut_short_are_named(artifact: Path) -> None:
    data = artifact / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert "model.onnx.data is cut short" in refusal(artifact)


def test_model_that_onnxruntime_refuses_is_one_sentence(artifact: Path) -> None:
    model = onnx.load_model(artifact / "model.onnx", load_external_data=False)
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save_model(model, artifact / "model.onnx")
    sentence = refusal(artifact)
    assert sentence.startswith("ONNX Runtime cannot run ")
    assert "NoSuchOperator" in sentence


def test_crash_of_the_engine_is_one_sentence(monkeypatch: pytest.MonkeyPatch, artifact: Path) -> None:
    def crash(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, -11, "", "")

    monkeypatch.setattr(subprocess, "run", crash)
    with pytest.raises(UnsupportedModelError, match=r"cannot run .*model\.onnx \(signal SIGSEGV\)"):
        explain_nodes.run_nodes(artifact / "model.onnx", threads=1, operators=None)


def test_context_beyond_the_artifact_is_a_usage_error(artifact: Path) -> None:
    done = call("explain", artifact, "--past-len", "64", "--quiet")
    assert (done.code, done.stdout) == (2, "")
    assert done.sentence == "past_len must be in [0, 64), the positions that artifact holds, got 64"


# The command.


def test_command_prints_one_document(make: Make) -> None:
    folder = make()
    done = call("explain", folder, "--past-len", str(PAST_LEN), "--threads", "1", "--json", "--quiet")
    assert (done.code, done.stderr) == (0, "")
    document = done.document
    assert document["step"]["read_bytes"] == explained(folder).read_bytes
    assert sum(part["share"] for part in document["step"]["parts"]) == pytest.approx(1)
    assert [matrix["name"] for matrix in document["matrices"]] == [
        matrix["name"] for matrix in open_artifact(folder).manifest["matrices"]
    ]
    assert document["limits"]["largest_speedup"] > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("_no_engine")
def test_text_fits_a_hundred_columns_and_names_every_part(kind: str, make: Make) -> None:
    done = call("explain", make(kind), "--past-len", str(PAST_LEN), "--quiet")
    assert (done.code, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "…" not in done.stdout.partition("\n\n")[2]  # nothing is cut off in a table
    for words in ("blocks: qkv", "blocks: down", "head", "KV cache", "Amdahl", "Floor: ", "dense int4 by MatMulNBits"):
        assert words in done.stdout


@pytest.mark.usefixtures("_no_engine")
def test_equal_matrices_share_a_line(make: Make) -> None:
    text = call("explain", make("operator-int8"), "--past-len", str(PAST_LEN), "--quiet").stdout
    line = next(line for line in text.splitlines() if line.startswith("gate_up"))
    assert line.split()[:5] == ["gate_up", "192x64", "packed-bitmask", "int8", "2"]


@pytest.mark.usefixtures("_no_engine")
def test_names_in_a_file_cannot_drive_the_terminal(artifact: Path) -> None:
    model = onnx.load_model(artifact / "model.onnx", load_external_data=False)
    model.graph.node[0].op_type = "[red]\x1b[2J[/red]"
    onnx.save_model(model, artifact / "model.onnx")
    text = call("explain", artifact, "--past-len", str(PAST_LEN), "--quiet").stdout
    assert "\x1b" not in text
    assert "[red]" in text


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys; from owl_deploy.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'onnxruntime', 'onnx', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, "explain", "--help"], check=True, capture_output=True)


def test_engine_free_libraries_are_enough(make: Make) -> None:
    """An installation that only runs artifacts has neither torch nor what writes graphs."""
    code = (
        "import sys; from pathlib import Path\n"
        "for name in ('torch', 'transformers', 'safetensors', 'onnx_ir', 'onnxscript'): sys.modules[name] = None\n"
        "from owl_deploy import explain, explain_tables\n"
        "explain.memory_bandwidth = lambda n: 1e9\n"
        "explain_tables.print_explanation(explain.explain_artifact(Path(sys.argv[1]), past_len=3, threads=1))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(make())], check=True, capture_output=True)
