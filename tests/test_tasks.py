"""Tasks of lm-evaluation-harness, against the harness's own Hugging Face model on the same checkpoint."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import yaml
from command_line import TEXT, call
from conftest import byte_tokenizer, save_tiny_model
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate as harness_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from owl_deploy import tasks as tasks_module
from owl_deploy.errors import OwlDeployError, RecipeError
from owl_deploy.evaluation import _EngineModel, open_language_model
from owl_deploy.export.writer import export_onnx
from owl_deploy.generation import torch_logits
from owl_deploy.progress import Step, silent
from owl_deploy.recipe import ExportSettings
from owl_deploy.tasks import _Harness, evaluate_tasks
from owl_deploy.text import Encoder

FOLDER = Path(__file__).parent / "tasks"
NAMES = ["colours", "stories", "last_word", "continue"]
SETTINGS = {"n_samples", "num_fewshot", "sha256"}


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short context, so that long texts are cut, and a tokenizer that adds BOS."""
    folder = save_tiny_model(tmp_path_factory.mktemp("bos") / "model", seed=3, max_position_embeddings=64)
    byte_tokenizer(adds_bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "artifact"
    export_onnx(str(tiny_model), ExportSettings(), out=out, parity=False)
    return out


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a task asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the task files that a test may add to."""
    return Path(shutil.copytree(FOLDER, tmp_path / "tasks"))


def hugging_face(model: Path) -> Any:
    """Return the harness's own model: another author's tokenisation, batching and scoring.

    Without its cache, which in 0.4.13 takes the wrong rows where one text is asked for twice, cut at two
    places: ("The sky is", " blue") scores -26.436 alone and in float64, but -26.198 beside ("The sky", " is blue").
    """
    tokenizer = byte_tokenizer(adds_bos="bos" in str(model))
    loaded = AutoModelForCausalLM.from_pretrained(model)
    return HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=1, device="cpu", logits_cache=False)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, argument, i, ("t", i, 1)) for i, argument in enumerate(arguments)]


PAIRS: list[tuple[Any, ...]] = [
    ("The sky is", " blue"),
    ("The sky is", " black"),
    ("The sky is ", "blue"),  # the space belongs to the continuation
    ("The sky is", " b"),
    ("The sky", " is blue"),
    ("", "no context"),
    ("<bos>begins with BOS", " itself"),
    ("The sky is", " blue"),  # the same again
    ("x" * 100, " cut at the left"),
    ("é→ not ASCII", " €"),
]
DOCUMENTS: list[tuple[Any, ...]] = [("short",), ("y" * 63,), ("z" * 64,), ("w" * 65,), ("a long text. " * 20,)]


@pytest.mark.parametrize("fixture", ["tiny_model", "with_bos"])
def test_scores_are_those_of_the_harness_own_model(fixture: str, request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue(fixture)
    expected = hugging_face(model)
    with open_language_model(str(model), 1, expected.max_length) as opened:
        ours = _Harness(opened, Encoder.open(model), expected.max_length, silent)
        pairs, documents = requests("loglikelihood", PAIRS), requests("loglikelihood_rolling", DOCUMENTS)
        found, wanted = ours.loglikelihood(pairs), expected.loglikelihood(pairs, disable_tqdm=True)
        rolling, wanted_rolling = ours.loglikelihood_rolling(documents), expected.loglikelihood_rolling(documents)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert rolling == pytest.approx(wanted_rolling, abs=1e-3, rel=1e-6)


@pytest.mark.parametrize("fixture", ["tiny_model", "with_bos"])
def test_greedy_text_is_that_of_the_harness_own_model(fixture: str, request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue(fixture)
    expected = hugging_face(model)
    asked = {"until": ["\n", "e"], "max_gen_toks": 12}
    texts = requests("generate_until", [(text, asked) for text in ("Once", "The sky is", "x" * 100, "Once upon")])
    with open_language_model(str(model), 1, expected.max_length) as opened:
        found = _Harness(opened, Encoder.open(model), expected.max_length, silent).generate_until(texts)
    assert found == expected.generate_until(texts, disable_tqdm=True)
    assert any(found)


def test_continuation_that_greedy_decoding_gives_is_called_greedy(tiny_model: Path) -> None:
    with open_language_model(str(tiny_model), 1, 512) as opened:
        model = _Harness(opened, Encoder.open(tiny_model), 512, silent)
        tokens = [20, 30, 40]
        for _ in range(3):
            tokens.append(int(opened.logits(np.asarray(tokens))[-1].argmax()))
        other = [*tokens[:-1], (tokens[-1] + 1) % 260]
        found = model._loglikelihood_tokens([(None, tokens[:3], tokens[3:]), (None, other[:3], other[3:])])
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_figures_are_those_of_the_harness_own_run(tiny_model: Path, num_fewshot: int | None) -> None:
    """The whole way: the harness reads the same files by its own loader, from their folder."""
    (found,) = evaluate_tasks([str(tiny_model)], NAMES[:3], folder=FOLDER, num_fewshot=num_fewshot, threads=1)
    before = Path.cwd()
    os.chdir(FOLDER)
    try:
        loaded: Any = TaskManager(include_defaults=False, include_path=str(FOLDER)).load(NAMES[:3])
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", num_fewshot or 0)
            task.set_fewshot_seed(1234)
        expected: Any = harness_evaluate(hugging_face(tiny_model), loaded, bootstrap_iters=0)
    finally:
        os.chdir(before)
    for name in NAMES[:3]:
        wanted = {key: value for key, value in expected["results"][name].items() if key.endswith(",none")}
        metrics = {key.removesuffix(",none"): value for key, value in wanted.items() if "_stderr" not in key}
        assert metrics
        assert {key: found.tasks[name][key] for key in metrics} == pytest.approx(metrics, rel=1e-4)
        assert found.tasks[name]["n_samples"] == expected["n-samples"][name]["effective"]
        assert found.tasks[name]["num_fewshot"] == (num_fewshot or 0)


def test_artifact_answers_as_its_checkpoint(tiny_model: Path, artifact: Path) -> None:
    torch_run, engine_run = evaluate_tasks([str(tiny_model), str(artifact)], NAMES, folder=FOLDER, threads=1)
    assert (torch_run.engine, engine_run.engine) == ("torch", "onnxruntime")
    for name in NAMES:
        ours, theirs = torch_run.tasks[name], engine_run.tasks[name]
        assert ours["sha256"] == theirs["sha256"]
        numbers = [key for key in ours if key not in SETTINGS and "_stderr" not in key]
        assert {key: theirs[key] for key in numbers} == pytest.approx({key: ours[key] for key in numbers}, rel=1e-3)


# What is computed once.


def texts_in_turn() -> list[tuple[NDArray[np.int64], int]]:
    """Texts that begin alike, are one inside another, differ from the first token, or come twice."""
    tokens = np.random.default_rng(0).integers(4, 260, 40)
    other = np.concatenate([tokens[:25], tokens[:10]])
    return [
        (tokens, 30),
        (tokens[:35], 20),
        (other, 24),
        (other, 24),
        (tokens[::-1].copy(), 39),
        (tokens, 0),
        (tokens, 5),
    ]


@pytest.mark.parametrize("window", [None, 8])
def test_tail_of_the_logits_in_torch_is_that_of_the_whole_text(window: int | None, tmp_path: Path) -> None:
    """With a sliding window too, whose cache would forget what the next text needs again."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        **sizes, num_key_value_heads=2, vocab_size=260, sliding_window=window, initializer_range=0.15
    )
    model = MistralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    with open_language_model(str(tmp_path), 1, 64) as opened:
        for tokens, start in texts_in_turn():
            np.testing.assert_allclose(opened.logits(tokens, start), torch_logits(model, tokens)[start:], atol=1e-4)


