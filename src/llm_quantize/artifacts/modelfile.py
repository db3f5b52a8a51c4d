"""A Modelfile for Ollama beside a GGUF file: where the file is, its chat template in Ollama's words, how it ends.

All of it follows from the GGUF file: its template, its special tokens, and the settings of its generation_config.json.
Ollama's reference: docs/modelfile.mdx and docs/template.mdx of its repository. Template texts are Go templates; every
fixed text is a quoted string inside an action, so that nothing in it is read as anything else.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from gguf.constants import Keys

from llm_quantize import events
from llm_quantize.artifacts.result import ArtifactResult
from llm_quantize.errors import MalformedInputError, UnsupportedError, UsageError
from llm_quantize.events import EventSink
from llm_quantize.io.gguf_file import MetaValue, read_gguf
from llm_quantize.io.paths import read_limited
from llm_quantize.io.whole_file import write_file
from llm_quantize.models.chat_template import ChatTemplate
from llm_quantize.models.turns import Turns, fit_turns

NO_TEMPLATE = "the chat template cannot be said in Ollama's language, so that the Modelfile has none ({why})"
_MOST_BYTES = 16 << 20
_PARAMETERS = {
    Keys.General.SAMPLING_TEMP: "temperature",
    Keys.General.SAMPLING_TOP_P: "top_p",
    Keys.General.SAMPLING_TOP_K: "top_k",
    Keys.General.SAMPLING_MIN_P: "min_p",
    Keys.General.SAMPLING_PENALTY_REPEAT: "repeat_penalty",
}
_MARKS = (TokenType.CONTROL, TokenType.USER_DEFINED)


@dataclass(frozen=True)
class Modelfile:
    """What stands in one: ``text``. ``unsaid``: why it has no template though the model has one, None otherwise."""

    text: str
    unsaid: str | None = None


def modelfile_path(artifact: Path) -> Path:
    """Beside the GGUF file, under its name."""
    return artifact.with_suffix(".Modelfile")


def create_command(path: Path) -> list[str]:
    """The command that gives the model of a Modelfile to Ollama, under its file's name in Ollama's alphabet."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in path.stem.lower())
    return ["ollama", "create", name.strip("._-") or "model", "-f", str(path)]


