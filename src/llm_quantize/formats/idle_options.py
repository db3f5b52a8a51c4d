"""Options that a format has no use for: refused by their names, never ignored."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from llm_quantize.errors import UsageError

if TYPE_CHECKING:
    from llm_quantize.options import Options

OF_DIRECTORIES = frozenset({"--include", "--output-shard-size"})
OF_GRIDS = frozenset({"--transform", "--group-size", "--sym, --asym", "--ignore"})
OF_GGUF = frozenset(
    {
        *("--output-type", "--embedding-type", "--tensor-type", "--pure", "--fallback"),
        *("--split-max-size", "--export-ollama"),
    }
)
"""Options by the formats that have a use for them."""


def refuse_idle(format: str, options: Options, takes: Collection[str], remedy: str) -> None:
    """Raise UsageError for what of ``options`` was given and is not among ``takes``, by the names on the command line.
    What every format takes is not looked at."""
    method, overrides = options.method, options.overrides
    given = {
        "--method": method.method is not None and method.method_of(format).reads_text,
        "--transform": method.transform_of(format).passes > 0,
        "--group-size": method.group_size is not None,
        "--sym, --asym": method.symmetric is not None,
        "--double-quant": method.double_quant is not None,
        "--compute-dtype": method.compute_dtype is not None,
        "--kv-cache": method.kv_cache is not None,
        "--ignore": bool(method.ignore),
        "--include": bool(method.include),
        "--output-shard-size": method.shard_size != type(method).shard_size,
        "--recipe": overrides.recipe is not None,
        "--output-type": overrides.output_type is not None,
        "--embedding-type": overrides.embedding_type is not None,
        "--tensor-type": bool(overrides.tensor_types),
        "--pure": overrides.pure,
        "--fallback": overrides.fallback != type(overrides).fallback,
        "--split-max-size": options.split_max_size is not None,
        "--export-ollama": options.modelfile,
    }
    named = [option for option, is_given in given.items() if is_given and option not in takes]
    if named:
        raise UsageError(f"options of other formats were given for {format}", found=", ".join(named), remedy=remedy)