def test_tail_of_the_logits_in_an_engine_is_that_of_the_whole_text(artifact: Path) -> None:
    with open_language_model(str(artifact), 1, 64) as opened, open_language_model(str(artifact), 1, 64) as fresh:
        for tokens, start in texts_in_turn():
            np.testing.assert_allclose(opened.logits(tokens, start), fresh.logits(tokens)[start:], atol=1e-4)


class FixedEngine:
    """An engine of a fixed number of tokens per call: the "logits" of a token are it and its position."""

    engine = "fixed"

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def forward(self, tokens: NDArray[np.int64], past_len: int) -> NDArray[np.float32]:
        self.calls.append((len(tokens), past_len))
        return np.stack([tokens, past_len + np.arange(len(tokens))], axis=1).astype(np.float32)


def test_engine_of_fixed_calls_gets_whole_chunks_and_gives_back_the_asked_rows() -> None:
    engine: Any = FixedEngine()
    model = _EngineModel(engine, 8, is_fixed=True)
    for tokens, start in texts_in_turn():
        expected = np.stack([tokens, np.arange(len(tokens))], axis=1)[start:]
        np.testing.assert_array_equal(model.logits(tokens, start), expected)
    assert {n for n, _ in engine.calls} == {8}
    assert all(past_len % 8 == 0 for _, past_len in engine.calls)


