"""A GGUF file in the real llama.cpp, on the CPU: tokenization, logits at every position, generated text.

Attention is computed without flash attention and with an F32 cache, so that what is measured is the file and not
the runtime's shortcuts; results do not depend on the number of threads.
"""

from __future__ import annotations

import codecs
import ctypes
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from llm_quantize import events
from llm_quantize.errors import (
    IntegrityError,
    LlmQuantizeError,
    MalformedInputError,
    MissingExtraError,
    ResourceError,
    UnsupportedError,
    UsageError,
    install_command,
)
from llm_quantize.events import EventSink, ignore
from llm_quantize.io.artifact_files import first_file
from llm_quantize.models.chat_template import ChatTemplate
from llm_quantize.models.ctranslate2 import is_ctranslate2
from llm_quantize.runtimes.base import (
    TALK_CONTEXT,
    Answered,
    Prompt,
    Request,
    Stopwatch,
    Timer,
    Written,
    is_model_directory,
    retokenized,
    talk,
    warn_beyond,
)
from llm_quantize.runtimes.llama_cpp_library import Batch, ChatMessage, Library, load_library
from llm_quantize.runtimes.threads import idle_threads

LABEL = "llama.cpp"
OPENS = "GGUF files"
TAKES = frozenset({"context", "gpu_layers"})
VARIABLE = ""
timer: Timer | None = None  # it is held open, and timed in evaluation/speed.py

_MAX_BATCH = 512
_NOT_ITS_OWN = (
    "jinja2 is not installed: the chat is set in llama.cpp's built-in template of this family, which may differ from "
    "the model's own; " + install_command("llamacpp")
)
_DECODE_PROBLEMS = {1: "no free place in the cache", 2: "aborted"}


