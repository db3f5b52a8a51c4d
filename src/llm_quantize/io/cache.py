"""Where what took long is kept: statistics, hashes of whole files, what vouches for finished artifacts."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """LLM_QUANTIZE_CACHE, or llm-quantize in the user's cache directory."""
    chosen = os.environ.get("LLM_QUANTIZE_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llm-quantize"


def kept_hashes() -> Path:
    """Where the hashes of whole files are kept, so that a file is read for its hash once (io/content.py)."""
    return cache_directory() / "hashes"
