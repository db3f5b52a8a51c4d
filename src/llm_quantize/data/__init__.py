"""Package data: the built-in demo model and a public-domain text to measure it on.

``demo-llama/README.md`` says how the model was trained, ``texts/README.md`` where the texts come from; neither
text is in the model's training data.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from llm_quantize.errors import IntegrityError, UnsupportedError

_TEXTS = ("pride_and_prejudice.txt", "wagahai_wa_neko_de_aru.txt")


def demo_model() -> Path:
    """The directory of the built-in model: a Llama of 5.8 million weights, bf16 safetensors (12 MB).

    Raises UnsupportedError when the package is imported from an archive, where there is no directory to give,
    and IntegrityError when the installation lacks the files.
    """
    directory = files(__name__) / "demo-llama"
    if not isinstance(directory, Path):
        raise UnsupportedError(
            "the built-in model needs an installation in a directory",
            found=f"llm_quantize imported from {type(directory).__name__}",
            remedy="pip install llm-quantize, instead of importing it from an archive",
        )
    if not (directory / "model.safetensors").is_file():
        raise IntegrityError(
            "the built-in model is missing from this installation",
            file=directory / "model.safetensors",
            remedy="pip install --force-reinstall llm-quantize",
        )
    return directory


def evaluation_text() -> str:
    """About 90 kB of English and Japanese prose in the public domain, one blank line between the two passages."""
    folder = files(__name__) / "texts"
    return "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in _TEXTS)
