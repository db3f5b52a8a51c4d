"""Which measured file for which machine: what each takes when it runs, and the rule's answer for sizes of memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from llm_quantize import memory
from llm_quantize.advice.footprint import footprint, place, shape_of, weights_of
from llm_quantize.advice.machine import Machine, detect
from llm_quantize.evaluation.speed import Speed
from llm_quantize.io.artifact_files import artifact_files
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.measures.advisor import Offer, advise
from llm_quantize.models.opening import Source
from llm_quantize.models.quantized import is_stored_directory
from llm_quantize.reports.findings import ComparisonResult, MachineChoice, Needs

RAM = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
GPU = (4, 6, 8, 12, 16, 24, 32, 48, 80, 96, 141)
GB = 10**9
BOUNDLESS = 1 << 60


def this_machine() -> Machine:
    """The machine that this process is on; where nobody can tell the size of its memory, everything fits."""
    return detect(ram=BOUNDLESS if memory.memory_limit(None) is None else None)


def needs_of(source: Source, artifact: Path, machine: Machine, context: int, speed: Speed | None) -> Needs:
    """What the artifact takes with a cache of ``context`` tokens: of a GGUF file computed (advice/footprint.py), of a
    directory as it was measured, if it was. Raises what reading headers raises."""
    if is_stored_directory(artifact):
        if speed is None:
            return Needs()
        return Needs(ram=speed.memory, here="cpu" if speed.memory <= machine.usable_ram else "")
    shape = shape_of(source)
    sizes = {tensor.name: tensor.nbytes for file in artifact_files(artifact) for tensor in read_gguf(file).tensors}
    weights = weights_of(sizes, shape.n_layer)
    boundless = Machine("cuda", BOUNDLESS, BOUNDLESS)
    whole, here = place(weights, shape, boundless, context), place(weights, shape, machine, context)
    return Needs(
        ram=footprint(weights, shape, context).total,
        gpu=None if whole is None else whole.gpu,
        here="" if here is None else here.kind,
    )


def choices(result: ComparisonResult) -> tuple[MachineChoice, ...]:
    """The rule's answer for each size of RAM, and of GPUs that hold a file whole, of the variants that the first
    runtime runs; sizes below the first at which anything fits are left out, but for one."""
    leading = result.runtimes()[0] if result.variants else ""
    offers = [
        offer if variant.runs_in == leading else replace(offer, kld=math.inf)
        for offer, variant in zip(result.offers(), result.variants, strict=True)
    ]
    ram = [variant.needs.ram for variant in result.variants]
    gpu = [variant.needs.gpu for variant in result.variants]
    usable = [(size * GB, Machine("cpu", size * GB).usable_ram) for size in RAM]
    found = [*_rows(result, "ram", offers, ram, usable)]
    return (*found, *_rows(result, "gpu", offers, gpu, [(size * GB, size * GB) for size in GPU]))


def _rows(
    result: ComparisonResult,
    kind: str,
    offers: list[Offer],
    needs: list[int | None],
    machines: Iterable[tuple[int, int]],
) -> list[MachineChoice]:
    rows: list[MachineChoice] = []
    for size, room in machines:
        fitting = [
            replace(offer, fits=need is not None and need <= room, split=False)
            for offer, need in zip(offers, needs, strict=True)
        ]
        take = advise(fitting).take
        rows.append(MachineChoice(kind, size, None if take is None else result.variants[take].file))
    first = next((place for place, row in enumerate(rows) if row.file is not None), len(rows))
    return rows[max(0, first - 1) :] if first < len(rows) else []
