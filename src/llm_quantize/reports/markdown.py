"""A comparison as Markdown for a model card: one paragraph, the tables, and the command; no HTML, no picture."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

from llm_quantize.errors import printable
from llm_quantize.reports.findings import ComparisonResult, Variant
from llm_quantize.reports.hardware import hardware_rows
from llm_quantize.reports.labels import grade_name, labels
from llm_quantize.reports.machines import commands_of, machine_rows
from llm_quantize.reports.notes import translated
from llm_quantize.reports.numbers import ABSENT, bytes_text, percent, rate_text, significant, with_error
from llm_quantize.reports.page import kld_text, machines_lead, method, text_names, verdict

_SPECIAL = re.compile(r"([\\`*\[\]#|~$<>&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_BLANKS = {0xA0: " ", 0x202F: " "}
_FENCE = re.compile(r"`{3,}")


def escape(text: str) -> str:
    """``text`` as Markdown shows it as it is: one line, nothing in it markup, HTML or a link; blanks that do not break
    become such as do."""
    return _SPECIAL.sub(r"\\\1", printable(text.translate(_BLANKS), 1 << 16))


def markdown(result: ComparisonResult, lang: str = "en") -> str:
    """The text, ending in a newline. Raises UsageError for an unknown language."""
    words = labels(lang)
    advice = result.advice()
    chosen = None if advice.take is None else result.variants[advice.take]
    sentence = html.unescape(str(verdict(result, advice, words)))
    if chosen is not None:
        sentence = re.sub(r"</?strong>", "", sentence)
    text = result.text
    lead = words["markdown_lead"].format(
        version=result.versions.get("llm-quantize", ""),
        tokens=f"{text.tokens:,}",
        windows=f"{text.windows:,}",
        context=f"{text.context:,}",
        names=text_names(result, lang),
    )
    lines = [f"## {escape(words['title'].format(model=result.model.name))}", "", escape(sentence), ""]
    if chosen is not None:
        lines += [*_block(list(commands_of(result, chosen).values())), ""]
    lines += [*_machines(result, words, lang), escape(lead), ""]
    timed = any(variant.speed for variant in result.variants)
    heads = ["variant", "size", "bpw", "kld", "p99", "same", "ppl"]
    heads += ["memory", "prompt", "generation"] if timed else []
    lines.append("| " + " | ".join(words[name] for name in (*heads, "grade")) + " |")
    lines.append("|---|" + "---:|" * (len(heads) - 1) + "---|")
    for variant in result.variants:
        cells = _cells(variant, timed=timed)
        name = escape(variant.label)
        cells[0] = f"**{name}**" if variant is chosen else name
        lines.append("| " + " | ".join([*cells, escape(grade_name(variant.grade, lang))]) + " |")
    lines += _hardware(result, words, lang)
    for paragraph in method(result, lang):
        lines += ["", escape(paragraph)]
    if result.notes:
        lines += ["", *(f"- {escape(translated(note, lang))}" for note in result.notes)]
    if result.commands:
        lines += ["", *_block(result.commands)]
    return "\n".join(lines) + "\n"


def _block(commands: Sequence[str]) -> list[str]:
    """Lines for a shell, fenced."""
    block = "\n".join(printable(line, 1 << 16) for command in commands for line in command.split("\n"))
    fence = "`" * max([3, *(len(run) + 1 for run in _FENCE.findall(block))])
    return [f"{fence}sh", block, fence]


def _machines(result: ComparisonResult, words: Mapping[str, str], lang: str) -> list[str]:
    """The table of machines; nothing where there is none."""
    rows = machine_rows(result, lang)
    if not rows:
        return []
    heads = [words[name] for name in ("machine_column", "machine_take", "size", "machine_needs", "grade")]
    lines = ["| " + " | ".join(map(escape, heads)) + " |", "|---|---|---:|---:|---|"]
    for row in rows:
        cells = [row.machine, row.label or ABSENT, row.size, row.needs, row.grade]
        lines.append("| " + " | ".join(map(escape, cells)) + " |")
    made = dict.fromkeys(row.command for row in rows if row.command)
    lead = [line for text in machines_lead(result, words) for line in ("", escape(text))]
    return [*lines, *lead, "", *_block(list(made)), ""]


def _hardware(result: ComparisonResult, words: Mapping[str, str], lang: str) -> list[str]:
    """The table of formats and hardware; nothing where there is none."""
    rows = hardware_rows(result, lang)
    if not rows:
        return []
    heads = (words["variant"], words["hardware_runs"], words["hardware_column"])
    lines = ["", "| " + " | ".join(map(escape, heads)) + " |", "|---|---|---|"]
    return lines + ["| " + " | ".join(map(escape, (row.variants, row.runs, row.hardware))) + " |" for row in rows]


def _cells(variant: Variant, *, timed: bool) -> list[str]:
    measured, speed = variant.divergence, variant.speed
    perplexity, error = with_error(measured.perplexity, measured.perplexity_sem)
    cells = [
        variant.label,
        bytes_text(variant.size),
        f"{variant.bits_per_weight:.2f}",
        kld_text(variant),
        significant(measured.kld_99),
        f"{percent(measured.same_top)} %",
        f"{perplexity} ± {error}" if error else perplexity,
    ]
    if timed and speed is not None:
        rates = (speed.prompt_tokens_per_second, speed.generation_tokens_per_second)
        cells += [bytes_text(speed.memory), *map(rate_text, rates)]
    elif timed:
        cells += [ABSENT] * 3
    return cells
