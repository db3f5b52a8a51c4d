"""Every level of GGUF in llama.cpp: sizes as planned, memory and place as footprint.py computes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llm_quantize.advice.choice import Choice, Found, Question, found
from llm_quantize.advice.experience import gains_from_importance
from llm_quantize.advice.footprint import footprint, place, weights_of
from llm_quantize.architectures import rows
from llm_quantize.calibration import choose
from llm_quantize.formats.gguf.levels import LEVELS, TRAINED
from llm_quantize.formats.gguf.plan import FLOAT_LEVELS
from llm_quantize.formats.gguf.plan import NAME as GGUF
from llm_quantize.formats.table import FORMATS
from llm_quantize.models.opening import Source
from llm_quantize.options import Options
from llm_quantize.pipeline import plan_source
from llm_quantize.plan import ArtifactPlan
from llm_quantize.reports.numbers import bytes_text
from llm_quantize.runtimes import RUNTIMES

RUNTIME = "llama.cpp"
_FLOAT_LEVEL_OF = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


def gguf_choices(question: Question) -> Found:
    """All levels that this model can have. Raises what the format's plan refuses."""
    source, shape, machine, context = question.source, question.shape, question.machine, question.context
    experience, label = question.experience, RUNTIMES[RUNTIME].LABEL
    excluded, exact, choices = _cannot_be(source), float_level(source), []
    for plan, calibrate in _plans(source, [level for level in LEVELS if level not in excluded]):
        if plan.level == "MXFP4_MOE" and "mxfp4" not in plan.type_counts():
            excluded[plan.level] = "is for models with experts, and this one has none"
            continue
        weights = weights_of({tensor.name: tensor.nbytes for tensor in plan.tensors}, shape.n_layer)
        choices.append(
            Choice(
                level=plan.level,
                file=plan.files[0].name,
                size=plan.size,
                bits_per_weight=plan.bits_per_weight,
                need=footprint(weights, shape, context),
                placement=place(weights, shape, machine, context),
                loss=experience.loss(GGUF, plan.level, exact=plan.level == exact),
                speed=experience.speed(GGUF, plan.level, label),
                calibrate=calibrate,
                make=experience.make(GGUF, plan.level),
            )
        )
    room = f"{bytes_text(machine.usable_ram)} of RAM"
    if machine.device == "cuda":
        room = f"{bytes_text(machine.usable_ram)} of RAM and {bytes_text(machine.vram)} on the GPU"
    return found(choices, excluded, room)


def float_level(source: Source) -> str:
    """The level that holds the values of the source's weights as they are; of a quantized source, float32."""
    kept: Counter[str] = Counter()
    model = source.checkpoint
    for name, info in model.tensors.items():
        if model.is_readable(name):
            dtype = model.stored_dtype(name)
            kept[_FLOAT_LEVEL_OF[dtype.name]] += rows.weights_of(info.shape) * dtype.itemsize
    return max(kept, key=lambda level: kept[level], default="BF16")


def _cannot_be(source: Source) -> dict[str, str]:
    """Levels that are no choice for this model whatever the machine, and why."""
    own = float_level(source)
    as_stored = any(info.dtype == own for info in source.checkpoint.tensors.values())
    kind = source.checkpoint.kind
    why = f"{own} is what the source stores: the same weights"
    if kind or not as_stored:
        why = f"{own} holds every value of the source ({kind or 'decoded'}) as it is"
    cannot = {level: why for level in FLOAT_LEVELS if level != own}
    trained = {
        level: f"is for models trained with {kind}; any other loses nearly everything"
        for level, kind in TRAINED.items()
    }
    released = {"NVFP4": "is for models that are released so: of any other IQ4_NL, of the same size, loses less"}
    return {**cannot, **trained, **released}


def _plans(source: Source, levels: Sequence[str]) -> list[tuple[ArtifactPlan, bool]]:
    """The plan of each level, and whether to calibrate: it must be, or published figures say that it gains."""
    form = FORMATS[GGUF]
    calibrate = {
        level: gains_from_importance(level) or form.needs_importance(source, level, Options()) for level in levels
    }
    planned = []
    for wanted in (False, True):
        chosen = [level for level in levels if calibrate[level] is wanted]
        options = Options(calibrate=wanted)
        foreseen = choose.foresee(source, GGUF, chosen, options)
        plans = plan_source(source, GGUF, levels=chosen, name=None, options=options, importance=foreseen)
        planned += [(plan, wanted) for plan in plans]
    return planned
