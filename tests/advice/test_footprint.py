"""Memory of a running model: by hand, as properties, and against what llama.cpp itself reports."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_quantize.advice.describe import describe
from llm_quantize.advice.footprint import CUDA_CONTEXT, Shape, Weights, footprint, place, shape_of, weights_of
from llm_quantize.advice.machine import Machine
from llm_quantize.advice.recommend import recommend
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import quantize
from llm_quantize.runtimes.llama_cpp_library import load_library
from tests.tiny_models import make_tiny

MODELS = Path(__file__).resolve().parents[2] / "benchmarks" / "models"
SHAPE = Shape(4, 2, 64, 512, 1024, 0, 32_000, (0, 0, 0, 0))
WEIGHTS = Weights(10_000_000, (20_000_000,) * 4, 15_000_000, False)
PLENTY = 100_000_000_000


def test_cache_by_hand() -> None:
    assert SHAPE.layer_cache(0, 2048) == 2 * 2 * 2 * 64 * 2048
    assert SHAPE.layer_cache(0, 2049) == 2 * 2 * 2 * 64 * 2304
    sliding = replace(SHAPE, windows=(512, 0, 512, 512))
    assert [sliding.cells(layer, 8192) for layer in range(4)] == [1024, 8192, 1024, 1024]
    assert [sliding.cells(layer, 700) for layer in range(4)] == [768] * 4
    assert footprint(WEIGHTS, sliding, 8192).cache == 2 * 2 * 2 * 64 * (3 * 1024 + 8192)


@pytest.mark.parametrize(
    ("shape", "context", "mebibytes"),
    [
        (Shape(4, 4, 64, 2048, 5632, 0, 32_000, (0,) * 4), 2048, 84.52),
        (Shape(4, 4, 64, 2048, 5632, 0, 32_000, (0,) * 4), 8192, 94.52),
        (Shape(4, 4, 64, 2048, 5632, 0, 128_256, (0,) * 4), 32_768, 302.52),
        (Shape(4, 4, 64, 2048, 11_264, 0, 32_000, (0,) * 4), 8192, 94.02),
        (Shape(2, 8, 128, 4096, 14_336, 0, 128_256, (0,) * 2), 32_768, 330.52),
        (Shape(2, 8, 128, 4096, 14_336, 0, 512, (0,) * 2), 2048, 126.02),
    ],
)
def test_working_buffers_as_llama_cpp_reported_them(shape: Shape, context: int, mebibytes: float) -> None:
    assert 1.0 <= shape.compute(context) / (mebibytes * 2**20) < 1.07


def test_parts_of_a_model() -> None:
    sizes = {"token_embd.weight": 7, "output_norm.weight": 1, "blk.0.attn_q.weight": 10, "blk.1.attn_q.weight": 20}
    tied = weights_of(sizes, 2)
    assert tied == Weights(7, (10, 20), 8, True)
    assert tied.total == sum(sizes.values())
    assert weights_of({**sizes, "output.weight": 5}, 2) == Weights(7, (10, 20), 6, False)


def test_everything_on_the_gpu_or_nothing() -> None:
    need = footprint(WEIGHTS, SHAPE, 1024)
    whole = place(WEIGHTS, SHAPE, Machine("cuda", PLENTY, PLENTY), 1024)
    assert whole is not None
    assert (whole.kind, whole.gpu_layers, whole.layers) == ("gpu", 5, 5)
    assert whole.gpu == 95_000_000 + need.cache + need.compute + CUDA_CONTEXT
    alone = place(WEIGHTS, SHAPE, Machine("cpu", PLENTY), 1024)
    assert alone is not None
    assert (alone.kind, alone.gpu_layers, alone.ram) == ("cpu", 0, need.total)
    assert place(WEIGHTS, SHAPE, Machine("cpu", need.total), 1024) is None  # the system keeps an eighth


def test_an_embedding_that_serves_twice_lies_there_once() -> None:
    tied = Weights(10_000_000, (20_000_000,) * 4, 10_000_001, True)
    alone, whole = (place(tied, SHAPE, Machine("cuda", PLENTY, vram), 1024) for vram in (0, PLENTY))
    need = footprint(tied, SHAPE, 1024)
    assert alone is not None
    assert whole is not None
    assert need.weights == 90_000_001
    assert alone.ram == need.total
    assert whole.ram == 10_000_000 + need.runtime + 4 * 512 * SHAPE.hidden  # llama.cpp keeps the embedding in RAM
    assert whole.gpu == 90_000_001 + need.cache + need.compute + CUDA_CONTEXT


def test_memory_that_is_shared_is_not_split() -> None:
    need = footprint(WEIGHTS, SHAPE, 1024)
    enough = Machine("apple", need.total * 2, need.total)
    found = place(WEIGHTS, SHAPE, enough, 1024)
    assert found is not None
    assert found.kind == "gpu"
    cramped = place(WEIGHTS, SHAPE, replace(enough, vram=130_000_000), 1024)  # for half of it
    assert cramped is not None
    assert cramped.kind == "cpu"
    assert place(WEIGHTS, SHAPE, replace(enough, ram=need.total), 1024) is None


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10**9), min_size=4, max_size=4),
    ends=st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)),
    tied=st.booleans(),
    ram=st.integers(1, 10**10),
    vram=st.integers(0, 10**10),
    context=st.integers(1, 10**5),
)
def test_placements_fit_and_are_the_largest(
    sizes: list[int], ends: tuple[int, int], tied: bool, ram: int, vram: int, context: int
) -> None:
    weights = Weights(ends[0], tuple(sizes), ends[1] + (ends[0] if tied else 0), tied)
    machine = Machine("cuda", ram, vram)
    need, found = footprint(weights, SHAPE, context), place(weights, SHAPE, machine, context)
    if found is None:
        assert need.total > machine.usable_ram
        return
    assert found.gpu <= vram
    assert found.ram <= machine.usable_ram
    assert found.gpu + found.ram >= need.total
    more = place(weights, SHAPE, replace(machine, vram=vram * 2), context)
    assert more is not None
    assert more.gpu_layers >= found.gpu_layers


def reported(lines: list[str], words: str) -> int:
    """Bytes of every buffer of this kind in llama.cpp's log."""
    found = [re.search(rf"{words} buffer size = +([\d.]+) MiB", line) for line in lines]
    return round(sum(float(match[1]) for match in found if match) * 2**20)


