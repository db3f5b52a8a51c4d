"""llm-quantize: any Hugging Face checkpoint to a quantized artifact, measured.

The library beneath the command line. Names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "open_checkpoint": "llm_quantize.models.safetensors",
    "LlmQuantizeError": "llm_quantize.errors",
    "plan": "llm_quantize.pipeline",
    "quantize": "llm_quantize.pipeline",
    "verify": "llm_quantize.artifacts.verify",
}

__all__ = ["LlmQuantizeError", "__version__", "open_checkpoint", "plan", "quantize", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
