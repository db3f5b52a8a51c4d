"""Any artifact under the names and shapes of its source's checkpoint."""

from __future__ import annotations

from pathlib import Path

from llm_quantize.artifacts.decoded import Decoded, DecodedArtifact
from llm_quantize.artifacts.decoded_ctranslate2 import DecodedCTranslate2
from llm_quantize.artifacts.decoded_directory import DecodedDirectory
from llm_quantize.models.ctranslate2 import is_ctranslate2
from llm_quantize.models.opening import Source
from llm_quantize.models.quantized import is_stored_directory


def open_decoded(source: Source, path: str | Path) -> Decoded:
    """The artifact at ``path``: a model directory, or a GGUF file or the directory of a split one.

    Raises what ``DecodedDirectory``, ``DecodedCTranslate2`` and ``DecodedArtifact`` raise.
    """
    path = Path(path)
    if is_ctranslate2(path):
        return DecodedCTranslate2(source, path)
    if is_stored_directory(path):
        return DecodedDirectory(source, path)
    return DecodedArtifact(source, path)
