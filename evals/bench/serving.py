"""Serving: time per token beside stock mlx_lm.server, alone and with eight clients.

    python evals/bench/serving.py

SmolLM2-135M in float32, greedy. Both servers run at once, each with OpenBLAS, and are asked in
turns; a client measures from its first token to its last. The table goes into README.md here.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _common import machine, save

from quantkit.demo.build import plain_checkpoint

TOKENS, ROUNDS, CLIENTS = 60, 6, 8
START = "import sys; import quantkit.backend; from {} import main; sys.argv[1:] = {}; main()"
SERVERS = {
    "mlx_lm.server": ("mlx_lm.server", ["--port", "8391", "--model"], 8391),
    "quantkit serve": ("quantkit.cli.main", ["serve", "--port", "8392"], 8392),
}


def start(name: str, repo: Path) -> subprocess.Popen:
    """Start a server, and wait until it answers."""
    module, options, port = SERVERS[name]
    command = [sys.executable, "-c", START.format(module, [*options, str(repo)])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            ask(port, 1, "x")
            return process
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{name} does not answer")


def ask(port: int, count: int, text: str) -> tuple[float, int]:
    """Seconds from the first token to the last, and how many there were."""
    body = {
        "model": "default_model",
        "messages": [{"role": "user", "content": text}],
        "stream": True,
        "temperature": 0,
        "max_tokens": count,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    times, tokens = [], 0
    with urllib.request.urlopen(request, timeout=600) as reply:
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())
    return (times[-1] - times[0] if times else 0.0), tokens


def alone(port: int, number: int) -> float:
    """Milliseconds per token of one client."""
    seconds, tokens = ask(port, TOKENS, f"Tell me a long story about the number {number}.")
    return 1000 * seconds / (tokens - 1)


def together(port: int, number: int) -> float:
    """Tokens per second of all clients."""
    began = time.perf_counter()
    texts = [f"Tell me a long story about {number} and {client}." for client in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        tokens = sum(count for _, count in pool.map(lambda text: ask(port, TOKENS, text), texts))
    return tokens / (time.perf_counter() - began)


def main() -> None:
    """Make the table."""
    with tempfile.TemporaryDirectory() as folder:
        repo = Path(folder) / "float32"
        convert = ["-m", "mlx_lm", "convert", "--dtype", "float32", "--mlx-path", str(repo)]
        source = str(plain_checkpoint())
        subprocess.run([sys.executable, *convert, "--hf-path", source], check=True)
        processes = [start(name, repo) for name in SERVERS]
        try:
            single = {name: [] for name in SERVERS}
            many = {name: [] for name in SERVERS}
            for number in range(ROUNDS):
                order = list(SERVERS) if number % 2 else list(reversed(SERVERS))
                for name in order:
                    single[name].append(alone(SERVERS[name][2], number))
                for name in order:
                    many[name].append(together(SERVERS[name][2], number))
        finally:
            for process in processes:
                process.kill()
    lines = [
        f"{machine()}; SmolLM2-135M in float32; medians of {ROUNDS} rounds in turns, {TOKENS} "
        "tokens an answer.",
        "",
        f"| | ms per token, one client | tokens/s, {CLIENTS} clients |",
        "|---|---|---|",
    ]
    for name in SERVERS:
        one, all_ = statistics.median(single[name]), statistics.median(many[name])
        lines.append(f"| {name} | {one:.2f} | {all_:.1f} |")
    first, second = SERVERS
    ratios = [b / a for a, b in zip(single[first], single[second], strict=True)]
    rates = [b / a for a, b in zip(many[first], many[second], strict=True)]
    slower, faster = statistics.median(ratios), statistics.median(rates)
    lines.append(f"| ratio, round by round | {slower:.3f} | {faster:.3f} |")
    save("\n".join(lines), "serving")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
