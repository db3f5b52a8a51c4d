"""A model in a real runtime of another process: one model for each, often under another interpreter.

A runtime that fails to load a model may leave its process unable to load the next one, and some must live beside other
versions of torch than ours; so a script of ``workers/`` runs alone, and speaks by files in a folder:

    request.json, windows.npy     what is asked; token ids int32 (windows, length)
    reply.json, logprobs.npy      what came of it; float32 (windows, length, vocabulary)
    error.json                    the runtime's own exception, word for word
    log                           what it printed

A process that stays, and tells what it writes as it writes it, is that of ``session.py``.

Nothing reaches the network: the hub is told to be offline, and its cache is the folder, gone with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from llm_quantize import events
from llm_quantize.errors import (
    IntegrityError,
    LlmQuantizeError,
    MissingExtraError,
    NumericPolicyError,
    ResourceError,
    UnsupportedError,
    UsageError,
)
from llm_quantize.runtimes.base import Reply, Request, Written
from llm_quantize.runtimes.chat import in_template
from llm_quantize.runtimes.threads import idle_threads

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
    """``request`` answered by ``runtime`` for the model in ``directory``. ``settings``: variables of the environment;
    ``options``: what else the script reads.

    Raises MissingExtraError (not installed), IntegrityError (weights that are not in the files), UnsupportedError (the
    runtime fails; its words are in ``found``), ResourceError (it takes longer than ``request.timeout``),
    NumericPolicyError (its logits are not numbers).
    """
    threads = request.threads or idle_threads()
    talks = [request.messages(prompt) for prompt in request.prompts]
    asked = {
        **basics(directory, request, threads),
        "prompts": list(in_template(directory, talks) if request.chat else request.prompts),
        "max_tokens": request.max_tokens,
        "chat": request.chat,
        "timing": None if request.timing is None else asdict(request.timing),
        **options,
    }
    windows = np.zeros((0, 1), np.int32) if request.windows is None else np.asarray(request.windows, np.int32)
    with tempfile.TemporaryDirectory(prefix="llm-quantize-") as name:
        folder = Path(name)
        np.save(folder / "windows.npy", windows)
        with started(runtime, folder, asked, settings) as child:
            try:
                child.wait(request.timeout)
            except subprocess.TimeoutExpired as error:
                raise ResourceError(
                    f"{runtime.name} took longer than {request.timeout:g} s",
                    file=directory,
                    found=_tail(folder),
                    remedy="give it more time, or fewer tokens",
                ) from error
        if not (folder / "reply.json").is_file():
            raise failure(runtime, folder, directory, child.returncode)
        return _read(folder, runtime, directory, bool(len(windows)), threads)


def basics(directory: Path, request: Request, threads: int) -> dict[str, Any]:
    """What every script is told: the model, and how tokens are computed and drawn."""
    return {
        "directory": str(directory.resolve()),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "dtype": request.dtype,
        "threads": threads,
    }


@contextmanager
def started(
    runtime: Worker,
    folder: Path,
    asked: Mapping[str, Any],
    settings: Mapping[str, str],
    *,
    stdin: int = subprocess.DEVNULL,
    pass_fds: tuple[int, ...] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """The script of ``runtime``, asked what ``asked`` says, at work in ``folder``; it and its children are gone when
    this ends. A signal from the terminal is ours to answer. Raises as ``interpreter``."""
    python = interpreter(runtime)
    (folder / "request.json").write_text(json.dumps(asked), encoding="utf-8")
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    caches = dict.fromkeys(_CACHES, str(folder))
    environment = {**own, **_QUIET, **caches, "OMP_NUM_THREADS": str(asked["threads"]), **settings}
    script = Path(__file__).parent / "workers" / runtime.script
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(
            [python, str(script), str(folder)],
            env=environment,
            stdin=stdin,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=pass_fds,
        )
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):  # all of them have ended by themselves
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def failure(runtime: Worker, folder: Path, directory: Path, status: int) -> LlmQuantizeError:
    """The error for a script that ended with exit ``status``, without what it was asked for."""
    if not (folder / "error.json").is_file():
        return UnsupportedError(
            f"{runtime.name} ended without an answer (exit status {status})", file=directory, found=_tail(folder)
        )
    error_said = json.loads((folder / "error.json").read_text(encoding="utf-8"))
    said = f"{error_said['type']}: {error_said['text']}"
    if error_said["missing"]:
        return runtime.missing(said)
    if error_said["incomplete"]:
        return incomplete(directory, error_said["text"])
    return UnsupportedError(f"{runtime.name} does not run this model", file=directory, found=said)


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
