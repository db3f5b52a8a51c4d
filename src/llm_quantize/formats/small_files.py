"""The small files beside the weights: tokenizer, generation settings, chat template, licence. Copied as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llm_quantize.errors import AccessError, UnsupportedError
from llm_quantize.io.paths import inside, read_limited

if TYPE_CHECKING:
    from llm_quantize.models.base import Model

MOST_BYTES = 64 << 20
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf"),
    *(".npz", ".tflite", ".nemo", ".mlmodel", ".tar", ".gz", ".zip", ".index.json"),
)
_MADE_ANEW = ("config.json", "manifest.json", "quantize_config.json", "quant_config.json")


def need_small_files(model: Model) -> None:
    """Raise UnsupportedError for a model that has none: a directory made of it could not be loaded."""
    if model.metadata is not None:
        raise UnsupportedError(
            "a directory needs tokenizer files, which a GGUF file has not",
            file=model.config_file,
            remedy="start from the directory of the original model, or make a GGUF file: quantize MODEL gguf -q LEVEL",
        )


def small_files(directory: Path) -> tuple[list[tuple[str, bytes]], list[str]]:
    """([(name, contents)] by name, warnings about what was left out) of the files directly in ``directory``.

    Not taken: weights and their index, what is made anew, old READMEs, hidden files. What cannot be taken (a name or
    link that paths.inside refuses, more than MOST_BYTES, a directory of chat templates) is told.
    """
    found, warnings = [], []
    for entry in sorted(directory.iterdir(), key=lambda path: path.name):
        name = entry.name
        if entry.is_dir():
            if name == "additional_chat_templates":
                warnings.append(f"{name}/ is not copied: an artifact has no directories")
            continue
        if name.startswith((".", "README")) or name in _MADE_ANEW or name.lower().endswith(_WEIGHTS):
            continue
        try:
            path = inside(directory, name)
        except AccessError as error:
            warnings.append(f"{name[:80]!r} is not copied: {error.what}")
            continue
        if not path.is_file():
            continue
        if path.stat().st_size > MOST_BYTES:
            warnings.append(f"{name} is not copied: {path.stat().st_size:,} bytes are more than a small file has")
            continue
        found.append((name, read_limited(path, MOST_BYTES)))
    return found, warnings
