"""The command line of a run, as the model card states it."""

import os
import shlex
from typing import Any

import typer

from quantkit.storage.paths import user_path

_NOT_REPEATED = ("force", "json")


def command_line(ctx: typer.Context) -> str:
    """Return the command line for others to repeat: paths without folders, the output as OUT."""
    words = ["quantkit", str(ctx.info_name)]
    for option in ctx.command.params:
        origin = ctx.get_parameter_source(str(option.name))
        if origin is None or origin.name != "COMMANDLINE" or option.name in _NOT_REPEATED:
            continue
        value: Any = ctx.params[str(option.name)]
        for one in value if isinstance(value, list | tuple) else [value]:
            text = "OUT" if option.name == "output" else _without_folders(str(one))
            if option.param_type_name == "argument":
                words.append(text)
            else:
                words += [option.opts[0]] if one is True else [option.opts[0], text]
    return shlex.join(words)


def _without_folders(text: str) -> str:
    if text.startswith("like:"):
        return f"like:{_without_folders(text.removeprefix('like:'))}"
    is_path = os.sep in text or text.startswith(("~", "."))
    path = user_path(text)
    return path.resolve().name if is_path and path.exists() else text
