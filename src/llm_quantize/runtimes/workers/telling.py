"""What the scripts share: they find it beside themselves."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class IncompleteError(RuntimeError):
    """The model has parameters for which its files hold nothing."""


def start(main: Callable[[Path, dict[str, Any]], dict[str, Any]]) -> None:
    """``main(folder, request)`` for the folder named on the command line: its reply, or its error, is written there."""
    folder = Path(sys.argv[1])

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # Packages that ask for others raise ImportError, or fail where they read a version.
        missing, incomplete = isinstance(error, ImportError), isinstance(error, IncompleteError)
        said = {"type": kind.__name__, "text": str(error), "missing": missing, "incomplete": incomplete}
        (folder / "error.json").write_text(json.dumps(said), encoding="utf-8")
        traceback.print_exception(kind, error, trace)

    sys.excepthook = tell
    reply = main(folder, json.loads((folder / "request.json").read_text(encoding="utf-8")))
    (folder / "reply.json").write_text(json.dumps(reply), encoding="utf-8")


def refuse_unfilled(told: Mapping[str, Any]) -> None:
    """Raise where transformers, as it tells of its loading, left parameters at random values: it only warns.

    IncompleteError: nothing in the files was left over for them. RuntimeError: something was, under names or in a form
    that transformers has no use for, as with the experts of GPTQ and AWQ.
    """
    mismatched = [key[0] for key in told.get("mismatched_keys", ())]
    missing, unused = [*told["missing_keys"], *mismatched], [*told["unexpected_keys"], *mismatched]
    if missing and not unused:
        raise IncompleteError(f"nothing for {len(missing)} parameters ({_some(missing)})")
    if missing:
        raise RuntimeError(
            f"{len(missing)} tensors were left at random values ({_some(missing)}); "
            f"{len(unused)} tensors of the file were not used ({_some(unused)})"
        )


def _some(names: Iterable[str]) -> str:
    """A few of ``names``."""
    return ", ".join(sorted(names)[:3])


class Pieces:
    """A streamer for transformers' ``generate``: text of one sequence, told as soon as its characters are whole.

    ``decode``: token ids to text; ``say``: hears each piece; together they are the text of all ids. ``count``: ids that
    were written. The ids before the last piece are decoded with the new ones, as a tokenizer may write the first word
    of a text without its space.
    """

    def __init__(self, decode: Callable[[list[int]], str], say: Callable[[str], None]) -> None:
        self.decode, self.say = decode, say
        self.ids: list[int] = []
        self.prompt: int | None = None
        self._from, self._told = 0, 0

    @property
    def count(self) -> int:
        return len(self.ids)

    def put(self, value: Any) -> None:
        """Ids of the next tokens, a tensor; those of the prompt come first, once."""
        ids = [int(token) for token in value.flatten().tolist()]
        if self.prompt is None:
            self.prompt = len(ids)
            return
        self.ids += ids
        self._tell(whole=False)

    def end(self) -> None:
        """All that is left, if its characters are whole or not."""
        self._tell(whole=True)

    def _tell(self, *, whole: bool) -> None:
        before = self.decode(self.ids[self._from : self._told])
        now = self.decode(self.ids[self._from :])
        if len(now) > len(before) and (whole or not now.endswith("\ufffd")):
            self.say(now[len(before) :])
            self._from, self._told = self._told, len(self.ids)


def versions(*names: str) -> dict[str, str]:
    """Installed versions of ``names``; those that are not installed are left out."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
