"""Operations and bytes of each stage for gpt-oss, beside the peaks of GPUs and of this CPU.

    python evals/bench/count.py

Counted from the published shapes; a product and its sum are two operations. A stage takes at least
the longer of its operations at a GPU's peak and its bytes at the peak of its memory. The share of
the peak reached here is that of the stages that `full_width.py` timed on one core, whose peak is a
product of float32 matrices in this process. The table goes into README.md here.
"""

import re
import time
from dataclasses import dataclass

from _common import HERE, machine, save

from quantkit.backend import mx
from quantkit.sensitivity.entries import AFFINE_TIERS, ONE_BIT_TIERS

WIDTH, ATTENTION = 2880, 2 * 2880 * 4096 + 2 * 2880 * 512  # weights of q, o, k and v
VOCABULARY, CHOSEN = 201_088, 4  # experts of a token
PROFILED, TUNED = 4096, 1024  # tokens, by default; of one step of scale tuning
STACK = 3 * WIDTH * WIDTH  # weights of an expert
EXPERT_TIERS = len(AFFINE_TIERS) + len(ONE_BIT_TIERS)
DISK = 5e9  # bytes per second that a Mac's SSD reads, about
RUNS = 2.7  # of the model by gptq, its trials on a sample included
PRIORS = 16  # factored to choose one
PASSES = 20  # over the weights: 16 candidates of the scale search, feedback and descent
# cores x 128 lanes x 2 operations x clock, and memory bandwidth
GPUS = {"M2 Max": (38 * 256 * 1.398e9, 400e9), "M4 Max": (40 * 256 * 1.578e9, 546e9)}


@dataclass(frozen=True)
class Model:
    """Sizes of a gpt-oss, and the tokens from which gptq quantizes it by default."""

    name: str
    layers: int
    experts: int
    file_bytes: float
    tokens: int

    @property
    def active(self) -> int:
        """Weights that a token meets in the layers."""
        return self.layers * (ATTENTION + CHOSEN * STACK)

    @property
    def stacks(self) -> int:
        """Weights of all experts."""
        return self.layers * self.experts * STACK


MODELS = (
    Model("gpt-oss-20b", 24, 32, 13.8e9, 92_160),
    Model("gpt-oss-120b", 36, 128, 65.3e9, 119_808),
)


@dataclass(frozen=True)
class Stage:
    """Operations of a stage, the bytes that go through memory, and those read from disk."""

    name: str
    operations: float
    memory: float
    disk: float = 0.0


def run(model: Model, tokens: int) -> float:
    """Operations of one forward pass through the layers."""
    return 2.0 * model.active * tokens


def head(tokens: int) -> float:
    """Operations of the head."""
    return 2.0 * VOCABULARY * WIDTH * tokens


def stages(model: Model) -> list[Stage]:
    """What each stage of the main job computes."""
    values = 4 * model.stacks  # bytes of all experts in float32
    profile_run = run(model, PROFILED)
    at_experts = CHOSEN * model.layers * 2.0 * STACK
    hessian = 2.0 * model.tokens * CHOSEN * WIDTH**2  # of all experts of one stack
    pooled, sums = 2 * hessian, 3  # gate and up share one; down has two sums
    factors = model.layers * (3 * model.experts + 2 * PRIORS) * 4 / 3 * WIDTH**3
    return [
        Stage(
            "profile: forward, backward",
            3 * profile_run + 3 * head(PROFILED),
            3 * values,
            2 * model.file_bytes,
        ),
        Stage(
            f"profile: experts in {EXPERT_TIERS} tiers",
            EXPERT_TIERS * PROFILED * at_experts,
            2 * EXPERT_TIERS * values,
        ),
        Stage(
            f"gptq: runs on {model.tokens:,} tokens",
            RUNS * run(model, model.tokens),
            RUNS * values * 2,
            RUNS * model.file_bytes,
        ),
        Stage(
            "gptq: Hessians",
            model.layers * sums * pooled,
            model.layers * sums * 4 * model.tokens * CHOSEN * WIDTH,
        ),
        Stage("gptq: factors", factors, factors / WIDTH * 4),
        Stage("gptq: search, feedback, descent", 8.0 * model.stacks * WIDTH, PASSES * values),
        Stage(
            f"a step of tuning, {TUNED:,} tokens",
            4 * run(model, TUNED) + 4 * head(TUNED),
            4 * values,
            2 * model.file_bytes,
        ),
        Stage(
            f"compare, {16384:,} tokens",
            2 * run(model, 16384) + 2 * head(16384),
            2 * values,
            2 * model.file_bytes,
        ),
    ]


