"""An opened model: its checkpoint, its architecture and the map of its tensors; what no format changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_quantize.architectures import Architecture, open_architecture
from llm_quantize.architectures.base import TensorMap
from llm_quantize.errors import UnsupportedError
from llm_quantize.events import EventSink, ignore
from llm_quantize.models.safetensors import Checkpoint, open_checkpoint


@dataclass(frozen=True, eq=False)
class Source:
    """An opened model: its checkpoint, its architecture and the map of its tensors."""

    checkpoint: Checkpoint
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

    @property
    def limits(self) -> tuple[UnsupportedError, ...]:
        """Why llama.cpp cannot run this model; empty where it can. Of the tokenizer nothing is known here."""
        return (*self.architecture.limits, *self.tensors.limits)


def open_source(
    model: str, *, revision: str | None = None, on_event: EventSink = ignore, headers_only: bool = False
) -> Source:
    """Open a model: headers and configuration. Raises the error tree for anything malformed or unknown.

    With ``headers_only`` no weight is fetched from the hub, and none can be read (``open_checkpoint``).
    """
    checkpoint = open_checkpoint(model, revision=revision, on_event=on_event, headers_only=headers_only)
    try:
        return _describe(checkpoint, on_event)
    except BaseException:
        checkpoint.close()
        raise


def _describe(checkpoint: Checkpoint, on_event: EventSink) -> Source:
    architecture = open_architecture(checkpoint.config, file=checkpoint.directory / "config.json")
    for note in architecture.notes:
        on_event({"event": "warning", "text": note})
    tensors = architecture.map_tensors(checkpoint.tensors)
    for output in tensors.outputs:
        for piece in output.pieces:
            checkpoint.check_readable(piece.source)
    return Source(checkpoint, architecture, tensors)
