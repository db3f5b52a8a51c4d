"""Results for people and machines. With ``cli``, the only module that prints."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_quantize.artifacts.modelfile import create_command
from llm_quantize.artifacts.result import ArtifactResult
from llm_quantize.artifacts.verdict import EXACT
from llm_quantize.artifacts.verify import Verification
from llm_quantize.errors import NumericPolicyError, printable
from llm_quantize.measures.amounts import bytes_text, counted, decimals, time_text
from llm_quantize.measures.uncertainty import figure
from llm_quantize.plan import ArtifactPlan, cpu_seconds, spoken
from llm_quantize.reports.wording import said, said_of_many_words


def shown(value: Any, style: str = "") -> Text:
    """A line, in the reader's language, or a cell of a table, which may come from input: whole, no markup, no control
    characters."""
    return Text(printable(said_of_many_words(str(value)), 1 << 20), style=style)


def human_bytes(count: float) -> str:
    """3.58 MB, in powers of ten, three significant digits."""
    return bytes_text(count)


def human_count(count: float) -> str:
    """7.24 B parameters, 5.77 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return str(int(count))


def plans_to_dict(plans: Sequence[ArtifactPlan], *, threads: int, memory_needed: int) -> dict[str, Any]:
    """JSON-ready plans, with the disk and the CPU seconds (None: not known) that all of them together need, and what
    ``preflight.fit`` found."""
    return {
        "disk_needed": sum(plan.size for plan in plans),
        "cpu_seconds_needed": cpu_seconds([plan.cost for plan in plans if plan.cost]),
        "memory_needed": memory_needed,
        "threads": threads,
        "artifacts": [plan.to_dict() for plan in plans],
    }


def print_plans(
    plans: Sequence[ArtifactPlan], *, threads: int, memory_needed: int, verbose: int = 0, quiet: bool = False
) -> None:
    """The plan: each tensor (``verbose``), warnings and notes (unless ``quiet``), and the totals."""
    console = Console(highlight=False, soft_wrap=True)
    for kind, text, details in () if quiet else spoken(plans):
        console.print(shown(f"{kind}: {text}", "yellow" if kind == "warning" else ""))
        for detail in details if verbose else ():
            console.print(shown(f"  {detail}"))
    for plan in plans:
        if verbose:
            _print_tensors(console, plan)
        types = ", ".join(f"{count} {name}" for name, count in plan.type_counts().items())
        files = f"{len(plan.files)} files" if len(plan.files) > 1 else plan.files[0].name
        size = said(f"{files}, {human_bytes(plan.size)} ({plan.size:,} bytes)")
        console.print(shown(f"{plan.level}: {size}"))
        console.print(shown(f"  {plan.bits_per_weight:.3f} bits per weight; {types}"))
    console.print(shown(_needs(plans, threads, memory_needed)))


def _needs(plans: Sequence[ArtifactPlan], threads: int, memory_needed: int) -> str:
    """Disk, memory and time of all of ``plans`` together, as a line."""
    disk, seconds = sum(plan.size for plan in plans), cpu_seconds([plan.cost for plan in plans if plan.cost])
    time = "the time of a graphics processor" if seconds is None else f"about {time_text(seconds)} of CPU time"
    if seconds is not None and threads > 1 and seconds >= threads:
        parallel = time_text(seconds / threads)
        time = f"about {time_text(seconds)} of CPU time ({parallel} if all of it runs in parallel)"
    return (
        f"needs {human_bytes(disk)} of disk, {time}, and about {human_bytes(memory_needed)} of memory with "
        f"{counted(threads, 'thread')}"
    )


