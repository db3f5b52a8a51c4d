"""Windows drawn the slow way: every document an object, every piece a string, one piece tokenized after another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.calibration.text import plain
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.calibration.windows import exchanges, split_text
from llm_quantize.errors import UnsupportedError

Item = str | list[dict[str, str]]
"""A text, or the messages of a conversation."""


def documents(path: Path) -> list[Item]:
    """What a .txt, .json, .jsonl or .parquet file of texts and {"messages"} holds, without what has no words."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        values: list[Any] = parquet.read_table(path).column("text").to_pylist()
    elif path.suffix == ".txt":
        values = [path.read_text("utf-8-sig")]
    elif path.suffix == ".json":
        values = json.loads(path.read_text("utf-8-sig"))
    else:
        values = [json.loads(line) for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    found: list[Item] = [
        value if isinstance(value, str) else value.get("messages") or value["text"] for value in values if value
    ]
    return [item for item in found if not isinstance(item, str) or item.strip()]


def drawn(
    sets: Sequence[tuple[float, Sequence[Item]]],
    tokenizer: TextTokenizer,
    *,
    samples: int,
    length: int,
    seed: int,
    chat: bool,
    part: int,
    piece: int,
) -> npt.NDArray[np.int64]:
    """int64 (n, length): windows of ``sets``, (weight, documents) of which each has one or more. Pieces of at most
    ``piece`` characters are tokenized in parts of ``part`` or more."""
    front = [] if tokenizer.bos is None else [tokenizer.bos]
    streams = [
        _stream(items, tokenizer, length - len(front), np.random.PCG64([seed, index]), chat, part, piece)
        for index, (_, items) in enumerate(sets)
    ]
    owed = [0.0] * len(sets)
    live, found = list(range(len(sets))), list[list[int]]()
    while len(found) < samples and live:
        for index in live:
            owed[index] += sets[index][0] / sum(sets[one][0] for one in live)
        while live:
            chosen = max(live, key=owed.__getitem__)
            if streams[chosen]:
                owed[chosen] -= 1
                found.append(front + streams[chosen].pop(0))
                break
            live.remove(chosen)
    return np.array(found, np.int64)


def _stream(
    items: Sequence[Item], tokenizer: TextTokenizer, body: int, bits: np.random.PCG64, chat: bool, part: int, piece: int
) -> list[list[int]]:
    """All windows of one set, in the order in which they are drawn."""
    pieces: list[tuple[Item, bool]] = []
    for item in items:
        if not isinstance(item, str):
            pieces.append((item, True))
        elif chat:
            pieces += [([dict(message) for message in turn], True) for turn in exchanges(item)]
        else:
            cut = list(split_text(item, piece))
            pieces += [(text, number == len(cut)) for number, text in enumerate(cut, 1)]
    parts: list[list[tuple[Item, bool]]] = [[]]
    for one in pieces:
        if sum(_characters(item) for item, _ in parts[-1]) >= part:
            parts.append([])
        parts[-1].append(one)
    random, found = np.random.Generator(bits), list[list[int]]()
    end = [tokenizer.eos] if tokenizer.eos is not None else tokenizer.encode("\n\n")
    for index in random.permutation(len(parts)):
        ids: list[int] = []
        for item, last in parts[index]:
            own = tokenizer.encode(item) if isinstance(item, str) else _conversation(item, tokenizer)
            ids += own + (end if last and own[-len(end) :] != end else [])
        whole = [ids[start : start + body] for start in range(0, len(ids) - body + 1, body)]
        found += [whole[one] for one in random.permutation(len(whole))]
    return found


def _characters(item: Item) -> int:
    return len(item) if isinstance(item, str) else sum(len(message["content"]) for message in item)


def _conversation(messages: list[dict[str, str]], tokenizer: TextTokenizer) -> list[int]:
    try:
        return tokenizer.encode_chat(messages)
    except UnsupportedError:
        return tokenizer.encode(plain(messages))
