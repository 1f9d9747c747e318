"""An engine in a child process: loaded, asked, timed and closed through a small protocol.

The child (`owl_deploy/engines/worker`) has its own threads and memory account, and may be run by
another environment's interpreter. A crash or a hang of it is an `EngineFailedError`, never more.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owl_deploy.artifact import OnnxArtifact
from owl_deploy.engines.bridge import bridge_python
from owl_deploy.engines.llama_cpp import LLAMA_CPP
from owl_deploy.engines.openvino import OPENVINO
from owl_deploy.engines.peer import Peer
from owl_deploy.errors import EngineFailedError
from owl_deploy.kernels import library_path

__all__ = ["EngineProcess", "open_engine", "open_worker"]

_WORKER = Path(__file__).resolve().parent / "worker"
# Seconds that a worker gets to end after it has closed its output: a core dump takes a while.
_LAST_WORDS_S = 10.0


class EngineProcess:
    """A running worker. Use `open_engine`; not thread-safe."""

    def __init__(self, engine: str, python: Path, timeout_s: float) -> None:
        self.engine = engine
        self.version = ""
        self.load_ms = 0.0
        self.timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="owl-deploy-")
        self._stderr_path = Path(self._folder.name) / "stderr"
        with self._stderr_path.open("wb") as stderr:
            self._process = subprocess.Popen(
                [str(python), str(_WORKER), engine],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # Its own session: Ctrl-C goes to us alone, and we end the worker.
                start_new_session=True,
                env={**os.environ, "NM_DISABLE_ANALYTICS": "True", "PYTHONDONTWRITEBYTECODE": "1"},
            )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._buffer = b""

    def load(
        self,
        artifact: OnnxArtifact | Peer,
        *,
        threads: int,
        n_tokens: int,
        capacity: int,
        last_logits_only: bool = False,
        batch: int = 1,
        is_serving: bool = False,
    ) -> None:
        """Load an artifact or a peer for calls of `n_tokens` tokens and a cache of `capacity` positions in all.

        Raises:
            EngineUnavailableError: it needs the operator library, and there is none for this machine.
        """
        folder = str((artifact.model if isinstance(artifact, Peer) else artifact.path).resolve())
        # Always the library that is installed here: an artifact brings one too, and its code is not to be trusted.
        operators = str(library_path()) if artifact.facts.weights == "sparse-operator" else None
        answer = self.ask(
            "load",
            artifact=folder,
            threads=threads,
            n_tokens=n_tokens,
            capacity=capacity,
            operators=operators,
            last_logits_only=last_logits_only,
            precision=artifact.facts.precision,
            batch=batch,
            is_serving=is_serving,
        )
        self.version, self.load_ms = answer["version"], answer["load_ms"]

    def forward(self, tokens: NDArray[np.int64], past_len: int) -> NDArray[np.float32]:
        """Run tokens behind `past_len` positions of the cache.

        Returns:
            Logits, float32 (len(tokens), vocab), or (1, vocab) where it was loaded for the last ones only.
        """
        file = Path(self._folder.name) / "logits.npy"
        self.ask("forward", tokens=tokens.tolist(), past_len=past_len, logits=str(file))
        logits: NDArray[np.float32] = np.load(file, allow_pickle=False)
        file.unlink()
        return logits

    def measure(self, tokens: NDArray[np.int64], past_len: int, n_samples: int) -> list[int]:
        """Return nanoseconds of `n_samples` calls, each with `past_len` positions in the cache."""
        ns: list[int] = self.ask("measure", tokens=tokens.tolist(), past_len=past_len, n_samples=n_samples)["ns"]
        return ns

    def generate(self, tokens: NDArray[np.int64], n_new: int, n_samples: int) -> list[list[int]]:
        """Generate greedily behind a prompt, `n_samples` times.

        Returns:
            Nanoseconds per time: `n_new`, from the request to the first token and from each token to the next.
        """
        ns: list[list[int]] = self.ask("generate", tokens=tokens.tolist(), n_new=n_new, n_samples=n_samples)["ns"]
        return ns

    def peak_rss_bytes(self) -> int:
        """Return the high-water mark of the worker's resident memory."""
        return int(self.ask("memory")["peak_rss_bytes"])

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            EngineFailedError: the worker reports an error, is gone, or is silent for `timeout_s`.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps({"command": command, **arguments}) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineFailedError(self._death()) from None
        line = self._line()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EngineFailedError(f"{self.engine} failed at {command}: it answered {line[:100]!r}")
        if "error" in answer:
            raise EngineFailedError(f"{self.engine} failed at {command}: {answer['error']}")
        return answer

    def _line(self) -> bytes:
        """Return the next line of the worker, within the time limit."""
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + self.timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self.kill()
                    raise EngineFailedError(f"{self.engine} gave no answer for {self.timeout_s:g} s and was stopped")
                chunk = stdout.read(1 << 16)
                if chunk == b"":
                    raise EngineFailedError(self._death())
                self._buffer += chunk or b""
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _death(self) -> str:
        """Say how the worker ended, with its last words."""
        try:
            code = self._process.wait(timeout=_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return f"{self.engine} stopped answering and was stopped"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = [line.strip() for line in self._stderr_path.read_text(errors="replace").splitlines() if line.strip()]
        words = f": {lines[-1][:300]}" if lines else ""
        return f"{self.engine} crashed ({how}){words}"

    def kill(self) -> None:
        """End the worker at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the worker and remove its files."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._folder.cleanup()


@contextmanager
def open_worker(engine: str, *, timeout_s: float = 600.0) -> Iterator[EngineProcess]:
    """Start a worker without an artifact.

    Raises:
        EngineUnavailableError: the engine's environment is not here.
    """
    pythons = {"deepsparse": bridge_python, "llama.cpp": LLAMA_CPP.python, "openvino": OPENVINO.python}
    python = pythons[engine]() if engine in pythons else Path(sys.executable)
    process = EngineProcess(engine, python, timeout_s)
    try:
        yield process
    finally:
        process.close()


@contextmanager
def open_engine(
    artifact: OnnxArtifact | Peer,
    *,
    threads: int,
    n_tokens: int,
    capacity: int,
    last_logits_only: bool = False,
    batch: int = 1,
    is_serving: bool = False,
    timeout_s: float = 600.0,
) -> Iterator[EngineProcess]:
    """Start the engine of an artifact or a peer in a child process and load it.

    Args:
        threads: of the engine.
        n_tokens: tokens per call; DeepSparse compiles for it, ONNX Runtime takes any number.
        capacity: cache positions in all, past and new.
        last_logits_only: leave out the logits of all tokens of a call but the last, as generation does.
        batch: equal sequences that a call runs at once; each gets the tokens, and the first one's logits are returned.
        is_serving: for `generate` alone, by the loop of `owl_deploy.serve` where the engine runs several sequences.
        timeout_s: seconds without an answer after which the engine counts as hung.

    Raises:
        EngineUnavailableError: the engine's environment is not here.
        EngineFailedError: it crashed, hung or refused the artifact.
    """
    with open_worker(artifact.facts.target, timeout_s=timeout_s) as process:
        process.load(
            artifact,
            threads=threads,
            n_tokens=n_tokens,
            capacity=capacity,
            last_logits_only=last_logits_only,
            batch=batch,
            is_serving=is_serving,
        )
        yield process