def test_answers_to_one_question_share_its_context(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_language_model(str(tiny_model), 1, 512) as opened:
        lengths: list[int] = []
        model: Any = opened
        forward = model.model.forward

        def counting(*arguments: Any, **settings: Any) -> Any:
            lengths.append(settings["input_ids"].shape[1])
            return forward(*arguments, **settings)

        monkeypatch.setattr(model.model, "forward", counting)
        context = list(range(10, 110))
        pairs = [(None, context, [5, 6]), (None, context, [7, 8]), (None, context, [9, 9])]
        _Harness(opened, Encoder.open(tiny_model), 512, silent)._loglikelihood_tokens(pairs)
    assert lengths == [101, 2, 2]  # the last token of the context predicts the first of the answer


# What a run tells, and leaves behind.


def test_models_get_the_shortest_context_of_them_all(tiny_model: Path, with_bos: Path) -> None:
    found = evaluate_tasks([str(tiny_model), str(with_bos)], ["stories"], folder=FOLDER, threads=1)
    assert [result.context_length for result in found] == [64, 64]
    (alone,) = evaluate_tasks([str(tiny_model)], ["stories"], folder=FOLDER, threads=1, window=32)
    assert alone.context_length == 32
    assert alone.tasks["stories"]["byte_perplexity"] != found[0].tasks["stories"]["byte_perplexity"]


def test_limit_takes_samples_from_the_start(tiny_model: Path) -> None:
    (found,) = evaluate_tasks([str(tiny_model)], ["colours"], folder=FOLDER, limit=3, threads=1)
    assert found.tasks["colours"]["n_samples"] == 3
    assert found.to_json()["limit"] == 3


def test_two_runs_give_the_same_document(tiny_model: Path) -> None:
    """Few-shot examples and resampled errors are drawn under a seed."""
    first, second = (
        evaluate_tasks([str(tiny_model)], ["colours", "last_word"], folder=FOLDER, num_fewshot=1, threads=1)
        for _ in range(2)
    )
    assert first == second


def test_progress_counts_the_requests(tiny_model: Path) -> None:
    steps: list[Step] = []
    evaluate_tasks([str(tiny_model)], ["stories"], folder=FOLDER, threads=1, on_step=steps.append)
    assert [step.done for step in steps] == [1, 2, 3, 4]
    assert {(step.stage, step.total) for step in steps} == {("answering tasks", 4)}


def test_run_puts_back_what_it_changes_of_the_process(tiny_model: Path, folder: Path) -> None:
    before = (utils.env, logging.getLogger("lm_eval").level, os.environ.get("DISABLE_MULTIPROC"))
    add(folder, "broken", doc_to_text="{{no_such_column}}")
    with pytest.raises(OwlDeployError):
        evaluate_tasks([str(tiny_model)], ["broken"], folder=folder, threads=1)
    assert (utils.env, logging.getLogger("lm_eval").level, os.environ.get("DISABLE_MULTIPROC")) == before


def test_command_says_nothing_on_stderr_and_writes_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, str(home / name))  # read from HOME when it was imported
    monkeypatch.chdir(tmp_path)
    arguments = ("--tasks", "colours,last_word", "--tasks-path", FOLDER, "--threads", "1", "--quiet", "--json")
    done = call("eval", tiny_model, *arguments)
    assert (done.code, done.stderr) == (0, "")
    assert capfd.readouterr() == ("", "")  # of libraries that write past sys.stdout and sys.stderr
    document = done.document
    assert (document["lm_eval"], document["engine"], document["context_length"]) == ("0.4.13", "torch", 512)
    assert set(document["tasks"]) == {"colours", "last_word"}
    assert {"acc", "acc_stderr", "n_samples", "num_fewshot", "sha256"} <= set(document["tasks"]["colours"])
    assert "perplexity" not in document
    assert [path for path in tmp_path.rglob("*") if path != home] == []


# What a task file may not do.


