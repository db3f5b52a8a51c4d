"""The page: one HTML file that needs nothing else, from a measured comparison.

No script, no font, no address: the template (``templates/comparison.html.j2``) holds its own styles, all text from
models and files is escaped, and a content security policy in the page forbids loading anything even so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from llm_quantize.evaluation.texts import BUILT_IN
from llm_quantize.io.whole_file import write_file
from llm_quantize.measures.advisor import Advice
from llm_quantize.reports import heatmap, plot
from llm_quantize.reports.findings import LEAST_KLD, ComparisonResult, Sample, Variant
from llm_quantize.reports.hardware import hardware_rows
from llm_quantize.reports.labels import grade_name, labels
from llm_quantize.reports.machines import commands_of, machine_rows
from llm_quantize.reports.notes import translated
from llm_quantize.reports.numbers import (
    ABSENT,
    bytes_text,
    count_text,
    percent,
    rate_text,
    rough_percent,
    significant,
    with_error,
)
from llm_quantize.reports.templating import template_of

_MARGINS = (52.0, 14.0, 124.0, 52.0)
_NARROW_MARGINS = (34.0, 10.0, 8.0, 44.0)


def write_page(result: ComparisonResult, path: str | Path, lang: str = "en") -> Path:
    """Write the page of ``result`` to ``path``, whole or not at all; gives back the path.

    Raises UsageError for an unknown language, AccessError or ResourceError where the file cannot be written.
    """
    return write_text(Path(path), page(result, lang))


def write_text(path: Path, text: str) -> Path:
    """Put ``text`` in place of ``path``, a file or nothing, at once; half a surrogate pair becomes a question mark."""
    write_file(path, [text.encode("utf-8", "replace")], replace=True)
    return path


def page(result: ComparisonResult, lang: str = "en") -> str:
    """The HTML text. Raises UsageError for an unknown language."""
    words = labels(lang)
    return template_of("comparison.html.j2").render(lang=lang, t=words, **context(result, lang))


def context(result: ComparisonResult, lang: str) -> dict[str, Any]:
    """What the template needs, every number as text."""
    words = labels(lang)
    advice = result.advice()
    chosen = None if advice.take is None else result.variants[advice.take]
    scale = heatmap.scale_of(result.variants)
    maps = [heatmap.draw(variant, scale) for variant in result.variants] if scale else []
    return {
        "model": result.model,
        "facts": _facts(result, words),
        "advice": advice,
        "chosen": chosen,
        "verdict": verdict(result, advice, words),
        "take": [] if chosen is None else [(words[f"command_{k}"], v) for k, v in commands_of(result, chosen).items()],
        "machines": machine_rows(result, lang),
        "machines_lead": machines_lead(result, words),
        "hardware": hardware_rows(result, lang),
        "tiles": _tiles(chosen, lang),
        "plots": _plots(result, advice, lang),
        "rows": [
            _row(variant, result, lang, chosen=index == advice.take, front=index in advice.front)
            for index, variant in enumerate(result.variants)
        ],
        "source_row": _source_row(result),
        "speed": next((variant.speed for variant in result.variants if variant.speed), None),
        "speed_empty": ", ".join(_empty(result)),
        "maps": [found for found in maps if found is not None],
        "scale": scale and (significant(scale[0], 2), significant(scale[1], 2)),
        "steps": range(heatmap.STEPS),
        "samples": _samples(result, words),
        "method": method(result, lang),
        "commands": result.commands,
        "footer": _footer(result, words),
        "notes": [translated(note, lang) for note in result.notes],
    }


def _empty(result: ComparisonResult) -> Iterator[str]:
    """What the process of each runtime held before it loaded anything."""
    found = {variant.runs_in: variant.speed.memory_empty for variant in result.variants if variant.speed}
    for runtime, held in found.items():
        yield f"{bytes_text(held)} ({runtime})" if len(found) > 1 else bytes_text(held)


def _facts(result: ComparisonResult, words: Mapping[str, str]) -> str:
    model = result.model
    return words["facts"].format(
        architecture=model.architecture,
        parameters=count_text(model.parameters),
        layers=model.layers,
        dtype=model.dtype,
        size=bytes_text(model.size),
    )


def kld_text(variant: Variant) -> str:
    """Mean KLD ± its standard error; 0 where it is no more than arithmetic."""
    if variant.divergence.kld < LEAST_KLD:
        return "0"
    value, error = with_error(variant.divergence.kld, variant.divergence.kld_sem)
    return f"{value} ± {error}" if error else value


def verdict(result: ComparisonResult, advice: Advice, words: Mapping[str, str]) -> Markup:
    """What to take and why, in sentences that follow from the figures alone."""
    if advice.take is None:
        return Markup(words["verdict_none"]) if result.variants else Markup("")
    chosen = result.variants[advice.take]
    divergence = chosen.divergence
    alone = len(result.variants) == 1
    parts = [
        Markup(words["verdict_one" if alone else "verdict_take"]).format(
            label=Markup("<strong>{}</strong>").format(chosen.label)
        ),
        words["verdict_figures"].format(
            size=bytes_text(chosen.size),
            share=rough_percent(chosen.size / result.model.size) if result.model.size else ABSENT,
            kld=kld_text(chosen),
            same=percent(divergence.same_top),
            tokens=f"{divergence.tokens:,}",
        ),
    ]
    if not alone:
        parts.append(words[f"verdict_{advice.reason}"])
    if reasons := _neighbours(result, advice, chosen, words):
        parts.append(Markup("{}{}").format(words["join"].join(reasons), words["stop"]))
    for runtime in result.runtimes()[1:]:
        other = result.advice(runtime).take
        if other is not None:
            parts.append(words["verdict_other"].format(runtime=runtime, label=result.variants[other].label))
    return Markup(words["space"]).join(parts)


def _neighbours(result: ComparisonResult, advice: Advice, chosen: Variant, words: Mapping[str, str]) -> list[str]:
    floor = max(result.reference.noise_floor or 0.0, 1e-9)
    here = max(chosen.divergence.kld, floor)
    reasons = []
    for key, index in (("verdict_larger", advice.larger), ("verdict_smaller", advice.smaller)):
        if index is None:
            continue
        other = result.variants[index]
        there = max(other.divergence.kld, floor)
        change = rough_percent(abs(other.size / chosen.size - 1))
        ratio = here / there if key == "verdict_larger" else there / here
        alike = "_alike" if significant(ratio, 2) == "1.0" else ""
        reasons.append(words[key + alike].format(label=other.label, percent=change, ratio=significant(ratio, 2)))
    return reasons


def machines_lead(result: ComparisonResult, words: Mapping[str, str]) -> list[str]:
    """What the table of machines rests on, in sentences: how memory is counted, and the rule."""
    found = [words["machines_lead"].format(cache=f"{result.cache:,}")]
    if len(result.runtimes()) > 1:
        found.append(words["machines_only"].format(runtime=result.runtimes()[0]))
    return [words["space"].join(found), words["rule_quality"]]


def _tiles(chosen: Variant | None, lang: str) -> list[tuple[str, str, str]]:
    if chosen is None:
        return []
    words = labels(lang)
    number, unit = bytes_text(chosen.size).split(" ")
    tiles = [
        (words["tile_size"], number, unit),
        (words["tile_kld"], with_error(chosen.divergence.kld, chosen.divergence.kld_sem)[0], words["unit_nats"]),
        (words["tile_same"], percent(chosen.divergence.same_top), "%"),
    ]
    if chosen.speed is not None:
        tiles.append((words["tile_speed"], rate_text(chosen.speed.generation_tokens_per_second), ""))
    else:
        tiles.append((words["grade"], grade_name(chosen.grade, lang), ""))
    return tiles


def _plots(result: ComparisonResult, advice: Advice, lang: str) -> list[tuple[str, plot.Plot]]:
    """The same plot twice, for a desk and for a phone: text must not shrink with the picture. None of one point."""
    if len(result.variants) < 2:
        return []
    grades = [(grade_name(name, lang), limit) for name, limit in result.grades]
    shapes = (("wide", 1040.0, 470.0, 13.0, _MARGINS), ("narrow", 358.0, 400.0, 12.0, _NARROW_MARGINS))
    return [
        (
            name,
            plot.draw(
                result.variants, advice, noise_floor=result.reference.noise_floor, grades=grades,
                width=width, height=height, font=font, margins=margins,
            ),
        )
        for name, width, height, font, margins in shapes
    ]  # fmt: skip


def _row(variant: Variant, result: ComparisonResult, lang: str, *, chosen: bool, front: bool) -> dict[str, Any]:
    """One line of the tables."""
    measured, speed = variant.divergence, variant.speed
    kld, kld_error = with_error(measured.kld, measured.kld_sem)
    perplexity, perplexity_error = with_error(measured.perplexity, measured.perplexity_sem)
    ratio, ratio_error = with_error(measured.ln_ratio, measured.ln_ratio_sem)
    seconds, accepted = variant.quantize_cpu_seconds, measured.acceptance
    share = variant.size / result.model.size if result.model.size else math.nan
    return {
        "label": variant.label,
        "file": variant.file,
        "format": variant.format,
        "chosen": chosen,
        "front": front,
        "size": bytes_text(variant.size),
        "share": rough_percent(share),
        "bpw": f"{variant.bits_per_weight:.2f}",
        "kld": (kld, kld_error),
        "same": percent(measured.same_top),
        "ppl": (perplexity, perplexity_error),
        "grade": grade_name(variant.grade, lang),
        "memory": ABSENT if speed is None else bytes_text(speed.memory),
        "prompt": ABSENT if speed is None else rate_text(speed.prompt_tokens_per_second),
        "generation": ABSENT if speed is None else rate_text(speed.generation_tokens_per_second),
        "quantize": ABSENT if seconds is None else f"{significant(seconds)} s",
        "median": significant(measured.kld_median),
        "p99": significant(measured.kld_99),
        "p999": significant(measured.kld_999),
        "max": significant(measured.kld_max),
        "delta": f"{percent(measured.rms_delta_p, 2)} %",
        "ln_ratio": (ratio, ratio_error),
        "accepted": f"{percent(accepted, 2)} %" if math.isfinite(accepted) else ABSENT,
    }


def _source_row(result: ComparisonResult) -> dict[str, Any]:
    reference = result.reference
    return {
        "size": bytes_text(result.model.size),
        "bpw": f"{reference.bits_per_weight:.2f}",
        "ppl": with_error(reference.perplexity, reference.perplexity_sem),
    }


def _samples(result: ComparisonResult, words: Mapping[str, str]) -> list[dict[str, Any]]:
    """For each prompt the source's text and every variant's, cut where it leaves the source's."""
    everyone = [result.reference.samples, *(variant.samples for variant in result.variants)]
    prompts = dict.fromkeys(sample.prompt for samples in everyone for sample in samples)
    found = []
    for prompt in prompts:
        source = _text(result.reference.samples, prompt)
        cards = []
        for variant in result.variants:
            text = _text(variant.samples, prompt)
            if text is not None:
                same = 0 if source is None else common_length(source, text)
                flag = next((sample.flag for sample in variant.samples if sample.prompt == prompt), "")
                said = words.get(f"flag_{flag}", flag)
                cards.append({"label": variant.label, "same": text[:same], "own": text[same:], "flag": said})
        found.append({"prompt": prompt, "source": source, "cards": cards})
    return found


