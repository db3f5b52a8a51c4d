"""Options of storage that only some directory formats take are refused by the others, each by its name."""

from __future__ import annotations

import pytest

from llm_quantize.data import demo_model
from llm_quantize.errors import UsageError
from llm_quantize.formats.base import OF_SOME
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import plan

GIVEN = {"double_quant": True, "compute_dtype": "float16"}


@pytest.mark.parametrize("name", OF_SOME)
@pytest.mark.parametrize("form", PACKED)
def test_an_option_of_another_format_is_refused(form: str, name: str) -> None:
    options = Options(method=MethodOptions("rtn", **{name: GIVEN[name]}))
    levels = [PACKED[form].EXAMPLE]
    if name in PACKED[form].OPTIONS:
        assert plan(str(demo_model()), form, levels=levels, options=options)
        return
    with pytest.raises(UsageError, match=f"options of other formats were given for {form}") as refusal:
        plan(str(demo_model()), form, levels=levels, options=options)
    assert refusal.value.found == OF_SOME[name]