class LlamaCpp:
    """One model and one context in llama.cpp. Use it as a context manager, or call ``close``.

    ``path``: a GGUF file (the first one, if it is split). ``context``: the most tokens of one sequence; ``trained``:
    no more than the model was trained for. ``threads``: None means as many as find an idle processor (threads.py).
    ``gpu_layers``: computed by a GPU.

    Raises: MissingExtraError, UnsupportedError (another interface, or an architecture llama.cpp does not know),
    MalformedInputError (llama.cpp refuses the file; its own words are in the message), UsageError (no such file,
    bad numbers), ResourceError (no memory for the context).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context: int = 512,
        trained: bool = False,
        threads: int | None = None,
        gpu_layers: int = 0,
    ) -> None:
        self._model: int | None = None
        self._context: int | None = None
        self._batch: Batch | None = None
        self.path = Path(path)
        if context < 1 or (threads is not None and threads < 1):
            raise UsageError("context and threads must be 1 or more", found=f"{context}, {threads}")
        if not self.path.is_file():
            raise UsageError("there is no such file", file=self.path)
        self._library: Library = load_library()
        try:
            self._open(context, trained, threads or idle_threads(), gpu_layers)
        except LlmQuantizeError:
            self.close()
            raise

    def _open(self, context: int, trained: bool, threads: int, gpu_layers: int) -> None:
        call, library = self._library.call, self._library
        library.lines.clear()
        parameters, keep = library.model_parameters(gpu_layers)
        self._model = call.llama_model_load_from_file(os.fsencode(self.path), parameters)
        del keep
        if not self._model:
            words = library.errors()
            kind = UnsupportedError if "unknown model architecture" in words else MalformedInputError
            raise kind("llama.cpp does not load this file", file=self.path, found=words or "no message")
        self._vocab = call.llama_model_get_vocab(self._model)
        self.vocab_size = int(call.llama_vocab_n_tokens(self._vocab))
        self.trained = int(call.llama_model_n_ctx_train(self._model))
        if trained and self.trained > 0:
            context = min(context, self.trained)
        self.context, self.threads = context, threads
        size = min(context, _MAX_BATCH)
        self._context = call.llama_init_from_model(self._model, library.context_parameters(context, size))
        if not self._context:
            raise ResourceError(
                f"llama.cpp cannot make a context of {context} tokens",
                file=self.path,
                found=library.errors() or "no message",
                remedy="ask for a smaller context, or free memory",
            )
        library.check_context(self._context, context, size)
        call.llama_set_n_threads(self._context, threads, threads)
        if call.llama_n_threads(self._context) != threads:
            raise library.changed("the number of threads is not the one that was set")
        self._batch = library.new_batch(size)
        self._batch_size = size

    def close(self) -> None:
        """Give all memory back. May be called again; the object is of no use afterwards."""
        if self._batch is not None:
            self._library.call.llama_batch_free(self._batch)
            self._batch = None
        if self._context:
            self._library.call.llama_free(self._context)
            self._context = None
        if self._model:
            self._library.call.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _alive(self) -> int:
        if self._context is None:
            raise UsageError("this model has been closed", file=self.path)
        return self._context

    @property
    def release(self) -> str:
        """The runtime and its version. Raises importlib's PackageNotFoundError where it is not installed."""
        return f"llama.cpp (xllamacpp {version('xllamacpp')})"

    def metadata(self, key: str) -> str | None:
        """One scalar metadata value of the file as llama.cpp spells it, or None."""
        self._alive()
        call, name = self._library.call, key.encode()
        length = call.llama_model_meta_val_str(self._model, name, None, 0)
        if length < 0:
            return None
        buffer = ctypes.create_string_buffer(length + 1)
        call.llama_model_meta_val_str(self._model, name, buffer, length + 1)
        return buffer.value.decode("utf-8", "replace")

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of ``text``. ``add_special``: begin/end tokens as the model wants them. ``parse_special``:
        special tokens spelled inside ``text`` become those tokens.

        Raises: UnsupportedError (the file has no tokenizer).
        """
        self._alive()
        call, raw = self._library.call, text.encode("utf-8", "surrogatepass")
        if call.llama_vocab_type(self._vocab) == 0:
            raise UnsupportedError("this GGUF file has no tokenizer", file=self.path)
        room = len(raw) + 16
        while True:
            ids = (ctypes.c_int32 * room)()
            count = call.llama_tokenize(self._vocab, raw, len(raw), ids, room, add_special, parse_special)
            if count >= 0:
                return list(ids[:count])
            if -count <= room:
                raise UnsupportedError("llama.cpp cannot tokenize this text", file=self.path, found=len(raw))
            room = -count

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD. ``special``: spell special tokens too."""
        self._alive()
        self._check_ids(ids)
        call, room = self._library.call, 8 * len(ids) + 16
        given = (ctypes.c_int32 * max(1, len(ids)))(*ids)
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = call.llama_detokenize(self._vocab, given, len(ids), buffer, room, False, special)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            room = -count

    def _check_ids(self, ids: Sequence[int]) -> None:
        for index, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise UsageError(
                    f"token {index} is not in the vocabulary",
                    file=self.path,
                    expected=f"0 to {self.vocab_size - 1}",
                    found=token,
                )

    def logits(self, ids: Sequence[int], first: int = 0) -> npt.NDArray[np.float32]:
        """Logits after each token of ``ids``, read as one sequence from an empty cache: float32 (n, vocabulary).
        With ``first``, only those after token ``first`` and its followers: (n - first, vocabulary).

        Raises: UsageError (none or more tokens than the context, or an id outside the vocabulary).
        """
        self._reset()
        out = np.empty((len(ids) - first, self.vocab_size), np.float32)
        for start in range(0, len(ids), self._batch_size) if self._fits(ids, 0) else ():
            part = ids[start : start + self._batch_size]
            wanted = start + len(part) > first
            rows = self._decode(part, start, every=wanted)
            if wanted:
                kept = rows[max(0, first - start) :]
                end = start + len(part) - first
                out[end - len(kept) : end] = kept
        return out

    def advance(self, ids: Sequence[int], position: int = 0) -> npt.NDArray[np.float32]:
        """Read ``ids`` behind the ``position`` tokens read before (0: into an emptied cache); logits (vocabulary,)
        after the last one. What generating does between two tokens, for those who time it.

        Raises: UsageError (no tokens, more than the context holds, or an id outside the vocabulary).
        """
        if not ids:
            raise UsageError("there are no tokens to read", file=self.path)
        if position == 0:
            self._reset()
        self._fits(ids, position)
        last: npt.NDArray[np.float32] = np.empty(0, np.float32)
        for start in range(0, len(ids), self._batch_size):
            last = self._decode(ids[start : start + self._batch_size], position + start, every=False)[0]
        return last

    def _reset(self) -> None:
        call = self._library.call
        call.llama_memory_clear(call.llama_get_memory(self._alive()), True)

    def keep(self, count: int) -> int:
        """Forget all that was read but the first ``count`` tokens; how many are left: ``count``, or 0 where the model
        cannot forget a part (one that is recurrent, or has lost the first ones already)."""
        call = self._library.call
        memory = call.llama_get_memory(self._alive())
        if count and call.llama_memory_seq_pos_min(memory, 0) == 0 and call.llama_memory_seq_rm(memory, 0, count, -1):
            return count
        self._reset()
        return 0

    def _fits(self, ids: Sequence[int], used: int) -> bool:
        if not 0 < used + len(ids) <= self.context:
            raise UsageError(
                "the tokens do not fit the context",
                expected=f"1 to {self.context}",
                found=used + len(ids),
                remedy="open the model with a larger context",
            )
        self._check_ids(ids)
        return True

    def _decode(self, ids: Sequence[int], position: int, *, every: bool) -> npt.NDArray[np.float32]:
        """Logits (n, vocabulary) of a batch at ``position``; only the last row if not ``every``."""
        handle, batch, call = self._alive(), self._batch, self._library.call
        if batch is None:
            raise UsageError("this model has been closed", file=self.path)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = 1 if every or i == len(ids) - 1 else 0
        self._library.lines.clear()
        status = call.llama_decode(handle, batch)
        if status != 0:
            reason = _DECODE_PROBLEMS.get(status, f"status {status}")
            words = self._library.errors()
            raise ResourceError("llama.cpp stopped while computing", file=self.path, found=f"{reason} {words}")
        rows = len(ids) if every else 1
        return np.ctypeslib.as_array(call.llama_get_logits(handle), (rows, self.vocab_size)).copy()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        chat: bool = False,
        system: str | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        on_event: EventSink = ignore,
    ) -> Iterator[str]:
        """Pieces of text that continue ``prompt`` (a text, or token ids as they are), ending at an end-of-generation
        token, ``max_tokens`` or a full context. ``temperature`` 0 takes the likeliest token; else one is drawn (PCG64
        of ``seed``), of the likeliest ones that have the share ``top_p`` of the probability.
        ``chat``: the prompt is a user's message, set in the model's own chat template after ``system``. ``on_event``
        hears a warning where prompt and answer may pass the context the model was trained for, and where the template
        is not its own; at the end, how many tokens were written in which time.

        Raises: UsageError (the prompt is empty, or does not fit the context), UnsupportedError (no template).
        """
        if temperature < 0 or not np.isfinite(temperature) or not 0 < top_p <= 1:
            raise UsageError("the temperature must be 0 or more, and top-p a share", found=f"{temperature} and {top_p}")
        if isinstance(prompt, str) and chat:
            with ChatText(self, on_event) as template:
                ids = self.chat_ids(template.text(talk(prompt, system)))
        else:
            ids = self.tokenize(prompt, parse_special=False) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise UsageError("the prompt is empty", remedy="give the text to continue")
        self._fits(ids, 0)
        warn_beyond(len(ids), max_tokens, self.trained, on_event)
        clock = Stopwatch()
        last = self.advance(ids)
        clock.prompt_read(len(ids))
        draw = Draw(temperature, top_p, seed)
        yield from self.written(last, len(ids), max_tokens, draw, clock)
        on_event(clock.told(self.threads))

    def written(
        self,
        last: npt.NDArray[np.float32],
        position: int,
        most: int,
        draw: Callable[[npt.NDArray[np.float32]], int],
        clock: Stopwatch,
        stop: Callable[[], bool] = lambda: False,
    ) -> Generator[str, None, tuple[list[int], str]]:
        """Pieces of the text that follows ``position`` tokens, after which the logits are ``last``; in the end: the
        tokens that were read behind them, and why it ended, as ``Answered`` says it. ``clock`` counts the tokens."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        read: list[int] = []
        end = "limit"
        for step in range(most):
            token = draw(last)
            if self._library.call.llama_vocab_is_eog(self._vocab, token):
                end = "end"
                break
            clock.tokens += 1
            if text := decoder.decode(self._piece(token)):
                yield text
            if stop():
                end = "stopped"
                break
            if position + len(read) >= self.context or step + 1 == most:
                break
            last = self._decode([token], position + len(read), every=False)[0]
            read.append(token)
        if text := decoder.decode(b"", final=True):
            yield text
        return read, end

    def _piece(self, token: int) -> bytes:
        call, room = self._library.call, 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = call.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def token_text(self, token: int) -> str:
        """The text of ``token`` in the vocabulary; "" where it is none."""
        raw = self._library.call.llama_vocab_get_text(self._vocab, token) if token >= 0 else None
        return raw.decode("utf-8", "replace") if raw else ""

    def template(self) -> tuple[bytes, str, str]:
        """The file's own chat template, and its begin and end tokens as text. Raises UnsupportedError: it has none."""
        self._alive()
        call = self._library.call
        raw = call.llama_model_chat_template(self._model, None)
        if raw is None:
            raise UnsupportedError("this model has no chat template", file=self.path, remedy="run without --chat")
        bos, eos = call.llama_vocab_bos(self._vocab), call.llama_vocab_eos(self._vocab)
        return bytes(raw), self.token_text(bos), self.token_text(eos)

    def chat_ids(self, text: str) -> list[int]:
        """Token ids of a chat in its template, which usually writes the begin token itself."""
        bos = self.token_text(self._library.call.llama_vocab_bos(self._vocab))
        return self.tokenize(text, add_special=not (bos and text.startswith(bos)), parse_special=True)

    def known_template(self, template: bytes, messages: Sequence[Mapping[str, str]]) -> str | None:
        """The rendered chat where llama.cpp recognises ``template``, else None."""
        pairs = [ChatMessage(m["role"].encode(), m["content"].encode("utf-8", "surrogatepass")) for m in messages]
        array, room = (ChatMessage * len(pairs))(*pairs), 1024
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self._library.call.llama_chat_apply_template(template, array, len(pairs), True, buffer, room)
            if count < 0:
                return None
            if count <= room:
                return buffer.raw[:count].decode("utf-8", "replace")
            room = count


