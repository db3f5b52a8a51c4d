"""What a calibration came to, and the forms in which a user keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize.artifacts.preflight import refuse_unwritable
from llm_quantize.calibration.imatrix import TapCoverage, summary, tensor_statistics
from llm_quantize.calibration.windows import Share
from llm_quantize.errors import UsageError
from llm_quantize.io.imatrix_writer import write_imatrix_dat, write_imatrix_gguf
from llm_quantize.io.statistics_file import read_statistics
from llm_quantize.io.whole_file import refuse_existing, refuse_input, write_file
from llm_quantize.measures.amounts import counted
from llm_quantize.models.opening import Source
from llm_quantize.results import Shown

PICTURE = "svg"
NAMES = {
    "imatrix": "imatrix.gguf",
    "dat": "imatrix.dat",
    "json": "importance.json",
    "statistics": "statistics.safetensors",
    PICTURE: "experts.svg",
}
"""{kind of file: what it is called behind the model's name}"""

KINDS = tuple(NAMES)
_SUFFIXES = {
    ".gguf": "imatrix",
    ".dat": "dat",
    ".json": "json",
    ".safetensors": "statistics",
    ".statistics": "statistics",
    ".svg": PICTURE,
}


def kind_of(target: Path) -> str:
    """The kind of file that a name asks for; "imatrix" where it says nothing."""
    return _SUFFIXES.get(target.suffix.lower(), "imatrix")


@dataclass(frozen=True, repr=False)
class Calibration(Shown):
    """What a calibration came to. ``reused``: nothing was run. ``short``: {layer input: experts below the minimum}.
    ``experts``: what those of each layer saw. ``seconds``: CPU time of this run; ``memory_planned`` and ``memory_peak``
    in bytes, 0 where nothing was run."""

    path: Path
    model: str
    reused: bool
    windows: int
    length: int
    shares: tuple[Share, ...]
    kinds: tuple[str, ...]
    dtype: str
    short: Mapping[str, tuple[int, ...]]
    expert_minimum: int
    seconds: float = 0.0
    computed_tokens: int = 0
    memory_planned: int = 0
    memory_peak: int = 0
    advice: tuple[str, ...] = ()
    experts: tuple[TapCoverage, ...] = ()

    @property
    def tokens(self) -> int:
        """How many were run through the model."""
        return self.windows * self.length

    def summary(self) -> dict[str, Any]:
        """The model, the text, and where the statistics are."""
        facts = {"model": self.model, "path": self.path, "tokens": self.tokens, "kinds": " ".join(self.kinds)}
        return facts | {"reused": self.reused}

    def to_dict(self) -> dict[str, Any]:
        """The same facts, JSON-ready."""
        others = ("path", "shares", "short", "advice", "experts")
        facts = {key: value for key, value in vars(self).items() if key not in others}
        return facts | {
            "statistics": str(self.path),
            "tokens": self.tokens,
            "datasets": {share.dataset: share.tokens for share in self.shares},
            "short_experts": {tap: list(experts) for tap, experts in self.short.items()},
            "advice": list(self.advice),
            **({"experts": [entry.to_dict() for entry in self.experts]} if self.experts else {}),
        }

    def sentences(self, *, in_full: bool = False) -> list[str]:
        """What a person wants to know, a line each; ``advice`` was told as a warning. ``in_full``: the experts that saw
        too little are listed."""
        text = ", ".join(f"{share.dataset} {share.tokens:,}" for share in self.shares if share.tokens)
        lines = [f"{self.model}: {self.tokens:,} tokens in {counted(self.windows, 'window')} of {self.length} ({text})"]
        if self.reused:
            lines.append("nothing was run: these statistics were there already")
        elif self.seconds > 0:
            rate = self.computed_tokens / self.seconds
            lines.append(
                f"{self.seconds:.1f} s of CPU time in {self.dtype}, {rate:,.0f} tokens per CPU second; memory "
                f"{self.memory_peak / 1e6:,.0f} MB, planned {self.memory_planned / 1e6:,.0f} MB"
            )
        if self.experts:
            least, most = (edge(edge(one.tokens) for one in self.experts) for edge in (min, max))
            lines.append(f"experts saw {least:,} to {most:,} tokens (-v: layer by layer; --format svg: a picture)")
        lines += [entry.sentence for entry in self.experts] if in_full else []
        if self.short:
            count, (first, few) = sum(map(len, self.short.values())), next(iter(self.short.items()))
            lines.append(
                f"{counted(count, 'expert')} at {counted(len(self.short), 'input')} of layers saw fewer than "
                f"{self.expert_minimum} tokens, the first: {few[0]} of {first} (-v lists them)"
            )
        for tap, experts in self.short.items() if in_full else ():
            named = ", ".join(map(str, experts[:8])) + (" and more" if len(experts) > 8 else "")
            lines.append(f"{tap}: experts {named} saw fewer than {self.expert_minimum} tokens")
        return [*lines, f"statistics: {self.path}"]


def refuse_export(
    source: Source, target: Path, kind: str, collect: Sequence[str], inputs: Iterable[str | Path] = ()
) -> None:
    """Raise what writing would raise after all the work: UsageError (a picture of experts that ``source`` has not;
    ``kind`` is made of the imatrix statistics and ``collect`` leaves them out; ``target`` is one of the ``inputs``),
    AccessError (``target`` is no regular file, or its directory cannot be written)."""
    if kind == PICTURE and not source.architecture.hyper.n_expert:
        raise UsageError("this model has no experts to draw", found=source.checkpoint.name)
    if kind not in ("statistics", PICTURE) and "imatrix" not in collect:
        raise UsageError(
            f"{kind} is written from the statistics of the kind imatrix",
            expected="imatrix in --collect, or --format statistics",
            found=", ".join(collect),
        )
    refuse_existing(target, replace=True)
    refuse_unwritable(target.parent)
    refuse_input(target, inputs)


def export(result: Calibration, source: Source, target: Path, kind: str) -> None:
    """Write the statistics as ``kind``: "imatrix" (llama.cpp's GGUF), "dat" (its older form), "json" (a summary),
    "statistics" (a copy of our file). An existing ``target`` is replaced; it appears whole or not at all."""
    with read_statistics(result.path) as statistics:
        if kind == "statistics":
            write_file(target, _pieces(result.path), replace=True)
        elif kind == "json":
            found = summary(statistics, source.tensors.outputs, result.expert_minimum)
            write_file(target, [json.dumps(found, indent=1, ensure_ascii=False).encode()], replace=True)
        else:
            entries = tensor_statistics(statistics, source.tensors.outputs)
            datasets = [str(name) for name in statistics.identity.text["datasets"]]
            if kind == "imatrix":
                write_imatrix_gguf(
                    target, entries, datasets=datasets, chunks=result.windows, chunk_size=result.length, replace=True
                )
            else:
                write_imatrix_dat(target, entries, dataset=", ".join(datasets), chunks=result.windows, replace=True)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(8 << 20):
            yield piece
