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
    from quantkit.artifacts.report import Report
    from quantkit.errors import QuantkitError
    from quantkit.formats.codec import decode, encode
    from quantkit.formats.tiers import TIERS, Tier, parse_tier
    from quantkit.judge.verify import Check, verify
    from quantkit.pipeline import quantize
    from quantkit.publish.report import read_report
    from quantkit.source.source import Source, open_source

_HOME = {
    "Check": "judge.verify",
    "Inventory": "artifacts.inventory",
    "Plan": "artifacts.plan",
    "QuantkitError": "errors",
    "Recipe": "allocate.recipe",
    "Report": "artifacts.report",
    "Source": "source.source",
    "TIERS": "formats.tiers",
    "Tier": "formats.tiers",
    "Weight": "artifacts.inventory",
    "decode": "formats.codec",
    "encode": "formats.codec",
    "load_recipe": "allocate.recipe",
    "make_plan": "allocate.plan",
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
    "QuantkitError",
    "Recipe",
    "Report",
    "Source",
    "Tier",
    "Weight",
    "decode",
    "encode",
    "load_recipe",
    "make_plan",
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
