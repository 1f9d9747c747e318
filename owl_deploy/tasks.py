"""Zero-shot and few-shot tasks, by EleutherAI's lm-evaluation-harness (`lm_eval`).

In: checkpoints and artifacts, names of tasks, perhaps a folder of task files. Out: one
`TaskEvaluation` per model. Prompts, metrics and aggregation are the harness's own; here is only how
a model answers its requests, and what a task file may ask for: data, never code.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from numpy.typing import NDArray

from owl_deploy.artifact import is_artifact, open_artifact
from owl_deploy.errors import OwlDeployError, RecipeError, UnsupportedModelError
from owl_deploy.evaluation import LanguageModel, log_likelihoods, open_encoder, open_language_model
from owl_deploy.progress import OnStep, Step, silent
from owl_deploy.text import Encoder
from owl_deploy.threads import resolve_threads

try:
    import datasets
    import lm_eval
    from lm_eval import utils
    from lm_eval.api import metrics as _  # noqa: F401  (fills the registry)
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import metric_registry
    from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS, DEFAULT_MAX_LENGTH, DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise OwlDeployError(
        f"{error.name} is not installed: pip install 'owl-deploy[tasks]' brings what --tasks needs"
    ) from error

__all__ = ["TaskEvaluation", "evaluate_tasks"]

# Resamples of the metrics whose standard error has no closed form. The harness's own default of
# 100000 takes minutes per metric in one process, and its process pool prints.
_BOOTSTRAP_RESAMPLES = 1000
_READERS = ("json", "csv", "parquet", "text")
"""Data that a task file may bring: the readers of `datasets` that cannot hold code (`pandas` reads pickles)."""
_READER_ARGUMENTS = {"data_files", "field", "delimiter"}
_CODE_KEYS = {"class", "custom_dataset", "hf_evaluate", "trust_remote_code", "unsafe_code", "use_prompt"}
"""Keys of a task file by which the harness or its libraries load code."""


@dataclass(frozen=True)
class TaskEvaluation:
    """What one model reached in every task, with the settings that the numbers depend on."""

    tasks: dict[str, dict[str, Any]]
    """Task -> its metrics, their `_stderr`, `n_samples`, `num_fewshot`, and `sha256` of prompts and targets."""
    engine: str
    context_length: int
    """Tokens; what does not fit is cut off at the left."""
    limit: int | None
    lm_eval: str
    """Version of the harness."""

    def to_json(self) -> dict[str, Any]:
        """Return the part of the document of `owl-deploy eval --json` that tells of tasks."""
        return {
            "engine": self.engine,
            "lm_eval": self.lm_eval,
            "context_length": self.context_length,
            **({} if self.limit is None else {"limit": self.limit}),
            "tasks": self.tasks,
        }


def evaluate_tasks(
    models: Sequence[str],
    names: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    window: int | None = None,
    threads: int | Literal["auto"] = "auto",
    offline: bool = False,
    on_step: OnStep = silent,
) -> list[TaskEvaluation]:
    """Let every model answer the same tasks.

    All models get the same context length, the shortest of theirs, so that none sees more of a long
    document than another. Few-shot examples are drawn with the harness's own seed (1234).

    Args:
        models: checkpoints or artifacts, by path or name.
        names: tasks of `folder`, or of the harness (its groups and tags too).
        folder: task files (YAML) with their data; they win over tasks of the harness.
        limit: samples of each task, from its start.
        num_fewshot: examples before each question; a task that says 0 itself keeps it, as in the harness.
        window: longest context in tokens, where it is to be shorter than the models'.
        threads: of torch and the engines.
        offline: never ask a hub for a model; data sets obey HF_HUB_OFFLINE, which the command line sets.

    Returns:
        One evaluation per model, in order.

    Raises:
        RecipeError: a task is unknown, or its file asks for code.
        OwlDeployError: a task cannot be loaded or answered.
    """
    n_threads = resolve_threads(threads).n
    context_length = min([*(_context_length(m, offline=offline) for m in models), *([window] if window else [])])
    with _quiet(), tempfile.TemporaryDirectory(prefix="owl-deploy-") as cache:
        loaded = _load(list(dict.fromkeys(names)), folder, Path(cache), on_step)
        results = []
        for model in models:
            _set_fewshot(loaded["tasks"], num_fewshot)
            encoder = open_encoder(model, offline=offline)
            with open_language_model(model, n_threads, context_length, offline=offline) as opened:
                harness = _Harness(opened, encoder, context_length, on_step)
                try:
                    found = evaluate(harness, loaded, limit=limit, bootstrap_iters=_BOOTSTRAP_RESAMPLES)
                except (OwlDeployError, MemoryError):
                    raise
                except Exception as error:  # the harness, its metrics and templates raise whatever they like
                    raise OwlDeployError(f"the tasks cannot be answered: {_words(error)}") from error
                results.append(TaskEvaluation(_figures(found), opened.name, context_length, limit, lm_eval.__version__))
    return results


class _Harness(TemplateLM):  # type: ignore[misc, unused-ignore]
    """Answers the harness's requests by a `LanguageModel`, as the harness's own Hugging Face model does.

    Context and continuation are encoded as one text and cut where the context alone would end
    (`TemplateLM._encode_pair`); a text without context stands behind BOS, or EOS where there is none.
    """

    def __init__(self, model: LanguageModel, encoder: Encoder, context_length: int, on_step: OnStep) -> None:
        super().__init__()
        prefix = encoder.bos_token_id if encoder.bos_token_id is not None else encoder.eos_token_id
        if prefix is None:
            raise UnsupportedModelError("the tokenizer names neither a BOS nor an EOS token: tasks need one of them")
        self.model = model
        self.encoder = encoder
        self.context_length = context_length
        self.on_step = on_step
        self._prefix = prefix
        self._prefix_text = encoder.tokenizer.decode([prefix], skip_special_tokens=False)

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        return self._prefix if self.encoder.eos_token_id is None else self.encoder.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Return the token that stands before a text without context."""
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; BOS as the tokenizer sets it, but never twice."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        return [int(token) for token in self.encoder.encode(string, special_tokens=add_special_tokens)]

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return of each continuation its log-probability and whether greedy decoding would give it."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score token pairs in an order in which neighbours share as long a beginning as possible."""
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])
        for done, i in enumerate(order, start=1):
            _pair, context, continuation = requests[i]
            answers[i] = self._score(context, continuation)
            self.on_step(Step("answering tasks", done, len(order), self.model.name))
        return answers

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Return the log-probability in nats of a continuation, and whether every token of it is the likeliest."""
        n = len(continuation)
        if not 1 <= n <= self.context_length:
            raise OwlDeployError(
                f"a task asks for an answer of {n} tokens, but 1 to {self.context_length} fit the context"
            )
        tokens = np.asarray((context + continuation)[-(self.context_length + 1) :], dtype=np.int64)
        logits = self._logits(tokens[:-1], len(tokens) - 1 - n)
        targets = tokens[-n:]
        return float(log_likelihoods(logits, targets).sum()), bool((logits.argmax(axis=1) == targets).all())

    def _logits(self, tokens: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        logits = self.model.logits(tokens, start)
        if not np.isfinite(logits).all():
            raise OwlDeployError("the model's logits hold NaN or Inf: no task can be answered")
        return logits

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """Return the log-probability of whole documents, in windows of the context length that do not overlap."""
        windows = [
            [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.context_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([(None, *window) for document in windows for window in document]))
        return [sum(next(scores)[0] for _ in document) for document in windows]

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """Return greedy continuations, each up to its first stop sequence."""
        contexts = [self.tok_encode(request.args[0]) or [self._prefix] for request in requests]
        answers = [""] * len(requests)
        for done, i in enumerate(sorted(range(len(requests)), key=contexts.__getitem__), start=1):
            answers[i] = self._generate(contexts[i], requests[i].args[1])
            self.on_step(Step("answering tasks", done, len(requests), self.model.name))
        return answers

    def _generate(self, context: list[int], asked: dict[str, Any]) -> str:
        settings = normalize_gen_kwargs(asked, DEFAULT_MAX_GEN_TOKS)
        if settings["do_sample"]:
            raise OwlDeployError(
                "a task asks for sampled text, but only greedy text is generated: set do_sample: false"
            )
        n_new = settings["max_gen_toks"]
        if not 0 < n_new < self.context_length:
            raise OwlDeployError(
                f"a task asks for {n_new} new tokens, but the context holds {self.context_length}: set max_gen_toks"
            )
        decode = self.encoder.tokenizer.decode
        stops = handle_stop_sequences(settings["until"], eos=decode([self.eot_token_id], skip_special_tokens=False))
        tokens = context[-(self.context_length - n_new) :]
        n_prompt, text = len(tokens), ""
        while len(tokens) < n_prompt + n_new:
            token = int(self._logits(np.asarray(tokens, dtype=np.int64), len(tokens) - 1)[-1].argmax())
            if token == self.eot_token_id:
                break
            tokens.append(token)
            text = decode(tokens[n_prompt:], skip_special_tokens=True)
            if any(stop and stop in text for stop in stops):
                break
        return str(postprocess_generated_text(text, stops, None))


def _context_length(model: str, *, offline: bool) -> int:
    """Return the positions of a model; 2048, the harness's fall-back, where its config names none."""
    if is_artifact(Path(model)):
        return open_artifact(Path(model)).facts.max_positions
    from owl_deploy.checkpoint import open_checkpoint

    config = open_checkpoint(model, offline=offline).config
    config = config.get("text_config") or config
    for key in ("n_positions", "max_position_embeddings", "n_ctx"):  # the harness's order
        if isinstance(config.get(key), int):
            return int(config[key])
    return int(DEFAULT_MAX_LENGTH)


