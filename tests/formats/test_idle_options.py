"""What a format has no use for is refused by its name, in every format; what it takes is not."""

from __future__ import annotations

from typing import Any

import pytest

from llm_quantize.data import demo_model
from llm_quantize.errors import UsageError
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.table import FORMATS
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import plan

GIVEN: dict[str, dict[str, Any]] = {
    "--group-size": {"group_size": 32},
    "--sym, --asym": {"symmetric": False},
    "--double-quant": {"double_quant": True},
    "--compute-dtype": {"compute_dtype": "float16"},
    "--kv-cache": {"kv_cache": "fp8", "method": "gptq"},
    "--ignore": {"ignore": ("layers.0.mlp",)},
    "--include": {"include": ("*.txt",)},
    "--output-shard-size": {"shard_size": 1_000_000_000},
    "--tensor-type": {"overrides": Overrides(tensor_types=(("ffn", "q8_0"),))},
    "--pure": {"overrides": Overrides(pure=True)},
    "--fallback": {"overrides": Overrides(fallback="best")},
    "--split-max-size": {"split_max_size": 1_000_000_000},
    "--export-ollama": {"modelfile": True},
}
GRIDS = {"--group-size", "--sym, --asym", "--ignore", "--include", "--output-shard-size"}
GGUF = {"--tensor-type", "--pure", "--fallback", "--split-max-size", "--export-ollama"}
TAKES = {
    "gguf": GGUF,
    "gptq": GRIDS,
    "awq": GRIDS,
    "compressed-tensors": GRIDS | {"--kv-cache"},
    "bitsandbytes": GRIDS | {"--double-quant", "--compute-dtype"},
    "mlx": GRIDS,
    "ctranslate2": {"--include"},
    "safetensors": {"--include", "--output-shard-size"},
}


@pytest.mark.parametrize("option", GIVEN)
@pytest.mark.parametrize("name", FORMATS)
def test_only_what_a_format_takes_is_not_refused(name: str, option: str) -> None:
    chosen = dict(GIVEN[option])
    whole = {key: chosen.pop(key) for key in ("overrides", "split_max_size", "modelfile") if key in chosen}
    if name == "safetensors":
        chosen.pop("method", None)
    method = MethodOptions(**{"method": "rtn" if name != "safetensors" else None, **chosen})
    assert refused(name, Options(method=method, **whole)) == ("" if option in TAKES[name] else option)


def refused(name: str, options: Options) -> object:
    """The options that are named as another format's; "" where none is, whatever else may be wrong."""
    try:
        plan(str(demo_model()), name, levels=[FORMATS[name].example], options=options)
    except UsageError as error:
        return error.found if error.what == f"options of other formats were given for {name}" else ""
    return ""


def test_all_of_them_are_named_at_once() -> None:
    method = MethodOptions(method="rtn", group_size=32, double_quant=True, shard_size=1_000_000_000)
    with pytest.raises(UsageError) as refusal:
        plan(str(demo_model()), "gguf", levels=["Q4_0"], options=Options(method=method))
    assert refusal.value.found == "--group-size, --double-quant, --output-shard-size"
