"""Tables of quality on published models, from what benchmarks/real.py measured: for docs/reference/quality.md, and
shorter for docs/reference/measured.md in both languages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_quantize.measures.amounts import counted

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
FILES = ("real.json", "real_gemma.json")
MIXED, ENGLISH = "English and Japanese", "English"

OTHERS = {
    "rtn": "rounded to nearest",
    "plain": "rounded, plain scales",
    "source": "`--inputs source`",
    "imatrix": "llama.cpp's bytes, imatrix",
    "llmcompressor": "llm-compressor, GPTQ",
    "mlx_lm.gptq": "mlx_lm, GPTQ",
    "gptqmodel": "GPTQModel",
    "gptqmodel awq": "GPTQModel, AWQ",
    "autoround": "AutoRound, 200 iterations",
}
"""What ours is held against, by its name in benchmarks/real.py."""

WORDS = {
    "en": ("file", "held against", "ours", "theirs", "ours / theirs", "in English alone"),
    "ja": ("ファイル", "比べた相手", "本ツール", "相手", "本ツール / 相手", "英語のみ"),
}
JAPANESE = {
    "rounded to nearest": "最近接への丸め",
    "rounded, plain scales": "丸め、単純なスケール",
    "llama.cpp's bytes, imatrix": "llama.cpp のバイト列、imatrix",
    "AutoRound, 200 iterations": "AutoRound、200 回",
}


def measured() -> list[dict[str, Any]]:
    """What is in FILES, in that order."""
    return [json.loads((RESULTS / name).read_text()) for name in FILES if (RESULTS / name).is_file()]


def compared(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, str]]:
    """(name, row, our way, the other) of every pair that is told."""
    for name, row in found["rows"].items():
        ours, *others = row["texts"][MIXED]["losses"]
        for other in others:
            yield name, row, ours, other


def full_tables() -> list[str]:
    """A section for each model."""
    lines: list[str] = []
    for found in measured():
        rows = list(compared(found))
        text = rows[0][1]["texts"][MIXED]
        lines += [
            "",
            f"## {found['model']}",
            "",
            f"{text['tokens']:,} scored tokens in {text['windows']} windows of {text['context']} of held-out prose, in",
            f"English and Japanese; in English alone on as many. {counted(found['threads'], 'thread')}.",
            "",
            "| file | held against | KLD | theirs | ratio | aim | | in English alone | 99.9 % KLD | same top | CPU-s |",
            "|---|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
        ]
        lines += [_full(name, row, ours, other) for name, row, ours, other in rows]
    return lines


def _full(name: str, row: dict[str, Any], ours: str, other: str) -> str:
    mixed, english = row["texts"][MIXED], row["texts"][ENGLISH]
    one, two = mixed["losses"][ours], mixed["losses"][other]
    cost = (row["made"][how]["cpu_seconds"] for how in (ours, other))
    aim = row.get("aims", {}).get(other)
    ratio = english["pairs"][f"{ours} / {other}"]["kld_ratio"]
    worst = max(ratio, mixed["pairs"][f"{ours} / {other}"]["kld_ratio"])
    verdict = "" if aim is None else "met" if worst <= aim else "missed"
    return (
        f"| {name} | {_called(row, other)} | {_kld(one['kld'])} | {_kld(two['kld'])} "
        f"| {_ratio(mixed, ours, other)} | {'' if aim is None else f'{aim:.2f}'} | {verdict} "
        f"| {_ratio(english, ours, other)} | {one['kld_999']:.3g} / {two['kld_999']:.3g} "
        f"| {100 * one['same_top']:.1f} % / {100 * two['same_top']:.1f} % "
        f"| {' / '.join(f'{seconds:.0f}' for seconds in cost)} |"
    )


def short_table(language: str) -> str:
    """The first model's rows in a few columns."""
    head = WORDS[language]
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---:|---:|---:|"]
    for name, row, ours, other in compared(measured()[0]):
        mixed, english = row["texts"][MIXED], row["texts"][ENGLISH]
        klds = (_kld(mixed["losses"][how]["kld"]) for how in (ours, other))
        called = _called(row, other)
        called = JAPANESE.get(called, called) if language == "ja" else called
        ratios = f"**{_ratio(mixed, ours, other)}** | {_ratio(english, ours, other)}"
        lines.append(f"| {name} | {called} | {' | '.join(klds)} | {ratios} |")
    return "\n".join(lines)


def _called(row: dict[str, Any], other: str) -> str:
    versions = row["made"][other].get("versions", {})
    version = next(iter(versions.values()), "")
    name, comma, rest = OTHERS[other].partition(",")
    return f"{name} {version}{comma}{rest}" if version else OTHERS[other]


def _ratio(text: dict[str, Any], ours: str, other: str) -> str:
    pair = text["pairs"][f"{ours} / {other}"]
    return f"{pair['kld_ratio']:.3f} ± {pair['kld_ratio_sem']:.3f}"


def _kld(value: float) -> str:
    return f"{value:.4f}" if value >= 0.01 else f"{value:.5f}"