def _text(samples: Sequence[Sample], prompt: str) -> str | None:
    """The text after a prompt, without blanks around it and the bytes of a character cut off at the end."""
    found = next((sample.text for sample in samples if sample.prompt == prompt), None)
    return None if found is None else found.rstrip("\ufffd").strip("\n ")


def common_length(a: str, b: str) -> int:
    """Characters that both begin with; a word that only begins alike is not counted."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    def inside(text: str) -> bool:
        return same < len(text) and all(c.isascii() and c.isalnum() for c in text[same - 1 : same + 1])

    if same > 0 and (inside(a) or inside(b)):
        while same and b[same - 1].isascii() and b[same - 1].isalnum():
            same -= 1
    return same


def method(result: ComparisonResult, lang: str) -> list[str]:
    """How it was measured, a paragraph each."""
    words, text, machine = labels(lang), result.text, result.machine
    ppl, _ = with_error(result.reference.perplexity, result.reference.perplexity_sem)
    floor = result.reference.noise_floor
    errors = _errors_text(result, words)
    about = {"names": text_names(result, lang), "sha": text.sha256[:16], "ppl": ppl, "context": f"{text.context:,}"}
    paragraphs = [
        words["method_kld"],
        words["method_text"].format(**about, windows=f"{text.windows:,}", tokens=f"{text.tokens:,}"),
        errors
        if floor is None
        else words["method_floor"].format(floor=significant(floor, 2)) + words["space"] + errors,
    ]
    if result.grades:
        paragraphs.append(words["method_grades"].format(grades=grades_text(result, lang)))
    timed = {variant.speed.runtime: variant.speed for variant in result.variants if variant.speed}
    if not timed:
        paragraphs.append(words["method_no_speed"].format(why=translated(machine.runtime, lang)))
    else:
        speed = next(iter(timed.values()))
        facts = {"runtime": ", ".join(timed), "cpu": machine.cpu, "threads": speed.threads, "repeats": speed.repeats}
        counts = {"prompt": speed.prompt_tokens, "new": speed.new_tokens}
        paragraphs.append(words["method_speed"].format(**facts, **counts))
    return paragraphs


def _errors_text(result: ComparisonResult, words: Mapping[str, str]) -> str:
    """What standard errors are of. Comparisons of earlier versions know no clusters."""
    clusters = {variant.divergence.clusters for variant in result.variants}
    if 0 in clusters:
        return words["method_errors_tokens"]
    return words["method_errors_none" if 1 in clusters else "method_errors"].format(windows=f"{result.text.windows:,}")


def text_names(result: ComparisonResult, lang: str) -> str:
    """What was read, in one phrase."""
    return ", ".join(labels(lang)["built_in_text"] if name == BUILT_IN else name for name in result.text.names)


def grades_text(result: ComparisonResult, lang: str) -> str:
    """The thresholds in one phrase."""
    words = labels(lang)
    parts = [
        words["grade_above"].format(name=grade_name(name, lang))
        if math.isinf(limit)
        else words["grade_upto"].format(name=grade_name(name, lang), limit=significant(limit, 2))
        for name, limit in result.grades
    ]
    return words["join"].join(parts)


def _footer(result: ComparisonResult, words: Mapping[str, str]) -> list[str]:
    model = result.model
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if name != "llm-quantize")
    made = words["made_by"].format(version=result.versions.get("llm-quantize", ""))
    if result.created:
        made += words["made_on"].format(date=result.created)
    lines = [made + (f" ({versions})" if versions else "")]
    source = words["source_hash"].format(source=model.source, hash=model.fingerprint[:16])
    if model.revision:
        source += ", " + words["revision"].format(revision=model.revision[:12])
    lines.append(source)
    lines.append(f"{result.machine.cpu}, {result.machine.system}")
    return lines
