"""From the demo model to the Hub: every command on the way, and what arrives speaks."""

import json

import mlx_lm
import pytest

from tests.support import hub

pytestmark = pytest.mark.slow


def test_from_profile_to_hub(online, demo, tmp_path):
    (tmp_path / "hub").mkdir()
    out = tmp_path / "out"

    def run(*arguments, endpoint="http://127.0.0.1:9", **env):
        done = online(endpoint, *arguments, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    tiers = "q8g64,q6g64,q4g64,q3g64"
    run("profile", demo, "-o", tmp_path / "profile", "--tokens", 512, "--tiers", tiers)
    budget = ("--profile", tmp_path / "profile", "--budget", "4.5bpw", "--quantizer", "rtn")
    run("quantize", demo, "-o", out, *budget)
    run("compare", demo, out, "--tokens", 1024, "--record")
    run("bench", out, "--context", "64", "--tokens", 16, "--record")
    shown = json.loads(run("upload", out, "user/demo", "--dry-run", "--json"))
    with hub.serving({}, tmp_path / "hub", part=20_000_000) as (endpoint, _):
        run("upload", out, "user/demo", endpoint=endpoint, HF_TOKEN=hub.TOKEN)
    stored = tmp_path / "hub" / "demo"
    assert {path.name: path.stat().st_size for path in stored.iterdir()} == dict(shown["files"])
    card = (stored / "README.md").read_text()
    report = json.loads((stored / "quantkit.json").read_text())
    assert f"{report['fidelity']['kl_mean']:.4g}" in card
    assert "mlx_lm.generate --model user/demo" in card
    assert "--budget 4.5bpw" in card
    model, tokenizer = mlx_lm.load(str(stored))
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    assert "Paris" in mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=32)
