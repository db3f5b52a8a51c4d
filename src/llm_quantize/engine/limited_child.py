"""What runs in a limited process: one function of one module, under limits that the system keeps.

Started by path (``limited.py``), so that nothing but the standard library is imported before the limits stand. Lines
of JSON come and go. The first: {"path": sys.path, "memory": bytes, "module", ...}. Each later one is given to the
module's ``answers(first, asked)``, whose answers are written as they come; "cpu" in it: the seconds that this process
may have used by then. {"too_much": what} is the answer where memory ends.
"""

from __future__ import annotations

import importlib
import json
import resource
import signal
import sys
from typing import IO


def main(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Serve to the end of ``requests``."""
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    first = json.loads(requests.readline())
    sys.path[:] = first["path"]
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":  # elsewhere the address space is no measure of memory
        _limit(resource.RLIMIT_AS, first["memory"])
    answers = importlib.import_module(first["module"]).answers
    for line in requests:
        asked = json.loads(line)
        _limit(resource.RLIMIT_CPU, asked["cpu"])
        try:
            for reply in answers(first, asked):
                replies.write(json.dumps(reply).encode() + b"\n")
        except MemoryError:
            replies.write(b'{"too_much": "memory at its end"}\n')
        replies.flush()


def _limit(kind: int, value: int) -> None:
    """Set the soft limit, which may be raised again, as far as the hard one allows."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
