"""The `quantkit` command: its subcommands, and the edge where errors become messages."""

import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quantkit import __version__
from quantkit.cli import console
from quantkit.cli.bench import bench
from quantkit.cli.chat import chat
from quantkit.cli.compare import compare
from quantkit.cli.demo import demo
from quantkit.cli.diff import diff
from quantkit.cli.eval import eval as eval_
from quantkit.cli.expand import Command, expanded, option_names, with_flags
from quantkit.cli.generate import generate
from quantkit.cli.inspect import inspect
from quantkit.cli.plan import plan
from quantkit.cli.profile import profile
from quantkit.cli.quantize import quantize
from quantkit.cli.report import report
from quantkit.cli.serve import serve
from quantkit.cli.traces import traces
from quantkit.cli.upload import upload
from quantkit.cli.verify import verify
from quantkit.errors import CacheWarning, QuantkitError

_USAGE_ERROR: Any = typer.BadParameter.__bases__[0]  # click's UsageError, wherever typer keeps it


class _Commands(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options before the command; a bad one becomes one line."""
        if not args:  # shows the help
            return list(super().parse_args(ctx, args))
        try:
            return list(super().parse_args(ctx, args))
        except _USAGE_ERROR as exc:
            console.error(f"{exc.format_message()} See: quantkit --help")
            raise typer.Exit(2) from exc

    def invoke(self, ctx: Any) -> Any:
        """Run a command; an error raised on purpose becomes one line and an exit code."""
        console.OPTIONS.update(option_names(self.commands))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", CacheWarning)
                warnings.showwarning = console.show_warning
                return super().invoke(ctx)
        except QuantkitError as exc:
            console.error(with_flags(str(exc), console.OPTIONS))
            raise typer.Exit(exc.exit_code) from exc
        except _USAGE_ERROR as exc:
            command = getattr(exc.ctx, "command_path", "quantkit")
            console.error(f"{exc.format_message()} See: {command} --help")
            raise typer.Exit(2) from exc
        except BrokenPipeError as exc:  # the reader, such as `head`, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from exc
        except OSError as exc:
            console.error(f"{exc.filename or 'the disk'}: {exc.strerror or exc}.")
            raise typer.Exit(2) from exc
        except KeyboardInterrupt as exc:
            console.error("interrupted. Run the same command again to resume.")
            raise typer.Exit(130) from exc


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Mixed-precision MLX quants of gpt-oss, and of any model mlx-lm runs.

    Quantize for a Mac with 16 GB, check the repo, and ask it:

    `quantkit quantize openai/gpt-oss-20b --budget mac:16GB -o gpt-oss-20b-16GB`

    `quantkit verify gpt-oss-20b-16GB`

    `quantkit generate gpt-oss-20b-16GB --prompt "Why is the sky blue?"`
    """,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version)
    ] = False,
) -> None:
    pass


COMMANDS = (
    *(inspect, profile, plan, diff, quantize, report, verify, compare, eval_, bench, upload),
    traces,
)
for command in (*COMMANDS, generate, chat, serve, demo):
    app.command(cls=Command)(expanded(command))


def main() -> None:
    """Run the `quantkit` script."""
    for stream in (sys.stdout, sys.stderr):  # file names may not be text
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