def add(folder: Path, name: str, **keys: Any) -> Path:
    """Write a task that is the one of colours but for some keys."""
    content = {"include": "_colours.yaml", "task": name, "output_type": "multiple_choice"}
    content |= {"doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "{{answer}}"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**content, **keys}))
    return path


CODE: dict[str, dict[str, Any]] = {
    "unsafe_code": {"unsafe_code": True},
    "trust_remote_code": {"dataset_kwargs": {"trust_remote_code": True}},
    "class": {"class": "evil.Task"},
    "custom_dataset": {"custom_dataset": "evil.data"},
    "use_prompt": {"use_prompt": "evil.yaml:prompt"},
    "hf_evaluate": {"metric_list": [{"metric": "acc", "hf_evaluate": True}]},
    "metric ./evil": {"metric_list": [{"metric": "./evil"}]},
}


@pytest.mark.parametrize("reason", CODE)
def test_task_file_that_asks_for_code_is_refused(reason: str, tiny_model: Path, folder: Path) -> None:
    add(folder, "evil", **CODE[reason])
    with pytest.raises(RecipeError, match=rf"evil\.yaml asks for {reason}: no code is run for a task file"):
        evaluate_tasks([str(tiny_model)], ["evil"], folder=folder, threads=1)


@pytest.mark.parametrize("where", ["key", "inside", "included", "mapping"])
def test_function_is_refused_and_its_module_never_imported(where: str, tiny_model: Path, folder: Path) -> None:
    mark = folder / "ran"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\ndef run(*_): return []\n")
    path = add(folder, "evil")
    if where == "included":
        (folder / "_code.yaml").write_text("process_docs: !function code.run\n")
        path.write_text(path.read_text().replace("_colours.yaml", "[_colours.yaml, _code.yaml]"))
    else:
        lines = {
            "key": "process_docs: !function code.run",
            "inside": "metric_list: [{metric: acc, aggregation: !function code.run}]",
            "mapping": "process_docs: !function {a: 1}",
        }
        path.write_text(path.read_text() + lines[where] + "\n")
    with pytest.raises(RecipeError, match="asks for !function: no code is run"):
        evaluate_tasks([str(tiny_model)], ["evil"], folder=folder, threads=1)
    assert not mark.exists()


def test_file_with_code_does_not_spoil_its_neighbours(tiny_model: Path, folder: Path) -> None:
    path = add(folder, "evil")
    path.write_text(path.read_text() + "process_docs: !function code.run\n")
    (found,) = evaluate_tasks([str(tiny_model)], ["colours"], folder=folder, limit=1, threads=1)
    assert list(found.tasks) == ["colours"]


@pytest.mark.parametrize("key", ["doc_to_text", "description"])
def test_template_reaches_no_python_object(key: str, tiny_model: Path, folder: Path) -> None:
    mark = folder / "ran"
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"
    assert "0" in utils.apply_template(escape, {})  # in the harness's own environment it does run
    assert mark.exists()
    mark.unlink()
    add(folder, "evil", **{key: escape})
    with pytest.raises(OwlDeployError, match="SecurityError"):
        evaluate_tasks([str(tiny_model)], ["evil"], folder=folder, threads=1)
    assert not mark.exists()


@pytest.mark.parametrize("source", ["pandas", "./data", "/etc", "code.py", "generator", None, ["json"], {"json": 1}])
def test_data_come_from_known_readers_or_a_hub(source: Any, tiny_model: Path, folder: Path) -> None:
    add(folder, "evil", dataset_path=source)
    with pytest.raises(RecipeError, match=r"has dataset_path .*: use one of json, csv, parquet, text with data_files"):
        evaluate_tasks([str(tiny_model)], ["evil"], folder=folder, threads=1)


@pytest.mark.parametrize("arguments", [{"cache_dir": "elsewhere"}, {"data_dir": "."}, ["data_files"]])
def test_other_arguments_of_the_readers_are_refused(arguments: Any, tiny_model: Path, folder: Path) -> None:
    add(folder, "evil", dataset_kwargs=arguments)
    with pytest.raises(RecipeError, match=r"has dataset_kwargs .*: known are \['data_files', 'delimiter', 'field'\]"):
        evaluate_tasks([str(tiny_model)], ["evil"], folder=folder, threads=1)


@pytest.mark.parametrize("file", ["https://example.org/data.jsonl", "missing.jsonl", "*.jsonl", None])
def test_data_are_files_that_are_here(file: Any, tiny_model: Path, folder: Path) -> None:
    add(folder, "evil", dataset_kwargs={"data_files": {"test": file}})
    with pytest.raises(RecipeError, match=r"names the data .*: there is no file"):
        evaluate_tasks([str(tiny_model)], ["evil"], folder=folder, threads=1)


def test_included_file_lies_in_the_folder(tiny_model: Path, folder: Path) -> None:
    (folder.parent / "outside.yaml").write_text("num_fewshot: 1\n")
    add(folder, "evil", include="../outside.yaml")
    with pytest.raises(RecipeError, match=r"evil\.yaml includes .*outside\.yaml: only files of"):
        evaluate_tasks([str(tiny_model)], ["evil"], folder=folder, threads=1)


def test_files_that_include_each_other_are_refused(tiny_model: Path, folder: Path) -> None:
    (folder / "a.yaml").write_text("include: b.yaml\n")
    (folder / "b.yaml").write_text("include: a.yaml\n")
    with pytest.raises(RecipeError, match="once each"):
        evaluate_tasks([str(tiny_model)], ["colours"], folder=folder, threads=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- list\n", "no mapping"),
        ("task: [", "cannot be read"),
        ("a: !!python/object/apply:os.system [true]\n", "cannot be read"),
        ("task: colours\n", "two files define the task colours"),
    ],
)
def test_damaged_task_file_is_named(text: str, words: str, tiny_model: Path, folder: Path) -> None:
    (folder / "damaged.yaml").write_text(text)
    with pytest.raises(RecipeError, match=words) as caught:
        evaluate_tasks([str(tiny_model)], ["colours"], folder=folder, threads=1)
    assert "damaged.yaml" in str(caught.value)


