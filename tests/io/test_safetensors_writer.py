"""Layouts of safetensors files, against the library's own bytes and its reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from llm_quantize.errors import ResourceError
from llm_quantize.io import safetensors_writer as writer
from llm_quantize.io.safetensors_writer import TensorSpec, layout_safetensors

TORCH = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SPECS = st.lists(
    st.builds(
        TensorSpec,
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.sampled_from(sorted(TORCH)),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
    ),
    max_size=8,
    unique_by=lambda tensor: tensor.name,
)


@settings(max_examples=80, deadline=None)
@given(SPECS, st.sampled_from([{}, {"format": "pt"}]))
def test_the_library_writes_the_same_header(tensors: list[TensorSpec], metadata: dict[str, str]) -> None:
    layout = layout_safetensors(tensors, metadata)
    theirs = save({t.name: torch.zeros(t.shape, dtype=TORCH[t.dtype]) for t in tensors}, metadata or None)
    assert theirs == layout.header + bytes(layout.size - len(layout.header))
    assert all(layout.offsets[t.name] % (TORCH[t.dtype].itemsize) == 0 for t in tensors)


def test_the_library_reads_what_is_put_at_the_offsets(tmp_path: Path) -> None:
    tensors = [TensorSpec("b", "F16", (2, 3)), TensorSpec("a", "I64", (2,)), TensorSpec("c.d", "I32", (5,))]
    values = {
        "b": torch.arange(6).reshape(2, 3).half(),
        "a": torch.tensor([7, -8]),
        "c.d": torch.arange(-2, 3, dtype=torch.int32),
    }
    layout = layout_safetensors(tensors, {"format": "pt"})
    data = bytearray(layout.header + bytes(layout.size - len(layout.header)))
    for name, value in values.items():
        raw = value.numpy().tobytes()
        data[layout.offsets[name] : layout.offsets[name] + len(raw)] = raw
    (tmp_path / "x.safetensors").write_bytes(data)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), value) for name, value in values.items())


def test_shards() -> None:
    assert writer.shard_names(1) == ["model.safetensors"]
    assert writer.shard_names(12)[-1] == "model-00012-of-00012.safetensors"
    assert writer.split_shards([4, 4, 9, 1, 1], 8) == [range(0, 2), range(2, 3), range(3, 5)]
    assert writer.split_shards([], 8) == [range(0, 0)]
    index = json.loads(writer.index_bytes({"b": "2", "a": "1"}, 12))
    assert index == {"metadata": {"total_size": 12}, "weight_map": {"a": "1", "b": "2"}}


def test_misuse(monkeypatch: pytest.MonkeyPatch) -> None:
    one = TensorSpec("x", "F16", (1,))
    with pytest.raises(ValueError, match="x stands twice"):
        layout_safetensors([one, one], {})
    with pytest.raises(ValueError, match="not in tuple"):
        layout_safetensors([TensorSpec("x", "F4", (2,))], {})
    monkeypatch.setattr(writer, "MAX_HEADER_BYTES", 32)
    with pytest.raises(ResourceError, match="output-shard-size"):
        layout_safetensors([one], {})