def _print_tensors(console: Console, plan: ArtifactPlan) -> None:
    """A table on a terminal; elsewhere whole lines with tabs, for other programs."""
    rows = [
        (tensor.name, " x ".join(map(str, tensor.output.shape)), tensor.qtype, f"{tensor.nbytes:,}")
        for tensor in plan.tensors
    ]
    if not console.is_terminal:
        for row in rows:
            console.file.write("\t".join(shown(cell).plain for cell in row) + "\n")
        return
    table = Table(title=shown(f"{plan.level}: {plan.files[0].name}"), box=None, title_justify="left")
    for label in ("tensor", "shape", "type"):
        table.add_column(said(label), overflow="fold")
    table.add_column(said("bytes"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(shown, row))
    console.print(table)


def strict_error(results: Sequence[ArtifactResult]) -> NumericPolicyError | None:
    """The error that --strict makes of a degraded result, if there is one."""
    found = [(result, text) for result in results for text in result.degradations()]
    if not found:
        return None
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return NumericPolicyError(
        "the result is degraded, and --strict does not accept that",
        file=found[0][0].path,
        expected="every finite weight quantized, none replaced or lost, by the method that was asked for",
        found=found[0][1] + more,
        remedy="mend the source; keep the tensor in BF16 with --tensor-type; take a level whose blocks divide the "
        "rows, such as Q8_0; give a method that fell back more text with --calibration-samples; or leave out --strict",
    )


def print_results(results: Sequence[ArtifactResult]) -> None:
    """One line per artifact, and one for each kind of thing in it that is not as asked."""
    console = Console(highlight=False, soft_wrap=True)
    for result in results:
        note = "" if result.status == "written" else f" ({said(result.status)})"
        made = said(
            f"{result.path}: {human_bytes(result.size)}, {result.bits_per_weight:.3f} bits per weight, "
            f"{result.seconds:.1f} CPU-s{' in this run' if result.resumed_units else ''}"
        )
        console.print(shown(made + note))
        for text in result.degradations():
            console.print(shown(f"  degraded: {text}", "yellow"))
        if result.conversion is not None:
            _print_verdict(console, result.conversion)
        if result.measured is not None:
            console.print(shown(f"  {said(_measured(result.measured))}"))
            if "activations" in result.measured:
                console.print(shown(f"  {said('that is of weights alone: a runtime rounds activations too')}"))
            if "kv_cache" in result.measured:
                text = "that is with keys and values as they are: what keeping them in 8 bits loses is not counted"
                console.print(shown(f"  {said(text)}"))
        if result.modelfile is not None:
            console.print(shown(f"  {shlex.join(create_command(result.modelfile))}"))


def _print_verdict(console: Console, conversion: Mapping[str, Any]) -> None:
    """What became of the tensors of a conversion: how many are exact, and how far the others are."""
    verdict = str(conversion["verdict"])
    console.print(shown(f"  {said(f'verdict: {verdict}')}", "green" if verdict == EXACT else "yellow"))
    for word, count in conversion["tensors"].items():
        console.print(shown(f"  {said(_tensors_text(word, count, conversion['weights'][word]))}"))
    worst, measured = conversion.get("worst"), conversion.get("measured")
    if worst is not None:
        text = f"largest relative error {worst['relative_error']:.3g}: {worst['tensor']}"
        console.print(shown(f"  {said(text)}"))
    if measured is not None:
        text = (
            f"KL divergence {figure(measured['kld'], measured['kld_sem'])} nats against the source, same likeliest "
            f"token {100 * measured['same_top']:.1f} %, on {measured['tokens']:,} tokens"
        )
        console.print(shown(f"  {said(text)}"))


def _tensors_text(word: str, count: int, weights: int) -> str:
    """How many tensors, and weights, have a verdict, as a line."""
    return f"{word}: {counted(count, 'tensor')}, {human_count(weights)} weights"


def print_foreseen(plan: ArtifactPlan, verdicts: Mapping[str, str], *, verbose: int = 0) -> None:
    """The verdict that a conversion will have at best, by what types alone tell."""
    console = Console(highlight=False, soft_wrap=True)
    counts = Counter(verdicts.values())
    told = ", ".join(f"{count:,} {word}" for word, count in counts.items())
    console.print(shown(f"{plan.level}: {said(f'at best: {told}')}"))
    for name, word in verdicts.items() if verbose else ():
        console.print(shown(f"  {name}: {said(word)}"))


def _measured(facts: Mapping[str, Any]) -> str:
    """What a calibrated run lost, in a line."""
    return (
        f"KL divergence {figure(facts['kld'], facts['kld_sem'])} nats, same likeliest token "
        f"{100 * facts['same_top']:.1f} %, on {facts['tokens']:,} tokens that were not calibrated on ({facts['dtype']})"
    )


def print_facts(facts: Mapping[str, Any], *, tensors: bool = False) -> None:
    """The facts of ``describe``: a table on a terminal; elsewhere a line ``key: value`` for each, whole."""
    console = Console(highlight=False, soft_wrap=True)
    rows = [(_label(key), _fact(key, value)) for key, value in facts.items() if key not in ("tensors", "metadata")]
    if console.is_terminal:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in rows:
            table.add_row(shown(label), shown(text))
        console.print(table, soft_wrap=False)
    else:
        for label, text in rows:
            console.print(shown(f"{label}: {text}"))
    for key, value in facts.get("metadata", {}).items():
        console.print(shown(f"{key} = {value}"))
    for tensor in facts["tensors"] if tensors else ():
        console.print(shown(f"{tensor['name']}  {tensor['dtype']}  {tensor['shape']}  {tensor['bytes']:,}"))


def _left_out(tensors: Mapping[str, str]) -> str:
    """Each reason once, with the first tensor of it and how many more there are."""
    names: dict[str, list[str]] = {}
    for name, why in tensors.items():
        names.setdefault(why, []).append(name)
    parts = ((found[0] if len(found) == 1 else said(f"{found[0]} and {len(found) - 1} more"), why)
             for why, found in names.items())  # fmt: skip
    return "; ".join(f"{named}: {said(why)}" for named, why in parts)


def _label(key: str) -> str:
    return said(key.replace("_", " "))


def _fact(key: str, value: Any) -> str:
    if key == "parameters":
        return f"{human_count(value)} ({value:,})"
    if key == "size":
        return human_bytes(value)
    if key == "dtypes":
        return ", ".join(
            said(f"{name}: {entry['tensors']} tensors, {human_bytes(entry['bytes'])}") for name, entry in value.items()
        )
    if key == "memory":
        cache = value["kv_cache_f16"]
        return said(
            f"source weights {human_bytes(value['source_weights'])}, 16-bit weights "
            f"{human_bytes(value['weights_16bit'])}, kv cache, f16, {cache['tokens']:,} tokens "
            f"{human_bytes(cache['bytes'])}"
        )
    if key == "files":
        return f"{len(value)} ({human_bytes(sum(entry['size'] for entry in value))})"
    if key == "left_out":
        return _left_out(value) if value else said("nothing")
    if isinstance(value, dict):
        return ", ".join(f"{_label(name)} {_plain(item)}" for name, item in value.items())
    return _plain(value)


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return said("yes" if value else "no")
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def print_verification(outcome: Verification, *, verbose: int = 0) -> None:
    """A summary, the worst tensors by error, and every problem."""
    console = Console(highlight=False, soft_wrap=True)
    hashed = sum(check.hash == "ok" for check in outcome.tensors)
    manifest = said(f"{hashed} match the manifest's hashes" if outcome.has_manifest else "no manifest")
    console.print(shown(f"{outcome.path}: {len(outcome.tensors)} tensors, {manifest}"))
    if outcome.compared:
        ranked = sorted(outcome.tensors, key=lambda check: -(check.relative_error or 0.0))
        table = Table(title=said("relative error against the source, worst first"), box=None, title_justify="left")
        for label in ("tensor", "type", "error"):
            table.add_column(said(label))
        for check in ranked if verbose else ranked[:10]:
            error = "-" if check.relative_error is None else decimals(check.relative_error, 5)
            table.add_row(shown(check.name), shown(check.type), error)
        console.print(table)
    for note in outcome.notes:
        console.print(shown(note))
    for fact in ("replaced", "kept", "lost"):
        found = [(check.name, count) for check in outcome.tensors if (count := getattr(check, f"nonfinite_{fact}"))]
        became = "replaced by zero" if fact == "replaced" else fact
        if len(found) > 1 and not verbose:
            total = sum(count for _, count in found)
            found = [(f"{found[0][0]} and {len(found) - 1:,} more (-v lists them)", total)]
        for name, count in found:
            console.print(shown(f"{name}: {count:,} NaN or infinite weights were {became}"))
    if outcome.rederived is not None:
        console.print(shown(said(outcome.rederived.line)))
    console.print(said("ok" if outcome.ok else "NOT OK"), style="green" if outcome.ok else "red")
    for problem in outcome.all_problems()[:50]:
        console.print(shown(f"  {said(problem)}"))
    for line in [] if outcome.rederived is None else list(outcome.rederived.lines())[:50]:
        console.print(shown(f"  {said(line)}"))
    if outcome.statement is not None:
        console.print(shown(said(f"the statement is in {outcome.statement}")))
