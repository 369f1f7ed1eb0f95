"""Shared by the benchmarks: running commands, naming the machine, saving tables."""

import contextlib
import os
import platform
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


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
    usage = used(command, stderr=subprocess.DEVNULL)
    os.sync()
    return time.perf_counter() - start, peak_gb(usage)


def used(command: list[str], **options: Any) -> resource.struct_rusage:
    """What a command used, which is run with these options of subprocess.Popen."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return usage


def peak_gb(usage: resource.struct_rusage) -> float:
    """The peak resident GB of a process."""
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes there, kB here
    return usage.ru_maxrss * unit / 1e9


def machine() -> str:
    """The machine in a few words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(": ")[2] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{platform.system()}, {model}, {os.cpu_count()} cores, {memory:.0f} GiB"


def save(text: str, section: str) -> None:
    """Put a table between its markers in README.md."""
    path = HERE / "README.md"
    before, _, old = path.read_text().partition(f"<!-- {section} -->\n")
    after = old.partition(f"<!-- /{section} -->")[2]
    path.write_text(f"{before}<!-- {section} -->\n{text}\n<!-- /{section} -->{after}")
