"""The reasons of an answer, and what a reader must know beside it, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llm_quantize.advice.choice import Choice, Question
from llm_quantize.advice.elsewhere import ELSEWHERE_SOURCE, ROUNDS_INPUTS
from llm_quantize.advice.experience import PUBLISHED_SOURCE
from llm_quantize.advice.machine import Machine
from llm_quantize.formats.gguf.plan import NAME as GGUF
from llm_quantize.measures.advisor import GOOD, USABLE
from llm_quantize.measures.grades import grade
from llm_quantize.reports.numbers import bytes_text
from llm_quantize.runtimes import RUNTIMES

_KNOWN = {
    "measured": "measured on this model",
    "estimated": "estimated from levels measured on this model",
    "published": "not measured on this model: published for Llama 3 8B",
    "elsewhere": "not known of this model: measured on the built-in one",
    "exact": "the source's own weights",
}


def why(take: Choice, reason: str, machine: Machine, room: int | None) -> Iterator[str]:
    """The reasons for ``take``. ``room``: bytes that its runtime may have, None where it lies in several places."""
    if take.placement is None or take.loss is None:
        return
    yield _where(take, machine, room)
    known = _KNOWN[take.loss.basis]
    if take.loss.basis == "elsewhere":
        yield f"loss: mean KLD {take.loss.kld:.2g} ({known})"
    else:
        yield f"loss: {grade(take.loss.kld)}, mean KLD {take.loss.kld:.2g} ({known})"
    good = f"of those that fit with a loss that is still good (mean KLD below {GOOD:g})"
    speed = f"{take.speed:.1f} tokens per second, measured" if take.speed else "fewest bytes to read; not measured"
    there = "on the built-in model" if take.loss.basis == "elsewhere" else ""
    if there and reason in ("clean", "least"):
        yield {
            "clean": f"the smallest that is indistinguishable from the source {there}",
            "least": f"of those that fit, it loses least {there}",
        }[reason]
        return
    yield {
        "clean": "the smallest that is indistinguishable from the source: more bits would show in nothing",
        "least": "of those that fit, it loses least",
        "whole": "the best that runs whole on the GPU; better ones would be split between GPU and RAM, and slow",
        "fast": f"the fastest {good}: {speed}",
        "small": f"the smallest of those that fit whose loss stays below a mean KLD of {USABLE:g}",
    }[reason]
    if take.offer().judged >= USABLE:
        yield "a smaller model at more bits may well be better: compare the two"


def _where(take: Choice, machine: Machine, room: int | None) -> str:
    text, need, placement = bytes_text, take.need, take.placement
    assert placement is not None
    if room is not None:
        parts = (
            f"weights {text(need.weights)}, cache {text(need.cache)}, buffers {text(need.compute)}, "
            f"{RUNTIMES[take.runtime].LABEL} itself {text(need.runtime)}"
        )
        if placement.kind == "gpu":
            return f"it runs on the GPU: {text(need.total)} of {text(room)} ({parts})"
        return f"it runs in RAM: {text(need.total)} of {text(room)} ({parts})"
    parts = f"weights {text(need.weights)}, cache {text(need.cache)}, buffers {text(need.compute + need.runtime)}"
    if placement.kind == "gpu":
        rest = placement.gpu - placement.context - need.cache - need.compute
        parts = f"weights {text(rest)}, cache {text(need.cache)}, buffers {text(need.compute)}"
        parts += f", CUDA itself {text(placement.context)}" if placement.context else ""
    return {
        "cpu": f"it runs in RAM: {text(placement.ram)} of {text(machine.usable_ram)} ({parts})",
        "gpu": f"it runs whole on the GPU: {text(placement.gpu)} of {text(machine.vram)} ({parts})",
        "split": f"{placement.gpu_layers} of {placement.layers} layers run on the GPU ({text(placement.gpu)} of "
        f"{text(machine.vram)}), the rest in RAM ({text(placement.ram)} of {text(machine.usable_ram)})",
    }[placement.kind]


def notes(question: Question, choices: Sequence[Choice], take: Choice | None, untried: Choice | None) -> Iterator[str]:
    """What the reader must know beside; ``choices``: of all runtimes."""
    source, machine = question.source, question.machine
    if source.checkpoint.kind:
        yield f"losses are counted from this {source.checkpoint.kind} model, not from the one it was made of"
    bases = {choice.loss.basis for choice in choices if choice.loss is not None}
    if "published" in bases:
        yield (
            f"losses marked * were not measured on this model; they are from {PUBLISHED_SOURCE}. "
            "llm-quantize compare measures them, and this command then uses its report"
        )
    if "estimated" in bases:
        yield f"losses marked ~ are published ones ({PUBLISHED_SOURCE}), scaled by those measured on this model"
    if "elsewhere" in bases:
        yield (
            f"losses marked ^ were measured on {ELSEWHERE_SOURCE}: they order the levels of a runtime, and say little "
            "of this model. llm-quantize compare measures them here"
        )
    rounded = [one for one in choices if (one.format, one.level) in ROUNDS_INPUTS and one.loss is not None]
    if names := sorted({one.name for one in rounded if one.loss is not None and one.loss.basis == "measured"}):
        yield (
            f"what compare measures of {', '.join(names)} is the loss of the weights; the runtime rounds the inputs of "
            "matrices too, which loses more"
        )
    if question.experience.file is not None:
        yield f"measured figures are from {question.experience.file}"
    if machine.device == "cuda" and machine.capability is None:
        yield "the GPU was not named; what needs newer kernels than Turing's (7.5) is left out: --gpu NAME tells"
    if len(machine.gpus) > 1:
        yield "vLLM and transformers are counted on the largest GPU alone, llama.cpp on all of them"
    trained = source.architecture.hyper.context_length
    if trained and question.context > trained:
        yield f"the model was made for {trained} tokens; the cache is counted for {question.context}"
    if take is not None and untried is not None and untried.loss is not None:
        pair = ",".join(f"{one.format}:{one.level}" for one in (untried, take))
        yield (
            f"{untried.level} was not measured on this model; by estimates (mean KLD {untried.loss.kld:.2g}) it may be "
            f"the better choice: measure it with llm-quantize compare --variants {pair}"
        )
    if take is not None and not take.make and take.calibrate:
        yield "--calibrate needs the extra [torch] (pip install '.[torch]'); without it take --imatrix FILE"
    if take is not None and not take.make and take.format != GGUF and take.loss and take.loss.basis != "exact":
        yield "the errors of rounding are fed back, which needs the extra [torch] (pip install '.[torch]')"
