"""Model directories beside GGUF: what they would take, exactly, for those who ask what to take.

They are not ranked: what fits depends on the memory of vLLM, Transformers or mlx_lm, which was not measured.
"""

from __future__ import annotations

from llm_quantize.calibration import choose
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.models.opening import Source
from llm_quantize.options import Options
from llm_quantize.pipeline import plan_source
from llm_quantize.reports.numbers import bytes_text


def directories_note(source: Source) -> str:
    """Formats, levels and planned sizes of the files, in one sentence; what a format cannot hold, with the reason."""
    told = []
    for name, form in PACKED.items():
        level = form.EXAMPLE
        options = Options()
        try:
            foreseen = choose.foresee(source, name, [level], options)
            (plan,) = plan_source(source, name, levels=[level], name=None, options=options, importance=foreseen)
        except (UnsupportedError, UsageError) as error:
            told.append(f"{name} -q {level} cannot be made of this model ({error.what})")
        else:
            told.append(f"{name} -q {level}: {bytes_text(plan.size)}")
    return (
        "for vLLM, Transformers and mlx_lm, quantize also writes directories; they are not ranked here, as the memory "
        f"they take there was not measured: {'; '.join(told)}"
    )
