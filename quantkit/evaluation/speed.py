"""Measure generation speed and memory of a repo with stock mlx-lm."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quantkit.artifacts.report import Report
from quantkit.artifacts.speed import Run, Speed
from quantkit.backend import mx, on_cpu
from quantkit.checkpoint.model_config import ModelConfig
from quantkit.checkpoint.provenance import versions
from quantkit.checkpoint.stock import load_stock
from quantkit.errors import InputError, OutputError
from quantkit.progress import Stage
from quantkit.storage.json_files import load_json
from quantkit.units import gb

_WARM_UP = 16  # tokens
_LONGEST = 1 << 20  # tokens, if the config does not say


def measure(
    repo: Path,
    report: Report,
    contexts: Sequence[int],
    generated: int,
    progress: Stage,
    *,
    trust_remote_code: bool = False,
) -> Speed:
    """Generate `generated` tokens after prompts of random tokens, without early stops.

    Loads the repo with stock mlx-lm. Raises InputError for contexts that the model does not
    support, OutputError for a repo that mlx-lm does not load.
    """
    config = ModelConfig.parse(load_json(repo / "config.json", OutputError))
    _require_possible(report, config, contexts, generated)
    import mlx_lm

    model, tokenizer = load_stock(str(repo), trust_remote_code=trust_remote_code)
    tokenizer._eos_token_ids = set()  # as in mlx-lm's benchmark: random prompts end early
    vocabulary = config.vocabulary or len(tokenizer.get_vocab())
    random = np.random.default_rng(0)

    def run(context: int, count: int) -> Run:
        prompt = random.integers(0, vocabulary, context).tolist()
        mx.reset_peak_memory()
        for step in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=count):
            progress(1, f"{context} tokens of prompt")
            last = step
        return Run(
            context,
            count,
            float(last.prompt_tps),
            float(last.generation_tps),
            int(mx.get_peak_memory()),
            _predicted(report, config, context + count),
        )

    run(_WARM_UP, 1)
    return Speed(machine(), versions(), tuple(run(context, generated) for context in contexts))


def _require_possible(
    report: Report, config: ModelConfig, contexts: Sequence[int], generated: int
) -> None:
    longest = config.context or _LONGEST
    for context in contexts:
        if context < 1 or generated < 1:
            raise InputError("`context` and `tokens` must be 1 or more.")
        if context + generated > longest:
            raise InputError(
                f"`context`: {context} + {generated} tokens exceed the model's context, {longest}."
            )
        needed = _predicted(report, config, context + generated) or 0
        if needed > _memory():
            raise InputError(
                f"a prompt of {context} tokens needs {gb(needed)} with the weights, this machine "
                f"has {gb(_memory())}. Give a smaller `context`."
            )


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine() -> str:
    """Describe the machine: its processor and memory."""
    memory = _memory() / 2**30
    if not on_cpu():
        name = str(mx.device_info().get("device_name", "a GPU"))
        return f"{name}, {memory:.0f} GB of memory"
    return f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GB of memory"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()


def _predicted(report: Report, config: ModelConfig, tokens: int) -> int | None:
    try:
        return report.total_bytes + config.kv_cache_bytes(tokens)
    except InputError:
        return None
