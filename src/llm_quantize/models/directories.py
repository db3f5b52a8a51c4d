"""Artifacts that are directories, whatever they hold: one door to their readers."""

from __future__ import annotations

from pathlib import Path

from llm_quantize.models.ctranslate2 import CTranslate2Directory, is_ctranslate2
from llm_quantize.models.files import read_headers
from llm_quantize.models.quantized import open_directory
from llm_quantize.models.stored import StoredDirectory


def open_artifact_directory(path: Path) -> StoredDirectory | CTranslate2Directory:
    """The model in the directory ``path``. Raises what its reader raises."""
    return CTranslate2Directory(path) if is_ctranslate2(path) else open_directory(path)


def weight_files(path: Path) -> list[Path]:
    """The files of weights in ``path``. Raises what reading their headers raises."""
    if is_ctranslate2(path):
        return [CTranslate2Directory(path).file.path]
    return [header.path for header in read_headers(path, str(path), packed=True)[0]]
