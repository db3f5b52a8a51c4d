"""Package data: the built-in demo model, a public-domain text to measure it on, and texts to calibrate with.

``demo-llama/README.md`` says how the model was trained, ``texts/README.md`` and ``calibration/README.md`` where the
texts come from. No evaluation text is in the model's training data or among the texts for calibration.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from llm_quantize.errors import IntegrityError, UnsupportedError, install_command

_TEXTS = ("pride_and_prejudice.txt", "wagahai_wa_neko_de_aru.txt")


def demo_model() -> Path:
    """The directory of the built-in model: a Llama of 5.8 million weights, bf16 safetensors (12 MB).

    Raises UnsupportedError when the package is imported from an archive, where there is no directory to give,
    and IntegrityError when the installation lacks the files.
    """
    return _installed("demo-llama", "model.safetensors")


def _installed(folder: str, file: str) -> Path:
    """The directory ``folder`` of the package data, in which ``file`` lies."""
    directory = files(__name__) / folder
    if not isinstance(directory, Path):
        raise UnsupportedError(
            "the built-in data need an installation in a directory",
            found=f"llm_quantize imported from {type(directory).__name__}",
            remedy=f"{install_command()}, instead of importing it from an archive",
        )
    if not (directory / file).is_file():
        raise IntegrityError(
            "a built-in file is missing from this installation",
            file=directory / file,
            remedy="in a checkout of llm-quantize: pip install --force-reinstall .",
        )
    return directory


def evaluation_text() -> str:
    """About 90 kB of English and Japanese prose in the public domain, one blank line between the two passages."""
    return "\n".join(evaluation_texts().values())


def evaluation_texts() -> dict[str, str]:
    """The passages of ``evaluation_text`` by name: ``pride_and_prejudice`` and ``wagahai_wa_neko_de_aru``."""
    folder = files(__name__) / "texts"
    return {name.removesuffix(".txt"): folder.joinpath(name).read_text(encoding="utf-8") for name in _TEXTS}


def calibration_file(name: str) -> Path:
    """The file of the built-in calibration set ``name``: JSON lines of documents or conversations.

    Raises UnsupportedError and IntegrityError as ``demo_model`` does.
    """
    return _installed("calibration", f"{name}.jsonl") / f"{name}.jsonl"
