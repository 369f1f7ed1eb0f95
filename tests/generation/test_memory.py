"""What a repo leaves for KV caches on a Mac."""

import json

import pytest

from quantkit.backend import mx
from quantkit.errors import InputError
from quantkit.generation import memory

GPT_OSS = {
    "num_hidden_layers": 24, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}  # fmt: skip
WIRED = 11_453_251_584  # of a Mac with 16 GB
LONG = 7_940  # tokens of a prompt of HashHop and its answer, 0.2 GB


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A quant of gpt-oss-20b that `mac:16GB` plans, as far as its sizes tell."""
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(9_750_000_000)  # sparse
    monkeypatch.setattr(memory, "wired_bytes", lambda: WIRED)
    monkeypatch.setattr(mx, "device_info", lambda: {"memory_size": 16 << 30})
    return tmp_path


def test_long_prompts_are_answered_one_by_one_on_a_small_mac(repo, monkeypatch):
    assert memory.sequences_that_fit(repo, LONG, 32) == 1
    assert memory.sequences_that_fit(repo, 200, 32) == 25
    monkeypatch.setattr(memory, "wired_bytes", lambda: 4 * WIRED)
    assert memory.sequences_that_fit(repo, LONG, 32) == 32


def test_prompts_that_may_come_again_leave_room_for_the_one_that_is_read(repo, monkeypatch):
    assert memory.prompt_cache_bytes(repo) == 256 << 20
    monkeypatch.setattr(memory, "wired_bytes", lambda: WIRED + 10**9)
    assert memory.prompt_cache_bytes(repo) == pytest.approx(0.9e9, rel=0.2)
    monkeypatch.setattr(memory, "wired_bytes", lambda: 4 * WIRED)
    assert memory.prompt_cache_bytes(repo) == 2 << 30


def test_without_metal_nothing_is_known(repo, monkeypatch):
    def none():
        raise InputError("no Metal")

    monkeypatch.setattr(memory, "wired_bytes", none)
    assert memory.sequences_that_fit(repo, LONG, 32) == 32
    assert memory.sequences_that_fit(None, LONG, 32) == 32
    assert memory.prompt_cache_bytes(repo) == 2 << 30
