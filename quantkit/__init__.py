"""Mixed-precision MLX quants, chosen under a budget and checked.

Names are imported on first use: `import quantkit` alone loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quantkit.artifacts.fidelity import Fidelity
    from quantkit.artifacts.inventory import Inventory, Weight
    from quantkit.artifacts.memory import MemoryTarget
    from quantkit.artifacts.plan import Plan
    from quantkit.artifacts.report import Report
    from quantkit.artifacts.scores import Score
    from quantkit.artifacts.sensitivity import SensitivityProfile
    from quantkit.backend.memory_limits import limited_memory
    from quantkit.calibration.calibration_set import CalibrationSpec
    from quantkit.checkpoint.source import Source, open_source
    from quantkit.demo.build import demo_checkpoint
    from quantkit.errors import QuantkitError
    from quantkit.evaluation.verify import Check, verify
    from quantkit.formats.codec import decode, encode
    from quantkit.formats.tiers import TIERS, Tier, parse_tier
    from quantkit.jobs.compare import compare
    from quantkit.jobs.evaluate import EvaluationRequest, EvaluationSettings, evaluate
    from quantkit.jobs.open_model import open_model
    from quantkit.jobs.planning import PlanRequest, choose_plan
    from quantkit.jobs.profile import profile
    from quantkit.jobs.quantize import QuantizeOutcome, quantize, write_plan
    from quantkit.jobs.quantize_options import QuantizeOptions
    from quantkit.jobs.refine import refine
    from quantkit.planning.allocator import plan_by_budget
    from quantkit.planning.budget import Budget, parse_budget
    from quantkit.planning.constraints import Constraints
    from quantkit.planning.frontier import frontier, recipe_plans
    from quantkit.planning.plan import make_plan, read_plan
    from quantkit.planning.recipe import Recipe, load_recipe, plan_by_recipe, recipe_names
    from quantkit.progress import Progress
    from quantkit.publish.plot import plot_fidelity, plot_frontier, plot_profile
    from quantkit.publish.record import read_report
    from quantkit.sensitivity.measure import ProfileSettings
    from quantkit.sensitivity.store import load_profile

_HOME = {
    "Budget": "planning.budget",
    "CalibrationSpec": "calibration.calibration_set",
    "Check": "evaluation.verify",
    "Constraints": "planning.constraints",
    "EvaluationRequest": "jobs.evaluate",
    "EvaluationSettings": "jobs.evaluate",
    "Fidelity": "artifacts.fidelity",
    "Inventory": "artifacts.inventory",
    "MemoryTarget": "artifacts.memory",
    "Plan": "artifacts.plan",
    "PlanRequest": "jobs.planning",
    "ProfileSettings": "sensitivity.measure",
    "Progress": "progress",
    "QuantizeOptions": "jobs.quantize_options",
    "QuantizeOutcome": "jobs.quantize",
    "QuantkitError": "errors",
    "Recipe": "planning.recipe",
    "Report": "artifacts.report",
    "Score": "artifacts.scores",
    "SensitivityProfile": "artifacts.sensitivity",
    "Source": "checkpoint.source",
    "TIERS": "formats.tiers",
    "Tier": "formats.tiers",
    "Weight": "artifacts.inventory",
    "choose_plan": "jobs.planning",
    "compare": "jobs.compare",
    "decode": "formats.codec",
    "demo_checkpoint": "demo.build",
    "encode": "formats.codec",
    "evaluate": "jobs.evaluate",
    "frontier": "planning.frontier",
    "limited_memory": "backend.memory_limits",
    "load_profile": "sensitivity.store",
    "load_recipe": "planning.recipe",
    "make_plan": "planning.plan",
    "open_model": "jobs.open_model",
    "open_source": "checkpoint.source",
    "parse_budget": "planning.budget",
    "parse_tier": "formats.tiers",
    "plan_by_budget": "planning.allocator",
    "plan_by_recipe": "planning.recipe",
    "plot_fidelity": "publish.plot",
    "plot_frontier": "publish.plot",
    "plot_profile": "publish.plot",
    "profile": "jobs.profile",
    "quantize": "jobs.quantize",
    "read_plan": "planning.plan",
    "read_report": "publish.record",
    "recipe_names": "planning.recipe",
    "recipe_plans": "planning.frontier",
    "refine": "jobs.refine",
    "verify": "evaluation.verify",
    "write_plan": "jobs.quantize",
}

__all__ = [
    "TIERS",
    "Budget",
    "CalibrationSpec",
    "Check",
    "Constraints",
    "EvaluationRequest",
    "EvaluationSettings",
    "Fidelity",
    "Inventory",
    "MemoryTarget",
    "Plan",
    "PlanRequest",
    "ProfileSettings",
    "Progress",
    "QuantizeOptions",
    "QuantizeOutcome",
    "QuantkitError",
    "Recipe",
    "Report",
    "Score",
    "SensitivityProfile",
    "Source",
    "Tier",
    "Weight",
    "choose_plan",
    "compare",
    "decode",
    "demo_checkpoint",
    "encode",
    "evaluate",
    "frontier",
    "limited_memory",
    "load_profile",
    "load_recipe",
    "make_plan",
    "open_model",
    "open_source",
    "parse_budget",
    "parse_tier",
    "plan_by_budget",
    "plan_by_recipe",
    "plot_fidelity",
    "plot_frontier",
    "plot_profile",
    "profile",
    "quantize",
    "read_plan",
    "read_report",
    "recipe_names",
    "recipe_plans",
    "refine",
    "verify",
    "write_plan",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"quantkit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
