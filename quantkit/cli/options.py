"""Arguments and options that several commands share."""

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.storage.paths import user_path

_NOT_REPEATED = ("force", "json")

Src = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A checkpoint: a local folder, a Hub id such as openai/gpt-oss-20b, or a small "
        "model to try things on: demo (a gpt-oss) or demo-llama.",
    ),
]
Repo = Annotated[
    Path, typer.Argument(metavar="OUT", parser=user_path, help="A repo that quantkit wrote.")
]
Record = Annotated[
    bool,
    typer.Option("--record", help="Put the figures into OUT's quantkit.json and model card."),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub id. Default: its main branch.")
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="A shipped recipe (mxfp4-q8, mxfp4-q4, moringlabs-3.6bit, optiq-style-4-8, "
        "uniform-4, uniform-3), or a .toml file of your own.",
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        "-p",
        metavar="FILE",
        parser=user_path,
        help="A plan that `quantkit plan -o` saved.",
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        help="How large it may be: 4.25bpw, 12GB, 48GiB, mac:64GB, mac:this, like:RECIPE, "
        "like:FOLDER, or lossless. Exact, everything stored counted.",
    ),
]
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="PROFILE",
        help="What every weight loses in every tier: a folder that `quantkit profile` wrote, or "
        "a Hub id (user/name).",
    ),
]
Pins = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="PATTERN=TIER",
        help="Give weights a tier, such as lm_head=q6g64 or 'experts.*=native': a role, or a shell "
        "pattern on the end of the path. Several may be given; the first that matches decides.",
    ),
]
Ties = Annotated[
    list[str] | None,
    typer.Option(
        "--tie", metavar="PATTERN", help="Weights of a layer that match share a tier: 'experts.*'."
    ),
]
Tiers = Annotated[
    str | None,
    typer.Option(help="Tiers that may be chosen beside the native one. Default: the profile's."),
]
MinTier = Annotated[
    str | None, typer.Option(help="No tier with fewer bits per weight than this one, as q3g64.")
]
Routers = Annotated[
    bool, typer.Option("--routers", help="Routers may be quantized, too (they stay as they are).")
]
ActiveBytes = Annotated[
    str | None,
    typer.Option(
        help="At most this much read per generated token, such as 2.1GB (KV cache aside)."
    ),
]
Speed = Annotated[
    str | None,
    typer.Option(help="The same as a speed at a memory bandwidth, such as 60tok/s@400GB/s."),
]
Context = Annotated[
    str, typer.Option(help="With mac: the tokens of context that must fit beside the weights.")
]
Reserve = Annotated[str, typer.Option(help="With mac: memory left for activations and all else.")]
CalibrationName = Annotated[
    str,
    typer.Option(
        "--calibration",
        help="Text to measure on: a Hub data set, a .jsonl, .txt or .parquet file, or the small "
        "mix that ships with quantkit.",
    ),
]
Tokens = Annotated[int, typer.Option(help="How many tokens of it.")]
RoundingName = Annotated[
    str | None,
    typer.Option(
        "--rounding",
        help="How numbers are chosen inside a tier: rtn (to nearest, mlx's own), search, or gptq. "
        "Default: gptq with --budget, rtn with --recipe, the plan's own with --plan.",
    ),
]
Refine = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=0,
        help="Measure the plan, correct the predictions of each role by what was found, and solve "
        "anew, N times; the best that was measured wins. Runs the model a layer at a time.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Float type of unquantized tensors, scales and biases: bfloat16, float16 or float32. "
        "Default: the one that config.json states, else that of most values.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let a tokenizer that comes with Python code of its own run that code (off).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def command_line(ctx: typer.Context) -> str:
    """What was typed, for others to repeat: files without the way to them, the output as OUT."""
    words = ["quantkit", str(ctx.info_name)]
    for option in ctx.command.params:
        given = ctx.get_parameter_source(str(option.name))
        if given is None or given.name != "COMMANDLINE" or option.name in _NOT_REPEATED:
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
    named = os.sep in text or text.startswith(("~", "."))
    path = user_path(text)
    return path.resolve().name if named and path.exists() else text
