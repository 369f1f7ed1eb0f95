"""A served stand-in of gpt-oss whose answers a test writes."""

import contextlib
import socket
import threading
import time
import urllib.request
from pathlib import Path

import mlx_lm.server
import uvicorn

from quantkit.backend import mx
from quantkit.serving.app import Address, make_app
from quantkit.serving.turns import open_service

THINK = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>{}<|return|>"
CALL = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"
WEATHER = {
    "name": "weather",
    "description": "The weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CHAT_TOOLS = [{"type": "function", "function": WEATHER}]
TOOLS = [{"type": "function", **WEATHER}]


def play(prompt):
    """The default script."""
    asked = prompt.rpartition("<|start|>user<|message|>")[2].partition("<|end|>")[0]
    if asked.startswith("say "):
        return THINK.format("I shall say it.") + FINAL.format(asked[4:])
    if asked == "weather?":
        calls = prompt.count("to=functions.weather")
        if calls < 3:
            return THINK.format(f"call {calls}") + CALL.format(
                "weather", f'{{"city": "Rome {calls}"}}'
            )
        return THINK.format("done") + FINAL.format("Sunny.")
    return FINAL.format("Hello 😀 there")


class Script:
    """Forces each generated token, by what `answer` says to the text of the prompt."""

    def __init__(self, answer):
        self.answer = answer
        self.tokenizer = None

    def processors(self, args):
        """As mlx-lm's server makes them: one list for each request."""
        state = {}

        def force(tokens, logits):
            ids = [int(token) for token in tokens.tolist()]
            if not state:
                said = self.answer(self.tokenizer.decode(ids))
                if isinstance(said, str):
                    said = self.tokenizer.encode(said, add_special_tokens=False)
                state.update(start=len(ids), tokens=said)
            place = len(ids) - state["start"]
            token = state["tokens"][place] if place < len(state["tokens"]) else 200002
            return mx.where(mx.arange(logits.shape[-1]) == token, 0.0, -1e9)[None]

        return [force]


class Served:
    """A server at `url`, whose `script` can be rewritten."""

    def __init__(self, url, script, service):
        self.url, self.script, self.service = url, script, service


@contextlib.contextmanager
def serve(repo: Path, answer=None, **address):
    """Serve a repo in a thread; with `answer`, by a script."""
    script = Script(answer)
    make = mlx_lm.server._make_logits_processors
    if answer is not None:
        mlx_lm.server._make_logits_processors = script.processors
    service = open_service(str(repo), {"max_tokens": 4096})
    engine, script.tokenizer = service.engine, service.engine.tokenizer
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = uvicorn.Config(
        make_app(service, Address(port=port, **address)), port=port, log_level="error"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    for _ in range(100):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
            break
        time.sleep(0.05)
    try:
        yield Served(url, script, service)
    finally:
        server.should_exit = True
        thread.join(10)
        engine.close()
        mlx_lm.server._make_logits_processors = make
