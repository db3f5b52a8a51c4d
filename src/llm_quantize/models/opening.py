"""An opened model: its checkpoint, its architecture and the map of its tensors; what no format changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llm_quantize import events
from llm_quantize.architectures import Architecture, open_architecture
from llm_quantize.architectures.base import TensorMap
from llm_quantize.errors import UnsupportedError
from llm_quantize.events import EventSink, ignore
from llm_quantize.io.cache import kept_hashes
from llm_quantize.models import ctranslate2_model, gguf, pickled, quantized, safetensors
from llm_quantize.models.base import Model, Reader, itemsize
from llm_quantize.models.hub.locate import locate
from llm_quantize.models.identity import content_digest
from llm_quantize.models.lora import merged

READERS: tuple[Reader, ...] = (ctranslate2_model, quantized, gguf, pickled, safetensors)
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
    def stem(self) -> str:
        """What files that are made of it are called by, where the user gives no name: the model's own, and those of
        the adapters that are merged into it."""
        return "-".join(name.rsplit("/", 1)[-1] for name in self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The model's own, and those of its adapters."""
        return (self.checkpoint.name, *(merge.name for merge in self.checkpoint.adapters))

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
    model: str,
    *,
    revision: str | None = None,
    lora: Sequence[str] = (),
    on_event: EventSink = ignore,
    headers_only: bool = False,
    called: tuple[str, str | None] | None = None,
) -> Model:
    """The model in directory or file ``model``, or the hub's ``model`` at ``revision`` (branch, tag or commit), by the
    first of READERS that knows it. ``lora``: adapters that are merged into it as it is read, in this order, each
    DIR or a hub id (with @REVISION), and =SCALE after it.

    Raises UsageError (no such model or adapter, an adapter of another model), MalformedInputError, UnsupportedError (an
    adapter as MODEL, a way of quantizing that is not decoded, an adapter that is no LoRA), AccessError (names that lead
    outside), NetworkError, ResourceError, NumericPolicyError (an adapter with values that are not finite). With
    ``headers_only``, weights that are not here are not fetched from the hub, and ``read_rows`` refuses (UsageError)
    wherever the model came from. ``called``: the name and the revision that it has from now on, wherever it lies.
    """
    place = locate(model, revision, on_event, headers_only=headers_only)
    if called is not None:
        place = replace(place, name=called[0], revision=called[1])
    try:
        reader = next(reader for reader in READERS if reader.sniff(place.path))
        opened = reader.open_at(place, str(model), headers_only=headers_only)
    except BaseException:
        if place.temporary is not None:
            place.temporary.cleanup()
        raise
    try:
        for text in lora:
            opened = merged(opened, text, on_event)
    except BaseException:
        opened.close()
        raise
    return opened


def open_source(
    model: str,
    *,
    revision: str | None = None,
    lora: Sequence[str] = (),
    on_event: EventSink = ignore,
    headers_only: bool = False,
    called: tuple[str, str | None] | None = None,
) -> Source:
    """Open a model: headers and configuration. Raises the error tree for anything malformed or unknown.

    With ``headers_only`` no weight is fetched from the hub, and none can be read; ``called``: as in ``open_model``.
    """
    checkpoint = open_model(
        model, revision=revision, lora=lora, on_event=on_event, headers_only=headers_only, called=called
    )
    try:
        return _describe(checkpoint, on_event)
    except BaseException:
        checkpoint.close()
        raise


def _describe(checkpoint: Model, on_event: EventSink) -> Source:
    architecture = open_architecture(checkpoint.config, file=checkpoint.config_file)
    if checkpoint.kind:
        text = f"this model is already quantized ({checkpoint.kind}): what it lost by that is counted in no figure here"
        on_event(events.Caution(text))
    for note in (*checkpoint.notes, *architecture.notes):
        on_event(events.Caution(note))
    tensors = architecture.map_tensors(checkpoint.tensors)
    for output in tensors.outputs:
        for piece in output.pieces:
            checkpoint.check_readable(piece.source)
    return Source(checkpoint, architecture, tensors)
