"""A small artifact of known bytes, written through ``ResumableOutput`` as the pipeline does it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_quantize.io.output import OutputFile, ResumableOutput, Span

IDENTITY: dict[str, Any] = {
    "source": "model",
    "source_files": [["model.safetensors", 1234, "ab" * 32]],
    "level": "Q4_K",
    "version": "1",
    "pure": False,
}
MANIFEST = b'{"tensors": []}\n'


def _content(label: str, nbytes: int) -> bytes:
    return (hashlib.sha256(label.encode()).digest() * (nbytes // 32 + 1))[:nbytes]


class SmallOutput:
    """``files`` files of three units each, with gaps between them; the first gap is known like a header. ``done``: the
    units made last, in order."""

    def __init__(
        self,
        target: Path,
        files: int = 1,
        *,
        journal: bool = True,
        sizes: tuple[int, ...] = (37, 300, 64),
        suffix: str = ".gguf",
    ):
        self.target = target
        self.journal = target.with_name(target.name + ".journal") if journal else None
        self.units: dict[str, tuple[Span, bytes]] = {}
        self.files: list[OutputFile] = []
        self.expected: dict[str, bytes] = {}
        self.done: list[str] = []
        self.warnings: list[str] = []
        for number in range(files):
            header = _content(f"header {number}", 96)
            body, offset = bytearray(header), 96
            between: list[tuple[int, bytes]] = []
            for index, nbytes in enumerate(sizes):
                data = _content(f"{number} {index}", nbytes)
                self.units[f"t{number}.{index}[0:1]"] = (Span(number, offset, nbytes), data)
                gap = bytes(-nbytes % 32) if index else _content(f"between {number}", -nbytes % 32)
                between += [] if index or not gap else [(offset + nbytes, gap)]
                body += data + gap
                offset += nbytes + len(gap)
            name = target.name if files == 1 else f"part-{number + 1:05d}-of-{files:05d}{suffix}"
            self.files.append(OutputFile(name, len(body), header, between=tuple(between)))
            self.expected[name] = bytes(body)
        listed = {"files": [{"name": name} for name in self.expected]}
        self.manifest = MANIFEST if suffix == ".gguf" else json.dumps(listed).encode()

    def open(self, identity: Mapping[str, Any] = IDENTITY, *, replace: bool = False) -> ResumableOutput:
        return ResumableOutput(
            self.target,
            self.files,
            identity=identity,
            spans={unit: span for unit, (span, _) in self.units.items()},
            journal_path=self.journal,
            on_warning=self.warnings.append,
            replace=replace,
        )

    def make(
        self,
        identity: Mapping[str, Any] = IDENTITY,
        *,
        replace: bool = False,
        finish: bool = True,
        stop_after: int | None = None,
        each: Callable[[ResumableOutput], None] = lambda _: None,
    ) -> None:
        """Open, check what is recorded, make what is missing (two writes each), finish. ``done``: what was made."""
        self.done.clear()
        self.warnings.clear()
        with self.open(identity, replace=replace) as output:
            for unit in list(output.records):
                output.check(unit)
            for unit, (span, data) in self.units.items():
                if unit in output.records:
                    continue
                if stop_after is not None and len(self.done) >= stop_after:
                    return
                half = len(data) // 2
                output.write(span, half, data[half:])
                output.write(span, 0, memoryview(data)[:half])
                output.record(unit, {"sha256": hashlib.sha256(data).hexdigest()})
                self.done.append(unit)
                each(output)
            if finish:
                output.finish(self.manifest)

    @property
    def partial(self) -> Path:
        return self.target.with_name(self.target.name + ".partial")

    def whole(self) -> bool:
        """Whether the artifact stands under its final name with the right bytes; False if nothing stands there.

        Raises AssertionError for anything between.
        """
        if not self.target.exists():
            return False
        manifest = self.target.with_name(self.target.name + ".manifest.json")
        found = {self.target.name: self.target}
        if len(self.files) > 1:
            manifest = self.target / "manifest.json"
            found = {path.name: path for path in self.target.iterdir() if path.name != "manifest.json"}
        assert {name: path.read_bytes() for name, path in found.items()} == self.expected
        assert manifest.read_bytes() == self.manifest
        return True
