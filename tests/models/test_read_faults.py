"""The n-th read of the source fails, for all n: our error with the file, no artifact, and the next run completes it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.cli import run
from tests.cli.test_hostile_cli import copied
from tests.cli.test_hostile_cli import good as good

# Which exit code the failure of a call on the source must end in, whatever call it is.
FAILURES = {errno.EIO: 5, errno.EACCES: 6, errno.EMFILE: 5, errno.ENOMEM: 5, errno.ESTALE: 5}


@contextmanager
def failing_reads(name: str, nth: int, number: int, model: Path) -> Iterator[list[str]]:
    """The ``nth`` call of ``os.name`` on a file of ``model`` raises; the list holds the paths of all such calls."""
    seen: list[str] = []
    real: Callable[..., Any] = getattr(os, name)

    def call(first: Any, *arguments: Any, **options: Any) -> Any:
        path = Path(f"/proc/self/fd/{first}").readlink() if isinstance(first, int) else os.fspath(first)
        if str(path).startswith(str(model)):
            seen.append(str(path))
            if len(seen) == nth:
                raise OSError(number, os.strerror(number))
        return real(first, *arguments, **options)

    setattr(os, name, call)
    try:
        yield seen
    finally:
        setattr(os, name, real)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the file of a descriptor in /proc")
@pytest.mark.parametrize("number", FAILURES, ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("name", ["open", "preadv"])
def test_every_read_fails_once(
    tmp_path: Path, good: Path, capsys: pytest.CaptureFixture[str], name: str, number: int
) -> None:
    model = copied(good, tmp_path / "model")
    words = ["--json", "quantize", str(model), "-q", "Q8_0", "--threads", "1", "-o"]
    with failing_reads(name, 0, number, model) as seen:
        assert run([*words, str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    calls = len(seen)
    assert calls >= 5
    wanted = (tmp_path / "whole" / "model-Q8_0.gguf").read_bytes()
    out = tmp_path / "out"  # kept from one failure to the next: the work that was done stays done
    for nth in range(1, calls + 1):
        with failing_reads(name, nth, number, model) as seen:
            code = run([*words, str(out)])
        result = json.loads(capsys.readouterr().out)
        if len(seen) < nth:  # units finished by earlier runs are not read again
            assert code == 0
            break
        if code == 0:  # what is read last only says how the source looked: the artifact stands, and nothing is lost
            assert (out / "model-Q8_0.gguf").read_bytes() == wanted
            break
        assert (code, result["exit_code"]) == (FAILURES[number],) * 2, result
        assert result["file"] == seen[nth - 1]
        assert result["remedy"]
        assert not list(out.glob("*.gguf"))
    assert run([*words, str(out)]) == 0
    assert (out / "model-Q8_0.gguf").read_bytes() == wanted
    assert [path.name for path in out.iterdir() if path.suffix in (".partial", ".journal")] == []
