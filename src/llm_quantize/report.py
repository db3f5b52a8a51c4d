"""Results for people and machines. With ``cli``, the only module that prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from llm_quantize import preflight
from llm_quantize.pipeline import ArtifactResult
from llm_quantize.plan import ArtifactPlan
from llm_quantize.verify import Verification


def human_bytes(count: float) -> str:
    """1.23 GB, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_count(count: float) -> str:
    """7.24 B parameters, 5.77 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return str(int(count))


def plans_to_dict(plans: Sequence[ArtifactPlan], threads: int | None = None) -> dict[str, Any]:
    """JSON-ready plans, with the disk and memory that all of them together need."""
    count = threads or preflight.available_cpus()
    return {
        "disk_needed": sum(plan.size for plan in plans),
        "memory_needed": preflight.memory_needed(plans, count),
        "threads": count,
        "artifacts": [plan.to_dict() for plan in plans],
    }


def print_plans(plans: Sequence[ArtifactPlan], *, verbose: int = 0, threads: int | None = None) -> None:
    """The plan as tables: each tensor (``verbose``), and the totals."""
    console = Console(highlight=False, soft_wrap=True)
    for plan in plans:
        if verbose:
            table = Table(title=f"{plan.level}: {plan.files[0].name}", box=None, title_justify="left")
            for label, justify in (("tensor", "left"), ("shape", "left"), ("type", "left"), ("bytes", "right")):
                table.add_column(label, justify=justify)  # type: ignore[arg-type]
            for tensor in plan.tensors:
                shape = " x ".join(str(size) for size in tensor.output.shape)
                table.add_row(tensor.name, shape, tensor.qtype, f"{tensor.nbytes:,}")
            console.print(table)
        for warning in plan.warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False)
        types = ", ".join(f"{count} {name}" for name, count in plan.type_counts().items())
        files = f"{len(plan.files)} files" if len(plan.files) > 1 else plan.files[0].name
        console.print(f"{plan.level}: {files}, {plan.size:,} bytes ({human_bytes(plan.size)})", markup=False)
        console.print(f"  {plan.bits_per_weight:.3f} bits per weight; {types}", markup=False)
    facts = plans_to_dict(plans, threads)
    console.print(
        f"needs {human_bytes(facts['disk_needed'])} of disk and about {human_bytes(facts['memory_needed'])} of memory "
        f"with {facts['threads']} threads"
    )


def result_to_dict(result: ArtifactResult) -> dict[str, Any]:
    """JSON-ready result of one artifact."""
    return {
        "level": result.level,
        "path": str(result.path),
        "size": result.size,
        "bits_per_weight": round(result.bits_per_weight, 4),
        "status": result.status,
        "cpu_seconds": round(result.seconds, 3),
        "resumed_units": result.resumed_units,
        "nonfinite_replaced": dict(result.degraded),
    }


def print_results(results: Sequence[ArtifactResult]) -> None:
    """One line per artifact."""
    console = Console(highlight=False, soft_wrap=True)
    for result in results:
        note = "" if result.status == "written" else f" ({result.status})"
        console.print(
            f"{result.path}: {human_bytes(result.size)}, {result.bits_per_weight:.3f} bits per weight, "
            f"{result.seconds:.1f} CPU-s{note}",
            markup=False,
        )


def print_facts(facts: Mapping[str, Any], *, tensors: bool = False) -> None:
    """The facts of ``describe`` as a list of lines."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in facts.items():
        if key not in ("tensors", "metadata"):
            table.add_row(key.replace("_", " "), _fact(key, value))
    console.print(table)
    for key, value in facts.get("metadata", {}).items():
        console.print(f"{key} = {value}", markup=False)
    if tensors:
        for tensor in facts["tensors"]:
            console.print(f"{tensor['name']}  {tensor['dtype']}  {tensor['shape']}  {tensor['bytes']:,}", markup=False)


def _fact(key: str, value: Any) -> str:
    if key == "parameters":
        return f"{human_count(value)} ({value:,})"
    if key == "size":
        return human_bytes(value)
    if key == "dtypes":
        return ", ".join(
            f"{name}: {entry['tensors']} tensors, {human_bytes(entry['bytes'])}" for name, entry in value.items()
        )
    if key == "memory":
        return ", ".join(f"{name.replace('_', ' ')} {human_bytes(count)}" for name, count in value.items())
    if key == "files":
        return f"{len(value)} ({human_bytes(sum(entry['size'] for entry in value))})"
    if key == "left_out":
        return "nothing" if not value else "; ".join(f"{name}: {why}" for name, why in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(item)}" for name, item in value.items())
    return _plain(value)


def _plain(value: Any) -> str:
    return {True: "yes", False: "no", None: "-"}.get(value, str(value)) if not isinstance(value, int | float) or (
        isinstance(value, bool)
    ) else f"{value:,}"  # fmt: skip


def print_verification(outcome: Verification, *, verbose: int = 0) -> None:
    """A summary, the worst tensors by error, and every problem."""
    console = Console(highlight=False, soft_wrap=True)
    hashed = sum(check.hash == "ok" for check in outcome.tensors)
    manifest = f"{hashed} match the manifest's hashes" if outcome.has_manifest else "no manifest"
    console.print(f"{outcome.path}: {len(outcome.tensors)} tensors, {manifest}", markup=False)
    if outcome.compared:
        ranked = sorted(outcome.tensors, key=lambda check: -(check.relative_error or 0.0))
        table = Table(title="relative error against the source, worst first", box=None, title_justify="left")
        for label in ("tensor", "type", "error"):
            table.add_column(label)
        for check in ranked if verbose else ranked[:10]:
            error = "-" if check.relative_error is None else f"{check.relative_error:.5f}"
            table.add_row(check.name, check.type, error)
        console.print(table)
    console.print("ok" if outcome.ok else "NOT OK", style="green" if outcome.ok else "red")
    for problem in outcome.all_problems()[:50]:
        console.print(f"  {problem}", markup=False)
