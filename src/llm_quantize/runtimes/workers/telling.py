"""What the scripts share: they find it beside themselves."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol


class IncompleteError(RuntimeError):
    """The model has parameters for which its files hold nothing."""


class Speaker(Protocol):
    """A model that stays loaded. ``trained``: tokens of context that it was trained for, if that is known."""

    trained: int | None

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids; ``special``: with those that the tokenizer puts around a text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        ...

    def write(self, ids: list[int], most: int, put: Callable[[int], bool]) -> int:
        """Hand the tokens after ``ids`` to ``put``, which is true when there shall be no more; in the end: how many of
        ``ids`` were not read again."""
        ...


def start(
    main: Callable[[Path, dict[str, Any]], dict[str, Any]], speaker: Callable[[dict[str, Any]], Speaker] | None = None
) -> None:
    """``main(folder, request)`` for the folder named on the command line: its reply, or its error, is written there.
    A request with "answers" is for ``speaker(request)``, which is asked again and again (runtimes/session.py)."""
    folder = Path(sys.argv[1])

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # Packages that ask for others raise ImportError, or fail where they read a version.
        missing, incomplete = isinstance(error, ImportError), isinstance(error, IncompleteError)
        said = {"type": kind.__name__, "text": str(error), "missing": missing, "incomplete": incomplete}
        (folder / "error.json").write_text(json.dumps(said), encoding="utf-8")
        traceback.print_exception(kind, error, trace)

    sys.excepthook = tell
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    if speaker is not None and "answers" in request:
        serve(folder, request["answers"], speaker(request))
        return
    (folder / "reply.json").write_text(json.dumps(main(folder, request)), encoding="utf-8")


def serve(folder: Path, answers: int, speaker: Speaker) -> None:
    """Answer the questions on standard input, until there are no more."""
    with open(answers, "w", encoding="utf-8") as out:

        def tell(**line: Any) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        tell(ready={"trained": speaker.trained})
        for number, line in enumerate(sys.stdin):
            asked = json.loads(line)
            ids = speaker.encode(asked["text"], asked["special"])
            tell(read=len(ids))
            if asked["most"]:
                stop = folder / f"stop-{number}"
                tell(done=_answer(speaker, ids, asked["most"], stop, lambda text: tell(said=text)))


def _answer(speaker: Speaker, ids: list[int], most: int, stop: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """One answer, told as it is written; its figures. The prompt's time ends with the first token."""
    pieces = Pieces(speaker.decode, say)
    began = time.monotonic()
    first: list[float] = []

    def put(token: int) -> bool:
        first.append(time.monotonic())
        pieces.add([token])
        return stop.exists()

    reused = speaker.write(ids, most, put)
    pieces.end()
    now = time.monotonic()
    read = first[0] if first else now
    return {
        "tokens": pieces.count,
        "seconds": now - read,
        "prompt": len(ids),
        "prompt_seconds": read - began,
        "reused": reused,
        "stopped": stop.exists(),
    }


def common(before: Sequence[int], now: Sequence[int]) -> int:
    """How many tokens both begin with, without the last of ``now``: the logits after it are wanted."""
    pairs = enumerate(zip(before, now[:-1], strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(before), len(now) - 1))


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
    """Text of one sequence, told as soon as its characters are whole.

    ``decode``: token ids to text; ``say``: hears each piece; together they are the text of all ids. ``count``: ids that
    were written. The ids before the last piece are decoded with the new ones, as a tokenizer may write the first word
    of a text without its space.
    """

    def __init__(self, decode: Callable[[list[int]], str], say: Callable[[str], None]) -> None:
        self.decode, self.say = decode, say
        self.ids: list[int] = []
        self._from, self._told = 0, 0

    @property
    def count(self) -> int:
        return len(self.ids)

    def add(self, ids: Iterable[int]) -> None:
        """The next tokens."""
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
