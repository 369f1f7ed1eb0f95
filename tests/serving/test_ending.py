"""A server that ends: no thread of mlx-lm's keeps its process alive."""

import signal
import subprocess
import sys

import pytest

from quantkit.demo.build import plain_checkpoint

TAKEN = """
import socket, sys
from quantkit.serving.app import Address, run
from quantkit.serving.turns import open_service
service = open_service(sys.argv[1])
taken = socket.create_server(("127.0.0.1", 0))
run(service, Address(port=taken.getsockname()[1]))
"""
LOADING = """
import sys, time
from quantkit.serving import engine
from quantkit.serving.app import end_at_once
from quantkit.serving.turns import open_service
def load(*_, **__):
    print("loading", flush=True)
    time.sleep(600)
engine.load_stock = load
end_at_once()
open_service(sys.argv[1])
"""
UNSOUND = """
import sys
from quantkit.serving import turns
def refuse(*_):
    raise ValueError("no prompts")
turns.open_prompts = refuse
turns.open_service(sys.argv[1])
"""


@pytest.fixture
def started():
    processes = []

    def start(script):
        command = [sys.executable, "-c", script, str(plain_checkpoint())]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("script", "says"), [(TAKEN, b"in use"), (UNSOUND, b"no prompts")])
def test_a_server_that_cannot_begin_ends(started, script, says):
    process = started(script)
    _, errors = process.communicate(timeout=60)
    assert process.returncode
    assert says in errors


def test_a_server_that_still_loads_ends_when_it_is_told(started):
    process = started(LOADING)
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 0
