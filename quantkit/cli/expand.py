"""Options declared once: a command takes dataclasses of options, typer sees every single one."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from quantkit.units import plural

ESSENTIAL = ("Arguments", "Options", "Input", "Budget", "Output", "Text", "Sampling", "Address")
_HELP_ALL = "help_all"
_FIELD = re.compile(r"`([a-z_]+)`")
_FLAGS = {"tuning_steps": "--tune", "pins": "--pin", "ties": "--tie", "shard_bytes": "--shard-size"}


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with each dataclass parameter replaced by the fields of the dataclass."""
    hints = get_type_hints(command, include_extras=True)
    hints.pop("return", None)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = list(_parameters(command, hints, groups))
    parameters += _help_all(parameters)

    def run(**values: Any) -> None:
        values.pop(_HELP_ALL, None)
        given = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return run


def _parameters(
    command: Callable[..., None], hints: Mapping[str, Any], groups: Mapping[str, Any]
) -> list[Parameter]:
    parameters: list[Parameter] = []
    for parameter in signature(command).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        types = get_type_hints(group, include_extras=True)
        for field in fields(group):
            default = Parameter.empty if field.default is MISSING else field.default
            kind = Parameter.KEYWORD_ONLY
            parameters.append(
                Parameter(field.name, kind, default=default, annotation=types[field.name])
            )
    # Typer shows options in this order; a required one may follow one with a default.
    return [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters]


class Command(TyperCommand):
    """A command whose `--help` shows the essential options, and `--help-all` all of them."""

    def _advanced(self) -> list[Any]:
        return [option for option in self.params if _is_advanced(option)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the essential options."""
        advanced = self._advanced()
        for option in advanced:
            option.hidden = True
        try:
            super().format_help(ctx, formatter)
        finally:
            for option in advanced:
                option.hidden = False

    def print_all(self, ctx: Any) -> None:
        """Print all options."""
        super().format_help(ctx, ctx.make_formatter())


def _is_advanced(option: Any) -> bool:
    return getattr(option, "rich_help_panel", None) not in (None, *ESSENTIAL)


def _print_all(ctx: typer.Context, asked: bool) -> None:
    if asked and isinstance(ctx.command, Command):
        ctx.command.print_all(ctx)
        ctx.exit()


def _help_all(parameters: Sequence[Parameter]) -> Iterator[Parameter]:
    """Yield the parameter of `--help-all`, which is hidden if no option is advanced."""
    options = [option for p in parameters for option in get_args(p.annotation)]
    count = sum(_is_advanced(option) for option in options if isinstance(option, OptionInfo))
    option = typer.Option(
        "--help-all",
        is_eager=True,
        callback=_print_all,
        hidden=not count,
        help=f"Show {plural(count, 'more option')}.",
    )
    annotation = Annotated[bool, option]
    yield Parameter(_HELP_ALL, Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


def with_flags(message: str, names: Mapping[str, str]) -> str:
    """Return a message of the library with its fields, in backticks, as command-line options.

    `names` maps parameters to options, such as `sequence_length` to `--sequence-length`.
    """

    def flag(match: re.Match[str]) -> str:
        return _FLAGS.get(match[1]) or names.get(match[1]) or match[0]

    return _FIELD.sub(flag, message)


def option_names(commands: Mapping[str, Any]) -> dict[str, str]:
    """Return parameter -> option of all commands."""
    names = {}
    for command in commands.values():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                names[str(parameter.name)] = str(parameter.opts[0])
    return names
