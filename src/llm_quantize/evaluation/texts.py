"""Text to measure on, cut into windows as llama-perplexity cuts it (evaluation/perplexity.py).

Every file is cut by itself, so that no window holds the end of one text and the beginning of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_quantize import data, events
from llm_quantize.calibration.text import load_texts
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.errors import UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.measures.perplexity import Tokens, cut_windows

BUILT_IN = "built-in English and Japanese prose"


@dataclass(frozen=True)
class EvaluationText:
    """``windows``: (n, context) token ids; ``names``: of the texts they come from; ``available``: how many windows
    there are without a limit."""

    names: tuple[str, ...]
    windows: Tokens
    available: int


def evaluation_text(
    tokenizer: TextTokenizer,
    files: Sequence[str] = (),
    *,
    context: int = 512,
    limit: int | None = None,
    on_event: EventSink = ignore,
) -> EvaluationText:
    """Windows of ``context`` tokens from ``files`` (.txt, .json, .jsonl, .parquet; none: the built-in text).

    Where texts begin with a token (BOS), it stands before each text and takes the first place of every window, as in
    llama.cpp. ``limit`` keeps that many windows at even distances over all texts. A text shorter than one window is
    left out with a warning. Raises UsageError where all are too short, and what reading files raises.
    """
    if context < 4 or (limit is not None and limit < 1):
        raise UsageError("a window needs at least 4 tokens, and a limit at least 1", found=f"{context}, {limit}")
    texts = [(name, load_texts((name,)).text()) for name in files] or [(BUILT_IN, data.evaluation_text())]
    parts: list[Tokens] = []
    names: list[str] = []
    short: list[str] = []
    for name, text in texts:
        ids = [tokenizer.bos] if tokenizer.bos is not None else []
        ids += tokenizer.encode(text)
        if len(ids) < context:
            short.append(f"{name} ({len(ids):,} tokens)")
            continue
        parts.append(cut_windows(ids, context, bos=tokenizer.bos))
        names.append(name)
    if not parts:
        raise UsageError(
            "the text is shorter than one window",
            expected=f"at least {context:,} tokens",
            found=", ".join(short),
            remedy="give a longer text or a smaller --context",
        )
    for one in short:
        on_event(events.Caution(f"{one} is shorter than one window of {context:,}: left out"))
    windows = np.concatenate(parts)
    available = len(windows)
    if limit is not None and limit < available:
        windows = windows[(np.arange(limit) * available) // limit]
    return EvaluationText(tuple(names), windows, available)
