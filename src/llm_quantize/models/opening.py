"""An opened model: its checkpoint, its architecture and the map of its tensors; what no format changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_quantize import events
from llm_quantize.architectures import Architecture, open_architecture
from llm_quantize.architectures.base import TensorMap
from llm_quantize.errors import UnsupportedError
from llm_quantize.events import EventSink, ignore
from llm_quantize.io.cache import kept_hashes
from llm_quantize.models import ctranslate2_model, gguf, quantized, safetensors
from llm_quantize.models.base import Model, Reader, itemsize
from llm_quantize.models.hub.locate import locate
from llm_quantize.models.identity import content_digest

READERS: tuple[Reader, ...] = (ctranslate2_model, quantized, gguf, safetensors)
"""Ways in which models are stored; the first that knows a path opens it."""


@dataclass(frozen=True, eq=False)
class Source:
    """An opened model: its checkpoint, its architecture and the map of its tensors."""

    checkpoint: Model
    architecture: Architecture
    tensors: TensorMap

    @property
    def left_out(self) -> dict[str, str]:
        """Every source tensor that the artifact does not hold, and why."""
        return {**self.checkpoint.left_out, **self.tensors.left_out}

    @property
    def files(self) -> dict[str, Path]:
        """Where each source tensor lies."""
        return {name: info.file for name, info in self.checkpoint.tensors.items()}

    def content(self, on_event: EventSink = ignore) -> str:
        """Which model this is, by all of its content (models/identity.py): what was measured on a source of another
        content is another model's. ``on_event`` hears how far the reading of its files is, where their hashes are not
        kept.

        Raises UsageError where the weights are not here, and what reading raises.
        """
        return content_digest(
            self.checkpoint,
            kept=kept_hashes(),
            told=lambda done, total: on_event(events.Check("which model this is", done, total)),
        )

    @property
    def itemsize(self) -> int:
        """The most bytes in which rows of a tensor are read."""
        return max((itemsize(info.dtype) for info in self.checkpoint.tensors.values()), default=2)

    @property
    def limits(self) -> tuple[UnsupportedError, ...]:
        """Why llama.cpp cannot run this model; empty where it can. Of the tokenizer nothing is known here."""
        return (*self.architecture.limits, *self.tensors.limits)


def open_model(
    model: str, *, revision: str | None = None, on_event: EventSink = ignore, headers_only: bool = False
) -> Model:
    """The model in directory or file ``model``, or the hub's ``model`` at ``revision`` (branch, tag or commit), by the
    first of READERS that knows it.

    Raises UsageError (no such model), MalformedInputError, UnsupportedError (pickled weights, an adapter, a way of
    quantizing that is not decoded), AccessError (names that lead outside), NetworkError, ResourceError. With
    ``headers_only``, weights that are not here are not fetched from the hub, and ``read_rows`` refuses (UsageError)
    wherever the model came from.
    """
    place = locate(model, revision, on_event, headers_only=headers_only)
    try:
        reader = next(reader for reader in READERS if reader.sniff(place.path))
        return reader.open_at(place, str(model), headers_only=headers_only)
    except BaseException:
        if place.temporary is not None:
            place.temporary.cleanup()
        raise


def open_source(
    model: str, *, revision: str | None = None, on_event: EventSink = ignore, headers_only: bool = False
) -> Source:
    """Open a model: headers and configuration. Raises the error tree for anything malformed or unknown.

    With ``headers_only`` no weight is fetched from the hub, and none can be read (``open_model``).
    """
    checkpoint = open_model(model, revision=revision, on_event=on_event, headers_only=headers_only)
    try:
        return _describe(checkpoint, on_event)
    except BaseException:
        checkpoint.close()
        raise


def _describe(checkpoint: Model, on_event: EventSink) -> Source:
    architecture = open_architecture(checkpoint.config, file=checkpoint.config_file)
    if checkpoint.kind:
        text = f"this model is already quantized ({checkpoint.kind}): what is made of it has its errors too"
        on_event(events.Caution(text))
    for note in (*checkpoint.notes, *architecture.notes):
        on_event(events.Caution(note))
    tensors = architecture.map_tensors(checkpoint.tensors)
    for output in tensors.outputs:
        for piece in output.pieces:
            checkpoint.check_readable(piece.source)
    return Source(checkpoint, architecture, tensors)
