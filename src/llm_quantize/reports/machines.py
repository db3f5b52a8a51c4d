"""Which file for which machine, as rows of a table: the answers of a comparison, equal neighbours in one row."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llm_quantize.options import PROMPTS
from llm_quantize.reports.findings import ComparisonResult, MachineChoice, Variant
from llm_quantize.reports.labels import grade_name, labels
from llm_quantize.reports.numbers import ABSENT, bytes_text, tick_text


@dataclass(frozen=True)
class MachineRow:
    """Words of one row: the ``machine``, the ``label`` of what to take ("": nothing fits), its ``size``, the memory
    it ``needs``, its ``grade``, and the ``command`` that makes it, or runs it where it was there already."""

    machine: str
    label: str
    size: str
    needs: str
    grade: str
    command: str


def machine_rows(result: ComparisonResult, lang: str) -> list[MachineRow]:
    """The rows, from little memory to much; of computers first, then of GPUs."""
    words = labels(lang)
    named = {variant.file: variant for variant in result.variants}
    return [
        _row(result, run, named.get(run[0].file or ""), is_last=last, words=words, lang=lang)
        for run, last in _runs(result.machines)
    ]


def commands_of(result: ComparisonResult, variant: Variant) -> dict[str, str]:
    """{"make", "run"}: lines for a shell that make the variant in out/ and let it write; without "make" where it was
    taken as it was."""
    if variant.make is None:
        return {"run": shlex.join(["llm-quantize", "run", variant.path or variant.file, PROMPTS[0]])}
    make = ["llm-quantize", "quantize", result.model.source, *variant.make, "-o", "out"]
    return {
        "make": shlex.join(make),
        "run": shlex.join(["llm-quantize", "run", f"out/{variant.file}", PROMPTS[0]]),
    }


def command_of(result: ComparisonResult, variant: Variant) -> str:
    """The line that makes the variant, or runs it where it was there already."""
    return next(iter(commands_of(result, variant).values()))


def _runs(choices: tuple[MachineChoice, ...]) -> Iterator[tuple[list[MachineChoice], bool]]:
    """Neighbours with the same answer, and whether they are the last of their kind."""
    run: list[MachineChoice] = []
    for choice in choices:
        if run and (run[0].kind, run[0].file) != (choice.kind, choice.file):
            yield run, run[0].kind != choice.kind
            run = []
        run.append(choice)
    if run:
        yield run, True


def _row(
    result: ComparisonResult,
    run: list[MachineChoice],
    variant: Variant | None,
    *,
    is_last: bool,
    words: Mapping[str, str],
    lang: str,
) -> MachineRow:
    first, last = tick_text(run[0].memory), tick_text(run[-1].memory)
    size = first if first == last else words["machine_range"].format(first=first, last=last)
    if is_last:
        size = words["machine_open"].format(first=first)
    machine = words[f"machine_{run[0].kind}"].format(size=size)
    if variant is None:
        return MachineRow(machine, "", "", "", words["machine_none"], "")
    need = getattr(variant.needs, run[0].kind)
    return MachineRow(
        machine=machine,
        label=variant.label,
        size=bytes_text(variant.size),
        needs=ABSENT if need is None else bytes_text(need),
        grade=grade_name(variant.grade, lang),
        command=command_of(result, variant),
    )
