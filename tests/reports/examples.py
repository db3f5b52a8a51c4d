"""Comparison results made by hand for the tests of the reports."""

from __future__ import annotations

import math

import numpy as np

from llm_quantize.evaluation.speed import Speed
from llm_quantize.measures.divergence import Divergence
from llm_quantize.measures.grades import GRADES, grade
from llm_quantize.reports.findings import (
    ComparisonResult,
    MachineChoice,
    MachineFacts,
    ModelFacts,
    Needs,
    Reference,
    Sample,
    TensorError,
    TextFacts,
    Variant,
)

ROLES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def divergence(kld: float, sem: float | None = None) -> Divergence:
    sem = kld / 40 if sem is None else sem
    return Divergence(
        tokens=6096,
        perplexity=21.4 * math.exp(kld),
        perplexity_sem=0.6,
        reference_perplexity=21.4,
        reference_perplexity_sem=0.61,
        ln_ratio=kld,
        ln_ratio_sem=sem,
        kld=kld,
        kld_sem=sem,
        kld_median=kld * 0.6,
        kld_99=kld * 7,
        kld_999=kld * 15,
        kld_max=kld * 31,
        same_top=max(0.0, 1 - math.sqrt(kld) / 2),
        same_top_sem=0.004,
        rms_delta_p=math.sqrt(kld) / 6,
        rms_delta_p_sem=0.0004,
        acceptance=max(0.0, 1 - math.sqrt(kld) / 3),
        acceptance_sem=0.003,
        clusters=24,
    )


def speed(rate: float, memory: int) -> Speed:
    return Speed(rate * 4, rate, memory, 43_000_000, 256, 32, 3, 2, "llama.cpp (xllamacpp 2026.10)", 0.98)


def variant(
    level: str,
    size: int,
    kld: float,
    *,
    layers: int = 4,
    sem: float | None = None,
    text: str | None = " was very calm. He said to himself that it was good.",
    timed: bool = True,
) -> Variant:
    random = np.random.Generator(np.random.PCG64(size))
    base = math.sqrt(kld) / 2
    errors = [
        TensorError(f"blk.{i}.{role}.weight", i, role, "q4_k", base * float(random.uniform(0.5, 1.6)))
        for i in range(layers)
        for role in ROLES
    ]
    errors.append(TensorError("token_embd.weight", None, "token_embd", "q6_k", base * 0.6))
    return Variant(
        format="gguf",
        level=level,
        file=f"model-{level}.gguf",
        size=size,
        bits_per_weight=size * 8 / 5_771_520,
        quantize_cpu_seconds=1.25,
        divergence=divergence(kld, sem),
        grade=grade(kld),
        speed=speed(3e9 / size, size + 70_000_000) if timed else None,
        tensor_errors=tuple(errors),
        samples=() if text is None else (Sample("The old man looked at the sea and", text),),
        runs_in="llama.cpp",
        needs=Needs(size + 80_000_000, size + 500_000_000),
        make=("gguf", "-q", level),
        path=f"report/artifacts/model-{level}.gguf",
    )


def comparison(
    *variants: Variant, name: str = "demo-llama", layers: int = 4, source_text: str | None = None
) -> ComparisonResult:
    text = " was very calm. He said that he was going." if source_text is None else source_text
    return ComparisonResult(
        model=ModelFacts(name, name, None, "llama", 5_771_520, 11_547_128, "BF16", layers, "9f" * 32, "8e" * 32),
        text=TextFacts(("pride_and_prejudice.txt", "wagahai_wa_neko_de_aru.txt"), "ab" * 32, 256, 48, 6096),
        machine=MachineFacts("A processor of some kind", 2, 16_000_000_000, "Linux x86_64", "llama.cpp"),
        reference=Reference(21.4, 0.61, 16.01, 2.1e-6, (Sample("The old man looked at the sea and", text),)),
        variants=variants,
        grades=GRADES,
        versions={"llm-quantize": "0.1.0", "numpy": "2.0"},
        commands=("llm-quantize compare demo-llama --variants gguf:Q4_K_M",),
        created="2026-11-22",
        cache=1024,
        machines=(
            MachineChoice("ram", 4_000_000_000, None),
            *(MachineChoice("ram", size * 10**9, variants[0].file) for size in (8, 16, 24) if variants),
            MachineChoice("gpu", 8_000_000_000, variants[-1].file),
        )
        if variants
        else (),
    )


def usual() -> ComparisonResult:
    """Six levels as one sees them, and one that another beats."""
    return comparison(
        variant("Q8_0", 6_206_976, 0.00021),
        variant("Q6_K", 4_810_240, 0.0016),
        variant("Q5_K_M", 4_174_848, 0.0061),
        variant("Q4_K_M", 3_576_832, 0.0192),
        variant("Q4_0", 3_700_000, 0.041),
        variant("Q3_K_M", 3_005_440, 0.083),
        variant("Q2_K", 2_409_472, 0.39),
    )
