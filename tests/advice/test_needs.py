"""Memory of the runtimes beside llama.cpp: by hand, as it was measured, and never less for more."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_quantize.advice import needs
from llm_quantize.advice.footprint import CUDA_CONTEXT, Shape, shape_of
from llm_quantize.advice.machine import Gpu, Machine
from llm_quantize.advice.needs import GIB, MIB, Load, cells
from llm_quantize.models.opening import open_source
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import quantize
from tests.tiny_models import make_tiny

SHAPE = Shape(4, 2, 64, 512, 1024, 0, 32_000, (0, 0, 0, 0), n_head=8)
LOAD = Load(10_000_000, 500_000)
CPU, GPU = Machine("cpu", 64 * GIB), Machine("cuda", 64 * GIB, 24 * GIB)
ALL = (needs.vllm_gpu, needs.vllm_cpu, needs.transformers_gpu, needs.transformers_cpu, needs.ctranslate2, needs.mlx)


def test_caches_by_hand() -> None:
    """Type and blocks of each runtime: 2 (keys, values) × bytes × 2 heads × 64 × cells of 4 layers."""
    line = 2 * 2 * 64 * 4
    assert needs.vllm_gpu(LOAD, SHAPE, GPU, 1000).cache == line * 2 * 1008  # blocks of 16
    assert needs.vllm_cpu(LOAD, SHAPE, CPU, 1000).cache == GIB  # whole gigabytes
    assert needs.vllm_cpu(LOAD, replace(SHAPE, n_head_kv=64), CPU, 20_000).cache == 2 * GIB
    assert needs.transformers_gpu(LOAD, SHAPE, GPU, 1000).cache == line * 2 * 1000
    assert needs.ctranslate2(LOAD, SHAPE, CPU, 1000).cache == line * 4 * 1000  # float32
    assert needs.mlx(LOAD, SHAPE, Machine("apple", 16 * GIB, 10 * GIB), 1000).cache == line * 2 * 1024
    sliding = replace(SHAPE, windows=(512, 0, 512, 512))
    assert cells(sliding, 8192, block=1) == 3 * 512 + 8192
    assert cells(sliding, 8192, block=16, ahead=2064) == 3 * 2576 + 8192
    assert cells(sliding, 100, block=16, ahead=2064) == 4 * 112


def test_scores_of_a_long_prompt_are_ctranslate2s_own() -> None:
    short, long = (needs.ctranslate2(LOAD, SHAPE, CPU, context).compute for context in (1000, 2000))
    assert long - 2 * short == pytest.approx(2 * 4 * 8 * 1000**2, rel=0.01)


def test_a_matrix_is_decoded_and_integers_are_wide() -> None:
    decoded = (
        needs.transformers_cpu(LOAD, SHAPE, CPU, 64).compute - needs.transformers_cpu(Load(0), SHAPE, CPU, 64).compute
    )
    assert decoded == 2 * 500_000
    plain, wide = (needs.transformers_cpu(Load(0, 0, one), SHAPE, CPU, 4096).compute for one in (False, True))
    assert wide > 3 * plain


def test_what_a_runtime_may_have() -> None:
    assert needs.of_vllm(GPU) == int(0.9 * 24 * GIB)
    busy = Machine("cuda", 64 * GIB, 30 * GIB, (Gpu("a", 24 * GIB, 20 * GIB), Gpu("b", 12 * GIB, 10 * GIB)))
    assert needs.of_vllm(busy) == 20 * GIB  # of one GPU, and only what is free of it
    assert needs.of_one_gpu(busy) == 20 * GIB
    assert needs.of_ram(CPU) == CPU.usable_ram
    assert needs.of_metal(Machine("apple", 8 * GIB, 6 * GIB)) == 6 * GIB
    assert needs.vllm_gpu(LOAD, SHAPE, GPU, 64).runtime == CUDA_CONTEXT + 512 * MIB
    large = needs.vllm_gpu(LOAD, SHAPE, Machine("cuda", 64 * GIB, 80 * GIB), 64)
    assert large.compute > 3 * needs.vllm_gpu(LOAD, SHAPE, GPU, 64).compute  # reads more tokens at once


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70_000), st.integers(1, 5000), st.integers(0, 4096), st.sampled_from(ALL))
def test_more_tokens_never_take_less(context: int, more: int, window: int, need: needs.Need) -> None:
    shape = replace(SHAPE, windows=(window, 0, window, 0))
    fewer, greater = (need(LOAD, shape, GPU, tokens) for tokens in (context, context + more))
    assert fewer.cache <= greater.cache
    assert fewer.total <= greater.total
    assert need(replace(LOAD, weights=LOAD.weights + 1), shape, GPU, context).total == fewer.total + 1


_PEAK = """
import json, sys, ctranslate2
def memory(line):
    return next(1024 * int(text.split()[1]) for text in open("/proc/self/status") if text.startswith(line))
directory, tokens = sys.argv[1], int(sys.argv[2])
model = ctranslate2.Generator(directory, device="cpu", intra_threads=1)
words = json.load(open(directory + "/vocabulary.json"))
prompt = [words[index % len(words)] for index in range(tokens)]
model.generate_batch([prompt], max_length=2, min_length=2, sampling_topk=1, include_prompt_in_result=False)
print(memory("VmHWM"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("tokens", [64, 1500])
def test_ctranslate2_takes_what_is_counted(tokens: int, tmp_path: Path) -> None:
    """The whole process, at its peak."""
    pytest.importorskip("ctranslate2")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096}  # fmt: skip
    model = make_tiny("llama", tmp_path / "model", **sizes)
    options = Options(threads=1, method=MethodOptions(method="rtn"))
    (made,) = quantize(str(model), "ctranslate2", levels=["int8"], output_dir=tmp_path, options=options)
    with (source := open_source(str(model), headers_only=True)).checkpoint:
        counted = needs.ctranslate2(Load(made.size), shape_of(source), CPU, tokens).total
    done = subprocess.run([sys.executable, "-c", _PEAK, str(made.path), str(tokens)], capture_output=True, check=True)
    assert 0.7 * counted < int(done.stdout) < 1.07 * counted
