"""Mixed-precision MLX quants, chosen under a budget and checked.

Names are imported when they are first used: `import quantkit` alone loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quantkit.artifacts.fidelity import Fidelity
    from quantkit.artifacts.inventory import Inventory, Weight
    from quantkit.artifacts.plan import Plan
    from quantkit.artifacts.profile import SensitivityProfile
    from quantkit.artifacts.report import Report
    from quantkit.calibration.text import CalibrationSpec
    from quantkit.checkpoint.source import Source, open_source
    from quantkit.demo.build import demo_checkpoint
    from quantkit.errors import QuantkitError
    from quantkit.evaluation.verify import Check, verify
    from quantkit.formats.codec import decode, encode
    from quantkit.formats.tiers import TIERS, Tier, parse_tier
    from quantkit.jobs.pipeline import compare, make_profile, quantize, refine
    from quantkit.planning.allocator import (
        Constraints,
        Limits,
        frontier,
        plan_by_budget,
        recipe_plans,
    )
    from quantkit.planning.budget import parse_budget
    from quantkit.planning.plan import make_plan, read_plan
    from quantkit.planning.recipe import Recipe, load_recipe, plan_by_recipe, recipe_names
    from quantkit.publish.plot import plot_fidelity, plot_frontier, plot_profile
    from quantkit.publish.report import read_report
    from quantkit.sensitivity.measure import Settings
    from quantkit.sensitivity.store import load_profile

_HOME = {
    "Check": "evaluation.verify",
    "Fidelity": "artifacts.fidelity",
    "Inventory": "artifacts.inventory",
    "Limits": "planning.allocator",
    "Plan": "artifacts.plan",
    "SensitivityProfile": "artifacts.profile",
    "QuantkitError": "errors",
    "Recipe": "planning.recipe",
    "Report": "artifacts.report",
    "CalibrationSpec": "calibration.text",
    "Settings": "sensitivity.measure",
    "Source": "checkpoint.source",
    "TIERS": "formats.tiers",
    "Tier": "formats.tiers",
    "Weight": "artifacts.inventory",
    "Constraints": "planning.allocator",
    "compare": "jobs.pipeline",
    "decode": "formats.codec",
    "demo_checkpoint": "demo.build",
    "encode": "formats.codec",
    "frontier": "planning.allocator",
    "load_profile": "sensitivity.store",
    "load_recipe": "planning.recipe",
    "make_plan": "planning.plan",
    "make_profile": "jobs.pipeline",
    "open_source": "checkpoint.source",
    "parse_budget": "planning.budget",
    "parse_tier": "formats.tiers",
    "plan_by_budget": "planning.allocator",
    "plan_by_recipe": "planning.recipe",
    "plot_fidelity": "publish.plot",
    "plot_frontier": "publish.plot",
    "plot_profile": "publish.plot",
    "quantize": "jobs.pipeline",
    "read_plan": "planning.plan",
    "read_report": "publish.report",
    "recipe_names": "planning.recipe",
    "recipe_plans": "planning.allocator",
    "refine": "jobs.pipeline",
    "verify": "evaluation.verify",
}

__all__ = [
    "TIERS",
    "CalibrationSpec",
    "Check",
    "Constraints",
    "Fidelity",
    "Inventory",
    "Limits",
    "Plan",
    "QuantkitError",
    "Recipe",
    "Report",
    "SensitivityProfile",
    "Settings",
    "Source",
    "Tier",
    "Weight",
    "compare",
    "decode",
    "demo_checkpoint",
    "encode",
    "frontier",
    "load_profile",
    "load_recipe",
    "make_plan",
    "make_profile",
    "open_source",
    "parse_budget",
    "parse_tier",
    "plan_by_budget",
    "plan_by_recipe",
    "plot_fidelity",
    "plot_frontier",
    "plot_profile",
    "quantize",
    "read_plan",
    "read_report",
    "recipe_names",
    "recipe_plans",
    "refine",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"quantkit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
