"""Rankings of experts in profiles, by the command."""

import json

import numpy as np
import pytest

from quantkit.artifacts.experts import expert_blocks
from quantkit.backend import mx
from quantkit.checkpoint.source import open_source
from quantkit.errors import SourceError
from quantkit.sensitivity.expert_probe import ExpertProbe
from quantkit.sensitivity.probe import LayerProbe
from quantkit.streaming.layer_runner import StreamingModel
from quantkit.streaming.measure_kl import measure_kl
from tests.support import standin, tiny
from tests.support.families import LLAMA, write

FEW = ("--tokens", 256, "--sequence-length", 64, "--tiers", "q3g64")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """8 experts, of which a token uses 4; the vocabulary of gpt-oss's stand-in."""
    return standin.write_own(tmp_path_factory.mktemp("source") / "src")


def read(profile):
    return json.loads((profile / "profile.json").read_text())


def test_rankings_are_added_to_a_profile_that_lacks_them(cli, source, tmp_path):
    out = tmp_path / "profile"
    assert cli("profile", source, "-o", out, *FEW).exit_code == 0
    plain, took = read(out), (out / "run.json").read_text()
    assert plain["expert_rankings"] == {}
    shown = cli("profile", source, "-o", out, *FEW, "--prune")
    assert shown.exit_code == 0, shown.output
    assert "experts kept      7: " in shown.stdout
    ranked = read(out)
    assert ranked["weights"] == plain["weights"]
    assert (out / "run.json").read_text() == took  # of the entries, by which `--check` counts
    assert list(ranked["expert_rankings"]) == list(
        expert_blocks(open_source(str(source)).inventory)
    )
    for ranking in ranked["expert_rankings"].values():
        assert sorted(ranking["ranking"]) == list(range(8))
        assert list(ranking["costs"]) == ["7", "6", "5", "4"]
        assert all(cost["kl"] >= 0 for cost in ranking["costs"].values())
    before = (out / "profile.json").stat().st_mtime_ns
    assert cli("profile", source, "-o", out, *FEW, "--experts", "6").exit_code == 0
    assert (out / "profile.json").stat().st_mtime_ns == before  # it has 6 already


def test_predictions_are_near_the_measured_cost(source, tmp_path, cli):
    out = tmp_path / "profile"
    assert cli("profile", source, "-o", out, *FEW, "--prune").exit_code == 0
    opened, rankings = open_source(str(source)), read(out)["expert_rankings"]
    tokens = mx.array(np.random.default_rng(1).integers(0, 256, (8, 64)))
    removed = [{b: r["ranking"][count:] for b, r in rankings.items()} for count in (7, 6, 5, 4)]
    measured = measure_kl(StreamingModel(opened), tokens, [{}] * 4, lambda _: None, removed)
    means = [float(kl.mean()) for kl in measured]
    assert means == sorted(means)
    assert means[0] > 0
    predicted = [sum(r["costs"][k]["kl"] for r in rankings.values()) for k in ("7", "6", "5", "4")]
    for ours, true in zip(predicted, means, strict=True):
        assert true / 5 < ours < true * 5


def test_a_layer_that_does_more_than_add_is_refused(tmp_path, monkeypatch):
    """The prediction would be wrong there: it is compared to the layer's real output."""
    folder = tiny.write_gpt_oss(tmp_path / "src")
    opened = open_source(str(folder))
    model = StreamingModel(opened)
    calls = []
    tokens = mx.random.randint(0, 64, (2, 20), key=mx.random.key(0))
    model.run(tokens, lambda _n, call, _y: calls.append(call))
    g = mx.random.normal((2, *calls[0].x.shape), key=mx.random.key(1))
    weights = [w for w in model.weights.values() if w.layer == 0]
    experts = ExpertProbe.of(opened.inventory, (3, 2))
    probe = LayerProbe(model.layers[0], weights, model.values, experts=experts)
    assert probe.run(calls[0], g, [], lambda _: None).rankings
    block = type(model.layers[0].module.mlp)
    monkeypatch.setattr(block, "__call__", scaled(block.__call__))
    with pytest.raises(SourceError, match="does not add the output of its experts"):
        probe.run(calls[0], g, [], lambda _: None)


def scaled(call):
    """A block that scales what it adds by a number of its input."""

    def run(self, x):
        y = call(self, x)
        return 3 * y if y.shape[-1] == x.shape[-1] and x.shape[1] == 20 else y

    return run


REFUSED = {
    "dense": "has no experts to remove",
    "by measurement": "are ranked by",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(cli, source, tmp_path, name):
    options = ("--method", "kl") if name == "by measurement" else ()
    folder = write(tmp_path / "src", LLAMA) if name == "dense" else source
    refused = cli("profile", folder, "-o", tmp_path / "out", *FEW, "--prune", *options)
    assert refused.exit_code == 2
    assert REFUSED[name] in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
