import json
from pathlib import Path

import pytest

from quantkit.checkpoint.gpt_oss import stored_tensors
from tests.support import tiny

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="package")
def published(tmp_path_factory):
    """The published 20b and 120b: true headers, no values."""
    folders = {}
    for size in ("20b", "120b"):
        folder = DATA / f"gpt-oss-{size}"
        config = json.loads((folder / "config.json").read_text())
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        to = tmp_path_factory.mktemp(size) / "src"
        tiny.write_headers_only(to, config, stored_tensors(config), weight_map)
        folders[size] = to
    return folders
