"""Traces: the model's own answers to many prompts, as text to calibrate or to evaluate on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantkit.calibration import calibration_set
from quantkit.errors import InputError, OutputError, first_line
from quantkit.generation.chat_model import ChatModel, SamplingParameters
from quantkit.generation.harmony import FINAL, Delta, read_calls
from quantkit.progress import Progress
from quantkit.storage.hashing import digest
from quantkit.storage.json_files import whole_lines

_PROMPTS = Path(calibration_set.__file__).parent / "data" / "prompts.jsonl"
_TOGETHER = 8  # prompts that are answered at once
Row = dict[str, Any]
"""`messages` and, where the prompt has them, `tools`."""


@dataclass(frozen=True)
class TraceSettings:
    """The prompts, a JSON-lines file (None: the shipped ones), and how they are answered."""

    prompts: Path | None = None
    sampling: SamplingParameters = field(
        default_factory=lambda: SamplingParameters(max_tokens=2048, effort="low")
    )


@dataclass(frozen=True)
class TraceOutcome:
    """How many prompts were answered, and how many answers were cut off and left out."""

    answered: int
    truncated: int


def write_traces(
    repo: str,
    out: Path,
    settings: TraceSettings | None = None,
    *,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> TraceOutcome:
    """Answer prompts with a repo or a checkpoint that mlx-lm loads, and write the chats to `out`.

    A killed run resumes from `out`.partial. Raises InputError for prompts that cannot be read, and
    OutputError if `out` exists already or was begun with other inputs.
    """
    settings, progress = settings or TraceSettings(), progress or Progress()
    rows = _read_prompts(settings.prompts or _PROMPTS)
    _require_writable(out, force)
    partial = out.with_name(f"{out.name}.partial")
    key = {"key": digest([repo, rows, asdict(settings.sampling)])}
    lines = _begun(partial, key, force)
    chat_model = ChatModel(repo, trust_remote_code=trust_remote_code)
    stage = progress.stage("Answering", len(rows), "prompts")
    stage(len(lines), "resumed")
    for start in range(len(lines), len(rows), _TOGETHER):
        more = _answered(chat_model, rows[start : start + _TOGETHER], settings.sampling)
        with open(partial, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in more)
        lines += more
        stage(len(more), f"{len(lines)} of {len(rows)}")
    whole = [row for row in lines if row is not None]
    if not whole:
        partial.unlink()
        raise OutputError(
            f"{repo}: no answer ended within {settings.sampling.max_tokens} tokens. Raise "
            "`max_tokens`."
        )
    partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in whole), "utf-8")
    partial.replace(out)
    return TraceOutcome(len(whole), len(rows) - len(whole))


def _require_writable(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise OutputError(f"{out}: exists. Choose another file, or replace it with `force`.")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: its folder does not exist.")


def _read_prompts(path: Path) -> list[Row]:
    """Read prompts: a JSON object a line, with `messages`, or with a `prompt`."""
    rows: list[Row] = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"`prompts` {path}: cannot be read ({first_line(exc)}).") from exc
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as exc:
            raise InputError(f"`prompts` {path}, line {number}: not JSON.") from exc
        if isinstance(row, Mapping) and isinstance(row.get("prompt"), str):
            row = {**row, "messages": [{"role": "user", "content": row["prompt"]}]}
        messages = row.get("messages") if isinstance(row, Mapping) else None
        if not isinstance(messages, list) or not messages:
            raise InputError(f"`prompts` {path}, line {number}: has no prompt and no messages.")
        rows.append({key: row[key] for key in ("messages", "tools") if row.get(key)})
    if not rows:
        raise InputError(f"`prompts` {path}: is empty.")
    return rows


def _begun(partial: Path, key: Mapping[str, str], force: bool) -> list[Row | None]:
    """Return the rows of an interrupted run; otherwise begin a new file."""
    if partial.exists() and not force:
        first, *rows = whole_lines(partial) or [None]
        if first != key:
            raise OutputError(
                f"{partial}: was begun with another model, other prompts or another sampling. "
                "Remove it, or replace it with `force`."
            )
        return rows
    partial.write_text(json.dumps(key) + "\n", "utf-8")
    return []


def _answered(
    chat_model: ChatModel, rows: Sequence[Row], sampling: SamplingParameters
) -> list[Row | None]:
    """Return the chats of some prompts with their answers."""
    tools = [row.get("tools") for row in rows]
    answers = chat_model.answers([row["messages"] for row in rows], sampling, tools)
    return [_trace(row, deltas) for row, deltas in zip(rows, answers, strict=True)]


def _trace(row: Row, deltas: Sequence[Delta] | None) -> Row | None:
    """Return the chat with its answer; None for an answer that was cut off."""
    if deltas is None:
        return None
    answer = _message(deltas)
    return None if answer is None else {**row, "messages": [*row["messages"], answer]}


def _message(deltas: Sequence[Delta]) -> dict[str, Any] | None:
    """Return an assistant's message with its thinking and its tool call; None for an empty one."""
    said = "".join(d.text for d in deltas if d.channel == FINAL and d.recipient is None)
    thought = "".join(d.text for d in deltas if d.channel != FINAL and d.recipient is None)
    message: dict[str, Any] = {"role": "assistant", "content": said}
    if thought:
        message["thinking"] = thought
    if calls := _calls(deltas):
        message["tool_calls"] = calls
    return message if said or calls else None


def _calls(deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    """Return the calls of tools whose arguments are JSON."""
    calls: list[dict[str, Any]] = []
    for name, text in read_calls(deltas):
        try:
            function = {"name": name, "arguments": json.loads(text)}
        except ValueError:
            continue
        calls.append({"type": "function", "function": function})
    return calls
