"""An installed wheel is whole."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOOK = """
import quantkit
from quantkit.planning.recipe import load_recipe, recipe_names
from quantkit.calibration.documents import open_documents
from quantkit.evaluation.benchmarks import benchmark_names, load_benchmark
print(quantkit.__file__)
print(len([load_recipe(name) for name in recipe_names()]))
print(len([load_benchmark(name) for name in benchmark_names()]))
print(len([next(documents) for documents in open_documents("default", 0, "evaluate")]))
"""


def test_recipes_and_text_travel(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("quantkit-*.whl")
    install = ["install", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    look = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{LOOK}",
    ]
    done = subprocess.run(look, cwd=tmp_path, capture_output=True, text=True, check=True)
    where, recipes, benchmarks, texts = done.stdout.split()
    assert where.startswith(str(tmp_path))
    assert recipes == "6"
    assert benchmarks == "7"
    assert texts == "4"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if "/bench/" in name or "evals" in name]
