"""What a user may set about a method, a transform and the grid of a directory format. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from llm_quantize.errors import UsageError
from llm_quantize.methods.gptq_options import GptqOptions

METHODS = ("rtn", "gptq")
TRANSFORMS = ("none", "awq")
INPUTS = ("sequential", "block", "source")


@dataclass(frozen=True)
class MethodOptions:
    """``method``: rtn (round to nearest) or gptq (error feedback); None: the format's own.

    ``transform``: awq rescales channels first; None: what the format does. ``inputs``: what a matrix is calibrated on:
    "sequential" (the model as quantized up to this very matrix), "block" (up to this block), "source" (not at all).
    ``gptq``: the stages of error feedback.

    Of directories: ``group_size`` (-1: a whole row), ``symmetric``, None: as the format and level say; ``desc_act``;
    ``ignore``: regular expressions of modules that stay as they are; ``shard_size`` in bytes.
    """

    method: str | None = None
    transform: str | None = None
    inputs: str = "sequential"
    gptq: GptqOptions = field(default_factory=GptqOptions)
    group_size: int | None = None
    symmetric: bool | None = None
    desc_act: bool = False
    ignore: tuple[str, ...] = ()
    shard_size: int = 5_000_000_000

    def __post_init__(self) -> None:
        for name, found, allowed in (
            ("--method", self.method, METHODS),
            ("--transform", self.transform, TRANSFORMS),
            ("--inputs", self.inputs, INPUTS),
        ):
            if found is not None and found not in allowed:
                raise UsageError(f"unknown {name}", expected=", ".join(allowed), found=found)

    def method_of(self, format: str) -> str:
        """The method for ``format``: GGUF is rounded unless asked otherwise, directories are not."""
        return self.method or ("rtn" if format == "gguf" else "gptq")

    def transform_of(self, format: str) -> str:
        """The transform for ``format``: AWQ's own belongs to its format, unless the method is plain rounding."""
        if self.transform is not None:
            return self.transform
        return "awq" if format == "awq" and self.method_of(format) != "rtn" else "none"

    def calibrates(self, format: str) -> bool:
        """Whether ``format`` made so needs text."""
        return self.method_of(format) == "gptq" or self.transform_of(format) != "none"

    def words(self, format: str, texts: Sequence[str]) -> dict[str, str]:
        """What a model card says of how the codes were chosen. ``texts``: names of the calibration texts."""
        method, transform = self.method_of(format), self.transform_of(format)
        scaled = ", channels rescaled as AWQ does" if transform == "awq" else ""
        if method == "rtn":
            words = {"Method": f"rounding to nearest on fitted grids{scaled}"}
        else:
            words = {
                "Method": f"error feedback (GPTQ) on importance-weighted grids fixed first{scaled}",
                "Inputs": {
                    "sequential": "of the model as quantized up to each matrix",
                    "block": "of the model as quantized up to each block",
                    "source": "of the source model",
                }[self.inputs],
            }
        return words | ({"Calibrated on": ", ".join(texts)} if texts else {})

    def identity(self, format: str) -> dict[str, object]:
        """What of these decides the bytes: for the artifact's identity."""
        method, transform = self.method_of(format), self.transform_of(format)
        facts: dict[str, object] = {"method": method, "transform": transform}
        if self.calibrates(format):
            facts |= {"inputs": self.inputs, **asdict(self.stages(format))}
        return facts

    def stages(self, format: str) -> GptqOptions:
        """The optimiser's options: rtn has no stage at all, and nothing is to be made up for on the source's inputs."""
        if self.method_of(format) == "rtn":
            return replace(self.gptq, feedback=False, sweeps=0, refit=False, correction=0.0)
        return replace(self.gptq, correction=0.0) if self.inputs == "source" else self.gptq
