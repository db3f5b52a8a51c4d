"""What to take: for one model and one machine, which runtime, format and level fit, and which one is best.

    ways of the machine (``ways``) → plans of every level → what each takes in memory as that runtime counts it
    (``footprint``, ``needs``) → what it loses (``experience``) → exclusions with reasons → one choice of each runtime
    for the priority, the next better, the next smaller → the runtime that is usual for the machine first

Sizes are exact, from headers alone; the memory of a running model is computed (``footprint`` and ``needs`` say how);
the loss is measured, estimated, published or measured elsewhere, and always labelled as such. Runtimes are not ranked
by loss: their figures are of different models.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_quantize.advice.answer import Advice, Answer
from llm_quantize.advice.choice import Found, Question
from llm_quantize.advice.experience import Experience
from llm_quantize.advice.footprint import context_of, shape_of
from llm_quantize.advice.machine import Machine
from llm_quantize.advice.ways import WAYS, Way, ways_for
from llm_quantize.advice.why import notes, why
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.measures.advisor import PRIORITIES, advise
from llm_quantize.models.opening import Source


def recommend(
    source: Source,
    machine: Machine,
    *,
    model: str,
    revision: str | None = None,
    lora: Sequence[str] = (),
    context: int | None = None,
    priority: str = "quality",
    experience: Experience | None = None,
    runtime: str | None = None,
) -> Advice:
    """Which runtime, format and level of ``source`` to take for ``machine`` with a cache of ``context`` tokens (None:
    8192, or what the model was made for, if that is less). ``model``, ``lora``: as the user named them, for the
    commands. ``runtime``: a name of RUNTIMES; None: the first of WAYS for this machine that fits. Reads headers only.

    Raises UsageError for an unknown priority, no context or a runtime that this machine does not have, and where
    nothing can be made of the model what the first runtime's format says."""
    if priority not in PRIORITIES:
        raise UsageError("unknown priority", expected=", ".join(PRIORITIES), found=priority)
    if context is None:
        context = context_of(source)
    if context < 1:
        raise UsageError("the context must be 1 token or more", found=context)
    ways = _ways(machine, runtime)
    question = Question(source, machine, context, shape_of(source), experience or Experience())
    answers, refused = [], []
    for way in ways:
        try:
            answers.append(_answer(way, way.find(question), machine, priority))
        except UnsupportedError as error:
            refused.append((way, error))
    if not any(answer.choices for answer in answers) and refused:
        raise refused[0][1]
    first = next((answer for answer in answers if answer.take is not None), answers[0])
    others = tuple(answer for answer in answers if answer is not first)
    return Advice(
        model=model,
        revision=revision,
        name=source.checkpoint.name,
        machine=machine,
        context=context,
        priority=priority,
        answer=first,
        lora=tuple(lora),
        others=others,
        notes=(
            *(f"{way.runtime}: {error.what}" for way, error in refused),
            *notes(question, [one for answer in answers for one in answer.choices], first.take, first.untried),
        ),
    )


def _ways(machine: Machine, runtime: str | None) -> list[Way]:
    found = ways_for(machine.device, runtime)
    if not found:
        raise UsageError(
            "recommend knows no such runtime on this machine",
            expected=", ".join(dict.fromkeys(way.runtime for way in WAYS if way.device == machine.device)),
            found=f"{runtime} on {machine.device}",
            remedy="give another --runtime, or the machine by --device, --ram, --vram and --gpu",
        )
    return found


def _answer(way: Way, found: Found, machine: Machine, priority: str) -> Answer:
    """What the rule of ``measures.advisor`` makes of the choices of one runtime."""
    choices = found.choices
    advice = advise([choice.offer() for choice in choices], priority)
    take, better, smaller, untried = (
        None if place is None else choices[place]
        for place in (advice.take, advice.larger, advice.smaller, advice.untried)
    )
    reasons = () if take is None else tuple(why(take, advice.reason, machine, way.room(machine)))
    return Answer(way, advice.reason, take, better, smaller, untried, reasons, choices, found.excluded)
