"""Arguments and options of the commands, each declared once, in groups that commands share."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.storage.paths import user_path

if TYPE_CHECKING:
    from quantkit.calibration.calibration_set import CalibrationSpec
    from quantkit.checkpoint.source import Source
    from quantkit.jobs.planning import PlanRequest

INPUT, BUDGET, CONSTRAINTS = "Input", "Budget", "Constraints"
QUANTIZER, TEXT, OUTPUT = "Quantizer", "Calibration text", "Output"
RUNTIME = "Runtime"


def named_path(text: str | Path) -> Path:
    """Return a path with ~ expanded. Refuses the empty string, which would mean this folder.

    A default, which newer versions of typer parse as well, is a path already.
    """
    if not str(text).strip():
        raise typer.BadParameter("is empty. Name a file or folder.")
    return user_path(str(text))


Src = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="Checkpoint: a local folder, a Hub id such as openai/gpt-oss-20b, or a small model "
        "for a first try, demo (a gpt-oss) or demo-llama.",
    ),
]
Repo = Annotated[Path, typer.Argument(metavar="OUT", parser=named_path, help="Repo by quantkit.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="OUT",
        parser=lambda name: str(named_path(name)),
        help="Folder or Hub id that stock mlx-lm loads.",
    ),
]
Record = Annotated[
    bool,
    typer.Option(
        "--record",
        rich_help_panel=OUTPUT,
        help="Add the measurements to OUT's quantkit.json and model card.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print JSON instead of tables.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        rich_help_panel=RUNTIME,
        help="Let the tokenizer run Python code of its repo.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(rich_help_panel=INPUT, help="Branch, tag or commit of a Hub id."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        rich_help_panel=RUNTIME,
        help="Float type of unquantized tensors, scales and biases: bfloat16, float16 or float32. "
        "Default: the type in config.json, else the type of most values.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        rich_help_panel=RUNTIME,
        help="Memory for intermediate results, beside the weights of a layer. Default: 4GB.",
    ),
]
Text = Annotated[
    str,
    typer.Option(
        "--calibration",
        rich_help_panel=TEXT,
        help="Hub data set, a .jsonl, .txt or .parquet file, or the shipped mix (default).",
    ),
]
Tokens = Annotated[
    int, typer.Option(rich_help_panel=TEXT, help="Tokens of text to measure the KL costs on.")
]
SequenceLength = Annotated[int, typer.Option(rich_help_panel=TEXT, help="Tokens per sequence.")]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="PNG",
        parser=named_path,
        rich_help_panel=OUTPUT,
        help="Save a plot (needs the extra `plot`).",
    ),
]
Experts = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        rich_help_panel=CONSTRAINTS,
        help="Remove experts: keep the best N in every layer, or `auto`, as many as is best under "
        "the budget.",
    ),
]
Prune = Annotated[
    bool, typer.Option("--prune", rich_help_panel=CONSTRAINTS, help="The same as --experts auto.")
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        rich_help_panel=OUTPUT,
        help="Replace existing output, or an unfinished run with other inputs.",
    ),
]


@dataclass(frozen=True)
class SourceOptions:
    """How to open a checkpoint."""

    revision: Revision = None
    dtype: Dtype = None
    trust_remote_code: TrustRemoteCode = False

    def open(self, name: str) -> "Source":
        """Open the checkpoint called `name`. Raises InputError."""
        from quantkit.jobs.open_model import open_model

        return open_model(
            name, self.revision, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )


@dataclass(frozen=True)
class TierOptions:
    """How to choose tiers."""

    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            rich_help_panel=BUDGET,
            help="Size limit: 4.25bpw, 12GB, 48GiB, mac:64GB, mac:this, like:RECIPE, like:FOLDER "
            "or lossless. Exact, counting every stored byte.",
        ),
    ] = None
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            metavar="PROFILE",
            rich_help_panel=BUDGET,
            help="Sensitivity profile: a folder from `quantkit profile`, or a Hub id (user/name).",
        ),
    ] = None
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            rich_help_panel=BUDGET,
            help="Shipped recipe (mxfp4-q8, mxfp4-q4, moringlabs-3.6bit, optiq-style-4-8, "
            "uniform-4, uniform-3), or a .toml file.",
        ),
    ] = None
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            "-p",
            metavar="FILE",
            parser=named_path,
            rich_help_panel=BUDGET,
            help="Plan saved by `quantkit plan -o`.",
        ),
    ] = None
    pin: Annotated[
        list[str] | None,
        typer.Option(
            "--pin",
            metavar="PATTERN=TIER",
            rich_help_panel=CONSTRAINTS,
            help="Fix the tier of weights, such as lm_head=q6g64 or 'experts.*=native': a role, or "
            "a shell pattern on the end of the path. Repeatable; the first match decides.",
        ),
    ] = None
    tie: Annotated[
        list[str] | None,
        typer.Option(
            "--tie",
            metavar="PATTERN",
            rich_help_panel=CONSTRAINTS,
            help="Give matching weights of a layer the same tier: 'experts.*'.",
        ),
    ] = None
    tiers: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=CONSTRAINTS,
            help="Tiers to choose from, beside the native one. Default: those in the profile.",
        ),
    ] = None
    min_tier: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=CONSTRAINTS,
            help="Smallest tier to use, by bits per weight, such as q3g64.",
        ),
    ] = None
    routers: Annotated[
        bool,
        typer.Option("--routers", rich_help_panel=CONSTRAINTS, help="Allow quantized routers."),
    ] = False
    active_bytes: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=CONSTRAINTS,
            help="Limit on the bytes read per generated token, KV cache aside, such as 2.1GB.",
        ),
    ] = None
    speed: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=CONSTRAINTS,
            help="The same limit as a speed at a memory bandwidth, such as 60tok/s@400GB/s.",
        ),
    ] = None
    context: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=CONSTRAINTS,
            help="Tokens of KV cache that fit beside the weights (mac: budgets, memory report). "
            "Default: 8k.",
        ),
    ] = None
    reserve: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=CONSTRAINTS,
            help="Memory for activations and the rest of the process. Default: 1.5GB.",
        ),
    ] = None
    quantizer: Annotated[
        str | None,
        typer.Option(
            "--quantizer",
            rich_help_panel=QUANTIZER,
            help="How the integers of a tier are chosen: rtn (round to nearest), search or gptq. "
            "Default: gptq with --budget, rtn with --recipe, the plan's own with --plan.",
        ),
    ] = None
    refine: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            rich_help_panel=QUANTIZER,
            help="Measure the plan on 2,048 tokens of the shipped text, correct the predictions "
            "and solve again, N times.",
        ),
    ] = 0
    experts: Experts = None
    prune: Prune = False

    def request(self) -> "PlanRequest":
        """Return the request that these options state. Raises InputError."""
        from quantkit.jobs.planning import PlanRequest

        return PlanRequest(
            budget=self.budget,
            recipe=self.recipe,
            plan=self.plan,
            profile=self.profile,
            pins=tuple(self.pin or ()),
            ties=tuple(self.tie or ()),
            tiers=self.tiers,
            min_tier=self.min_tier,
            routers=self.routers,
            active_bytes=self.active_bytes,
            speed=self.speed,
            context=self.context,
            reserve=self.reserve,
            quantizer=self.quantizer,
            refine=self.refine,
            experts=requested_experts(self.experts, self.prune),
        )


@dataclass(frozen=True)
class TextOptions:
    """The text to measure on."""

    calibration: Text = "default"
    tokens: Tokens = 1536
    sequence_length: SequenceLength = 256
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**64 - 1, rich_help_panel=TEXT, help="Seed of the order of the text."
        ),
    ] = 0

    def spec(self) -> "CalibrationSpec":
        """Return the text that these options name."""
        from quantkit.calibration.calibration_set import CalibrationSpec

        return CalibrationSpec(self.calibration, self.tokens, self.sequence_length, self.seed)


def requested_experts(experts: str | None, prune: bool) -> str | None:
    """Return the request of `--experts` and `--prune`. Raises InputError if they disagree."""
    from quantkit.errors import InputError

    if prune and experts not in (None, "auto"):
        raise InputError("`prune` stands for `experts` auto; leave out one of them.")
    return "auto" if prune else experts


def memory_bytes(memory: str | None) -> int | None:
    """Return the bytes of `--memory`, None if it is not given. Raises InputError."""
    from quantkit.errors import in_field
    from quantkit.units import parse_bytes

    with in_field("memory"):
        return None if memory is None else parse_bytes(memory)