# Loading tasks.


def _load(names: Sequence[str], folder: Path | None, cache: Path, on_step: OnStep) -> dict[str, dict[str, Any]]:
    """Build the tasks of a folder from checked data, the others from the harness."""
    local = _local_tasks(folder) if folder is not None else {}
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    harness: Any = None
    for name in names:
        source: Any = name
        if name in local:
            source = _checked(*local[name], cache)
            manager = TaskManager(include_defaults=False)
        else:
            if harness is None:
                on_step(Step("reading the harness's tasks", 0, 1))
                harness = _harness_tasks()
                on_step(Step("reading the harness's tasks", 1, 1))
            manager = harness
            if name not in harness.task_index:  # a path, say, which the harness would open, code and all
                raise RecipeError(f"unknown task {name!r}{_nearest(name, [*local, *harness.all_tasks])}")
        try:
            loaded = manager.load([source])
        except Exception as error:  # a template, a metric, the data, the hub: each has errors of its own
            raise OwlDeployError(f"task {name} cannot be loaded: {_words(error)}") from error
        tasks.update(loaded["tasks"])
        groups.update(loaded.get("groups", {}))
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise RecipeError(f"task {unsafe[0]} runs code that the model writes: it is not run here")
    return {"tasks": tasks, "groups": groups}


