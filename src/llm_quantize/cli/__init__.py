"""The command line: a lazy group; each command parses, calls one library function, and renders.

Nothing heavy is imported until a command runs, so ``--help`` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import click

from llm_quantize import __version__
from llm_quantize.cli import streams
from llm_quantize.errors import LlmQuantizeError, ResourceError, StoppedError, printable

COMMANDS = {
    "info": "Show what a model is: architecture, parameters, tensors, tokenizer, memory.",
    "plan": "Show the types and the exact size of the file, before any work.",
    "quantize": "Quantize a model to one or more levels in one read of the source.",
    "analyze": "Calibrate, and measure what an artifact lost.",
    "recommend": "Say which level to take for a machine, and why.",
    "compare": "Measure variants of a model side by side, and write a page that shows it.",
    "verify": "Check an artifact against its manifest, its plan and its source.",
    "run": "Generate text with an artifact in its real runtime.",
    "demo": "Quantize the built-in model, run every level, and measure what was lost.",
}


class LazyGroup(click.Group):
    """A group whose commands live in modules of their own: ``llm_quantize.cli.PREFIXNAME:command``.

    ``table``: name to one line of help, in the order in which they are listed.
    """

    def __init__(self, *arguments: Any, table: Mapping[str, str], prefix: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.table, self.prefix = table, prefix

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        command: click.Command = import_module(f"llm_quantize.cli.{self.prefix}{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.table.items()))


@click.group(
    cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option("--json", "as_json", is_flag=True, help="Print results as JSON, progress as JSON lines on stderr.")
@click.option("-v", "--verbose", count=True, help="Say more: every tensor of a plan or a verification.")
@click.option("-s", "--quiet", is_flag=True, help="Print results and warnings only: no progress, no notes.")
@click.version_option(__version__, prog_name="llm-quantize")
@click.pass_context
def group(ctx: click.Context, as_json: bool, verbose: int, quiet: bool) -> None:
    """Turn any Hugging Face checkpoint into the best quantized artifact for your runtime.

    MODEL is a local directory, a GGUF file, a hub id such as Qwen/Qwen3-0.6B, or builtin:demo-llama, the small model
    that comes with this program. Start with: llm-quantize demo
    """
    ctx.obj = {"json": as_json, "verbose": verbose, "quiet": quiet}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code (docs/reference/exit-codes.md)."""
    streams.install()
    # numpy's BLAS is never used here, and its threads would each take address space from a limited process.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    try:
        return _dispatch(words, as_json)
    except ResourceError as error:  # standard output failed, under a command or under the report of another error
        print(f"llm-quantize: {_printable(error)}", file=sys.stderr)
        return error.exit_code


def _dispatch(words: list[str], as_json: bool) -> int:
    try:
        result: Any = group.main(args=words, prog_name="llm-quantize", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except LlmQuantizeError as error:
        _show(error, as_json)
        return error.exit_code
    except click.ClickException as error:
        if as_json:
            _print_json({"error": "usage", "exit_code": 2, "what": error.format_message()})
        else:
            error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        _show(StoppedError("stopped", remedy="run the same command again"), as_json)
        return StoppedError.exit_code
    except MemoryError:
        _show(ResourceError("out of memory", remedy="lower --threads or --max-ram, or raise the limit"), as_json)
        return ResourceError.exit_code


def _show(error: LlmQuantizeError, as_json: bool) -> None:
    if as_json and not streams.reader_gone():
        _print_json(error.to_dict())
    else:
        print(f"llm-quantize: {_printable(error)}", file=sys.stderr)


def _printable(error: LlmQuantizeError) -> str:
    """The lines of a message without control characters; a sentence may quote what a file says."""
    return "\n".join(printable(line, 4000) for line in str(error).split("\n"))


def _print_json(value: Any) -> None:
    print(streams.json_text(value), flush=True)
