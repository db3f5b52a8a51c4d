"""What a runtime is to the rest of this package: the Protocol that every module of the table in __init__.py satisfies,
and what it is asked and answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from llm_quantize import events
from llm_quantize.architectures.mapping import AbsentWeightError
from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.events import EventSink
from llm_quantize.formats.foreign import SAID_IN, UnknownCodesError, refuse_side_file
from llm_quantize.formats.packed_formats import PACKED, said_of
from llm_quantize.formats.small_files import MOST_BYTES, is_read
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import inside, refuse_larger
from llm_quantize.models.ctranslate2 import is_ctranslate2
from llm_quantize.models.files import CONFIG_LIMIT, read_config
from llm_quantize.models.opening import open_source

TALK_CONTEXT = 4096
"""Tokens of a conversation where nobody says, and the model was trained for as many."""


@dataclass(frozen=True)
class Timing:
    """What is timed: ``prompt`` tokens read at once into an empty cache; ``new`` tokens written one by one behind
    ``lead`` tokens. Each once to warm up, then ``repeats`` times."""

    prompt: int
    new: int
    lead: int
    repeats: int


@dataclass(frozen=True)
class Request:
    """What a runtime is asked. ``windows``: token ids int32 (windows, length), each scored by itself. ``prompts``:
    texts to continue by up to ``max_tokens``, greedily where ``temperature`` is 0; ``chat``: in the model's own
    template, after ``system``, a message of its own, if there is one. ``top_p``: the likeliest tokens that have this
    share of the probability are drawn from. ``context``: the most tokens of prompt and answer; None: what they need.
    ``gpu_layers``: how many are computed by a GPU. ``dtype``: of the computation, as torch calls it, or "auto".
    ``threads`` None: as many as find an idle processor (threads.py). ``timing``: what is timed, before
    all else. ``timeout``: seconds, loading included."""

    windows: npt.NDArray[np.int32] | None = None
    prompts: tuple[str, ...] = ()
    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False
    system: str | None = None
    top_p: float = 1.0
    context: int | None = None
    gpu_layers: int = 0
    dtype: str = "auto"
    threads: int | None = None
    timing: Timing | None = None
    timeout: float = 1800.0

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """A chat that ends with ``prompt``, as templates take it."""
        return talk(prompt, self.system)


def talk(prompt: str, system: str | None = None) -> list[dict[str, str]]:
    """A chat of ``prompt``, after a ``system`` message if there is one."""
    own = [] if system is None else [{"role": "system", "content": system}]
    return [*own, {"role": "user", "content": prompt}]


@dataclass(frozen=True)
class Reply:
    """What a runtime answered. ``logprobs``: natural log-probabilities of the token after each position, float32
    (windows, length, vocabulary). ``texts`` and ``tokens``: the continuations. ``versions`` of its packages,
    ``kernels``: classes that compute the linears, ``seconds``: of load, score and generate, with
    ``threads``. ``timed``: seconds to "read" and to "write" (medians), "memory" and "memory_empty" in bytes, and the
    "cpu_share" of the threads."""

    logprobs: npt.NDArray[np.float32] | None
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    versions: Mapping[str, str]
    kernels: tuple[str, ...]
    seconds: Mapping[str, float]
    threads: int = 1
    timed: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Written:
    """One continuation: its ``text``, its token ``ids``, and whether it ``ended`` before the limit."""

    text: str
    ids: tuple[int, ...]
    ended: bool


@dataclass(frozen=True)
class Prompt:
    """A chat as the runtime reads it: its ``text`` in the model's template, special tokens written out, and how many
    ``tokens`` that is."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Answered:
    """How an answer ended: ``end`` is "end" (the model's own), "limit" (as many tokens as were asked for) or "stopped"
    (by who asked). ``told``: its figures; the prompt's are those of what was read for it, ``reused`` tokens of it were
    in the cache."""

    told: events.Generated
    end: str
    reused: int = 0