def _harness_tasks() -> Any:
    """Return the harness's own tasks: 14683 names, some 10 s of reading."""
    return TaskManager()


@dataclass(frozen=True)
class _Tagged:
    """A YAML value with a tag such as !function, which is not followed."""

    tag: str


class _Loader(yaml.SafeLoader):
    """Plain values only."""


_Loader.add_multi_constructor("!", lambda _loader, suffix, _node: _Tagged(f"!{suffix}"))


def _local_tasks(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Read every task file below a folder: name -> file and content, includes merged."""
    if not folder.is_dir():
        raise OwlDeployError(f"no folder of tasks at {folder}")
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        content = _read(path, folder.resolve(), ())
        name = content.get("task")
        if not isinstance(name, str) or "group" in content:  # something to include, or a group
            continue
        if name in found:
            raise RecipeError(f"two files define the task {name}: {found[name][0]} and {path}")
        found[name] = path, content
    return found


def _read(path: Path, folder: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    """Read one file and what it includes, which must lie in the folder too; local keys win."""
    path = path.resolve()
    if not path.is_relative_to(folder) or path in including:
        raise RecipeError(f"{including[-1] if including else path} includes {path}: only files of {folder}, once each")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"the task file {path} cannot be read: {_words(error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"the task file {path} is no mapping of keys")
    includes = content.pop("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        if not isinstance(include, str):
            raise RecipeError(f"the task file {path} includes {include!r}, which is no file")
        merged.update(_read(path.parent / include, folder, (*including, path)))
    return {**merged, **content}


def _checked(path: Path, content: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Return a task file's content with data made absolute; refuse whatever could make code run."""
    try:
        reason = next(_code(content), None)
    except RecursionError:
        reason = "a value that contains itself"
    if reason is None:
        metrics = content.get("metric_list") or []
        names = [entry.get("metric") if isinstance(entry, dict) else entry for entry in metrics]
        # The harness looks for others in the library evaluate, which runs a script of that name.
        reason = next((f"metric {name}" for name in names if str(name) not in metric_registry), None)
    if reason is not None:
        raise RecipeError(f"the task file {path} asks for {reason}: no code is run for a task file")
    return {**content, "dataset_kwargs": _data(path, content, cache)}


def _code(value: Any) -> Iterator[str]:
    """Yield what in a value could make code run."""
    if isinstance(value, _Tagged):
        yield value.tag
    elif isinstance(value, dict):
        yield from (str(key) for key, inner in value.items() if key in _CODE_KEYS and inner not in (None, False))
        for inner in value.values():
            yield from _code(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _code(inner)


def _data(path: Path, content: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Return the arguments of `datasets.load_dataset`: files beside the task file, or a data set of the hub."""
    source, arguments = content.get("dataset_path"), content.get("dataset_kwargs") or {}
    is_local = source in _READERS
    if not is_local and not (re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) and not Path(str(source)).exists()):
        raise RecipeError(
            f"the task file {path} has dataset_path {source!r}: use one of {', '.join(_READERS)} with data_files, "
            "or OWNER/NAME of a hub"
        )
    allowed = _READER_ARGUMENTS if is_local else {"revision"}
    if not isinstance(arguments, dict) or not allowed.issuperset(arguments):
        raise RecipeError(f"the task file {path} has dataset_kwargs {arguments!r}: known are {sorted(allowed)}")
    if not is_local:
        return dict(arguments)
    files = arguments.get("data_files")
    if isinstance(files, dict):
        files = {split: _data_files(path, some) for split, some in files.items()}
    else:
        files = _data_files(path, files)
    return {**arguments, "data_files": files, "cache_dir": str(cache)}


def _data_files(path: Path, files: Any) -> list[str]:
    """Return data files, named relative to the task file, by their absolute paths."""
    found = []
    for name in files if isinstance(files, list) else [files]:
        file = (path.parent / str(name)).resolve()
        if not file.is_file():
            raise RecipeError(f"the task file {path} names the data {name!r}: there is no file {file}")
        found.append(str(file))
    return found


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "; lm-eval ls tasks lists those of the harness"


def _set_fewshot(tasks: dict[str, Any], num_fewshot: int | None) -> None:
    """Set the number and the seed of examples, by the rules of the harness's `simple_evaluate`."""
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if own != 0 and num_fewshot is not None:
            task.set_config("num_fewshot", num_fewshot)
        elif own is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def _figures(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take the figures of every task and group out of the harness's results.

    Metrics of the filter `none` go by their own name, others as `metric,filter`. The hash is the
    harness's `task_hashes`: SHA-256 over the hashes of document, prompt and target of every sample.
    """
    figures = {}
    for name, results in found["results"].items():
        values = {
            key.removesuffix(",none"): float(value) if math.isfinite(value) else None
            for key, value in results.items()
            if "," in key and isinstance(value, (int, float, np.number))
        }
        samples = found["samples"].get(name)
        figures[name] = {
            **values,
            "n_samples": results["sample_len"],
            "num_fewshot": found["n-shot"].get(name),
            **({"sha256": _samples_sha256(samples)} if samples else {}),
        }
    return figures


def _samples_sha256(samples: Sequence[dict[str, Any]]) -> str:
    return str(utils.hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)))


def _words(error: BaseException) -> str:
    """Say in a line what went wrong inside a library."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from printing, logging, starting processes, counting downloads, and running templates freely."""
    sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    were_bars_off = datasets.are_progress_bars_disabled()
    with contextlib.ExitStack() as stack:
        # The harness's own environment lets a template reach any Python object: {{ ''.__class__ ... }}.
        stack.enter_context(_replaced(utils, "env", sandbox))
        stack.enter_context(_replaced(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False))
        # The harness's bars go to stderr; TQDM_DISABLE works only where it is set before tqdm is imported.
        stack.enter_context(_replaced(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True)))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        multiprocessing = os.environ.get("DISABLE_MULTIPROC")
        os.environ["DISABLE_MULTIPROC"] = "1"
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            if not were_bars_off:
                datasets.enable_progress_bars()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if multiprocessing is None:
                del os.environ["DISABLE_MULTIPROC"]
            else:
                os.environ["DISABLE_MULTIPROC"] = multiprocessing


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
