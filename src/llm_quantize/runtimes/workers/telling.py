"""What the scripts share: they find it beside themselves."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any


def start(main: Callable[[Path, dict[str, Any]], dict[str, Any]]) -> None:
    """``main(folder, request)`` for the folder named on the command line: its reply, or its error, is written there."""
    folder = Path(sys.argv[1])

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # Packages that ask for others raise ImportError, or fail where they read a version.
        missing = isinstance(error, ImportError)
        said = {"type": kind.__name__, "text": str(error), "missing": missing}
        (folder / "error.json").write_text(json.dumps(said), encoding="utf-8")
        traceback.print_exception(kind, error, trace)

    sys.excepthook = tell
    reply = main(folder, json.loads((folder / "request.json").read_text(encoding="utf-8")))
    (folder / "reply.json").write_text(json.dumps(reply), encoding="utf-8")


def versions(*names: str) -> dict[str, str]:
    """Installed versions of ``names``; those that are not installed are left out."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
