"""What Ollama does with a Modelfile: its parser's rules for values, and the part of Go's text/template that ours uses.

From Ollama's sources (parser/parser.go, template/template.go) and Go's documentation of text/template, written anew,
slow and strict: what is not known here is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_COMMANDS = ("from", "license", "template", "system", "adapter", "parameter", "message")
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", '"': '"', "\\": "\\"}


def unquoted(text: str) -> str | None:
    """A value as it is meant; None where it goes on."""
    for mark in ('"""', '"'):
        if text.startswith(mark):
            whole = len(text) >= 2 * len(mark) and text.endswith(mark)
            return text[len(mark) : -len(mark)] if whole else None
    return text


def commands(modelfile: str) -> list[tuple[str, str]]:
    """[(name, value)]: of a parameter, its own name."""
    found, rest = [], modelfile
    while rest := rest.lstrip():
        name, _, rest = rest.partition(" ")
        assert name.lower() in _COMMANDS, name
        if name.lower() == "parameter":
            name, _, rest = rest.lstrip().partition(" ")
        for end in re.finditer(r"\n|\Z", rest):
            value = unquoted(rest[: end.start()].strip())
            if value is not None:
                found.append((name.lower(), value))
                rest = rest[end.end() :]
                break
        else:
            raise AssertionError("a value without an end")
    return found


@dataclass
class _Branch:
    """``if`` and ``else if`` with their lists, or ``range`` with one."""

    kind: str
    arms: list[tuple[str, list[Any]]] = field(default_factory=list)


def execute(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """The text that Ollama gives to the model: messages of one role in a row are one, system messages are also
    ``.System``."""
    collated: list[dict[str, str]] = []
    for message in messages:
        if collated and collated[-1]["role"] == message["role"]:
            collated[-1]["content"] += "\n\n" + message["content"]
        else:
            collated.append(dict(message))
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    told = [{"Role": message["role"], "Content": message["content"]} for message in collated]
    root = {"System": system, "Messages": told}
    nodes, rest = _parsed(list(_tokens(template)))
    assert not rest
    return "".join(_run(nodes, root, [{"$": root}]))


def _tokens(template: str) -> Iterator[tuple[str, str]]:
    """("text" or "action", content), with what - trims taken off."""
    at, trim = 0, False
    while True:
        start = template.find("{{", at)
        text = template[at:] if start < 0 else template[at:start]
        if trim:
            text = text.lstrip(" \t\r\n")
        if start < 0:
            yield "text", text
            return
        inner = start + 2
        if template.startswith("- ", inner):
            text, inner = text.rstrip(" \t\r\n"), inner + 1
        yield "text", text
        end = inner
        while not template.startswith("}}", end):
            string = _STRING.match(template, end)
            end = string.end() if string else end + 1
            assert end < len(template), "an action without an end"
        content = template[inner:end]
        trim = content.endswith(" -")
        yield "action", content.removesuffix(" -").strip()
        at = end + 2


def _parsed(tokens: list[tuple[str, str]]) -> tuple[list[Any], list[tuple[str, str]]]:
    """A list of nodes up to an ``else`` or ``end``, and what follows, it included."""
    nodes: list[Any] = []
    while tokens:
        kind, content = tokens[0]
        word = content.split(" ", 1)[0] if kind == "action" else ""
        if word in ("end", "else"):
            break
        tokens = tokens[1:]
        if word in ("if", "range"):
            branch, condition = _Branch(word), content.partition(" ")[2]
            while True:
                inner, tokens = _parsed(tokens)
                branch.arms.append((condition, inner))
                last = tokens[0][1]
                tokens = tokens[1:]
                if last == "end":
                    break
                assert last.startswith("else")
                condition = last.removeprefix("else").strip().removeprefix("if").strip()
            nodes.append(branch)
        else:
            nodes.append((kind, content))
    return nodes, tokens


def _run(nodes: Sequence[Any], dot: Any, scopes: list[dict[str, Any]]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, _Branch) and node.kind == "range":
            ((head, inner),) = node.arms
            names = re.fullmatch(r"(\$\w+), (\$\w+) := (.+)", head)
            assert names is not None, head
            for index, item in enumerate(_value(names[3], dot, scopes)):
                yield from _run(inner, item, [*scopes, {names[1]: index, names[2]: item}])
        elif isinstance(node, _Branch):
            for condition, inner in node.arms:
                if not condition or _value(condition, dot, scopes):
                    yield from _run(inner, dot, [*scopes, {}])
                    break
        elif node[0] == "text":
            yield node[1]
        elif made := re.fullmatch(r"(\$\w+) (:?=) (.+)", node[1]):
            value = _value(made[3], dot, scopes)
            place = scopes[-1] if made[2] == ":=" else next(one for one in reversed(scopes) if made[1] in one)
            place[made[1]] = value
        else:
            text = _value(node[1], dot, scopes)
            assert isinstance(text, str)
            yield text


def _value(expression: str, dot: Any, scopes: list[dict[str, Any]]) -> Any:
    expression = expression.strip()
    if _STRING.fullmatch(expression):
        return re.sub(r"\\(?:u([0-9a-f]{4})|U([0-9a-f]{8})|(.))", _character, expression[1:-1])
    if expression in ("true", "false"):
        return expression == "true"
    if expression.isdigit():
        return int(expression)
    if expression.startswith("(") and expression.endswith(")"):
        return _value(expression[1:-1], dot, scopes)
    if re.fullmatch(r"\.\w+", expression):
        return dot[expression[1:]]
    if found := re.fullmatch(r"(\$\w*)(?:\.(\w+))?", expression):
        value = next(one[found[1]] for one in reversed(scopes) if found[1] in one)
        return value[found[2]] if found[2] else value
    if found := re.fullmatch(r"eq (\([^\"]*\)|\S+) (\S.*)", expression):
        return _value(found[1], dot, scopes) == _value(found[2], dot, scopes)
    if found := re.fullmatch(r"len (.+)", expression):
        return len(_value(found[1], dot, scopes))
    if found := re.fullmatch(r"slice (\S+) (\S+)", expression):
        return _value(found[1], dot, scopes)[_value(found[2], dot, scopes) :]
    raise AssertionError(f"not known here: {expression!r}")


def _character(found: re.Match[str]) -> str:
    return _ESCAPES[found[3]] if found[3] else chr(int(found[1] or found[2], 16))