class Session(Protocol):
    """A model that stays loaded, and answers one prompt after another. ``context``: the most tokens of a prompt and its
    answer. What it read before is not read again, where its runtime can go on from there."""

    context: int

    def prompt(self, messages: Sequence[Mapping[str, str]], /) -> Prompt:
        """``messages`` with the assistant's turn opened. Raises what rendering the template raises."""
        ...

    def answer(self, prompt: Prompt, most: int, stop: Callable[[], bool], /) -> Generator[str, None, Answered]:
        """Pieces of the answer, of at most ``most`` tokens, as they are written; it ends when ``stop()`` is true."""
        ...


class Predictions(Protocol):
    """A model in its runtime: logits, or log-probabilities, float32 (length, vocabulary) of a window's tokens."""

    def logits(self, ids: list[int], /) -> npt.NDArray[np.float32]: ...


class OpenModel(Protocol):
    """A model that this process holds open and asks token by token, as timing and tasks need it.

    ``context``: the most tokens of one sequence; ``release``: the runtime and its version, for people. ``metadata``:
    one scalar of the artifact under the key that GGUF has for it, or None.
    """

    path: Path
    vocab_size: int
    context: int

    @property
    def release(self) -> str: ...
    def metadata(self, key: str) -> str | None: ...
    def tokenize(self, text: str, *, add_special: bool = ..., parse_special: bool = ...) -> list[int]: ...
    def detokenize(self, ids: Sequence[int], *, special: bool = ...) -> str: ...
    def logits(self, ids: Sequence[int], first: int = ...) -> npt.NDArray[np.float32]: ...
    def advance(self, ids: Sequence[int], position: int = ...) -> npt.NDArray[np.float32]: ...
    def generate(
        self, prompt: str | Sequence[int], *, max_tokens: int = ..., temperature: float = ...
    ) -> Iterator[str]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Opener(Protocol):
    def __call__(self, path: Path, *, context: int, threads: int | None) -> OpenModel: ...


class Timer(Protocol):
    def __call__(self, path: Path, request: Request, /) -> Reply: ...


class Runtime(Protocol):
    """A runtime: one module of this package.

    ``LABEL``: its name for people. ``OPENS``: what it runs, in a few words. ``TAKES``: the fields of a request that not
    every runtime has a use for, and this one has. ``VARIABLE``: of the environment, which
    names its interpreter; "": it runs in this one. ``open_model``: holds a model open in this
    process; None: each request is a process of its own, so that what it refuses is said of that artifact alone, and
    ``timer`` answers one that has a ``timing`` (None: this runtime is not timed).
    """

    LABEL: str
    OPENS: str
    TAKES: frozenset[str]
    VARIABLE: str

    @property
    def open_model(self) -> Opener | None: ...

    @property
    def timer(self) -> Timer | None: ...

    def opens(self, path: Path) -> bool:
        """Whether this runtime is for what lies at ``path``. Raises what reading its configuration raises."""
        ...

    def require(self) -> None:
        """Raises MissingExtraError, with what to install, where the runtime is not there."""
        ...

    def generate(self, path: Path, request: Request, on_event: EventSink) -> Iterator[str]:
        """Pieces of text that continue the first prompt of ``request``."""
        ...

    def converse(self, path: Path, request: Request, on_event: EventSink) -> AbstractContextManager[Session]:
        """The model, held loaded for a conversation. Its tokens are drawn as ``request`` says; prompt and answer have
        ``request.context`` tokens, or TALK_CONTEXT where that is None, but no more than the model was trained for.

        Raises UnsupportedError where it has no chat template, and what loading it raises.
        """
        ...

    def write(self, path: Path, request: Request) -> list[Written]:
        """What the model writes after each prompt of ``request``, greedily."""
        ...

    def predictions(
        self, path: Path, windows: npt.NDArray[np.integer], *, vocab_size: int, threads: int | None
    ) -> AbstractContextManager[Predictions]:
        """The model, to be asked for ``windows`` (n, length) of token ids in their order, each once.

        Raises IntegrityError where it does not predict ``vocab_size`` tokens.
        """
        ...


def is_model_directory(path: Path) -> bool:
    """Whether ``path`` is a Hugging Face model directory, and neither GGUF files that lie beside a configuration nor a
    CTranslate2 model.

    Runtimes follow any link, read any size and break off in their own ways: what our readers refuse is not shown to
    them. Raises AccessError (a link that leaves the directory) and MalformedInputError (config.json, or a tokenizer
    larger than any).
    """
    if not (path.is_dir() and (path / "config.json").is_file()):
        return False
    if is_ctranslate2(path) or (any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))):
        return False
    refuse_hostile(path)
    return True


