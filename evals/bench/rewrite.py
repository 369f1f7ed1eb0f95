"""Time and memory of a full-shape gpt-oss-20b rewrite, against mlx_lm.convert and cp.

    python evals/bench/rewrite.py [--work FOLDER] [--rounds 3]

Needs 45 GB of disk. Every command runs in its own process, in turn, round by round, from a cold
page cache if the machine allows dropping it. The table goes into README.md here.
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from _common import drop_page_cache, machine, run, save
from full_shape import CONFIG_20B, write_checkpoint

from quantkit.demo.build import demo_checkpoint

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> None:
    """Write the checkpoint, run the rounds, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/quantkit-bench"))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    source = args.work / "gpt-oss-20b-random"
    if not source.exists():
        partial = args.work / "writing"
        shutil.rmtree(partial, ignore_errors=True)
        print("writing a full-shape gpt-oss-20b of random values")
        write_checkpoint(partial, CONFIG_20B)
        for name in TOKENIZER:
            shutil.copyfile(demo_checkpoint() / name, partial / name)
        partial.replace(source)
    commands = jobs(source, args.work / "out")
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(args.rounds):
        for name, command in commands.items():
            shutil.rmtree(args.work / "out", ignore_errors=True)
            measured[name].append(run(command))
            wall, peak = measured[name][-1]
            print(f"round {number + 1}: {name}: {wall:.1f} s, {peak:.2f} GB", flush=True)
    shutil.rmtree(args.work / "out", ignore_errors=True)
    text = table(measured)
    print(text)
    save(text, "rewrite")


def jobs(source: Path, out: Path) -> dict[str, list[str]]:
    """Name -> command; every command writes `out`."""
    python = sys.executable
    quantize = [python, "-m", "quantkit", "quantize", str(source), "-o", str(out), "--recipe"]
    convert = [python, "-m", "mlx_lm", "convert", "--hf-path", str(source), "--mlx-path", str(out)]
    return {
        "`cp -r` of the source": ["cp", "-r", str(source), str(out)],
        "`mlx_lm.convert -q --q-bits 8`": [*convert, "-q", "--q-bits", "8"],
        "`quantkit quantize -r mxfp4-q8`": [*quantize, "mxfp4-q8"],
        "`quantkit quantize -r moringlabs-3.6bit`": [*quantize, "moringlabs-3.6bit"],
    }


def table(measured: dict[str, list[tuple[float, float]]]) -> str:
    """Medians, and each wall time over mlx_lm.convert's of the same round."""
    base = measured["`mlx_lm.convert -q --q-bits 8`"]
    median: Callable[..., float] = statistics.median
    lines = [
        f"{machine()}; {len(base)} rounds, medians; wall time until the bytes are on "
        f"disk; page cache {'cold' if drop_page_cache() else 'warm'}.",
        "",
        "| command | wall | over mlx_lm.convert | peak memory |",
        "|---|---|---|---|",
    ]
    for name, runs in measured.items():
        ratio = median(mine[0] / theirs[0] for mine, theirs in zip(runs, base, strict=True))
        wall, peak = median(r[0] for r in runs), median(r[1] for r in runs)
        lines.append(f"| {name} | {wall:.0f} s | {ratio:.2f} | {peak:.2f} GB |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
