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
from llm_quantize.cli.help import Context
from llm_quantize.cli.words import did_you_mean, explained, ours
from llm_quantize.errors import LlmQuantizeError, ResourceError, StoppedError, printable
from llm_quantize.reports.labels import LANGUAGES, labels
from llm_quantize.reports.wording import error_text, language_of, said, speaking

COMMANDS = {
    "info": "Show what a model is: architecture, parameters, tensors, tokenizer, memory.",
    "plan": "Show the types and the exact size of the file, before any work.",
    "quantize": "Quantize a model to one or more levels in one read of the source.",
    "convert": "Put a model into another format with the numbers that it has, and say what changed.",
    "analyze": "Calibrate, and measure what an artifact lost.",
    "recommend": "Say which level to take for a machine, and why.",
    "compare": "Measure variants of a model side by side, and write a page that shows it.",
    "verify": "Check an artifact against its manifest, its plan and its source.",
    "run": "Generate text with an artifact in its real runtime.",
    "push": "Put a finished artifact on the Hugging Face hub.",
    "demo": "Quantize the built-in model, run every level, and measure what was lost.",
}


class LazyGroup(click.Group):
    """A group whose commands live in modules of their own: ``llm_quantize.cli.PREFIXNAME:command``.

    ``table``: name to one line of help, in the order in which they are listed.
    """

    context_class = Context

    def __init__(self, *arguments: Any, table: Mapping[str, str], prefix: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.table, self.prefix = table, prefix

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        command: click.Command = import_module(f"llm_quantize.cli.{self.prefix}{cmd_name}").command
        command.context_class = Context
        if not isinstance(command, click.Group) and all(option.name != "lang" for option in command.params):
            command.params.append(_lang_option())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it; a command that there is not is answered with the nearest."""
        word = args[0]
        if (
            not word.startswith("-")
            and self.get_command(ctx, word) is None
            and self.get_command(ctx, ours(word)) is None
        ):
            raise click.UsageError(f"No such command {word!r}.{did_you_mean(word, self.table)}", ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.table.items()))


def _lang_option() -> click.Option:
    """``--lang`` before and after the name of a command; ``_language`` has read it before anything is parsed."""
    return click.Option(
        ["--lang"],
        type=click.Choice(LANGUAGES),
        expose_value=False,
        help="Language of what is said. [default: the locale's]",
    )


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "token_normalize_func": ours,
    },
)
@click.option("--json", "as_json", is_flag=True, help="Print results as JSON, progress as JSON lines on stderr.")
@click.option(
    "-v",
    "--verbose",
    count=True,
    help="Say more: every tensor of a plan or a verification, the whole list behind a warning.",
)
@click.option("-s", "--quiet", is_flag=True, help="Print results and errors only: no progress, no notes, no warnings.")
@click.version_option(__version__, prog_name="llm-quantize")
@click.pass_context
def group(ctx: click.Context, as_json: bool, verbose: int, quiet: bool) -> None:
    """Turn any Hugging Face checkpoint into the best quantized artifact for your runtime.

    MODEL is a local directory, a GGUF file, a hub id such as Qwen/Qwen3-0.6B, ollama:NAME from Ollama's store, or
    builtin:demo-llama, the small model that comes with this program. Start with: llm-quantize demo
    """
    ctx.obj = {"json": as_json, "verbose": verbose, "quiet": quiet}


group.params.insert(1, _lang_option())


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
    with speaking(_language(words)):
        try:
            return _dispatch(words, as_json)
        except ResourceError as error:  # standard output failed, under a command or under the report of another error
            print(f"llm-quantize: {_printable(error)}", file=sys.stderr)
            return error.exit_code


def _language(words: Sequence[str]) -> str:
    """The language that the command line names, else that of the locale; English where the terminal has not its
    characters."""
    before = words[: words.index("--")] if "--" in words else words
    named = [value for word, value in zip(before, [*before[1:], ""], strict=True) if word == "--lang"]
    named += [word.partition("=")[2] for word in before if word.startswith("--lang=")]
    known = [name for name in named[-1:] if name in LANGUAGES]  # click says what is wrong with another one
    language = known[0] if known else language_of(os.environ)
    return language if _sayable(language) else LANGUAGES[0]


def _sayable(language: str) -> bool:
    """Whether standard output and error have the characters of ``language``."""
    try:
        for stream in (sys.stdout, sys.stderr):
            labels(language)["layer"].encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _dispatch(words: list[str], as_json: bool) -> int:
    try:
        result: Any = group.main(args=words, prog_name="llm-quantize", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except LlmQuantizeError as error:
        _show(error, as_json)
        return error.exit_code
    except click.ClickException as error:
        told = explained(error)
        if as_json:
            what = "Missing command." if isinstance(told, click.exceptions.NoArgsIsHelpError) else told.format_message()
            _print_json({"error": "usage", "exit_code": 2, "what": what})
        else:
            _show_usage(told)
        return 2
    except (click.Abort, KeyboardInterrupt):
        _show(StoppedError("stopped", remedy="run the same command again"), as_json)
        return StoppedError.exit_code
    except MemoryError:
        _show(ResourceError("out of memory", remedy="lower --threads or --max-ram, or raise the limit"), as_json)
        return ResourceError.exit_code


def _show_usage(error: click.ClickException) -> None:
    """What click says of a mistake on the command line: the usage, where help is, and the mistake; or the help."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is not None:
        hint = said(f"Try '{context.command_path} --help' for help.")
        click.echo(f"{context.get_usage()}\n{hint}\n", err=True)
    click.echo(said(f"Error: {error.format_message()}"), err=True)


def _show(error: LlmQuantizeError, as_json: bool) -> None:
    if as_json and not streams.reader_gone():
        _print_json(error.to_dict())
    else:
        print(f"llm-quantize: {_printable(error)}", file=sys.stderr)


def _printable(error: LlmQuantizeError) -> str:
    """The lines of a message without control characters; a sentence may quote what a file says."""
    return "\n".join(printable(line, 4000) for line in error_text(error).split("\n"))


def _print_json(value: Any) -> None:
    print(streams.json_text(value), flush=True)
