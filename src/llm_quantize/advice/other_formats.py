"""Model directories beside GGUF: what they would take, exactly, for those who ask what to take.

They are not ranked: what fits depends on the memory of vLLM or Transformers, which was not measured.
"""

from __future__ import annotations

from llm_quantize.artifacts.planning import Options, plan_source
from llm_quantize.calibration import choose
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.models.opening import Source
from llm_quantize.reports.numbers import bytes_text

DIRECTORIES = (("gptq", "4bit"), ("awq", "4bit"), ("compressed-tensors", "W4A16"))


def directories_note(source: Source) -> str:
    """Formats, levels and planned sizes of the files, in one sentence; what a format cannot hold, with the reason."""
    told = []
    for format, level in DIRECTORIES:
        options = Options()
        try:
            imatrix = choose.foresee(source, format, [level], options)
            (plan,) = plan_source(source, format, levels=[level], name=None, options=options, imatrix=imatrix)
        except (UnsupportedError, UsageError) as error:
            told.append(f"{format} -q {level} cannot be made of this model ({error.what})")
        else:
            told.append(f"{format} -q {level}: {bytes_text(plan.size)}")
    return (
        "for vLLM and Transformers, quantize also writes directories; they are not ranked here, as the memory they "
        f"take there was not measured: {'; '.join(told)}"
    )