def refuse_hostile(path: Path) -> None:
    """Raise AccessError for a link that leaves the directory ``path``, MalformedInputError for a config.json, or files
    of a tokenizer, that our readers would not read."""
    for name in sorted(entry.name for entry in path.iterdir() if entry.is_symlink()):
        inside(path, name)
    for entry in path.iterdir():
        if is_read(entry.name) and entry.is_file():
            refuse_larger(entry, MOST_BYTES)
    read_json_object(inside(path, "config.json"), limit_bytes=CONFIG_LIMIT)


def own_format(path: Path) -> str | None:
    """The format of the model directory ``path`` where only its own runtime reads it; else None. Raises what reading
    its configuration raises."""
    said = said_of(read_json_object(inside(path, "config.json"), limit_bytes=CONFIG_LIMIT))
    name = said.get("quant_method") if isinstance(said, dict) else None
    form = PACKED.get(name) if isinstance(name, str) else None
    return form.NAME if form is not None and form.RUNTIME is not None else None


def _refuse_side_file(path: Path) -> None:
    """Raise UnknownCodesError for a quantized model whose settings are not in its config.json."""
    said = said_of(read_config(path)) if path.is_dir() else None
    if isinstance(said, dict) and SAID_IN in said:
        raise refuse_side_file(said, path / "config.json")


def is_torch_directory(path: Path) -> bool:
    """Whether ``path`` is a model directory of those that Transformers and vLLM read. Raises as
    ``is_model_directory``."""
    return is_model_directory(path) and own_format(path) is None


def refuse_incomplete(path: Path, *, tells: bool = True) -> None:
    """Raise MalformedInputError or IntegrityError where a weight of the model in ``path``, or a field of it, is absent,
    UnsupportedError for codes that no runtime knows for what they are.

    Of quantized models runtimes compute with whatever stands in the place of what is absent. What else our reader has
    to say against a model, and every model of a family that it does not know, is the runtime's to judge, if it
    ``tells`` afterwards what it did not fill; else such a model is refused too (UnsupportedError).
    """
    try:
        _refuse_side_file(path)
        open_source(str(path), headers_only=True).checkpoint.close()
    except (AbsentWeightError, UnknownCodesError):
        raise
    except (MalformedInputError, UnsupportedError) as error:
        if tells:
            return
        raise UnsupportedError(
            "whether this model is whole cannot be known here, and its runtime does not tell which weights it found",
            file=path,
            expected="a model that llm-quantize can read, in this runtime",
            found=error.what,
            remedy="run it with --runtime transformers, which tells",
        ) from error


class Stopwatch:
    """The time of a prompt, and of ``tokens`` after it. It begins when it is made."""

    def __init__(self) -> None:
        self.tokens = 0
        self._began = time.monotonic()
        self._read: tuple[int, float] | None = None

    def prompt_read(self, tokens: int) -> None:
        """The prompt, of so many tokens, is read; what follows is writing."""
        now = time.monotonic()
        self._read, self._began = (tokens, now - self._began), now

    def told(self, threads: int) -> events.Generated:
        """What was written until now, with the prompt if that was read."""
        prompt, seconds = self._read or (None, None)
        return events.Generated(self.tokens, time.monotonic() - self._began, threads, prompt, seconds)


def retokenized(text: str, tokenize: Callable[[str], list[int]], limit: int) -> Written:
    """A continuation of at most ``limit`` tokens, whose ids are those of its text."""
    ids = tuple(tokenize(text)) if text else ()
    # A text is tokenized again in fewer tokens than it was written in, if not in the same: near the limit is at it.
    return Written(text, ids, len(ids) < limit * 7 // 8)


def warn_beyond(prompt: int, answer: int, trained: int, on_event: EventSink) -> None:
    """Warn where ``prompt`` and ``answer`` (tokens) may pass the ``trained`` context length; 0: it is not known."""
    if 0 < trained < prompt + answer:
        text = (
            f"{prompt} tokens of prompt and up to {answer} of answer pass the {trained} that the model was trained for"
        )
        on_event(events.Caution(text))