def peak_here() -> float:
    """Operations a second of a product of float32 matrices, the best of five."""
    a, b = mx.random.normal((WIDTH, WIDTH)), mx.random.normal((WIDTH, WIDTH))
    mx.eval(a, b)
    best = 0.0
    for _ in range(5):
        start = time.process_time()
        mx.eval(a @ b)
        best = max(best, 2 * WIDTH**3 / (time.process_time() - start))
    return best


def measured(label: str) -> float:
    """The seconds of a row of the table of full width."""
    text = (HERE / "README.md").read_text().partition("<!-- full-width -->")[2]
    (seconds,) = re.findall(rf"\| {re.escape(label)}[^|]*\| (\d+) s", text)[:1]
    return float(seconds)


def shares(peak: float) -> list[str]:
    """The share of this CPU's peak that the measured stages reach."""
    of_20b = MODELS[0]
    layers, lines = of_20b.layers, []
    for tokens in (16_384, 131_072):
        one = Model("", 1, of_20b.experts, 0, tokens)
        gptq = [stage for stage in stages(one) if stage.name.startswith("gptq")]
        operations = sum(stage.operations for stage in gptq)
        seconds = measured(f"20b, gptq of a layer, {tokens:,} tokens")
        lines.append((f"gptq of a layer of the 20b, {tokens:,} tokens", operations, seconds))
    profile = sum(s.operations for s in stages(of_20b)[:2]) - 3 * head(PROFILED)
    lines.append(
        ("profile of a layer of the 20b", profile / layers, measured("20b, profile of a layer"))
    )
    return [
        f"| {label} | {operations:.1e} | {seconds:.0f} s | {operations / seconds:.1e} | "
        f"{100 * operations / seconds / peak:.0f}% |"
        for label, operations, seconds in lines
    ]


def table() -> str:
    """Both tables."""
    lines = []
    for model in MODELS:
        for stage in stages(model):
            times = []
            for operations, bandwidth in GPUS.values():
                computed, moved = stage.operations / operations, stage.memory / bandwidth
                times.append(f"{max(computed, moved, stage.disk / DISK):,.0f} s")
            lines.append(
                f"| {model.name}, {stage.name} | {stage.operations:.1e} | {stage.memory:.1e} | "
                f"{stage.disk:.1e} | {' | '.join(times)} |"
            )
    peak = peak_here()
    peaks = ", ".join(
        f"{name} {operations / 1e12:.1f}e12 operations and {bandwidth / 1e9:.0f} GB a second"
        for name, (operations, bandwidth) in GPUS.items()
    )
    return "\n".join(
        [
            f"Peaks: {peaks}, {DISK / 1e9:.0f} GB a second from disk.",
            "",
            "| stage | operations | bytes, memory | bytes, disk | at least, M2 Max | M4 Max |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
            f"{machine()}; one core makes {peak:.1e} operations a second in a product of float32 "
            "matrices.",
            "",
            "| measured here | operations | time | a second | of the peak |",
            "|---|---|---|---|---|",
            *shares(peak),
        ]
    )


def main() -> None:
    """Make the table, and put it into README.md."""
    text = table()
    print(text)
    save(text, "count")


if __name__ == "__main__":
    main()
