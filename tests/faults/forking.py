"""The command line run again and again, each time in a process of its own, faults included (see ``server.py``)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize.io.journal import parse_journal

SERVER = Path(__file__).with_name("server.py")
QUIET_MACHINE = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Outcome:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str
    calls: list[str] | None

    @property
    def events(self) -> list[dict[str, Any]]:
        """The JSON lines on stderr (``--json``)."""
        return [json.loads(line) for line in self.err.splitlines() if line.startswith("{")]

    @property
    def resumed(self) -> int:
        """Units that the run took over from an earlier one."""
        return sum(event["resumed_units"] for event in self.events if event["event"] == "start")

    @property
    def made(self) -> int:
        """Units that the run made."""
        return sum(event["event"] == "progress" for event in self.events)

    @property
    def error(self) -> dict[str, Any]:
        """The error object that ``--json`` prints."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


class CommandLine:
    """A warm process that runs ``llm-quantize`` commands, ``modules`` imported. Use as a context manager."""

    def __init__(self, *modules: str) -> None:
        self.modules = modules

    def __enter__(self) -> CommandLine:
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER), *self.modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **QUIET_MACHINE},
        )
        return self

    def __exit__(self, *_: object) -> None:
        with self._server as server:
            assert server.stdin is not None
            server.stdin.close()

    @property
    def pid(self) -> int:
        """Of the process whose children run the commands."""
        return self._server.pid

    def run(self, *arguments: object, **faults: Any) -> Outcome:
        """Run one command with ``--json``; ``faults`` as server.py describes them."""
        request = {"arguments": ["--json", *map(str, arguments)], **faults}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return Outcome(answer["code"], answer["out"], answer["err"], answer["calls"])


def hashes(directory: Path) -> dict[str, str]:
    """{relative path: SHA-256} of every file under a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def finished(directory: Path) -> dict[str, str]:
    """``hashes`` without what an unfinished run keeps."""
    kept = (".partial", ".journal", ".hidden")
    return {name: value for name, value in hashes(directory).items() if not any(word in name for word in kept)}


def recorded(directory: Path) -> int:
    """Units that the journals under a directory declare done, of artifacts that are not in place yet."""
    count = 0
    placed = {path.name for path in directory.rglob("*")}
    for path in directory.rglob("*.journal"):
        if re.sub(r"\.[0-9a-f]{8}$", "", path.stem) in placed:
            continue
        records, _ = parse_journal(path.read_bytes())
        count += len({record["unit"] for record in records if "unit" in record})
    return count
