"""Lists the sentences that the program can say, and which of them ``words/messages.ja.json`` lacks or holds in vain.

    scripts/list_words.py             how many there are of each kind, and how many are translated
    scripts/list_words.py --missing   also those that stay English, the most frequent first
    scripts/list_words.py --stale     also the rows of the table that no sentence asks for
    scripts/list_words.py --prune     takes those rows out, for when sentences were changed or removed

Found are the sentences that stand where an error is made (by its class, or by a function that is said to return one),
or where something is told or shown; what is put together elsewhere is not seen.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from llm_quantize.reports.wording import messages, sections

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "llm_quantize"
TABLE = PACKAGE / "reports" / "words" / "messages.ja.json"
KINDS = {
    "error": "the sentence of an error",
    "remedy": "what to do about an error",
    "fact": "what an error expected or found",
    "event": "notes, warnings and stages of a run",
    "shown": "what the command line itself says",
}
_FACTS = {"remedy": "remedy", "expected": "fact", "found": "fact"}
_EVENTS = ("Note", "Caution", "Stage")
_SHOWN = ("said", "shown", "say", "warn", "warn_idle")
_OURS = ("Error", "BadParameter")
_NOT_OURS = ("ValueError", "TypeError", "KeyError", "RuntimeError", "OSError")


def templates(node: ast.expr | None) -> Iterator[str]:
    """The sentences that an expression can be, with {0}, {1}, ... where it has values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        text, count = "", 0
        for part in node.values:
            if isinstance(part, ast.Constant):
                text += str(part.value)
            else:
                text, count = f"{text}{{{count}}}", count + 1
        yield text
    elif isinstance(node, ast.IfExp):
        yield from templates(node.body)
        yield from templates(node.orelse)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for first in templates(node.left):
            yield f"{first}{{{first.count('{')}}}"
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from templates(value)


def error_makers(source: str) -> set[str]:
    """Names of the functions of a module that return an error, by their annotation."""
    return {
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and node.returns is not None
        and ast.unparse(node.returns).endswith("Error")
    }


def sentences(source: str, makers: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """(kind, template) of every sentence in a module that is raised, told or shown where it stands. ``makers``: names
    of the functions that make an error of a sentence."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        given = {word.arg: word.value for word in node.keywords}
        first = node.args[0] if node.args else None
        if (name.endswith(_OURS) and name not in _NOT_OURS) or name in makers:
            yield from (("error", text) for text in templates(first))
            for key, kind in _FACTS.items():
                yield from ((kind, text) for text in templates(given.get(key)))
        elif name in _EVENTS:
            yield from (("event", text) for text in templates(first))
        elif name in _SHOWN:
            for argument in node.args[:2]:
                yield from (("shown", text) for text in templates(argument))


def every_sentence() -> dict[str, Counter[str]]:
    """{kind: {template: how often it is said}} of the whole package."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    sources = [file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))]
    makers = set().union(*map(error_makers, sources))
    for source in sources:
        for kind, text in sentences(source, makers):
            if sum(map(str.isalpha, text)) - text.count("{") > 1:
                found[kind][text] += 1
    return found


def every_text() -> set[str]:
    """Every piece of text of the package that could be a whole sentence, wherever it stands."""
    found: set[str] = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
                found.update(templates(node))
    return found | {text.replace("_", " ") for text in found}  # labels are made of the names of facts


def stale() -> list[str]:
    """The rows of the table, but for click's, that no sentence of the package asks for."""
    said = every_text()
    return sorted(text for text in sections("ja")["ours"] if text not in said)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--missing", action="store_true", help="list what stays English")
    parser.add_argument("--stale", action="store_true", help="list rows that no sentence asks for")
    parser.add_argument("--prune", action="store_true", help="take those rows out of the table")
    options = parser.parse_args()
    known = messages("ja")
    for kind, found in every_sentence().items():
        said = sum(text in known for text in found)
        print(f"{kind}: {said} of {len(found)} are translated ({KINDS[kind]})")
        for text, count in found.most_common() if options.missing else ():
            if text not in known:
                print(f"  {count} {text}")
    if options.stale:
        print("\n".join(stale()))
    if options.prune:
        table, gone = sections("ja"), set(stale())
        table["ours"] = {text: other for text, other in table["ours"].items() if text not in gone}
        TABLE.write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"{len(gone)} rows were taken out")


if __name__ == "__main__":
    main()
