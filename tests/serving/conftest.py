"""A served stand-in of gpt-oss, whose answers are scripted."""

import pytest

from tests.support import served, standin
from tests.support.served import play


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not standin.PUBLISHED.is_dir():
        pytest.skip(f"NOT TESTED with the published tokenizer: no {standin.PUBLISHED}")
    repo = standin.write_published(tmp_path_factory.mktemp("served") / "stand-in")
    with served.serve(repo, play, origins=("http://allowed.example",)) as server:
        yield server


@pytest.fixture
def script(server):
    yield server.script
    server.script.answer = play