@pytest.mark.parametrize("model", ["demo", "qwen3-moe", "gemma3_text", "mixtral"])
def test_as_llama_cpp_itself_reports(model: str, demo_model: Path, tmp_path: Path) -> None:
    """A live context with llama.cpp's own defaults, but the whole cache for sliding layers, as its library has it."""
    if model == "demo":
        path = demo_model
    elif model == "qwen3-moe":
        path = MODELS / "demo-qwen3-moe"
    else:
        path = make_tiny(model, tmp_path / "model")
    (result,) = quantize(str(path), levels=["Q8_0"], output_dir=tmp_path / "out")
    source = open_source(str(path), headers_only=True)
    with source.checkpoint:
        shape = shape_of(source)
    kinds = len(set(shape.windows))
    shape = replace(shape, windows=(0,) * shape.n_layer)
    library = load_library()
    call = library.call
    loaded = call.llama_model_load_from_file(str(result.path).encode(), call.llama_model_default_params())
    try:
        for context in (512, 4096):
            parameters = call.llama_context_default_params()
            parameters.put(0, "<I", context)
            library.lines.clear()
            live = call.llama_init_from_model(loaded, parameters)
            assert live
            lines = [text for _, text in library.lines]
            call.llama_free(live)
            cache = sum(shape.layer_cache(layer, context) for layer in range(shape.n_layer))
            assert reported(lines, "KV") == pytest.approx(cache, abs=kinds * 6000)  # the log has two places
            compute = reported(lines, "compute")
            assert 0.98 * compute < shape.compute(context) + (kinds - 1) * 1024 * context < 1.25 * compute + 2**20
    finally:
        call.llama_model_free(loaded)


def test_info_and_recommend_count_one_cache(tmp_path: Path) -> None:
    """Of a model most of whose layers slide, which a count of full attention in every layer gets wrong by far."""
    path = make_tiny("gemma3_text", tmp_path / "model", max_position_embeddings=8192)
    told = describe(str(path))["memory"]["kv_cache_f16"]
    source = open_source(str(path), headers_only=True)
    with source.checkpoint:
        hyper = source.architecture.hyper
        advice = recommend(source, Machine("cpu", PLENTY), model=str(path))
    assert told["tokens"] == advice.context == 8192
    assert {choice.need.cache for choice in advice.choices} == {told["bytes"]}
    full = 2 * 2 * hyper.n_head_kv * hyper.head_dim * 8192
    assert full < told["bytes"] < 2 * full
    assert hyper.n_layer == 7
