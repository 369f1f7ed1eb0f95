"""Tables on narrow terminals: no figure is ever cut."""

import re
from dataclasses import replace

import pytest

from quantkit.artifacts.calibration import CalibrationText
from quantkit.artifacts.fidelity import Fidelity, Interval
from quantkit.artifacts.sensitivity import SensitivityProfile, TierCost, WeightSensitivity
from quantkit.artifacts.speed import Run, Speed
from quantkit.checkpoint.source import open_source
from quantkit.cli import tables
from quantkit.planning.recipe import load_recipe, plan_by_recipe
from quantkit.sensitivity.entries import DEFAULT_TIERS, native_cost

WIDTHS = (40, 60, 72, 80, 100, 200)
NUMBER = re.compile(r"\d[\d.,]*(?:e[-+]\d+)?%?")


@pytest.fixture(scope="module")
def inventory(checkpoint):
    return open_source(str(checkpoint)).inventory


@pytest.fixture(scope="module")
def profile(inventory):
    """Losses of every size: those of the first tiers need the most characters."""
    weights = []
    for number, w in enumerate(inventory.weights):
        costs = [
            TierCost(t, 1, 1.2345e-11 * 7.3**i, 0.0) for i, t in enumerate(DEFAULT_TIERS, number)
        ]
        costs.append(native_cost(w))
        weights.append(
            WeightSensitivity(w.name, w.role, w.layer, w.storage, w.parameters, 0, tuple(costs))
        )
    text = CalibrationText("default", "", 16, 256, 0, "", "")
    return SensitivityProfile(
        inventory.source, "gpt_oss", "fisher", "rtn", 2, DEFAULT_TIERS, text, tuple(weights)
    )


@pytest.fixture(scope="module")
def plan(inventory):
    return plan_by_recipe(inventory, load_recipe("moringlabs-3.6bit"))


def fidelity(name):
    one = Interval(0.123456, 0.0987654, 0.167890)
    return Fidelity(
        name, "native", "default", 0, 12_076_119_168, 4.61912, 16384, 64,
        *[one] * 6, {"prose": one, "maths": one}, (0.0,) * 101,
    )  # fmt: skip


def frontier(plan):
    return [replace(plan, origin=f"budget {i}.25bpw") for i in range(3)]


SHOWN = {
    "inventory": lambda inventory, **_: tables.print_inventory(inventory),
    "plan": lambda plan, **_: tables.print_plan(plan),
    "profile": lambda profile, **_: tables.print_profile(profile),
    "frontier": lambda plan, **_: tables.print_frontier(frontier(plan), [plan]),
    "fidelity": lambda **_: tables.print_fidelity(
        [fidelity(f"some-user/some-rather-long-name-of-a-quant-{i}") for i in range(4)], "default"
    ),
    "speed": lambda **_: tables.print_speed(
        Speed("a Mac", {}, (Run(131072, 128, 12345.6, 123.4, 12 * 10**9, 13 * 10**9),)), "out"
    ),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("what", SHOWN)
def test_no_figure_is_cut(inventory, plan, profile, monkeypatch, capsys, what, width):
    def numbers(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        SHOWN[what](inventory=inventory, plan=plan, profile=profile)
        return capsys.readouterr().out

    wide, shown = numbers(1000), numbers(width)
    assert "…" not in shown
    assert len(NUMBER.findall(wide)) >= 5
    assert set(NUMBER.findall(wide)) == set(NUMBER.findall(shown)), shown
    table = [line for line in shown.splitlines() if "  " in line.strip()]
    assert max(map(len, table)) <= max(width, 80)  # titles and totals are lines, not tables