def test_value_that_contains_itself_is_refused(tiny_model: Path, folder: Path) -> None:
    path = add(folder, "evil")
    path.write_text(path.read_text() + "metadata: &all {inner: *all}\n")
    with pytest.raises(RecipeError, match="contains itself"):
        evaluate_tasks([str(tiny_model)], ["evil"], folder=folder, threads=1)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"doc_to_text": "{{no_such_column}}"}, "task odd cannot be loaded: UndefinedError"),
        ({"no_such_key": 1}, "task odd cannot be loaded: TypeError"),
        ({"output_type": "essay"}, "task odd cannot be loaded"),
        ({"test_split": "nowhere"}, "task odd cannot be loaded: KeyError"),
        ({"num_fewshot": 9}, "the tasks cannot be answered: ValueError"),  # of three examples
    ],
)
def test_task_that_does_not_work_is_one_sentence(
    keys: dict[str, Any], words: str, tiny_model: Path, folder: Path
) -> None:
    add(folder, "odd", **keys)
    with pytest.raises(OwlDeployError, match=words):
        evaluate_tasks([str(tiny_model)], ["odd"], folder=folder, threads=1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"do_sample": True, "temperature": 1.0}, "only greedy text is generated"),
        ({"max_gen_toks": 512}, "asks for 512 new tokens, but the context holds 512"),
    ],
)
def test_text_that_cannot_be_generated_is_refused(
    settings: dict[str, Any], words: str, tiny_model: Path, folder: Path
) -> None:
    add(folder, "odd", output_type="generate_until", generation_kwargs={"until": ["."], **settings})
    with pytest.raises(OwlDeployError, match=words):
        evaluate_tasks([str(tiny_model)], ["odd"], folder=folder, threads=1)


def test_answer_longer_than_the_context_is_refused(tiny_model: Path) -> None:
    with open_language_model(str(tiny_model), 1, 16) as opened:
        model = _Harness(opened, Encoder.open(tiny_model), 16, silent)
        with pytest.raises(OwlDeployError, match="an answer of 17 tokens, but 1 to 16 fit the context"):
            model._loglikelihood_tokens([(None, [5], [6] * 17)])


def test_logits_that_are_not_finite_are_an_error(tiny_model: Path) -> None:
    class Broken:
        name = "broken"

        def logits(self, tokens: NDArray[np.int64], start: int = 0) -> NDArray[np.float32]:
            return np.full((len(tokens) - start, 260), np.nan, dtype=np.float32)

    model = _Harness(Broken(), Encoder.open(tiny_model), 16, silent)
    with pytest.raises(OwlDeployError, match="NaN or Inf"):
        model._loglikelihood_tokens([(None, [5], [6])])


# The command line.


