import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported; no test leaves the machine
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from quantkit.backend import mx  # noqa: F401  (before mlx-lm, which tests import)
from tests.support import tiny
from tests.support.hub import hub_environment

Cli = Callable[..., Result]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ["QUANTKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["QUANTKIT_CACHE"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random gpt-oss as published. Not to be changed: copy or write another."""
    return tiny.write_gpt_oss(tmp_path_factory.mktemp("source") / "tiny-gpt-oss")


@pytest.fixture(scope="session")
def quant(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """`checkpoint` by the recipe mxfp4-q8. Not to be changed: copy it."""
    from quantkit.checkpoint.source import open_source
    from quantkit.planning.recipe import load_recipe, plan_by_recipe
    from tests.support.repo import write_repo

    source = open_source(str(checkpoint))
    out = tmp_path_factory.mktemp("repo") / "out"
    write_repo(source, plan_by_recipe(source.inventory, load_recipe("mxfp4-q8")), out)
    return out


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo checkpoint, built on first use."""
    from quantkit.demo.build import demo_checkpoint

    return demo_checkpoint()


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """Quantize a bad source: the one line it is refused with, exit code 2, and nothing left."""

    def run(source: Path, recipe: object = "mxfp4-q8") -> str:
        before = sorted(tmp_path.rglob("*"))
        result = cli("quantize", source, "-r", recipe, "-o", tmp_path / "quants" / "out")
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1, result.stderr
        assert sorted(tmp_path.rglob("*")) == before
        return result.stderr

    return run


@pytest.fixture
def cli() -> Cli:
    """Run a quantkit command in this process."""
    from quantkit.cli.main import app

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def online(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a quantkit command against a stand-in for the Hub, with a cache of its own."""

    def run(endpoint: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **hub_environment(endpoint, tmp_path), **more}
        command = [sys.executable, "-m", "quantkit", *map(str, arguments)]
        return subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return run
