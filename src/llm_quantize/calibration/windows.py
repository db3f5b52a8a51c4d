"""Windows of token ids to run a model on: full-length, seeded, never the same text twice.

Each data set is one stream of tokens: its documents, an end-of-text token after each (a blank line where the model has
none), because that is how models meet one document after another in training. The stream is cut into windows without
overlap. Where the model begins texts with a token (BOS), that token takes the first place of every window, and only
that place: activations at BOS are unlike all others, and in use it stands nowhere else.

Large data sets are tokenized in parts of a few megabytes of text, in a seeded order and only as far as windows are
asked for; inside a part the windows are in seeded order too. Data sets take turns by weight. So window k depends on
the text, the seed and the length alone: however many are asked for, the first k are the same.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llm_quantize import events
from llm_quantize.calibration.documents import Documents, Message
from llm_quantize.calibration.text import Corpus, Dataset, packed, plain
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.io.journal import canonical_json
from llm_quantize.measures.amounts import counted

PART_CHARACTERS = 4 << 20
_PIECE_CHARACTERS = 1 << 18  # a tokenizer without word boundaries takes more than linear time
_TURN_CHARACTERS = 2000
_TURNS = 4
_BATCH = 1024  # documents tokenized at once
_KNOWN, _KNOWN_CHARACTERS = 1 << 16, 16  # short texts whose ids are remembered: of millions, many are the same
_LEAST_LENGTH = 2

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """What one data set gives: drawn ``windows`` and ``tokens`` (BOS not counted), and how many windows and tokens it
    holds (``exact``, or an estimate while parts of a large set have not been tokenized)."""

    dataset: str
    windows: int
    tokens: int
    available_windows: int
    available_tokens: int
    exact: bool


class Windows:
    """The windows of a corpus. ``ids``: the first ``samples`` of them, int64 (n, length); ``draw`` gives more.

    ``datasets``: names, in the order in which they were given. ``tokens``: n * length. ``sha256``: of ``ids``.
    """

    def __init__(self, streams: Sequence[_Stream], *, samples: int, length: int, bos: int | None) -> None:
        self._streams, self._live = list(streams), list(streams)
        self.length, self.bos = length, bos
        self._drawn: list[tuple[_Stream, npt.NDArray[np.int32]]] = []
        self.datasets = tuple(stream.name for stream in streams)
        self._fill(samples)
        self.samples = len(self._drawn)
        self.ids = self.draw(0, samples)

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def sha256(self) -> str:
        """Of the windows in ``ids``."""
        return self.digest(self.samples)

    @property
    def available(self) -> int:
        """How many windows there are without repeating text (an estimate unless ``exact``)."""
        return sum(stream.available_windows() for stream in self._streams)

    @property
    def exact(self) -> bool:
        return all(stream.exact for stream in self._streams)

    def draw(self, start: int, count: int) -> Ids:
        """Windows start … start + count - 1, int64 (count, length); fewer rows where the text ends before."""
        self._fill(start + count)
        rows = [row for _, row in self._drawn[start : start + count]]
        ids = np.empty((len(rows), self.length), np.int64)
        first = 0
        if self.bos is not None:
            ids[:, 0] = self.bos
            first = 1
        for index, row in enumerate(rows):
            ids[index, first:] = row
        return ids

    def digest(self, count: int) -> str:
        """SHA-256 over the shape and the ids of the first ``count`` windows."""
        ids = self.draw(0, count)
        digest = hashlib.sha256(canonical_json({"windows": 1, "count": len(ids), "length": self.length}))
        digest.update(ids.astype("<i8").tobytes())
        return digest.hexdigest()

    def shares(self, count: int | None = None) -> tuple[Share, ...]:
        """What each data set gave to the first ``count`` windows (None: to those of ``ids``)."""
        drawn = [stream for stream, _ in self._drawn[: self.samples if count is None else count]]
        return tuple(
            Share(
                stream.name,
                drawn.count(stream),
                drawn.count(stream) * stream.body,
                stream.available_windows(),
                stream.available_tokens(),
                stream.exact,
            )
            for stream in self._streams
        )

    def _fill(self, count: int) -> None:
        """Draw until there are ``count`` windows or no text: the stream that is owed the most is next, the first of
        equals; what a stream that has ended was owed passes to the others by their weights."""
        while len(self._drawn) < count and self._live:
            total = sum(stream.weight for stream in self._live)
            for stream in self._live:
                stream.owed += stream.weight / total
            while self._live:
                chosen = max(self._live, key=lambda stream: stream.owed)
                row = chosen.next_window()
                if row is not None:
                    chosen.owed -= 1
                    self._drawn.append((chosen, row))
                    break
                self._live.remove(chosen)


class _Stream:
    """The tokens of one data set, in parts that are tokenized when their turn comes."""

    def __init__(self, name: str, weight: float, pieces: _Pieces, *, body: int, seed: Sequence[int]) -> None:
        self.name, self.weight, self.body, self.owed = name, weight, body, 0.0
        self._pieces = pieces
        self._random = np.random.Generator(np.random.PCG64(list(seed)))
        self._parts = [pieces.parts[i] for i in self._random.permutation(len(pieces.parts))]
        self._at = 0
        self._windows: npt.NDArray[np.int32] = np.empty((0, body), np.int32)
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._next = self._read_windows = self._read_tokens = self._read_characters = 0
        if self._parts:  # read the first, so that there is something to estimate from
            self._load()

    @property
    def exact(self) -> bool:
        return self._at == len(self._parts)

    def next_window(self) -> npt.NDArray[np.int32] | None:
        while self._next == len(self._order):
            if self.exact:
                return None
            self._load()
        self._next += 1
        row: npt.NDArray[np.int32] = self._windows[self._order[self._next - 1]]
        return row

    def available_windows(self) -> int:
        return self._read_windows + round(self._unread() / self.body)

    def available_tokens(self) -> int:
        return self._read_tokens + round(self._unread())

    def _unread(self) -> float:
        """Estimated tokens of the parts that have not been tokenized."""
        characters: int = sum(part.characters for part in self._parts[self._at :])
        return characters * self._read_tokens / max(1, self._read_characters)

    def _load(self) -> None:
        part = self._parts[self._at]
        self._at += 1
        ids = self._pieces.tokenize(part)
        count = len(ids) // self.body
        self._windows = ids[: count * self.body].reshape(count, self.body)
        self._order, self._next = self._random.permutation(count), 0
        self._read_windows += count
        self._read_tokens += len(ids)
        self._read_characters += part.characters


class _Piece(NamedTuple):
    """A text or a conversation; whether its document ends with it."""

    text: str
    messages: tuple[Message, ...]
    last: bool


class _Part(NamedTuple):
    """As many ``pieces``, from that after the first ``skip`` of document ``first`` on."""

    first: int
    skip: int
    pieces: int
    characters: int


class _Pieces:
    """The documents of some data sets as pieces of text or conversations, made when their part's turn comes."""

    def __init__(self, documents: Documents, tokenizer: TextTokenizer, chat: bool) -> None:
        self._documents, self._tokenizer, self._chat = documents, tokenizer, chat
        self._known: dict[str, list[int]] = {}
        self.plain_layout: tuple[int, UnsupportedError] | None = None
        self.parts: list[_Part] = []
        first = skip = count = characters = 0
        for index, (text, messages) in enumerate(documents.contents()):
            # One piece, unless it is cut: what is told of it here must not cost more than its length.
            short = not messages and not chat and 0 < len(text) <= _PIECE_CHARACTERS
            sizes = [len(text)] if short else map(_characters, self._pieces(text, messages))
            for number, size in enumerate(sizes, 1):
                if not count:
                    first, skip = index, number - 1
                count += 1
                characters += size
                if characters >= PART_CHARACTERS:
                    self.parts.append(_Part(first, skip, count, characters))
                    count = characters = 0
        if count:
            self.parts.append(_Part(first, skip, count, characters))

    def _pieces(self, text: str, messages: tuple[Message, ...]) -> Iterator[_Piece]:
        """The pieces of one document."""
        if messages:
            yield _Piece("", messages, True)
        elif self._chat:
            for turn in exchanges(text):
                yield _Piece("", turn, True)
        elif 0 < len(text) <= _PIECE_CHARACTERS:
            yield _Piece(text, (), True)
        else:
            for start, stop in _cuts(text, _PIECE_CHARACTERS):
                yield _Piece(text[start:stop], (), stop == len(text))

    def _of(self, part: _Part) -> Iterator[_Piece]:
        skip, left = part.skip, part.pieces
        for text, messages in self._documents.contents(part.first):
            for piece in islice(self._pieces(text, messages), skip, skip + left):
                left -= 1
                yield piece
            skip = 0
            if not left:
                return

    def tokenize(self, part: _Part) -> npt.NDArray[np.int32]:
        tokenizer = self._tokenizer
        end = [tokenizer.eos] if tokenizer.eos is not None else tokenizer.encode("\n\n")
        found = array("i")
        for piece, ids in self._encoded(part):
            found.extend(ids)
            if piece.last and ids[-len(end) :] != end:  # templates often end with the token themselves
                found.extend(end)
        return np.array(found, np.int32)

    def _encoded(self, part: _Part) -> Iterator[tuple[_Piece, list[int]]]:
        """Pieces and their ids, plain text by the batch and what is the same once: there may be millions."""
        pieces = self._of(part)
        while batch := list(islice(pieces, _BATCH)):
            known = self._known
            texts = dict.fromkeys(piece.text for piece in batch if not piece.messages and piece.text not in known)
            fresh = dict(zip(texts, self._tokenizer.encode_all(list(texts)), strict=True)) if texts else {}
            for piece in batch:
                if piece.messages:
                    yield piece, self._conversation(piece.messages)
                else:
                    yield piece, fresh[piece.text] if piece.text in fresh else known[piece.text]
            if len(known) < _KNOWN:
                known.update((text, ids) for text, ids in fresh.items() if len(text) <= _KNOWN_CHARACTERS)

    def _conversation(self, messages: Sequence[Message]) -> list[int]:
        """In the model's template; as plain text where it has none or refuses this one (counted, for the warning)."""
        try:
            return self._tokenizer.encode_chat(messages)
        except UnsupportedError as error:
            count = self.plain_layout[0] if self.plain_layout else 0
            self.plain_layout = (count + 1, error)
            return self._tokenizer.encode(plain(messages))


