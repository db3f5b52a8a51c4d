"""What a GGUF file says of a model, whatever its level: general facts, hyper-parameters, vocabulary. And what it cannot
say, because llama.cpp has no graph, no tokenizer or no place for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from gguf.constants import Keys

from llm_quantize.architectures.rows import weights_of
from llm_quantize.errors import MalformedInputError
from llm_quantize.formats.folders import pooling_metadata
from llm_quantize.formats.gguf import metadata as gguf_format
from llm_quantize.formats.gguf.vocabulary.reading import read_vocabulary, runtime_name
from llm_quantize.io.gguf_file import MetaValue

if TYPE_CHECKING:
    from llm_quantize.models.base import Model
    from llm_quantize.models.opening import Source


def describe(source: Source) -> Mapping[str, MetaValue]:
    """The metadata that no level changes, in the order of the file.

    Of a model that is a GGUF file already they are its own, untouched. Raises UnsupportedError where llama.cpp cannot
    run the model or read its tokenizer, MalformedInputError for tokenizer files that break their format or are not
    there.
    """
    return _described(source)[0]


def warnings_of(source: Source) -> tuple[str, ...]:
    """What of the model's files contradicts itself or could not be taken over. Raises what ``describe`` does."""
    return _described(source)[1]


_Described = tuple[Mapping[str, MetaValue], tuple[str, ...]]
_KEPT: WeakKeyDictionary[Source, _Described] = WeakKeyDictionary()  # a run plans more than once; vocabularies are large


def _described(source: Source) -> _Described:
    """Metadata and warnings."""
    if source not in _KEPT:
        _KEPT[source] = _read(source)
    return _KEPT[source]


def _read(source: Source) -> _Described:
    if source.limits:
        raise source.limits[0]
    if source.checkpoint.metadata is not None:
        return carried(source.checkpoint), ()
    checkpoint, architecture = source.checkpoint, source.architecture
    embedding = next((output for output in source.tensors.outputs if output.name == "token_embd.weight"), None)
    rows = embedding.shape[0] if embedding is not None else None
    told: list[str] = []
    vocabulary = read_vocabulary(
        checkpoint.directory,
        checkpoint.config,
        embedding_rows=rows,
        generation_config=checkpoint.generation_config,
        note=told.append,
    )
    counted = [output for output in source.tensors.outputs if output.constant is None]
    experts = [output for output in counted if len(output.shape) == 3]
    general = gguf_format.general_metadata(
        architecture=architecture.gguf_name,
        name=runtime_name(checkpoint.name, checkpoint.directory, vocabulary),
        parameters=sum(weights_of(output.shape) for output in counted),
        expert_parameters=sum(weights_of(output.shape) for output in experts),
        experts=architecture.hyper.n_expert,
        card=gguf_format.read_card(checkpoint.directory, told.append),
        generation_config=checkpoint.generation_config,
    )
    pooling = pooling_metadata(checkpoint.directory, architecture.gguf_name, told.append)
    return {**general, **architecture.metadata(checkpoint.generation_config), **pooling, **vocabulary}, tuple(told)


def carried(checkpoint: Model) -> Mapping[str, MetaValue]:
    """What a GGUF file says of its model, without what belongs to that file alone.

    Raises MalformedInputError where it has no tokenizer.
    """
    metadata = checkpoint.metadata or {}
    if Keys.Tokenizer.MODEL not in metadata or Keys.Tokenizer.LIST not in metadata:
        raise MalformedInputError(
            "this GGUF file has no tokenizer",
            file=checkpoint.config_file,
            expected=f"{Keys.Tokenizer.MODEL} and {Keys.Tokenizer.LIST}",
            found="neither" if Keys.Tokenizer.MODEL not in metadata else f"no {Keys.Tokenizer.LIST}",
            remedy="llama.cpp cannot load it without; start from a file that has it, or from the original model",
        )
    return {key: value for key, value in metadata.items() if not key.startswith(gguf_format.OF_THE_FILE)}
