"""The text of a run as windows of the model's own tokens: read, tokenized, drawn."""

from __future__ import annotations

from typing import Any

from llm_quantize import events
from llm_quantize.calibration.text import load_texts
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.calibration.windows import Windows, sample_windows
from llm_quantize.events import EventSink
from llm_quantize.models.opening import Source
from llm_quantize.options import DEFAULT_SAMPLES, CalibrationOptions


def draw_windows(source: Source, options: CalibrationOptions, on_event: EventSink) -> tuple[Windows, dict[str, Any]]:
    """The windows that ``options`` ask for, none longer than the model's context, and what describes them (JSON-ready).

    Raises what reading the text and the tokenizer raises.
    """
    on_event(events.Stage("read the text"))
    tokenizer = TextTokenizer(source)
    corpus = load_texts(options.data)
    length = min(options.length, source.architecture.hyper.context_length)
    if length < options.length:
        text = f"windows have {length:,} tokens: the model's context is no longer"
        on_event(events.Note(text))
    windows = sample_windows(
        corpus,
        tokenizer,
        samples=options.samples or DEFAULT_SAMPLES,
        length=length,
        seed=options.seed,
        chat=options.chat,
        on_event=on_event,
    )
    if corpus.built_in and not options.data:
        on_event(events.Note("no text was given: calibrating on the built-in mix of texts"))
    names = [dataset.name for dataset in corpus.datasets]
    return windows, {"datasets": names, "length": windows.length, "seed": options.seed, "chat": options.chat}
