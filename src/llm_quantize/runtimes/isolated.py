"""A model in a real runtime of another process: one model for each, often under another interpreter.

A runtime that fails to load a model may leave its process unable to load the next one, and some must live beside other
versions of torch than ours; so a script of ``workers/`` runs alone, and speaks by files in a folder:

    request.json, windows.npy     what is asked; token ids int32 (windows, length)
    reply.json, logprobs.npy      what came of it; float32 (windows, length, vocabulary)
    pieces                        text of the first prompt as it is written, where the script tells it
    error.json                    the runtime's own exception, word for word

Nothing reaches the network: the hub is told to be offline, and its cache is the folder, gone with it.
"""

from __future__ import annotations

import codecs
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from llm_quantize import events
from llm_quantize.errors import (
    IntegrityError,
    MissingExtraError,
    NumericPolicyError,
    ResourceError,
    UnsupportedError,
    UsageError,
)
from llm_quantize.runtimes.base import Reply, Request, Written
from llm_quantize.runtimes.chat import in_template
from llm_quantize.runtimes.threads import idle_threads

__all__ = ["Worker", "continued", "generated", "incomplete", "interpreter", "run", "spoken"]

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Compiling takes minutes, and saves them only for what runs long.
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
POLL_SECONDS = 0.1
_CACHES = ("HF_HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR")


@dataclass(frozen=True)
class Worker:
    """A runtime in a process of its own: its ``name`` as people know it, its ``script`` in workers/, the ``variable``
    of the environment that names its interpreter, the ``packages`` without which it cannot be, and how to get them
    (``remedy``; "": by our ``extra``)."""

    name: str
    script: str
    variable: str
    packages: tuple[str, ...]
    remedy: str = ""
    extra: str = "torch"

    def missing(self, found: str | None = None) -> MissingExtraError:
        """The error that tells how to install this runtime; ``found``: what it said itself."""
        error = MissingExtraError(f"Running a model in {self.name}", self.extra, remedy=self.remedy or None)
        error.found = found
        return error


def interpreter(runtime: Worker) -> str:
    """The Python that has ``runtime``: the one its variable names, or this one.

    Raises MissingExtraError where neither has it, UsageError where the variable names no file.
    """
    named = os.environ.get(runtime.variable)
    if named:
        if not Path(named).is_file():
            remedy = f"let {runtime.variable} name a Python with {runtime.name}, or nothing"
            raise UsageError(f"{runtime.variable} names a file that does not exist", file=named, remedy=remedy)
        return named
    if any(find_spec(package) is None for package in runtime.packages):
        raise runtime.missing()
    return sys.executable


def run(
    runtime: Worker, directory: Path, request: Request, *, settings: Mapping[str, str], options: Mapping[str, Any]
) -> Reply:
    """What ``spoken`` comes to."""
    speaking = spoken(runtime, directory, request, settings=settings, options=options)
    while True:
        try:
            next(speaking)
        except StopIteration as end:
            reply: Reply = end.value
            return reply