def _characters(piece: _Piece) -> int:
    return len(piece.text) + sum(len(message["content"]) for message in piece.messages)


def split_text(text: str, limit: int) -> Iterator[str]:
    """``text`` in pieces of at most ``limit`` characters that join to it again, cut after the last paragraph that
    fits, else after the last line, sentence or space, else anywhere."""
    return (text[start:stop] for start, stop in _cuts(text, limit))


def _cuts(text: str, limit: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(text):
        stop = min(start + limit, len(text))
        if stop < len(text):
            for mark in ("\n\n", "\n", "。", ". ", " "):
                place = text.rfind(mark, start + limit // 2, stop)
                if place >= 0:
                    stop = place + len(mark)
                    break
        yield start, stop
        start = stop


def exchanges(text: str) -> Iterator[tuple[Message, ...]]:
    """A document as conversations in which user and assistant say its passages in turn, the assistant last.

    The words stay the document's; what is gained is that the model sees them among its own special tokens.
    """
    passages = [piece.strip() for piece in split_text(text, _TURN_CHARACTERS) if piece.strip()]
    for start in range(0, len(passages), _TURNS):
        turn = passages[start : start + _TURNS]
        if len(turn) % 2:
            halves = [piece.strip() for piece in split_text(turn[-1], max(1, (len(turn[-1]) + 1) // 2))]
            turn[-1:] = [halves[0], " ".join(filter(None, halves[1:])) or halves[0]]
        roles = ("user", "assistant") * (len(turn) // 2)
        yield tuple({"role": role, "content": words} for role, words in zip(roles, turn, strict=True))


def sample_windows(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    *,
    samples: int,
    length: int,
    seed: int = 0,
    chat: bool = False,
    on_event: EventSink = ignore,
) -> Windows:
    """``samples`` windows of ``length`` tokens, or as many as the text gives without repeating it (a warning with the
    numbers; a note where all text is built in). ``chat``: plain text is set as conversations in the model's template.

    Data sets shorter than one window are joined into one; where all the text is shorter, the window is (a warning).
    Raises UsageError (numbers out of range, or text of fewer than 2 tokens), UnsupportedError (``chat`` for a model
    without template).
    """
    if samples < 1 or length < _LEAST_LENGTH or seed < 0:
        raise UsageError(
            f"calibration needs at least 1 window of {_LEAST_LENGTH} tokens and a seed of 0 or more",
            found=f"{samples} windows of {length}, seed {seed}",
        )
    if chat and not tokenizer.has_template:
        raise UnsupportedError(
            "this model has no chat template", file=tokenizer.directory, remedy="calibrate without --chat"
        )
    front = 0 if tokenizer.bos is None else 1
    pieces = [_Pieces(packed(dataset.documents), tokenizer, chat) for dataset in corpus.datasets]
    streams, rest = _streams(corpus, tokenizer, pieces, body=length - front, seed=seed, chat=chat)
    if not streams and rest is not None:
        samples = 1
        length = _shortened(rest, length, front, on_event)
        pieces = [_Pieces(packed(dataset.documents), tokenizer, chat) for dataset in corpus.datasets]
        streams, rest = _streams(corpus, tokenizer, pieces, body=length - front, seed=seed, chat=chat)
    if rest is not None and not rest.available_windows():
        text = f"{rest.available_tokens():,} tokens are less than one window of {length - front:,}"
        on_event(events.Caution(f"{rest.name}: {text}; this text is not used"))
    windows = Windows(streams, samples=samples, length=length, bos=tokenizer.bos)
    _tell(windows, samples, corpus.built_in, pieces, on_event)
    return windows


def _streams(
    corpus: Corpus, tokenizer: TextTokenizer, pieces: Sequence[_Pieces], *, body: int, seed: int, chat: bool
) -> tuple[list[_Stream], _Stream | None]:
    """A stream for each data set that gives a window of ``body`` tokens; the others joined, as one of them where that
    gives one, else apart."""
    streams: list[_Stream] = []
    short: list[Dataset] = []
    for index, dataset in enumerate(corpus.datasets):
        stream = _Stream(dataset.name, dataset.weight, pieces[index], body=body, seed=(seed, index))
        if stream.available_windows() == 0:
            short.append(dataset)
        else:
            streams.append(stream)
    if not short:
        return streams, None
    joined = _Pieces(Documents(chain.from_iterable(dataset.documents for dataset in short)), tokenizer, chat)
    weight = sum(dataset.weight for dataset in short)
    rest = _Stream(_names(short), weight, joined, body=body, seed=(seed, len(corpus.datasets)))
    return ([*streams, rest], None) if rest.available_windows() else (streams, rest)


def _shortened(rest: _Stream, length: int, front: int, on_event: EventSink) -> int:
    """The length of a window that holds all of a text that is shorter than one; a warning. Raises UsageError where no
    window can be made of it."""
    found = rest.available_tokens() + front
    if found < _LEAST_LENGTH:
        raise UsageError(
            "the text is too short to calibrate on",
            expected=f"at least {_LEAST_LENGTH} tokens",
            found=f"{found:,} tokens",
            remedy="give more text",
        )
    on_event(
        events.Caution(
            f"the text has {found:,} tokens, less than one window of {length:,}: it is one window of {found:,}, which "
            "is little to calibrate on"
        )
    )
    return found


def _names(datasets: Sequence[Dataset]) -> str:
    named = " + ".join(dataset.name for dataset in datasets[:3])
    return named if len(datasets) <= 3 else f"{named} and {len(datasets) - 3} more"


def _tell(windows: Windows, asked: int, built_in: bool, pieces: Sequence[_Pieces], on_event: EventSink) -> None:
    if windows.samples < asked:
        text = (
            f"the text gives {counted(windows.samples, 'window')} of {windows.length:,} tokens without repeating "
            f"itself; {asked:,} were asked for"
        )
        on_event((events.Note if built_in else events.Caution)(text))
    told = [item.plain_layout for item in pieces if item.plain_layout]
    if told:
        reason = told[0][1].found or told[0][1].what
        count = sum(number for number, _ in told)
        text = f"{count:,} conversations are laid out as plain text, not in the model's chat template: {reason}"
        on_event((events.Note if built_in else events.Caution)(text))