class ChatText:
    """Chats of ``model`` in its file's own template, rendered as transformers does. Close it, or use it as a context
    manager. ``on_event`` hears a warning where the template is not quite its own.

    llama.cpp itself only recognises families of templates and leaves out what it does not expect (a default system
    message), so that it serves where Jinja is not installed, and a warning says so.

    Raises UnsupportedError: the file has no template.
    """

    def __init__(self, model: LlamaCpp, on_event: EventSink = ignore) -> None:
        self._model, self._on_event = model, on_event
        self._raw, bos, eos = model.template()
        self._missing: MissingExtraError | None = None
        self._template: ChatTemplate | None = None
        try:
            self._template = ChatTemplate(self._raw.decode("utf-8", "replace"), bos=bos, eos=eos, file=model.path)
        except MissingExtraError as error:
            self._missing = error

    def text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """``messages`` with the assistant's turn opened. Raises as ``ChatTemplate.render``, and MissingExtraError where
        there is no Jinja and llama.cpp does not know the template."""
        if self._template is not None:
            return self._template.render(messages)
        known = self._model.known_template(self._raw, messages)
        if known is not None:
            self._on_event(events.Caution(_NOT_ITS_OWN))
            self._on_event = ignore
            return known
        raise self._missing or MissingExtraError("rendering this model's chat template", "llamacpp")

    def close(self) -> None:
        """End the process of the template."""
        if self._template is not None:
            self._template.close()

    def __enter__(self) -> ChatText:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Draw:
    """Tokens drawn from logits, one after another (PCG64 of ``seed``); ``temperature`` 0 takes the likeliest."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._random = np.random.Generator(np.random.PCG64(seed))

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        return _choose(logits, self._temperature, self._random, self._top_p)


class LlamaSession:
    """A conversation with ``model``, as ``Session`` has it: what prompts have in common at their beginning is read
    once."""

    def __init__(self, model: LlamaCpp, template: ChatText, request: Request) -> None:
        self.context = model.context
        self._model, self._template = model, template
        self._draw = Draw(request.temperature, request.top_p, request.seed)
        self._read: list[int] = []

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """As ``Session.prompt``."""
        text = self._template.text(messages)
        return Prompt(text, len(self._model.chat_ids(text)))

    def answer(self, prompt: Prompt, most: int, stop: Callable[[], bool]) -> Generator[str, None, Answered]:
        """As ``Session.answer``. Raises ResourceError where llama.cpp breaks off."""
        model, ids = self._model, self._model.chat_ids(prompt.text)
        clock = Stopwatch()
        # The last one is read again, for the logits after it.
        common = model.keep(_common(self._read, ids[:-1]))
        self._read = ids[:common]
        last: npt.NDArray[np.float32] = np.empty(0, np.float32)
        while len(self._read) < len(ids):
            if stop():
                return Answered(clock.told(model.threads), "stopped", common)
            done = len(self._read)
            part = ids[done : done + _MAX_BATCH]
            last = model.advance(part, done)
            self._read += part
        clock.prompt_read(len(ids) - common)
        read, end = yield from model.written(last, len(ids), most, self._draw, clock, stop)
        self._read += read
        return Answered(clock.told(model.threads), end, common)


def _common(before: Sequence[int], now: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(before, now, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(before), len(now)))


def _choose(
    logits: npt.NDArray[np.float32], temperature: float, random: np.random.Generator, top_p: float = 1.0
) -> int:
    """One token: the likeliest (the first of equals), or a draw from softmax(logits / temperature), from the fewest
    tokens that together have the share ``top_p``."""
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    if top_p < 1:
        falling = np.argsort(-weights, kind="stable")
        reached = np.cumsum(weights[falling])
        weights[falling[np.searchsorted(reached, top_p * reached[-1]) + 1 :]] = 0.0
    total = np.cumsum(weights)
    return int(np.searchsorted(total, random.random() * total[-1], side="right"))


def opens(path: Path) -> bool:
    """Whether ``path`` is no model directory: a file, or the directory of a split one."""
    return not is_model_directory(path) and not is_ctranslate2(path)


def require() -> None:
    """Raises MissingExtraError without xllamacpp, UnsupportedError where its interface is not the one we know."""
    load_library()


def open_model(path: Path, *, context: int, threads: int | None) -> LlamaCpp:
    """The GGUF file at ``path``, or the first of a split one. Raises UsageError, and as ``LlamaCpp``."""
    return LlamaCpp(first_file(path), context=context, threads=threads)


def generate(path: Path, request: Request, on_event: EventSink) -> Iterator[str]:
    """Pieces of text that continue the first prompt, as they are made. Raises as ``LlamaCpp`` and its ``generate``."""
    prompt = request.prompts[0]
    context = request.context or context_for(prompt + (request.system or ""), request.max_tokens)
    with LlamaCpp(first_file(path), context=context, threads=request.threads, gpu_layers=request.gpu_layers) as model:
        yield from model.generate(
            prompt,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            chat=request.chat,
            system=request.system,
            top_p=request.top_p,
            seed=request.seed,
            on_event=on_event,
        )


@contextmanager
def converse(path: Path, request: Request, on_event: EventSink) -> Iterator[LlamaSession]:
    """As ``Runtime.converse``. Raises as ``LlamaCpp``, and UnsupportedError where the file has no chat template."""
    with (
        LlamaCpp(
            first_file(path),
            context=request.context or TALK_CONTEXT,
            trained=request.context is None,
            threads=request.threads,
            gpu_layers=request.gpu_layers,
        ) as model,
        ChatText(model, on_event) as template,
    ):
        yield LlamaSession(model, template, request)


def write(path: Path, request: Request) -> list[Written]:
    """What the model writes after each prompt, greedily. Raises as ``generate``."""
    limit = request.max_tokens
    longest = max(context_for(prompt, limit) for prompt in request.prompts)
    with open_model(path, context=longest, threads=request.threads) as model:

        def plain(text: str) -> list[int]:
            return model.tokenize(text, add_special=False, parse_special=False)

        texts = ["".join(model.generate(prompt, max_tokens=limit)) for prompt in request.prompts]
        return [retokenized(text, plain, limit) for text in texts]


@contextmanager
def predictions(
    path: Path, windows: npt.NDArray[np.integer], *, vocab_size: int, threads: int | None
) -> Iterator[LlamaCpp]:
    """Logits of windows as long as ``windows``. Raises IntegrityError where the file has another vocabulary."""
    with open_model(path, context=windows.shape[1], threads=threads) as model:
        if model.vocab_size != vocab_size:
            raise IntegrityError(
                "the runtime's vocabulary is not the reference model's",
                file=model.path,
                expected=f"{vocab_size} tokens",
                found=f"{model.vocab_size} tokens",
                remedy="give the model that the artifact was made from with --reference",
            )
        yield model


def context_for(prompt: str, max_tokens: int) -> int:
    """A context length that surely holds the prompt (no more tokens than bytes, plus a template) and the answer."""
    return min(32_768, len(prompt.encode("utf-8", "surrogatepass")) + 512 + max_tokens)