def spoken(
    runtime: Worker, directory: Path, request: Request, *, settings: Mapping[str, str], options: Mapping[str, Any]
) -> Generator[str, None, Reply]:
    """Pieces of the text that continues the first prompt, as they are written; in the end: ``request`` answered by
    ``runtime`` for the model in ``directory``. ``settings``: variables of the environment; ``options``: what else the
    script reads.

    Raises MissingExtraError (not installed), IntegrityError (weights that are not in the files), UnsupportedError (the
    runtime fails; its words are in ``found``), ResourceError (it takes longer than ``request.timeout``),
    NumericPolicyError (its logits are not numbers).
    """
    python = interpreter(runtime)
    threads = request.threads or idle_threads()
    talks = [request.messages(prompt) for prompt in request.prompts]
    asked = {
        "directory": str(directory.resolve()),
        "prompts": list(in_template(directory, talks) if request.chat else request.prompts),
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "chat": request.chat,
        "top_p": request.top_p,
        "dtype": request.dtype,
        "threads": threads,
        "timing": None if request.timing is None else asdict(request.timing),
        **options,
    }
    windows = np.zeros((0, 1), np.int32) if request.windows is None else np.asarray(request.windows, np.int32)
    with tempfile.TemporaryDirectory(prefix="llm-quantize-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(asked), encoding="utf-8")
        np.save(folder / "windows.npy", windows)
        own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
        caches = dict.fromkeys(_CACHES, name)
        environment = {**own, **_QUIET, **caches, "OMP_NUM_THREADS": str(threads), **settings}
        script = Path(__file__).parent / "workers" / runtime.script
        yield from _wait([python, str(script), name], environment, folder, runtime, directory, request.timeout)
        return _read(folder, runtime, directory, bool(len(windows)), threads)


def _wait(
    command: list[str], environment: dict[str, str], folder: Path, runtime: Worker, directory: Path, timeout: float
) -> Iterator[str]:
    """Run ``command`` to its end, and tell what it writes meanwhile; it and its children are gone when this returns or
    raises, or is closed."""
    end = time.monotonic() + timeout
    (folder / "pieces").touch()
    whole = codecs.getincrementaldecoder("utf-8")("replace")
    with (folder / "log").open("wb") as log, (folder / "pieces").open("rb") as pieces:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while child.poll() is None:
                if time.monotonic() > end:
                    raise ResourceError(
                        f"{runtime.name} took longer than {timeout:g} s",
                        file=directory,
                        found=_tail(folder),
                        remedy="give it more time, or fewer tokens",
                    )
                with suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_SECONDS)
                if text := whole.decode(pieces.read()):
                    yield text
        finally:
            with suppress(ProcessLookupError):  # all of them have ended by themselves
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if (folder / "reply.json").is_file():
        return
    if not (folder / "error.json").is_file():
        raise UnsupportedError(
            f"{runtime.name} ended without an answer (exit status {child.returncode})",
            file=directory,
            found=_tail(folder),
        )
    error_said = json.loads((folder / "error.json").read_text(encoding="utf-8"))
    said = f"{error_said['type']}: {error_said['text']}"
    if error_said["missing"]:
        raise runtime.missing(said)
    if error_said["incomplete"]:
        raise incomplete(directory, error_said["text"])
    raise UnsupportedError(f"{runtime.name} does not run this model", file=directory, found=said)


def incomplete(directory: Path, found: str) -> IntegrityError:
    """The error for files that leave parameters of the model without values; ``found``: which."""
    return IntegrityError(
        "weights of the model are missing from its files",
        file=directory,
        expected="a value for every parameter",
        found=found,
        remedy="fetch or make the model again; its files are incomplete or of different versions",
    )


def _tail(folder: Path) -> str:
    """The last lines that the runtime printed."""
    lines = (folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-5:])


def _read(folder: Path, runtime: Worker, directory: Path, scored: bool, threads: int) -> Reply:
    reply = json.loads((folder / "reply.json").read_text(encoding="utf-8"))
    logprobs = None
    if scored:
        logprobs = np.load(folder / "logprobs.npy", allow_pickle=False)
        if np.isnan(logprobs).any():
            raise NumericPolicyError(
                f"logits of {runtime.name} are not numbers",
                file=directory,
                found=f"{int(np.isnan(logprobs).any(-1).sum())} of {logprobs[..., 0].size} positions",
                remedy="try another dtype: float16 overflows where bfloat16 does not",
            )
    return Reply(
        logprobs,
        tuple(reply["texts"]),
        tuple(tuple(tokens) for tokens in reply["tokens"]),
        reply["versions"],
        tuple(reply["kernels"]),
        reply["seconds"],
        threads,
        reply.get("timed"),
    )


def generated(reply: Reply) -> events.Generated:
    """How long the first text of ``reply`` took, its prompt included."""
    return events.Generated(len(reply.tokens[0]), reply.seconds.get("generate", 0.0), reply.threads)


def continued(reply: Reply, limit: int) -> list[Written]:
    """The continuations of ``reply``, which was asked for at most ``limit`` tokens each."""
    return [Written(text, ids, len(ids) < limit) for text, ids in zip(reply.texts, reply.tokens, strict=True)]
