"""Programs of a model do no harm, and do not pass by ending early."""

import time

import pytest

from quantkit.evaluation import sandbox
from quantkit.evaluation.sandbox import passes

HARMFUL = {
    "forks": "import os\nos.fork()",
    "runs a program": "import subprocess\nsubprocess.run(['true'])",
    "runs a shell": "import os\nos.system('true')",
    "starts processes": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    "allocates 100 GB": "x = bytearray(100 * 2**30)",
    "opens a socket": "import socket\nsocket.socket()",
    "opens a page": "import urllib.request\nurllib.request.urlopen('http://localhost')",
    "ends early": "raise SystemExit(0)",
    "ends at once": "import os\nos._exit(0)",
    "prints what could be the sentinel": "print('0' * 32)\nprint('ok')\nraise SystemExit",
    "fails": "assert False",
    "is no Python": "def (",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "loads C": "import ctypes",
}


@pytest.mark.parametrize("program", HARMFUL.values(), ids=HARMFUL)
def test_it_fails(program):
    assert not passes(program)


@pytest.mark.parametrize("program", ["import time\ntime.sleep(60)", "while True: pass"])
def test_it_may_not_last(program):
    began = time.monotonic()
    assert not passes(program, seconds=1)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos.remove({path!r})",
        "import shutil\nshutil.rmtree({folder!r})",
        "open({path!r}, 'w').write('gone')",
        "import pathlib\npathlib.Path({path!r}).unlink()",
        "import os\nos.rename({path!r}, 'mine')",
        "import os\nos.truncate({path!r}, 0)",
    ],
)
def test_files_of_others_stay(program, tmp_path):
    path = tmp_path / "precious.txt"
    path.write_text("precious")
    assert not passes(program.format(path=str(path), folder=str(tmp_path)))
    assert path.read_text() == "precious"


def test_files_in_its_own_folder_are_allowed():
    assert passes("open('note.txt', 'w').write('x')\nassert open('note.txt').read() == 'x'")


def test_plain_programs_pass():
    assert passes("import math, re, collections, itertools\nassert math.gcd(4, 6) == 2")


def test_memory_is_watched_where_the_system_has_no_limit(monkeypatch):
    monkeypatch.setattr(sandbox, "_MEMORY", 2**27)
    program = "x = b'1' * 2**29\nimport time\ntime.sleep(20)"
    began = time.monotonic()
    assert not passes(program, seconds=15)
    assert time.monotonic() - began < 10
