"""Threads, memory and the place of hidden states change no byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_quantize import memory
from llm_quantize.errors import ResourceError
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.recipe import Recipe

from ..faults.forking import hashes
from ..tiny_models import make_tiny
from .tiny import left_behind, options, run, write_text

MIXED = Recipe(
    "mixed",
    "W4A16",
    {"model.layers.0.mlp.down_proj": "int2_g32", "model.layers.1.self_attn.o_proj": "int6", "lm_head": "int8_g32"},
    form="compressed-tensors",
)
WORDS = ("IQ3_XXS", "IQ1_M")
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}  # what their types hold
# Windows enough that what a block is given comes in several chunks.
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama to gguf": ("llama", "gguf", "Q4_0", {}),
    "experts to gguf": ("mixtral", "gguf", "IQ4_NL", {"inputs": "block"}),
    "words to gguf": ("llama", "gguf", "IQ3_XXS", {}),
    "words of experts to gguf": ("mixtral", "gguf", "IQ1_M", {}),
    "tied head to mlx": ("qwen3", "mlx", "3bit", {"group_size": 32}),
    "tied head to floats of mlx": ("qwen3", "mlx", "mxfp4", {}),
    "llama to awq": ("llama", "awq", "4bit", {"group_size": 32}),
    "mixed bits to compressed-tensors": (
        "llama",
        "compressed-tensors",
        "W4A16",
        {"group_size": 32, "overrides": Overrides(recipe=MIXED)},
    ),
    "llama to FP8 smoothed": ("llama", "compressed-tensors", "FP8", {"transform": "smoothquant"}),
    "keys and values to FP8": ("qwen3", "compressed-tensors", "W4A16", {"group_size": 32, "kv_cache": "fp8"}),
    "experts to NVFP4": ("qwen3_moe", "compressed-tensors", "NVFP4", {}),
    "experts to compressed-tensors": ("qwen3_moe", "compressed-tensors", "W4A16", {"group_size": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_threads_memory_and_disk_change_no_byte(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, format, level, method = CASES[case]
    shape = WIDE if level in WORDS else {}
    model = make_tiny(variant, tmp_path / "model", **shape)
    common: dict[str, Any] = {"samples": 5, "length": 40, **method}
    text = write_text(tmp_path)
    monkeypatch.setattr("llm_quantize.blockwise.inputs.CHUNK_TOKENS", 80)
    events: list[dict[str, Any]] = []
    run(model, tmp_path / "one", options(text, **common), format, level)
    run(model, tmp_path / "three", options(text, threads=3, **common), format, level, events)
    assert [event["threads"] for event in events if event["event"] == "start"][-1] == 3
    monkeypatch.setattr(memory, "HIDDEN_BYTES", 0)
    monkeypatch.setattr(memory, "INPUT_BYTES", 0)
    run(model, tmp_path / "disk", options(text, threads=2, **common), format, level)
    for name in ("three", "disk"):
        assert hashes(tmp_path / name) == hashes(tmp_path / "one"), name
    assert not left_behind(tmp_path)


def test_a_small_limit_of_memory_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer threads, hidden states on disk; and a limit that is too small is refused before any work."""
    model = make_tiny("llama", tmp_path / "model")
    text = write_text(tmp_path)
    monkeypatch.setattr(memory, "peak_resident_bytes", lambda: 0)  # what earlier tests took
    run(model, tmp_path / "free", options(text))
    events: list[dict[str, Any]] = []
    monkeypatch.setattr("llm_quantize.blockwise.estimate.solve_bytes", lambda _columns: 100 << 20)
    limit = memory.resident_bytes() + (1000 << 20)
    run(model, tmp_path / "bound", options(text, threads=8, max_ram=limit), events=events)
    assert [event["threads"] for event in events if event["event"] == "start"][-1] < 8
    assert hashes(tmp_path / "bound") == hashes(tmp_path / "free")
    with pytest.raises(ResourceError, match="memory limit"):
        run(model, tmp_path / "none", options(text, max_ram=memory.resident_bytes() + (100 << 20)))
    assert not list((tmp_path / "none").glob("*.gguf"))