@pytest.fixture
def few_harness_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stand in for the 14683 names of the harness, which take 10 s to read."""
    folder = tmp_path / "harness"
    folder.mkdir()
    for name in ("hellaswag", "winogrande"):
        keys = {"task": name, "dataset_path": "owner/name", "test_split": "test", "output_type": "loglikelihood"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(keys))
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    monkeypatch.setattr(tasks_module, "_harness_tasks", lambda: manager)
    return folder


@pytest.mark.parametrize(("name", "near"), [("colors", "colours"), ("helaswag", "hellaswag")])
@pytest.mark.usefixtures("few_harness_tasks")
def test_unknown_task_is_one_sentence_with_the_nearest(name: str, near: str, tiny_model: Path) -> None:
    done = call("eval", tiny_model, "--tasks", name, "--tasks-path", FOLDER, "--quiet")
    assert (done.code, done.sentence) == (2, f"unknown task {name!r}; did you mean {near}?")


def test_path_is_no_name_of_a_task(tiny_model: Path, few_harness_tasks: Path, tmp_path: Path) -> None:
    """The harness would open it, and import what its !function names."""
    mark, path = tmp_path / "ran", tmp_path / "evil.yaml"
    (tmp_path / "code.py").write_text(f"open({str(mark)!r}, 'w')\ndef run(*_): return []\n")
    path.write_text("task: evil\nprocess_docs: !function code.run\n")
    done = call("eval", tiny_model, "--tasks", str(path), "--quiet")
    assert done.code == 2
    assert "unknown task" in done.sentence
    assert not mark.exists()


@pytest.mark.parametrize("name", ["remote", "hellaswag"])
@pytest.mark.usefixtures("few_harness_tasks")
def test_data_of_a_hub_that_is_not_asked_is_one_sentence(
    name: str, tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(folder, "remote", dataset_path="owner/name", dataset_kwargs={})
    # What --offline sets is read when these are imported, which this process did long ago.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = call("eval", tiny_model, "--tasks", name, "--tasks-path", folder, "--offline", "--quiet")
    assert done.code == 1
    assert done.sentence.startswith(f"task {name} cannot be loaded: ")
    assert "owner/name" in done.sentence


def test_table_shows_models_side_by_side(tiny_model: Path, artifact: Path) -> None:
    arguments = ("--tasks", "colours,continue", "--tasks-path", FOLDER, "--threads", "1", "--quiet", "--limit", "2")
    done = call("eval", tiny_model, artifact, *arguments)
    assert done.code == 0
    (row,) = (line.split() for line in done.stdout.splitlines() if " acc " in line)
    assert row.count("±") == 2
    assert "exact_match,stripped" in done.stdout
    assert "onnxruntime" in done.stdout
    assert "lm-eval 0.4.13, context of 512 tokens" in done.stdout


def test_perplexity_is_measured_too_where_a_text_is_given(tiny_model: Path) -> None:
    arguments = ("--tasks", "stories", "--tasks-path", FOLDER, "--text", TEXT, "--window", "64", "--max-windows", "1")
    document = call("eval", tiny_model, *arguments, "--threads", "1", "--quiet", "--json").document
    assert document["perplexity"] > 1
    assert document["context_length"] == document["window"] == 64
    assert document["tasks"]["stories"]["n_samples"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--limit", "3"), "need --tasks"),
        (("--num-fewshot", "1"), "need --tasks"),
        (("--tasks-path", FOLDER), "need --tasks"),
        (("--tasks", ","), "need --tasks"),
        (("--tasks", "colours", "--max-windows", "1"), "add --text"),
        (("--tasks", "colours", "--reference", "x"), "add --text"),
        (("--tasks", "colours", "--limit", "0"), "--limit"),
    ],
)
def test_flags_that_do_not_fit_are_a_usage_error(arguments: tuple[Any, ...], words: str, tiny_model: Path) -> None:
    done = call("eval", tiny_model, *arguments)
    assert done.code == 2
    assert words in done.stderr


def test_missing_folder_is_named(tiny_model: Path) -> None:
    done = call("eval", tiny_model, "--tasks", "colours", "--tasks-path", "nowhere", "--quiet")
    assert (done.code, done.sentence) == (1, "no folder of tasks at nowhere")


def test_missing_harness_names_the_extra(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "owl_deploy.tasks")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = call("eval", tiny_model, "--tasks", "colours", "--quiet")
    expected = "lm_eval is not installed: pip install 'owl-deploy[tasks]' brings what --tasks needs"
    assert (done.code, done.sentence) == (1, expected)
