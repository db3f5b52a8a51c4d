"""What a command takes, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def taken(command: Sequence[str]) -> dict[str, Any]:
    """CPU seconds, those of the system among them, and the largest memory of ``command``, in a process of its own."""
    script = (
        "import json, resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([used.ru_utime, used.ru_stime, used.ru_maxrss * 1024, done.stdout.decode()]))"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], stdout=subprocess.PIPE, check=True)
    user, system, memory, said = json.loads(done.stdout)
    seconds = {"cpu_seconds": round(user + system, 2), "system_seconds": round(system, 2)}
    return {**seconds, "peak_rss": memory, "said": said}
