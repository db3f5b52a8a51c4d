"""The pages of --help in the reader's language: click's pages, their sentences through the one table, their columns
measured as a terminal shows them. In English they are click's own, byte for byte."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import click

from llm_quantize.reports.columns import width, wrapped
from llm_quantize.reports.wording import said, speaks_english

_FACTS = re.compile(r"(?:(.*)  )?\[([^\[\]]*)\]", re.DOTALL)
"""What click says of an option by itself stands in brackets after the help, with two blanks between."""
_FACT_DIVIDER = "; "


class Formatter(click.HelpFormatter):
    """click's formatter; what it is given is English."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """The line of usage, arguments under one another where they are many."""
        if speaks_english():
            super().write_usage(prog, args, prefix)
            return
        head = f"{said(prefix or 'Usage:')} {prog} "
        room = max(self.width - width(head), 20)
        lines = wrapped(" ".join(said(word) for word in args.split()), room)
        self._write_lines(head, lines, width(head))

    def write_heading(self, heading: str) -> None:
        """A heading with a colon."""
        super().write_heading(said(heading))

    def write_text(self, text: str) -> None:
        """Paragraphs, each looked up whole; a block of fixed lines line by line."""
        if speaks_english():
            super().write_text(text)
            return
        indent = " " * self.current_indent
        blocks = ["\n".join(self._paragraph(block, indent)) for block in text.split("\n\n")]
        self.write("\n\n".join(blocks) + "\n")

    def _paragraph(self, block: str, indent: str) -> Iterator[str]:
        lines = block.splitlines()
        if lines[0].strip() == "\b":
            for line in lines[1:]:
                inner = line[: len(line) - len(line.lstrip())]
                yield f"{indent}{inner}{said(line.strip())}"
            return
        told = said(" ".join(line.strip() for line in lines))
        yield from (f"{indent}{line}" for line in wrapped(told, self.width - len(indent)))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Names, and what they are beside them."""
        if speaks_english():
            super().write_dl(rows, col_max, col_spacing)
            return
        told = list(rows)
        first = min(max((width(name) for name, _ in told), default=0), col_max) + col_spacing
        at = self.current_indent + first
        for name, text in told:
            head = f"{'':>{self.current_indent}}{name}"
            lines = wrapped(described(text), max(self.width - at, 10))
            if width(name) > first - col_spacing:
                self.write(f"{head}\n")
                head = ""
            self._write_lines(head + " " * (at - width(head)), lines, at)

    def _write_lines(self, head: str, lines: list[str], indent: int) -> None:
        """``head`` and the first line, then the others under it."""
        self.write("\n".join([f"{head}{lines[0]}".rstrip(), *(f"{'':>{indent}}{line}" for line in lines[1:])]) + "\n")


def described(text: str) -> str:
    """What is said of an option or a command, and after it what click adds: the default, the range, whether it must
    be there."""
    found = _FACTS.fullmatch(text)
    if found is None or (found[1] is None and said(text) != text):
        return said(text)
    facts, rest = "、".join(said(fact) for fact in found[2].split(_FACT_DIVIDER)), said(found[1] or "")
    return f"{rest} [{facts}]" if rest.endswith("]") else f"{rest}[{facts}]"


class Context(click.Context):
    """A context whose help is written by ``Formatter``."""

    formatter_class = Formatter
