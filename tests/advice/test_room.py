"""What of a size is left for the file, where a cache and the runtime must fit too."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_quantize.advice.footprint import Weights, footprint, shape_of
from llm_quantize.advice.room import room_for
from llm_quantize.errors import ResourceError, UsageError
from llm_quantize.models.opening import open_source
from tests.tiny_models import make_tiny

SIZE = 500_000_000


def test_the_state_of_recurrent_layers_is_as_large_in_any_type_of_cache(tmp_path: Path) -> None:
    with (source := open_source(str(make_tiny("qwen3_5_text", tmp_path / "model")))).checkpoint:
        shape = shape_of(source)
        kept = sum(shape.layer_cache(layer, 256) for layer, window in enumerate(shape.windows) if window is not None)
        assert 0 < kept < shape.cache(256)
        plain, small = (room_for(source, "gguf", SIZE, context=256, kv=kv) for kv in ("f16", "q8_0"))
        assert small.file - plain.file == kept - int(kept * 8.5 / 16)


def test_the_file_alone_or_with_all_that_it_needs(tmp_path: Path) -> None:
    with (source := open_source(str(make_tiny("llama", tmp_path / "model")))).checkpoint:
        assert room_for(source, "gguf", SIZE).facts() == {"size": SIZE, "file": SIZE}
        need = footprint(Weights(0, (), 0, False), shape_of(source), 512)
        room = room_for(source, "gguf", SIZE, context=512)
        assert room.file == SIZE - need.total
        assert room.facts()["kv"] == "f16"
        small = room_for(source, "gguf", SIZE, context=512, kv="Q8_0")
        assert small.file - room.file == need.cache - int(need.cache * 8.5 / 16)
        assert room_for(source, "compressed-tensors", 10 * SIZE, context=512, kv="fp8").file < 10 * SIZE
        for form, context, kv, message in (
            ("gguf", None, "q8_0", "without its length"),
            ("gguf", 513, None, "so long a context"),
            ("gguf", 512, "fp8", "llama.cpp has no cache"),
            ("compressed-tensors", 512, "q8_0", "vLLM on one GPU has no cache"),
        ):
            with pytest.raises(UsageError, match=message):
                room_for(source, form, SIZE, context=context, kv=kv)
        with pytest.raises(ResourceError, match="nothing is left") as refused:
            room_for(source, "gguf", need.total, context=512)
        assert f"{need.total:,}" in str(refused.value.expected)
