"""Time and memory of a full-shape gpt-oss-20b rewrite, against mlx_lm.convert and cp.

    python evals/bench/rewrite.py [--work FOLDER] [--rounds 3]

Needs 45 GB of disk. Every command runs as a process of its own, in turn, round by round, from a
cold page cache where the machine lets us drop it; the table in README.md beside this file is
replaced by what was measured.
"""

import argparse
import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from full_shape import CONFIG_20B, write_checkpoint

from quantkit.demo.build import demo_checkpoint

HERE = Path(__file__).parent
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
    save(text)


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


def drop_page_cache() -> bool:
    """Make the next command read from the disk; False where the machine does not let us."""
    os.sync()
    with contextlib.suppress(OSError):
        return Path("/proc/sys/vm/drop_caches").write_text("3") > 0
    return False


def run(command: list[str]) -> tuple[float, float]:
    """(wall seconds until the bytes are on disk, peak resident GB) of a command."""
    drop_page_cache()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes there, kB here
    return wall, usage.ru_maxrss * unit / 1e9


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


def machine() -> str:
    """The machine in a few words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(": ")[2] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{platform.system()}, {model}, {os.cpu_count()} cores, {memory:.0f} GiB"


def save(text: str, what: str = "rewrite") -> None:
    """Put a table between its markers in README.md."""
    path = HERE / "README.md"
    before, _, rest = path.read_text().partition(f"<!-- {what} -->\n")
    after = rest.partition(f"<!-- /{what} -->")[2]
    path.write_text(f"{before}<!-- {what} -->\n{text}\n<!-- /{what} -->{after}")


if __name__ == "__main__":
    main()
