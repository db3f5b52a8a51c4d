"""Everything that a user may set, in one tree that is handed on whole. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llm_quantize.engine import ENGINES
from llm_quantize.errors import UsageError
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.table import FORMATS
from llm_quantize.io.statistics_layout import check_kinds
from llm_quantize.methods.gptq_options import GptqOptions
from llm_quantize.methods.table import METHODS, Method
from llm_quantize.results import Settings
from llm_quantize.transforms.table import TRANSFORMS, Transform

DEFAULT_SAMPLES = 256
MEASURED_CONTEXT = 512
DEVICES = ("cpu", "cuda", "mps")
INPUTS: Mapping[str, str] = {
    "sequential": "of the model as quantized up to each matrix",
    "block": "of the model as quantized up to each block",
    "source": "of the source model",
}
NONFINITE_POLICIES = ("refuse", "zero", "keep")


@dataclass(frozen=True, repr=False)
class CalibrationOptions(Settings):
    """Text: ``data`` (files and names of built-in sets; none: the built-in mix), at most ``samples`` windows (None:
    256, or as many as a method needs) of ``length`` tokens (no longer than the model's context), drawn with ``seed``;
    ``chat`` sets plain text as a conversation in the model's template. ``collect``: which statistics, of "imatrix",
    "hessian" and "absmax". ``expert_minimum``: tokens that each expert should see; more text is drawn until it does or
    the text ends (0: never). ``device``: where the model runs, "cpu", "cuda" or "mps". ``threads`` and ``max_ram``
    (bytes) bound the run and do not change a byte of its result.

    Raises UsageError for values that mean nothing.
    """

    data: tuple[str, ...] = ()
    samples: int | None = None
    length: int = 2048
    chat: bool = False
    seed: int = 0
    collect: tuple[str, ...] = ("imatrix",)
    expert_minimum: int = 16
    device: str = "cpu"
    threads: int | None = None
    max_ram: int | None = None

    def settled(self, samples: int = DEFAULT_SAMPLES) -> CalibrationOptions:
        """The same with a number of windows: ``samples`` where the user gave none."""
        return self if self.samples is not None else replace(self, samples=samples)

    def __post_init__(self) -> None:
        check_kinds(self.collect)
        if self.device not in DEVICES:
            raise UsageError("there is no such device", expected=", ".join(DEVICES), found=self.device)
        if (self.samples is not None and self.samples < 1) or self.length < 2:
            raise UsageError("calibration needs at least 1 window of 2 tokens", found=f"{self.samples} x {self.length}")


KV_CACHES = ("fp8",)
"""What keys and values may be kept as."""


@dataclass(frozen=True, repr=False)
class MethodOptions(Settings):
    """``method``: rtn (round to nearest), gptq (error feedback) or keep (codes and scales of a quantized source as they
    are, where the format holds them); None: the format's own.

    ``transform``: awq rescales channels first; None: what the format does. ``inputs``: what a matrix is calibrated on:
    "sequential" (the model as quantized up to this very matrix), "block" (up to this block), "source" (not at all).
    ``gptq``: the stages of error feedback. ``refinement``: so many gradient steps move the codes and floats of each
    block afterwards (blockwise/refining.py); 0: none.

    Of directories: ``group_size`` (-1: a whole row), ``symmetric``, None: as the format and level say;
    ``double_quant`` (scales in 8 bits) and ``compute_dtype`` (None: the checkpoint's) of bitsandbytes; ``kv_cache``
    ("fp8"): what runtimes keep keys and values as, with calibrated scales, of compressed-tensors;
    ``ignore``: regular expressions of modules that stay as they are; ``shard_size`` in bytes; ``include``: globs of
    files of the source that are copied beside those that runtimes read.
    """

    method: str | None = None
    transform: str | None = None
    inputs: str = "sequential"
    gptq: GptqOptions = field(default_factory=GptqOptions)
    refinement: int = 0
    group_size: int | None = None
    symmetric: bool | None = None
    double_quant: bool | None = None
    compute_dtype: str | None = None
    kv_cache: str | None = None
    ignore: tuple[str, ...] = ()
    shard_size: int = 5_000_000_000
    include: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, found, allowed in (
            ("--method", self.method, tuple(METHODS)),
            ("--transform", self.transform, tuple(TRANSFORMS)),
            ("--inputs", self.inputs, tuple(INPUTS)),
            ("--kv-cache", self.kv_cache, KV_CACHES),
        ):
            if found is not None and found not in allowed:
                raise UsageError(f"unknown {name}", expected=", ".join(allowed), found=found)
        if self.refinement < 0:
            raise UsageError("--refine is a number of steps", expected="0 or more", found=self.refinement)

    def method_of(self, format: str) -> Method:
        """The method for ``format``: the one asked for, or the format's own."""
        return METHODS[self.method or FORMATS[format].method]

    def transform_of(self, format: str) -> Transform:
        """The transform for ``format``: the one asked for, or the format's own where its method reads text."""
        if self.transform is not None:
            return TRANSFORMS[self.transform]
        return TRANSFORMS[FORMATS[format].transform if self.method_of(format).reads_text else "none"]

    def calibrates(self, format: str) -> bool:
        """Whether ``format`` made so needs text."""
        return self.method_of(format).reads_text or self.transform_of(format).passes > 0

    def words(self, format: str, texts: Sequence[str]) -> dict[str, str]:
        """What a model card says of how the codes were chosen. ``texts``: names of the calibration texts."""
        method = self.method_of(format)
        words = {"Method": f"{method.words}{self.transform_of(format).words}"}
        if method.reads_text:
            words["Inputs"] = INPUTS[self.inputs]
        if self.refinement:
            words["Refined"] = f"{self.refinement} gradient steps on the output of each block"
        return words | ({"Calibrated on": ", ".join(texts)} if texts else {})

    def identity(self, format: str) -> dict[str, object]:
        """What of these decides the bytes: for the artifact's identity."""
        facts: dict[str, object] = {
            "method": self.method_of(format).name,
            "transform": self.transform_of(format).name,
        }
        if self.calibrates(format):
            facts |= {"inputs": self.inputs, **asdict(self.stages(format))}
        if self.refinement:
            facts["refinement"] = self.refinement
        return facts | ({} if self.kv_cache is None else {"kv_cache": self.kv_cache})

    def pairs(self, format: str) -> bool:
        """Whether the source's own stream goes along with that of the quantized model."""
        return self.stages(format).corrects or self.refinement > 0

    def stages(self, format: str) -> GptqOptions:
        """The optimiser's stages that the method leaves; on the source's own inputs there is nothing to make up for."""
        stages = self.method_of(format).stages(self.gptq)
        return replace(stages, correction=0.0) if self.inputs == "source" else stages


PROMPTS = ("The old man looked at the sea and", "むかしむかし、あるところに")
"""What models continue where a comparison shows text that they write."""


@dataclass(frozen=True, repr=False)
class MeasurementOptions(Settings):
    """What was lost is measured on ``texts`` (files and names of built-in sets; none: the built-in evaluation text), in
    at most ``windows`` at even distances (None: all) of ``context`` tokens (None: 512, or the model's context if that
    is less). ``runtime``: also in this one, "llama.cpp", "transformers" or "vllm". ``generate``: let source and
    artifacts write. ``speed``: run each variant of a comparison in its runtime for speed, memory and text after
    ``prompts``.
    """

    texts: tuple[str, ...] = ()
    context: int | None = None
    windows: int | None = None
    runtime: str | None = None
    generate: bool = False
    speed: bool = True
    prompts: tuple[str, ...] = PROMPTS

    def context_of(self, longest: int) -> int:
        """Tokens of a window for a model whose context is ``longest``."""
        return self.context or min(MEASURED_CONTEXT, longest)


@dataclass(frozen=True, repr=False)
class Options(Settings):
    """What a user may set beside model and levels. Sizes in bytes.

    ``threads`` (None: all CPUs) and ``max_ram`` bound a run and change no byte of it. ``overrides``: of the types that
    a GGUF level gives to tensors. ``split_max_size``: files no larger than that. ``imatrix``: llama.cpp's importance
    matrix, ``statistics``: the file of ``calibrate``; ``calibrate``: True calibrates, False never does, None does where
    a level needs importance and no file gives it.

    ``calibration`` is of the text and of where the model runs (``calibration.device``), ``method`` of how codes are
    chosen, ``measurement`` of what is found out about artifacts.

    ``nonfinite``: NaN and infinite weights are refused ("refuse"), replaced ("zero") or kept ("keep"). ``checkpoints``:
    keep a journal, in ``checkpoint_dir`` (None: beside the output), so that a stopped run can go on. ``overwrite``:
    take the place of an existing output. ``ignore_space``: try even if the disk looks too small. ``engine``: what does
    plain rounding, "threads" or "processes". ``modelfile``: write a Modelfile for Ollama beside each GGUF file.
    ``judged``: every tensor is held against the source's, and the verdict recorded (``convert``); ``exact``: and what
    is not exact is not kept. Raises UsageError for values that mean nothing.
    """

    threads: int | None = None
    max_ram: int | None = None
    overrides: Overrides = field(default_factory=Overrides)
    split_max_size: int | None = None
    imatrix: Path | None = None
    statistics: Path | None = None
    calibrate: bool | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    measurement: MeasurementOptions = field(default_factory=MeasurementOptions)
    nonfinite: str = "refuse"
    checkpoints: bool = True
    checkpoint_dir: Path | None = None
    overwrite: bool = False
    ignore_space: bool = False
    engine: str = "threads"
    modelfile: bool = False
    judged: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        if self.nonfinite not in NONFINITE_POLICIES:
            raise UsageError("unknown --nonfinite policy", expected=NONFINITE_POLICIES, found=self.nonfinite)
        if self.engine not in ENGINES:
            raise UsageError("unknown --engine", expected=", ".join(ENGINES), found=self.engine)
