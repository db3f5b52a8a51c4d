"""Words of other tools: those that mean one of ours are taken for it, others are answered with ours. And what --help
says of levels."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import click

OURS: Mapping[str, str] = {
    **dict.fromkeys(("w-bit", "w-bits", "wbits", "bits"), "level"),
    **dict.fromkeys(("q-group-size", "groupsize"), "group-size"),
    **dict.fromkeys(("nsamples", "n-samples"), "calibration-samples"),
    **dict.fromkeys(("seqlen", "seq-len", "max-seq-length"), "sequence-length"),
}
"""{an option of other tools: the option here that means the same}, both without the hyphens in front."""

HINTS: Mapping[str, str] = {
    "--format": "FORMAT is the word after MODEL: llm-quantize quantize MODEL gguf; --format json is --json here.",
    "--desc-act": "Leave it out: columns are visited in the order of their activations in any case, on grids fixed "
    "before, so the file needs no permutation and says desc_act false.",
    "--resume": "Leave it out: every run resumes by itself, the same command again.",
    "--scheme": "A scheme is a level here: -q W4A16.",
    "--damp-percent": "Leave it out: damping is raised by itself where a matrix needs it.",
    "--true-sequential": "Leave it out, or give --inputs sequential, which is the default.",
}
"""{an option that there is not, with hyphens: what to do}."""


def ours(word: str) -> str:
    """A long option, a command or a choice as it is written here; one letter stays as it is."""
    if len(word) == 1:
        return word
    word = word.replace("_", "-")
    return OURS.get(word, word)


def explained(error: click.ClickException) -> click.ClickException:
    """``error``, with what to do where it is about an option of other tools."""
    if isinstance(error, click.NoSuchOption):
        hint = HINTS.get(error.option_name.replace("_", "-"))
        if hint is not None:
            return click.UsageError(f"{error.message} {hint}", ctx=error.ctx)
    return error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message that does not know ``word``."""
    near = difflib.get_close_matches(word.lower(), list(known), n=2, cutoff=0.6)
    if len(near) > 1:
        return f" (Did you mean one of: {', '.join(map(repr, near))}?)"
    return f" Did you mean '{near[0]}'?" if near else ""


class LevelsCommand(click.Command):
    """A command whose --help lists the levels of every format."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from llm_quantize.formats.table import FORMATS

        with formatter.section("Levels (-q, in any case)"):
            formatter.write_dl(
                [
                    (name, f"{levels} (without -q: {form.default})" if form.default else levels)
                    for name, form in FORMATS.items()
                    for levels in [", ".join(form.levels)]
                ]
            )
        with formatter.indentation():
            formatter.write_text(
                "A number of bits means the usual level: -q 4 is Q4_K_M for gguf, 4bit for gptq and awq, W4A16 for "
                "compressed-tensors, NF4 for bitsandbytes."
            )
