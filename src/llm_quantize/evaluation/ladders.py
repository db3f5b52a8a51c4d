"""What can be profiled, a row for each format: which parts of a model at which types, and recipes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llm_quantize.errors import UsageError
from llm_quantize.evaluation import allocation, sensitivity
from llm_quantize.evaluation.allocation import Choice, Preset, Target
from llm_quantize.evaluation.directory_profile import DirectoryLadder
from llm_quantize.evaluation.sensitivity import Candidate, Profile, Sensitivity
from llm_quantize.qtypes.affine import WIDTHS

if TYPE_CHECKING:
    import torch

    from llm_quantize.io.imatrix_file import Imatrix
    from llm_quantize.models.opening import Source
    from llm_quantize.streams.pool import Pool

Hold = Callable[[Candidate], "dict[str, torch.Tensor]"]


class Ladder(Protocol):
    """A format whose parts are profiled. ``default_types``: what is measured unless the user names types; ``presets``:
    sizes that people know, by the words for them. ``feeds_back``: with Hessians, codes are chosen by error feedback;
    without that, only an importance matrix matters. ``weighed_types``: further ones, of few bits, that are of use with
    importance alone."""

    @property
    def form(self) -> str: ...
    @property
    def default_types(self) -> Sequence[str]: ...
    @property
    def presets(self) -> Mapping[str, Preset]: ...
    @property
    def feeds_back(self) -> bool: ...
    @property
    def weighed_types(self) -> Sequence[str]: ...

    def least(self, source: Source, wanted: Sequence[Candidate]) -> int:
        """Bytes of the whole artifact with every part of ``wanted`` at the smallest of its types."""

    def lossless(self, source: Source, wanted: Sequence[Candidate]) -> list[Sensitivity]:
        """Each part of ``wanted`` as the source has it, where a recipe may leave it so: no loss."""

    def plain(self, source: Source, wanted: Sequence[Candidate], limit: int, model: str) -> Choice | None:
        """The largest plain level of at most ``limit`` bytes, its losses not said; None where there is none. ``model``:
        digest of the source."""

    def candidates(self, source: Source, types: Sequence[str], covered: Mapping[str, Any]) -> list[Candidate]:
        """Every part at every type that it can hold, in the order of the artifact. ``covered``: names with importance.
        Raises UsageError for no type, or one that is not there."""

    def held_bytes(self, wanted: Sequence[Candidate], statistics: Path | None) -> int:
        """Bytes that holding one of ``wanted`` takes while its codes are chosen, beside its values."""

    def holding(
        self, source: Source, pool: Pool, imatrix: Imatrix | None, statistics: Path | None
    ) -> AbstractContextManager[Hold]:
        """A function that holds a candidate: {tensor of the source: float32, its shape}. ``statistics``: with Hessians,
        for codes chosen as error feedback does."""

    def choose(self, source: Source, profile: Profile, target: Target, *, name: str | None = None) -> Choice:
        """The recipe for ``target``. ``name``: of the recipe, else made of the size. Raises as ``allocate``, and
        UsageError for no such level."""


class GgufLadder:
    """GGUF's row: single tensors at llama.cpp's types."""

    form = "gguf"
    default_types = sensitivity.DEFAULT_TYPES
    presets = allocation.PRESETS
    feeds_back = False
    weighed_types = ("iq3_xxs", "iq2_s", "iq2_xxs")

    def least(self, source: Source, wanted: Sequence[Candidate]) -> int:
        """See ``Ladder``."""
        return allocation.rest_of_file(source) + allocation.HEADER_SLACK + sum(allocation.smallest(wanted).values())

    def lossless(self, source: Source, wanted: Sequence[Candidate]) -> list[Sensitivity]:
        """See ``Ladder``: tensors that the source stores in 16 bits."""
        return allocation.lossless(source, wanted)

    def plain(self, source: Source, wanted: Sequence[Candidate], limit: int, model: str) -> Choice | None:
        """See ``Ladder``."""
        return allocation.plain_level(source, wanted, limit, model)

    def candidates(self, source: Source, types: Sequence[str], covered: Mapping[str, Any]) -> list[Candidate]:
        """See ``Ladder``."""
        return sensitivity.candidates(source, types, covered)

    def held_bytes(self, wanted: Sequence[Candidate], statistics: Path | None) -> int:
        """See ``Ladder``: some rows at a time."""
        return 0

    @contextmanager
    def holding(self, source: Source, pool: Pool, imatrix: Imatrix | None, statistics: Path | None) -> Iterator[Hold]:
        """See ``Ladder``: codes are always rounded, with ``imatrix`` where there is one."""
        from llm_quantize.calibration.choose import rows_of
        from llm_quantize.streams.replaced import hold
        from llm_quantize.streams.weights import CheckpointWeights

        rows, weights = rows_of(source, imatrix), CheckpointWeights(source.checkpoint)

        def held(candidate: Candidate) -> dict[str, torch.Tensor]:
            (output,) = candidate.outputs
            return hold(source.checkpoint, weights, output, candidate.qtype, rows.get(output.name), pool.each)

        yield held

    def choose(self, source: Source, profile: Profile, target: Target, *, name: str | None = None) -> Choice:
        """See ``Ladder``."""
        return allocation.choose(source, profile, target, name=name)


LADDERS: Mapping[str, Ladder] = {
    GgufLadder.form: GgufLadder(),
    "compressed-tensors": DirectoryLadder(
        "compressed-tensors",
        ("int8_g128", "int6_g128", "int5_g128", "int4_g64", "int4_g128", "int3_g64", "int3_g128", "int2_g64"),
        {"quality": Preset("W5A16"), "balanced": Preset("W4A16")},
    ),
    "mlx": DirectoryLadder(
        "mlx",
        (
            *("affine8_g64", "affine6_g64", "affine5_g64", "affine4_g32", "affine4_g64", "affine4_g128"),
            *("affine3_g32", "affine3_g64", "affine2_g32", "affine2_g64"),
        ),
        {"quality": Preset("5bit"), "balanced": Preset("4bit")},
        level="{bits}bit",
        widths=WIDTHS,
        head_bits=WIDTHS,
        keeps=False,
        group=None,
    ),
}


def ladder_of(form: str) -> Ladder:
    """The row of ``form``. Raises UsageError for a format of which nothing is profiled."""
    if form not in LADDERS:
        raise UsageError("recipes are not measured for this format", expected=", ".join(LADDERS), found=form)
    return LADDERS[form]