def modelfile(artifact: Path) -> Modelfile:
    """The Modelfile of the GGUF file ``artifact``.

    Raises what reading it raises, MissingExtraError (Jinja is not installed) and ResourceError (no process for it).
    """
    metadata = read_gguf(artifact).metadata
    lines = [f"FROM ./{artifact.name}"]
    turns, unsaid = _turns(metadata, artifact)
    if turns is not None:
        lines.append(f'TEMPLATE """{go_template(turns)}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in (() if turns is None else _stops(turns, metadata))]
    for key, name in _PARAMETERS.items():
        if key in metadata:
            lines.append(f"PARAMETER {name} {_number(metadata[key].value)}")
    return Modelfile("\n".join(lines) + "\n", unsaid)


def write_modelfile(artifact: Path, *, replace: bool, on_event: EventSink) -> tuple[Path, str | None]:
    """Write the Modelfile beside ``artifact``, whole or not at all; its path, and why it has no template, if so.

    Another file of that name is left alone, and a warning says so, unless ``replace``. Raises as ``modelfile``, and
    UsageError for a file that is one of several (Ollama takes one), AccessError, BusyError, ResourceError.
    """
    if artifact.is_dir():
        raise UsageError(
            "Ollama takes a model in one file", file=artifact, remedy="leave --split-max-size or --export-ollama out"
        )
    made, path = modelfile(artifact), modelfile_path(artifact)
    data = made.text.encode("utf-8")
    if path.is_file() and not path.is_symlink() and not replace:
        if read_limited(path, _MOST_BYTES) != data:
            on_event(events.Caution(f"{path} is another Modelfile than this one would be, and stays: --overwrite"))
        return path, made.unsaid
    write_file(path, [data], replace=True)
    return path, made.unsaid


def with_modelfile(result: ArtifactResult, *, replace: bool, on_event: EventSink) -> ArtifactResult:
    """``result`` with its Modelfile written; what that could not say is one of its fallbacks. Raises as
    ``write_modelfile``."""
    path, unsaid = write_modelfile(result.path, replace=replace, on_event=on_event)
    told = {} if unsaid is None else {NO_TEMPLATE.format(why=unsaid): [path.name]}
    fallbacks = {**result.fallbacks, **told}
    return dataclasses.replace(result, artifact=result.plan, fallbacks=fallbacks, modelfile=path)


def _turns(metadata: Mapping[str, MetaValue], file: Path) -> tuple[Turns | None, str | None]:
    """The file's template as Ollama can say it, without the begin token that Ollama puts in front; or why it cannot."""
    found = metadata.get(Keys.Tokenizer.CHAT_TEMPLATE)
    if found is None:
        return None, None
    bos, eos = _token(metadata, Keys.Tokenizer.BOS_ID), _token(metadata, Keys.Tokenizer.EOS_ID)

    def opened(day: datetime.datetime) -> ChatTemplate:
        return ChatTemplate(str(found.value), bos=bos, eos=eos, file=file, today=day)

    try:
        turns = fit_turns(opened)
    except UnsupportedError as error:
        return None, f"{error.what}: {error.found}" if error.found else error.what
    except MalformedInputError as error:
        return None, error.what
    adds = metadata.get(Keys.Tokenizer.ADD_BOS)
    if bos and adds is not None and adds.value:
        opening, before = turns.opening.removeprefix(bos), turns.before_system.removeprefix(bos)
        turns = Turns(
            before, turns.after_system, opening, turns.answer, turns.turn, turns.reply, takes_system=turns.takes_system
        )
    return turns, None


def _token(metadata: Mapping[str, MetaValue], key: str) -> str:
    """The text of the special token whose id stands under ``key``, "" where there is none."""
    tokens, index = metadata.get(Keys.Tokenizer.LIST), metadata.get(key)
    if tokens is None or index is None or not 0 <= index.value < len(tokens.value):
        return ""
    return str(tokens.value[index.value])


def go_template(turns: Turns) -> str:
    """``turns`` as a template of Ollama: ``.System`` is the system message, ``.Messages`` holds all of them; where the
    assistant's is the last, the model goes on with it."""
    lines = (
        "{{- $first := true }}",
        "{{- if .System }}BEFORE{{ .System }}AFTER",
        "{{- else }}OPENING",
        "{{- end }}",
        "{{- range $i, $_ := .Messages }}",
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
        '{{- if eq .Role "user" }}',
        "{{- if $first }}{{- $first = false }}{{- else }}TURN{{- end }}{{ .Content }}",
        "{{- if $last }}REPLY{{- end }}",
        '{{- else if eq .Role "assistant" }}ANSWER{{ .Content }}',
        "{{- end }}",
        "{{- end }}",
    )
    parts = {
        "BEFORE": turns.before_system,
        "AFTER": turns.after_system,
        "OPENING": turns.opening,
        "TURN": turns.turn,
        "REPLY": turns.reply,
        "ANSWER": turns.answer,
    }
    return re.sub("[A-Z]{4,}", lambda found: _say(parts[found[0]]), "\n".join(lines))


def _say(text: str) -> str:
    """An action that writes ``text``."""
    return f"{{{{ {_string(text)} }}}}" if text else ""


def _string(text: str) -> str:
    """``text`` as a string of Go, in double quotes on one line. Quotes are escaped, so that three never stand together;
    characters that do not show are spelled."""
    return "".join(c if c == '"' or c.isprintable() else _spelled(c) for c in json.dumps(text, ensure_ascii=False))


def _spelled(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _stops(turns: Turns, metadata: Mapping[str, MetaValue]) -> list[str]:
    """Texts at which an answer ends: the special tokens that stand behind one; else the first line that does. Values of
    parameters have no escapes, so that a text with a quote, or that does not show, is none."""
    tokens, types = metadata.get(Keys.Tokenizer.LIST), metadata.get(Keys.Tokenizer.TOKEN_TYPE)
    marks: set[str] = set()
    if tokens is not None and types is not None:
        pairs = zip(tokens.value, types.value, strict=False)
        marks = {str(token) for token, kind in pairs if kind in _MARKS and str(token).strip()}
    places = {mark: turns.turn.find(mark) for mark in marks if mark in turns.turn}
    first = next((line.strip() for line in turns.turn.splitlines() if line.strip()), "")
    found = sorted(places, key=lambda mark: (places[mark], -len(mark))) or [first]
    return [text for text in found if text and text.isprintable() and '"' not in text]


def _number(value: Any) -> str:
    """A number as people write it: float32 values by their shortest decimals."""
    return f"{value:.7g}"
