"""Lists the sentences that the program can say, and which of them ``words/messages.ja.json`` lacks or holds in vain.

    scripts/list_words.py                 how many there are of each kind, and how many are translated
    scripts/list_words.py --missing       those that stay English, as JSON {English: ""} to be filled in; what stands
                                          at {0}, {1}, ... and where the sentence is said is written above each
    scripts/list_words.py --fill FILE     puts the filled lines of such a file into the table (lines of // are skipped)
    scripts/list_words.py --stale         the rows of the table that no sentence asks for
    scripts/list_words.py --prune         takes those rows out, for when sentences were changed or removed

Read is every literal text of the package, f-strings with {0}, {1}, ... for their values. Where an error is made, or
something is told or shown, a text of any length is a sentence; the help of commands is read by paragraphs; elsewhere,
where sentences are put together of pieces, what has two words, or a word and values, is one.
``scripts/english_only.json`` names the texts that no terminal shows, or that are no English, each list with its reason.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llm_quantize.reports.wording import messages, sections

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "llm_quantize"
TABLE = PACKAGE / "reports" / "words" / "messages.ja.json"
ENGLISH_ONLY = Path(__file__).with_name("english_only.json")
KINDS = {
    "error": "the sentence of an error",
    "remedy": "what to do about an error",
    "fact": "what an error expected or found",
    "event": "notes, warnings and stages of a run",
    "shown": "what the command line itself says",
    "help": "paragraphs of --help, and lines about options",
    "piece": "all other texts of two words or more, or of a word and values",
}
_FACTS = {"remedy": "remedy", "expected": "fact", "found": "fact"}
_EVENTS = ("Note", "Caution", "Stage")
_SHOWN = ("said", "shown", "say", "warn", "warn_idle")
_HELP = ("write_text", "section")
_HEADED = ("_aligned", "_columns")
_OURS = ("Error", "BadParameter")
_NOT_OURS = ("ValueError", "TypeError", "KeyError", "RuntimeError", "OSError", "AssertionError", "NotImplementedError")
_COMMANDS = ("click.command", "click.group")
_EXAMPLE = "Example: {0}"
"""How a paragraph of help begins that shows a command; one row has them all."""
_NAMED = re.compile(r"\{[a-z_]\w*\}")
_ARTICLE = re.compile(r"(an?|no|not) [A-Za-z]+$")
_WORD = re.compile(r"[A-Za-z][a-z]+")


@dataclass(frozen=True)
class Sentence:
    """A text as the table has it. ``values``: the expressions at {0}, {1}, ...; ``where``: file and line."""

    kind: str
    text: str
    values: tuple[str, ...] = ()
    where: str = ""


def spellings(node: ast.expr | None) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The sentences that an expression can be, with {0}, {1}, ... where it has values, and those values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield _numbered(node.value)
    elif isinstance(node, ast.JoinedStr):
        text, values = "", []
        for part in node.values:
            if isinstance(part, ast.Constant):
                text += str(part.value)
            elif isinstance(part, ast.FormattedValue):
                text += f"{{{len(values)}}}"
                values.append(ast.unparse(part.value))
        yield text, tuple(values)
    elif isinstance(node, ast.IfExp):
        yield from spellings(node.body)
        yield from spellings(node.orelse)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for text, values in spellings(node.left):
            yield f"{text}{{{len(values)}}}", (*values, ast.unparse(node.right))
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from spellings(value)


def _numbered(text: str) -> tuple[str, tuple[str, ...]]:
    """A literal text; one with {names}, which ``str.format`` fills, has numbers instead."""
    names = _NAMED.findall(text)
    for number, name in enumerate(names):
        text = text.replace(name, f"{{{number}}}", 1)
    return text, tuple(name[1:-1] for name in names)


def templates(node: ast.expr | None) -> Iterator[str]:
    """The sentences that an expression can be, with {0}, {1}, ... where it has values."""
    return (text for text, _ in spellings(node))


def error_makers(source: str) -> set[str]:
    """Names of the functions of a module that return an error, by their annotation."""
    return {
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and node.returns is not None
        and ast.unparse(node.returns).endswith("Error")
    }


def paragraphs(help_text: str) -> Iterator[str]:
    """The help of a command as ``cli.help`` asks the table for it: by paragraphs, a block of fixed lines by lines."""
    for block in inspect.cleandoc(help_text).split("\n\n"):
        lines = [line.strip() for line in block.splitlines()]
        told = lines[1:] if lines[0] == "\b" else [" ".join(lines)]
        yield from (text for text in told if not text.startswith("llm-quantize "))


def sentences(source: str, makers: Collection[str] = (), where: str = "") -> Iterator[Sentence]:
    """Every sentence of a module. ``makers``: names of the functions that make an error of a sentence."""
    tree = ast.parse(source)
    passed = _not_said(tree)
    placed: set[int] = set()
    for node in ast.walk(tree):
        for kind, expression in _placed(node, makers):
            placed.update(id(part) for part in _parts(expression))
            yield from _found(kind, expression, where)
        if isinstance(node, ast.FunctionDef) and _is_command(node):
            for text in paragraphs(ast.get_docstring(node) or ""):
                yield Sentence("help", text, where=f"{where}:{node.lineno}")
        for text in _counts(node):
            yield Sentence("piece", text, where=f"{where}:{getattr(node, 'lineno', 0)}")
        for word in _heads(node):
            yield Sentence("shown", word.value, where=f"{where}:{word.lineno}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and id(node) not in passed | placed:
            for one in _found("piece", node, where):
                if _is_piece(one):
                    yield one


def _is_piece(one: Sentence) -> bool:
    """Whether a text that stands anywhere is part of what is said: it has two words, or one and values or an
    article."""
    words = _WORD.findall(re.sub(r"\{\d+\}", " ", one.text))
    if " " not in one.text.strip() or not words:
        return False
    return len(words) > 1 or (bool(one.values) and len(words[0]) > 2) or _ARTICLE.match(one.text) is not None


def _found(kind: str, node: ast.expr | None, where: str) -> Iterator[Sentence]:
    for text, values in spellings(node):
        assert node is not None
        yield Sentence(kind, text, values, f"{where}:{node.lineno}")


def _placed(node: ast.AST, makers: Collection[str]) -> Iterator[tuple[str, ast.expr | None]]:
    """The arguments of a call that are sentences by their place."""
    if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "COMMANDS" and isinstance(node.value, ast.Dict):
        yield from (("help", value) for value in node.value.values)
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS" and isinstance(node.value, ast.Dict):
        yield from (("help", value) for value in node.value.values)
    if not isinstance(node, ast.Call):
        return
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    given = {word.arg: word.value for word in node.keywords}
    first = node.args[0] if node.args else None
    if (name.endswith(_OURS) and name not in _NOT_OURS) or name in makers:
        yield "error", first
        yield from ((kind, given.get(key)) for key, kind in _FACTS.items())
    elif name in _EVENTS:
        yield "event", first
    elif name in _SHOWN:
        yield from (("shown", argument) for argument in node.args[: 1 if name in ("shown", "say") else 2])
    elif name in _HELP:
        yield "help", first
    elif name.lower() in ("option", "argument") and "help" in given:
        yield "help", given["help"]


def _parts(node: ast.expr | None) -> Iterator[ast.AST]:
    """The nodes of one sentence: not what stands within its values."""
    if node is None:
        return
    yield node
    if isinstance(node, ast.JoinedStr):
        yield from (part for part in node.values if isinstance(part, ast.Constant))
    elif isinstance(node, ast.IfExp):
        yield from (*_parts(node.body), *_parts(node.orelse))
    elif isinstance(node, ast.BinOp):
        yield from _parts(node.left)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _parts(value)


def _not_said(tree: ast.Module) -> set[int]:
    """Nodes that are no sentence of their own: docstrings, what programming errors say, pieces of f-strings."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            for part in node.values:
                inner = [part] if isinstance(part, ast.Constant) else ast.walk(part.format_spec or ast.Module([], []))
                found.update(map(id, inner))
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            found.update(map(id, [part for part in _parts(node.left) if next(templates(node), None) is not None]))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (*_NOT_OURS, "re.compile"):
            found.update(id(part) for argument in node.args for part in ast.walk(argument))
        elif isinstance(node, ast.Assert) and node.msg is not None:
            found.update(map(id, ast.walk(node.msg)))
    return found


