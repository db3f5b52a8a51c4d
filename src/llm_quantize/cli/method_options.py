"""Options that say how codes are chosen, and on which grid where the format is a directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import click

from llm_quantize.cli.sizes import Size

Function = TypeVar("Function", bound=Any)


def method_options(function: Function) -> Function:
    """Methods, transforms, and the grids of directories."""
    options = [
        click.option("--method", type=click.Choice(["rtn", "gptq"]),
                     help="rtn rounds to nearest; gptq feeds errors back and needs text. [default: rtn for gguf, gptq "
                     "for the other formats]"),
        click.option("--transform", type=click.Choice(["none", "awq", "smoothquant"]),
                     help="awq rescales channels first; smoothquant does where activations are rounded too (W8A8, "
                     "FP8, ...). [default: awq for awq, none elsewhere]"),
        click.option("--inputs", type=click.Choice(["sequential", "block", "source"]), default="sequential",
                     show_default=True, help="What a matrix is calibrated on: the model as quantized up to it, up to "
                     "its block, or not at all (one pass over the source)."),
        click.option("--correction", type=click.FloatRange(0, 1), metavar="X",
                     help="How far a layer makes up for the errors of those before it. [default: as text that is held "
                     "back tells, input by input]"),
        click.option("--refine", "refinement", type=click.IntRange(0, 100_000), metavar="N", default=0,
                     show_default=True, help="After error feedback, N gradient steps on the output of each block move "
                     "codes and scales; kept where text that is held back loses less. For 2 and 3 bits; takes much "
                     "longer."),
        click.option("--group-size", "--blocksize", "group_size", type=int, metavar="N",
                     help="Weights that share a scale, -1: a whole row; not for gguf. [default: the largest of "
                     "128, 64, 32 that every matrix allows; of mlx 64, 32; of bitsandbytes 64]"),
        click.option("--sym/--asym", "symmetric", default=None,
                     help="Symmetric grids, or zero points; not for gguf. [default: as the format and level say]"),
        click.option("--zero-point/--no-zero-point", "zero_point", default=None, help="The same in AWQ's words."),
        click.option("--double-quant/--no-double-quant", default=None,
                     help="Scales in 8 bits; bitsandbytes NF4 and FP4 only. [default: no]"),
        click.option("--compute-dtype", type=click.Choice(["bfloat16", "float16", "float32"]),
                     help="What bitsandbytes computes in. [default: the type of the weights]"),
        click.option("--kv-cache", type=click.Choice(["fp8"]),
                     help="Calibrated scales of keys and values, which runtimes then keep in 8 bits; "
                     "compressed-tensors only. [default: none]"),
        click.option("--ignore", multiple=True, metavar="REGEX",
                     help="Modules that stay as they are; repeatable; not for gguf."),
        click.option("--output-shard-size", "shard_size", type=Size(), default="5G", show_default=True,
                     help="Largest file of a directory; not for gguf."),
        click.option("--include", multiple=True, metavar="GLOB",
                     help="Files of the model to copy, beside those that runtimes read; repeatable; not for gguf."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def build_method(arguments: Mapping[str, Any]) -> Any:
    """options.MethodOptions from the parsed command line. Raises UsageError for a contradiction."""
    from llm_quantize.errors import UsageError
    from llm_quantize.methods.gptq_options import GptqOptions
    from llm_quantize.options import MethodOptions

    symmetric, zero_point = arguments["symmetric"], arguments["zero_point"]
    if symmetric is not None and symmetric is zero_point:
        pair = "--sym and --zero-point" if symmetric else "--asym and --no-zero-point"
        raise UsageError(f"{pair} contradict each other", remedy="leave one of them out")
    if symmetric is None and zero_point is not None:
        symmetric = not zero_point
    return MethodOptions(
        method=arguments["method"],
        transform=arguments["transform"],
        inputs=arguments["inputs"],
        gptq=GptqOptions(correction=arguments["correction"]),
        refinement=arguments["refinement"],
        group_size=arguments["group_size"],
        symmetric=symmetric,
        double_quant=arguments["double_quant"],
        compute_dtype=arguments["compute_dtype"],
        kv_cache=arguments["kv_cache"],
        ignore=arguments["ignore"],
        shard_size=arguments["shard_size"],
        include=arguments["include"],
    )
