"""Which model this is: by its headers, or by all of its content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llm_quantize.errors import UsageError
from llm_quantize.io.content import Told, contents
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.paths import inside
from llm_quantize.models.base import Model

SMALL_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
    *("generation_config.json", "quantize_config.json", "quant_config.json"),
)
"""Files beside the weights and the configuration that change what a model is given, or how its weights are read."""


def content_digest(model: Model, *, kept: Path | None = None, told: Told | None = None) -> str:
    """SHA-256 over all that decides what the model computes and writes: its weight files whole, its configuration, and
    SMALL_FILES. Measurements are kept under it.

    ``kept``: a directory where the files' hashes are kept (io/content.py); ``told`` hears how far their reading is.
    Raises UsageError for a model whose weights are not here, and what reading raises.
    """
    if model.temporary is not None:
        raise UsageError(
            "the weights of this model are not here, so that it cannot be told from its fine-tunes",
            file=model.name,
            remedy="fetch the model, and give its directory",
        )
    digest = hashlib.sha256(header_digest(model).encode())
    for sha256 in contents(sorted(model.files), kept=kept, told=told):
        digest.update(sha256.encode())
    return digest.hexdigest()


def header_digest(model: Model) -> str:
    """SHA-256 over the headers of the weight files, the configuration and SMALL_FILES. Two models that differ in it are
    two; two that do not may be a model and its fine-tune."""
    digest = hashlib.sha256(canonical_json({"config": model.config, "generation": model.generation_config}))
    for fact in model.fingerprint():
        digest.update(canonical_json([fact.name, fact.size, fact.header_sha256]))
    if model.metadata is None:
        digest.update(small_files_digest(model.directory).encode())
    return digest.hexdigest()


def small_files_digest(directory: Path) -> str:
    """SHA-256 over those of SMALL_FILES that ``directory`` holds. Raises what opening and reading raise."""
    paths = [inside(directory, name) for name in SMALL_FILES if (directory / name).is_file()]
    named = zip((path.name for path in paths), contents(paths, kept=None), strict=True)
    return hashlib.sha256(canonical_json([list(pair) for pair in named])).hexdigest()