def _counts(node: ast.AST) -> Iterator[str]:
    """What ``measures.amounts.counted`` makes of a noun: of one, and of several."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "counted":
        nouns = [noun.value for noun in node.args[1:] if isinstance(noun, ast.Constant)]
        yield from (f"{{0}} {noun}" for noun in (nouns if len(nouns) > 1 else [nouns[0], f"{nouns[0]}s"]))


def _heads(node: ast.AST) -> Iterator[Any]:
    """The heads of a table: literal words in a row that ``_HEADED`` makes columns of, that are called labels, or that
    a loop gives to ``said``."""
    rows: list[ast.expr] = []
    if isinstance(node, ast.Call) and ast.unparse(node.func) in _HEADED:
        rows = node.args
    elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "labels":
        rows = [node.value]
    elif isinstance(node, ast.For) and f"said({ast.unparse(node.target)})" in ast.unparse(node):
        rows = [node.iter]
    for row in rows:
        if isinstance(row, ast.Tuple):
            yield from (one for one in row.elts if isinstance(one, ast.Constant) and isinstance(one.value, str))


def _is_command(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(one).startswith(_COMMANDS) for one in node.decorator_list)


@cache
def english_only() -> Mapping[str, Mapping[str, list[str]]]:
    """{reason: {"files": modules, "texts": texts}}: what stays English, and why."""
    found: dict[str, dict[str, list[str]]] = json.loads(ENGLISH_ONLY.read_text(encoding="utf-8"))
    return found


def _sources() -> dict[str, str]:
    return {str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}


@cache
def all_sentences() -> tuple[Sentence, ...]:
    """Every sentence of the package, as often as it is said, but for those that stay English."""
    sources = _sources()
    makers = set().union(*map(error_makers, sources.values()))
    texts = {text for one in english_only().values() for text in one.get("texts", ())}
    files = tuple(name for one in english_only().values() for name in one.get("files", ()))
    found = []
    for name, source in sources.items():
        if name.startswith(files):
            continue
        for one in sentences(source, makers, name):
            letters = sum(map(str.isalpha, re.sub(r"\{\d+\}", "", one.text)))
            if letters > 1 and one.text not in texts:
                found.append(one)
    return tuple(found)


def is_translated(one: Sentence) -> bool:
    """Whether the table has it."""
    return one.text in messages("ja") or one.text.startswith(_EXAMPLE.removesuffix("{0}"))


@cache
def every_text() -> frozenset[str]:
    """Every piece of text of the package that could be a whole sentence, wherever it stands."""
    found: set[str] = set()
    for source in _sources().values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
                found.update(templates(node))
            elif isinstance(node, ast.FunctionDef) and _is_command(node):
                found.update(paragraphs(ast.get_docstring(node) or ""))
            found.update(_counts(node))
    return frozenset(found | {text.replace("_", " ") for text in found})  # labels are made of the names of facts


def stale() -> list[str]:
    """The rows of the table, but for click's, that no sentence of the package asks for."""
    asked = every_text() | {_EXAMPLE}
    return sorted(text for text in sections("ja")["ours"] if text not in asked)


