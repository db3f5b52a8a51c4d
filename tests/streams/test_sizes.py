"""Headers foretell what the network then has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from llm_quantize.blockwise.stages import routers, stages
from llm_quantize.calibration.collect import compute_dtype
from llm_quantize.io.statistics_layout import TapLike
from llm_quantize.models.opening import open_source
from llm_quantize.streams.network import open_network
from llm_quantize.streams.sizes import _cpu_flags, from_headers, from_network, workspace_bytes

from ..tiny_models import make_tiny


def seen(taps: Sequence[TapLike], chosen: frozenset[str]) -> list[list[tuple[int, int]]]:
    """(columns, matrices) of what is collected together, in any order."""
    found = stages(taps, {tap.name for tap in taps}, chosen, sequential=True)
    return sorted(sorted((tap.columns, tap.matrices) for tap in stage) for stage in found)


@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "mixtral", "qwen3_moe", "gpt2", "olmo2"])
def test_headers_foretell_the_network(variant: str, tmp_path: Path) -> None:
    source = open_source(str(make_tiny(variant, tmp_path / "model")))
    with source.checkpoint:
        network = open_network(source, dtype=compute_dtype(source, "cpu"))
        found = from_network(source, network, [network.taps(index) for index in range(network.n_blocks)])
        foreseen = from_headers(source)
        chosen = routers(source.tensors.outputs)
    assert foreseen.itemsize == found.itemsize
    assert foreseen.block == pytest.approx(found.block, rel=0.01)
    assert foreseen.embedding == found.embedding
    assert foreseen.head == pytest.approx(found.head, rel=0.01)
    assert foreseen.hidden(3, 5) == found.hidden(3, 5) == 3 * 5 * network.width * found.itemsize
    for told, real in zip(foreseen.taps, found.taps, strict=True):
        assert seen(told, chosen) == seen(real, chosen)


def test_flags_are_found_where_the_system_tells_them(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu amx_tile\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert _cpu_flags(tmp_path / "cpuinfo") == {"fpu", "amx_tile"}
    assert _cpu_flags(tmp_path / "absent") == set()


def test_scores_of_all_heads_count_where_they_are_computed_at_once(demo_model: Path) -> None:
    source = open_source(str(demo_model))
    with source.checkpoint:
        hyper = source.architecture.hyper
    tiled, whole = (workspace_bytes(hyper, 1024, 2, eager=eager) for eager in (False, True))
    assert whole - tiled == 1024 * 1024 * (hyper.n_head * 8 - 16)
    assert workspace_bytes(hyper, 2048, 2, eager=True) > 3 * whole
