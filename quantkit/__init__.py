"""Mixed-precision MLX quants, chosen under a budget and checked.

Names are imported when they are first used: `import quantkit` alone loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quantkit.allocate.plan import make_plan, read_plan
    from quantkit.allocate.recipe import Recipe, load_recipe, plan_by_recipe, recipe_names
    from quantkit.artifacts.inventory import Inventory, Weight
    from quantkit.artifacts.plan import Plan
    from quantkit.artifacts.profile import Profile
    from quantkit.artifacts.report import Report
    from quantkit.errors import QuantkitError
    from quantkit.formats.codec import decode, encode
    from quantkit.formats.tiers import TIERS, Tier, parse_tier
    from quantkit.judge.verify import Check, verify
    from quantkit.model.calibration import Request
    from quantkit.pipeline import make_profile, quantize
    from quantkit.profile.profile import Settings
    from quantkit.profile.store import load_profile
    from quantkit.publish.report import read_report
    from quantkit.source.source import Source, open_source

_HOME = {
    "Check": "judge.verify",
    "Inventory": "artifacts.inventory",
    "Plan": "artifacts.plan",
    "Profile": "artifacts.profile",
    "QuantkitError": "errors",
    "Recipe": "allocate.recipe",
    "Report": "artifacts.report",
    "Request": "model.calibration",
    "Settings": "profile.profile",
    "Source": "source.source",
    "TIERS": "formats.tiers",
    "Tier": "formats.tiers",
    "Weight": "artifacts.inventory",
    "decode": "formats.codec",
    "encode": "formats.codec",
    "load_profile": "profile.store",
    "load_recipe": "allocate.recipe",
    "make_plan": "allocate.plan",
    "make_profile": "pipeline",
    "open_source": "source.source",
    "parse_tier": "formats.tiers",
    "plan_by_recipe": "allocate.recipe",
    "quantize": "pipeline",
    "read_plan": "allocate.plan",
    "read_report": "publish.report",
    "recipe_names": "allocate.recipe",
    "verify": "judge.verify",
}

__all__ = [
    "TIERS",
    "Check",
    "Inventory",
    "Plan",
    "Profile",
    "QuantkitError",
    "Recipe",
    "Report",
    "Request",
    "Settings",
    "Source",
    "Tier",
    "Weight",
    "decode",
    "encode",
    "load_profile",
    "load_recipe",
    "make_plan",
    "make_profile",
    "open_source",
    "parse_tier",
    "plan_by_recipe",
    "quantize",
    "read_plan",
    "read_report",
    "recipe_names",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"quantkit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