def missing() -> list[Sentence]:
    """What stays English in Japanese, each sentence once, in the order of the files."""
    found = {one.text: one for one in reversed(all_sentences()) if not is_translated(one)}
    return list(reversed(found.values()))


def print_missing() -> None:
    """A file to be filled in: ``--fill`` reads it back."""
    print("{")
    for one in missing():
        values = "; ".join(f"{{{number}}} = {value}" for number, value in enumerate(one.values))
        print(f"// {one.kind}, {one.where}{': ' if values else ''}{values}")
        print(f'{json.dumps(one.text, ensure_ascii=False)}: "",')
    print('"": ""\n}')


def fill(file: Path) -> int:
    """Put the filled rows of ``file`` into the table; the number of them. Raises ValueError for a text that is no
    sentence of the program."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("//")]
    rows = {text: other for text, other in json.loads("\n".join(lines)).items() if text and other}
    table = sections("ja")
    unknown = [text for text in rows if text not in every_text() and text not in table["click"]]
    if unknown:
        raise ValueError(f"the program says no such sentence: {unknown[0]}")
    for text, other in rows.items():
        table["click" if text in table["click"] else "ours"][text] = other
    _write(table)
    return len(rows)


def _write(table: Mapping[str, Mapping[str, str]]) -> None:
    TABLE.write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--missing", action="store_true", help="list what stays English, to be filled in")
    parser.add_argument("--fill", type=Path, metavar="FILE", help="put the filled rows of such a list into the table")
    parser.add_argument("--stale", action="store_true", help="list rows that no sentence asks for")
    parser.add_argument("--prune", action="store_true", help="take those rows out of the table")
    options = parser.parse_args()
    if options.missing:
        print_missing()
    elif options.fill:
        print(f"{fill(options.fill)} rows were put in")
    elif options.stale:
        print("\n".join(stale()))
    elif options.prune:
        table, gone = sections("ja"), set(stale())
        table["ours"] = {text: other for text, other in table["ours"].items() if text not in gone}
        _write(table)
        print(f"{len(gone)} rows were taken out")
    else:
        for kind, meaning in KINDS.items():
            found = {one.text: one for one in all_sentences() if one.kind == kind}
            count = sum(map(is_translated, found.values()))
            print(f"{kind}: {count} of {len(found)} are translated ({meaning})")


if __name__ == "__main__":
    main()
