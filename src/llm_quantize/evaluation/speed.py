"""How fast an artifact runs and how much memory it takes, in its real runtime, on this machine.

Every measurement is made in a child process of its own, so that nothing this process holds is counted, and the child
reads one artifact only. Prompt: ``PROMPT_TOKENS`` tokens in one batch into an empty cache. Generation:
``NEW_TOKENS`` tokens one after another behind a short prompt. Each is run once to warm up and then ``REPEATS`` times;
the median counts. Tokens are taken from the vocabulary at even distances: the arithmetic does not depend on which.

``memory``: the resident set (Linux: VmRSS) of the child after loading and one prompt, nothing subtracted: the weights
that the prompt touched (a mixture of experts may leave some on disk), the cache, the runtime's buffers and the
interpreter; ``memory_empty`` is what the same process held before it loaded anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_quantize.errors import LlmQuantizeError, MalformedInputError, ResourceError, UnsupportedError
from llm_quantize.memory import available_cpus, resident_bytes

if TYPE_CHECKING:
    from llm_quantize.runtimes.base import Runtime, Timing

PROMPT_TOKENS = 256
NEW_TOKENS = 32
REPEATS = 3
LEAST_SHARE = 0.85
_LEAD = 16
_FAILED = 3
_TIMEOUT = 3600


@dataclass(frozen=True)
class Speed:
    """Tokens per second (medians of ``repeats``), with ``threads`` threads in ``runtime``; memory in bytes.

    ``cpu_share``: CPU time that the timed runs got, of what their threads could have had; ``disturbed`` below
    LEAST_SHARE: other work ran on this machine, and the speeds say little.
    """

    prompt_tokens_per_second: float
    generation_tokens_per_second: float
    memory: int
    memory_empty: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    threads: int
    runtime: str
    cpu_share: float

    @property
    def disturbed(self) -> bool:
        return self.cpu_share < LEAST_SHARE


def measure_speed(artifact: str | Path, *, threads: int | None = None) -> Speed:
    """Run an artifact in its usual runtime and time it, all by one clock (runtimes/workers/timing.py): GGUF files in
    llama.cpp, CTranslate2 and MLX models in their owners' packages, other directories in transformers; a child process
    does the work.

    ``threads`` None: every CPU this process may use. Raises MissingExtraError where the runtime is not installed,
    UsageError where there is no such artifact, MalformedInputError (llama.cpp) or UnsupportedError (others) where the
    runtime refuses it or dies of it, and ResourceError where the system ends the child.
    """
    from llm_quantize.runtimes import artifact_at, runtime_for

    path = artifact_at(Path(artifact))
    runtime = runtime_for(path)
    runtime.require()
    if runtime.open_model is None:
        return _timed_alone(runtime, path, threads or available_cpus())
    command = [sys.executable, "-m", "llm_quantize.evaluation.speed", str(path), str(threads or available_cpus())]
    parts = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, parts))}
    try:
        child = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired as error:
        raise ResourceError("measuring the speed took longer than an hour", file=path, remedy="--no-speed") from error
    words = child.stderr.decode("utf-8", "replace").strip()[-2000:]
    if child.returncode == _FAILED:
        raise MalformedInputError("the artifact does not run", file=path, found=words, remedy="leave it out")
    if child.returncode != 0:
        raise ResourceError(
            "the process that measures the speed ended early",
            file=path,
            found=f"status {child.returncode}: {words}",
            remedy="free some memory, or leave the speed out with --no-speed",
        )
    return Speed(**json.loads(child.stdout.splitlines()[-1]))


def _timed_alone(runtime: Runtime, path: Path, threads: int) -> Speed:
    """Timed by a runtime each of whose requests is a process of its own."""
    from llm_quantize.runtimes.base import Request

    asked = Request(timing=_timing(), threads=threads, timeout=_TIMEOUT)
    reply = None if runtime.timer is None else runtime.timer(path, asked)
    if reply is None or reply.timed is None:
        raise UnsupportedError(
            f"the speed of models in {runtime.LABEL} is not measured", file=path, remedy="leave it out, or --no-speed"
        )
    named = next(iter(reply.versions.items()), None)
    return _speed(reply.timed, threads, runtime.LABEL if named is None else f"{runtime.LABEL} {named[1]}")


def time_here(path: Path, threads: int) -> Speed:
    """The measurement itself, in this process, of a model that its runtime holds open."""
    from llm_quantize.runtimes import open_model
    from llm_quantize.runtimes.workers.timing import one_by_one, time_model

    empty = resident_bytes()
    with open_model(path, context=PROMPT_TOKENS + NEW_TOKENS, threads=threads) as model:
        read = model.advance
        timed = time_model(
            read,
            one_by_one(read, lambda token, position: model.advance([token], position)),
            vocabulary=model.vocab_size,
            asked=asdict(_timing()),
            threads=min(threads, available_cpus()),
        )
        return _speed({**timed, "memory_empty": empty}, threads, model.release)


def _timing() -> Timing:
    from llm_quantize.runtimes.base import Timing

    return Timing(PROMPT_TOKENS, NEW_TOKENS, _LEAD, REPEATS)


def _speed(timed: Mapping[str, float], threads: int, runtime: str) -> Speed:
    """What ``time_model`` found, as people read it."""
    return Speed(
        prompt_tokens_per_second=PROMPT_TOKENS / timed["read"],
        generation_tokens_per_second=NEW_TOKENS / timed["write"],
        memory=int(timed["memory"]),
        memory_empty=int(timed["memory_empty"]),
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        repeats=REPEATS,
        threads=threads,
        runtime=runtime,
        cpu_share=timed["cpu_share"],
    )


def _child(arguments: list[str]) -> int:
    path, threads = arguments
    try:
        measured = time_here(Path(path), int(threads))
    except LlmQuantizeError as error:
        sys.stderr.write(f"{error}\n")
        return _FAILED
    sys.stdout.write(json.dumps(asdict(measured)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1:]))
