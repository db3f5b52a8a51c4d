"""Whether an artifact still writes as its source does: a few prompts continued greedily, by both.

What is looked for: an empty answer, one that repeats itself in a loop, and one that never ends although the source's
does. A small or undertrained model loops too; so an artifact is judged against what the source itself writes after
the same prompts, and never alone where that is to be had. One greedy answer proves little: two roundings of the same
model part after some tokens, and one may loop where the other does not. So findings are shown one by one, but what
counts is how many more prompts go wrong in the artifact only than in the source only (McNemar's comparison).

    loop        the share of an answer's tokens that belong to a tail which is one short phrase over and over
    repetition  1 - distinct n-grams / n-grams, n = 4: 0 for a text that never says the same four tokens twice
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quantize import events
from llm_quantize.errors import UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.runtimes.base import Request, Written, retokenized

PROMPTS = (
    "The old man looked at the sea and",
    "Once upon a time, in a village by the river,",
    "The capital of France is a city that",
    "Dear sir,\n\nI am writing to you because",
    "吾輩は猫である。名前はまだ",
    "昔々、ある村に",
    "def add(a, b):\n    ",
    "import os\n\nfor name in os.listdir('.'):\n",
)
"""English, Japanese and code."""

NEW_TOKENS = 96
NGRAM = 4
LONGEST_PHRASE = 24
"""Tokens of the longest phrase whose repetition counts as a loop."""

LOOP = 0.5
"""Share of the answer from which on a tail of one phrase, said three times or more, is a loop."""

MORE = 0.25
"""How much more repetition than the source's own is a finding."""

TOO_MANY = 3
"""So many more prompts going wrong in the artifact alone than in the source alone fail the check: by chance, where
both are equally good, three of three fall on one side once in eight times."""

_LEAST_TIMES = 3


@dataclass(frozen=True)
class Answer:
    """One continuation, greedy. ``tokens``: how many; ``ended``: by an end token and not by the limit."""

    prompt: str
    text: str
    tokens: int
    ended: bool
    loop: float
    repetition: float

    @property
    def empty(self) -> bool:
        return not self.text.strip()


@dataclass(frozen=True)
class Finding:
    """One thing that is worse than in the source. ``kind``: "empty", "loop", "repetition" or "endless"."""

    prompt: str
    kind: str
    text: str


@dataclass(frozen=True)
class GenerationCheck:
    """``answers`` and ``reference`` in the order of the prompts; ``reference`` empty: there was none to judge by, and
    only empty answers and loops are findings. ``better``: prompts that go wrong in the source and not here."""

    answers: tuple[Answer, ...]
    reference: tuple[Answer, ...]
    findings: tuple[Finding, ...]
    better: int

    @property
    def worse(self) -> int:
        """Prompts that go wrong here and not in the source."""
        return len({finding.prompt for finding in self.findings})

    @property
    def ok(self) -> bool:
        return self.worse - self.better < TOO_MANY

    def to_dict(self) -> dict[str, Any]:
        """The same facts, JSON-ready."""
        return {**asdict(self), "worse": self.worse, "ok": self.ok}


def loop_share(ids: Sequence[int]) -> float:
    """The share of ``ids`` in the longest tail that is one phrase of at most LONGEST_PHRASE tokens, three times or
    more (the last time perhaps cut off); 0 where there is none."""
    best = 0
    for period in range(1, min(LONGEST_PHRASE, len(ids) // _LEAST_TIMES) + 1):
        length = period
        while length < len(ids) and ids[-length - 1] == ids[-length - 1 + period]:
            length += 1
        if length >= _LEAST_TIMES * period:
            best = max(best, length)
    return best / len(ids) if ids else 0.0


def repetition(ids: Sequence[int], n: int = NGRAM) -> float:
    """1 - distinct / all n-grams of ``ids``; 0 for fewer than n + 1 tokens."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def answers(written: Sequence[Written], prompts: Sequence[str] = PROMPTS) -> tuple[Answer, ...]:
    """What was ``written`` after each of ``prompts``, with its loops and repetitions."""
    return tuple(
        Answer(prompt, one.text, len(one.ids), one.ended, loop_share(one.ids), repetition(one.ids))
        for prompt, one in zip(prompts, written, strict=True)
    )


def judge(found: Sequence[Answer], reference: Sequence[Answer] = ()) -> tuple[Finding, ...]:
    """What is worse in ``found`` than in ``reference`` (same prompts, same order; empty: no source to judge by).

    Raises UsageError where the prompts differ.
    """
    if reference and [one.prompt for one in found] != [one.prompt for one in reference]:
        raise UsageError("the two models were given different prompts")
    findings: list[Finding] = []
    for index, answer in enumerate(found):
        findings += _judge(answer, reference[index] if reference else None)
    return tuple(findings)


def check_answers(found: Sequence[Answer], reference: Sequence[Answer] = ()) -> GenerationCheck:
    """Judge both ways: what is worse in ``found``, and how often it is the source that goes wrong."""
    better = {finding.prompt for finding in judge(reference, found)} if reference else set()
    return GenerationCheck(tuple(found), tuple(reference), judge(found, reference), len(better))


def _judge(answer: Answer, own: Answer | None) -> Iterator[Finding]:
    if answer.empty:
        if own is None or not own.empty:
            yield Finding(answer.prompt, "empty", "writes nothing" + ("" if own is None else ", the source does"))
        return
    compared = "" if own is None else f", {own.loop:.0%} in the source"
    if answer.loop >= LOOP and (own is None or own.loop < LOOP):
        yield Finding(answer.prompt, "loop", f"{answer.loop:.0%} of the answer is one phrase over and over{compared}")
    elif own is not None and answer.repetition > own.repetition + MORE:
        text = f"{answer.repetition:.0%} of its phrases were said before, {own.repetition:.0%} in the source"
        yield Finding(answer.prompt, "repetition", text)
    if own is not None and own.ended and not own.empty and not answer.ended:
        yield Finding(answer.prompt, "endless", f"does not end within the limit, the source does after {own.tokens}")


def check_generation(
    artifact: str | Path,
    *,
    reference: Sequence[Answer] = (),
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = NEW_TOKENS,
    threads: int | None = None,
    on_event: EventSink = ignore,
) -> GenerationCheck:
    """Run ``artifact`` in its usual runtime over ``prompts`` and judge it against ``reference``, what its source wrote
    (``answers`` of its F32 or BF16 file, or ``source_answers``).

    Raises MissingExtraError where the runtime is not installed, and what the runtime raises.
    """
    from llm_quantize.runtimes import artifact_at, runtime_for

    on_event(events.Stage(f"text that {Path(artifact).name} writes"))
    path = artifact_at(Path(artifact))
    request = Request(prompts=tuple(prompts), max_tokens=max_tokens, threads=threads)
    return check_answers(answers(runtime_for(path).write(path, request), prompts), reference)


def source_answers(
    directory: Path,
    tokenizer: Callable[[str], list[int]],
    *,
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = NEW_TOKENS,
    threads: int | None = None,
    on_event: EventSink = ignore,
) -> tuple[Answer, ...]:
    """What the source itself writes, whole in memory in its usual runtime. ``tokenizer``: ids of a plain text.

    Raises MissingExtraError where that is not installed.
    """
    from llm_quantize.runtimes import runtime_for

    runtime, written = runtime_for(directory), []
    for prompt in prompts:
        request = Request(prompts=(prompt,), max_tokens=max_tokens, threads=threads)
        text = "".join(runtime.generate(directory, request, on_event))
        written.append(retokenized(text, tokenizer, max_tokens))
    return answers(written, prompts)
