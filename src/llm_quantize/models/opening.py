"""An opened model: checkpoint, architecture, tensor map, vocabulary and metadata; what no recipe changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_quantize.architectures import Architecture, open_architecture
from llm_quantize.architectures.base import TensorMap
from llm_quantize.architectures.rows import weights_of
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.gguf import metadata as gguf_format
from llm_quantize.formats.gguf.vocabulary.reading import read_vocabulary, runtime_name
from llm_quantize.io.gguf_file import MetaValue
from llm_quantize.models.safetensors import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Source:
    """An opened model: its checkpoint, architecture, tensor map and the metadata that no recipe changes."""

    checkpoint: Checkpoint
    architecture: Architecture
    tensors: TensorMap
    metadata: Mapping[str, MetaValue]

    @property
    def left_out(self) -> dict[str, str]:
        """Every source tensor that the artifact does not hold, and why."""
        return {**self.checkpoint.left_out, **self.tensors.left_out}

    @property
    def files(self) -> dict[str, Path]:
        """Where each source tensor lies."""
        return {name: info.file for name, info in self.checkpoint.tensors.items()}


def open_source(
    model: str, *, revision: str | None = None, on_event: EventSink = ignore, headers_only: bool = False
) -> Source:
    """Open a model: headers, configuration, tokenizer. Raises the error tree for anything malformed or unknown.

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
    embedding = next((output for output in tensors.outputs if output.name == "token_embd.weight"), None)
    rows = embedding.shape[0] if embedding is not None else None
    vocabulary = read_vocabulary(checkpoint.directory, checkpoint.config, embedding_rows=rows)
    counted = [output for output in tensors.outputs if output.constant is None]
    experts = [output for output in counted if len(output.shape) == 3]
    general = gguf_format.general_metadata(
        architecture=architecture.gguf_name,
        name=runtime_name(checkpoint.name, checkpoint.directory, vocabulary),
        parameters=sum(weights_of(output.shape) for output in counted),
        expert_parameters=sum(weights_of(output.shape) for output in experts),
        experts=architecture.hyper.n_expert,
        card=gguf_format.read_card(checkpoint.directory, lambda text: on_event({"event": "warning", "text": text})),
        generation_config=checkpoint.generation_config,
    )
    metadata = {**general, **architecture.metadata(checkpoint.generation_config), **vocabulary}
    return Source(checkpoint, architecture, tensors, metadata)
