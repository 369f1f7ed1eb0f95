"""The dependency rule: a room imports only rooms above it, and stages never each other."""

import ast
import re
from pathlib import Path

import pytest

import quantkit

ROOT = Path(quantkit.__file__).parent
# In the order the data walks through them; a line may import the lines above it.
ROOMS = [
    {"errors"}, {"units"}, {"progress"}, {"backend"}, {"storage"}, {"artifacts"}, {"formats"}, {"checkpoint"},
    {"demo"}, {"calibration"}, {"streaming"}, {"quantizers"},
    {"sensitivity", "planning", "writer", "evaluation", "publish", "generation"}, {"serving"}, {"jobs"}, {"cli"},
]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem in LEVEL)


def room_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_up(path):
    room = room_of(path)
    for module in imports(path):
        if module.startswith("quantkit."):
            other = module.split(".")[1]
            assert other == room or LEVEL[other] < LEVEL[room], f"{room} imports {other}"
        if module.split(".")[0] in ("typer", "rich"):
            assert room == "cli", f"only cli knows {module}"
        if module == "mlx.core":
            assert room == "backend", "mlx comes from quantkit.backend"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_fast_blas_comes_before_mlx_lm(path):
    """Whoever imports mlx-lm has imported quantkit.backend at its top."""
    if any(module.split(".")[0] == "mlx_lm" for module in imports(path)):
        top = [n.module for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom)]
        assert "quantkit.backend" in top


BENCHES = sorted((ROOT.parent / "evals" / "bench").glob("*.py"))


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.name)
def test_benches_load_the_fast_blas_first(path):
    """An import of mlx above that of quantkit would measure the slow one, 50 times slower."""
    body = ast.parse(path.read_text()).body
    plain = [(n.lineno, alias.name) for n in body if isinstance(n, ast.Import) for alias in n.names]
    named = [(n.lineno, n.module or "") for n in body if isinstance(n, ast.ImportFrom)]
    order = [name.split(".")[0] for _, name in sorted(plain + named)]
    foreign = [order.index(name) for name in ("mlx", "mlx_lm") if name in order]
    assert order
    assert all("quantkit" in order[:place] for place in foreign)


def test_files_stay_small():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path


TESTS = Path(__file__).parent


def test_tests_mirror_the_package():
    """A test file is named after the module that it is about, in a folder of the same room."""
    mirrored = list(TESTS.glob("*/test_*.py"))
    assert len(mirrored) > 20
    for path in mirrored:
        module = ROOT / path.parent.name / f"{path.stem.removeprefix('test_')}.py"
        assert module.is_file(), f"{path.name}: there is no {module.relative_to(ROOT)}"


def test_no_test_imports_another():
    for path in TESTS.rglob("*.py"):
        for module in imports(path):
            assert not re.search(r"tests\.(.*\.)?test_", module), f"{path.name} imports {module}"
