"""From what a person asked for to a plan."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.allocate.plan import read_plan
from quantkit.allocate.recipe import idle_rules, load_recipe, plan_by_recipe, recipe_names
from quantkit.artifacts.inventory import Inventory
from quantkit.artifacts.plan import Plan
from quantkit.cli import console
from quantkit.errors import InputError, PlanError
from quantkit.jsonfile import load_json

if TYPE_CHECKING:
    from quantkit.source.source import Source

DEMOS = ("demo", "demo-llama")


def open_model(name: str, revision: str | None = None) -> "Source":
    """The source called `name`: a folder, a Hub id, or one of the two small models that are built
    on the spot, `demo` and `demo-llama`. Raises InputError."""
    from quantkit.source.source import open_source

    if name in DEMOS and not Path(name).exists():
        from quantkit.demo import build

        built = build.demo_checkpoint() if name == "demo" else build.plain_checkpoint()
        return open_source(str(built))
    return open_source(name, revision)


def choose_plan(inventory: Inventory, recipe: str | None, plan_file: Path | None) -> Plan:
    """The plan of a recipe, or of a plan file. Raises InputError unless just one is given."""
    if (recipe is None) == (plan_file is None):
        ways = "--recipe NAME or --plan FILE, just one of them"
        raise InputError(f"say how to choose tiers: {ways}. Recipes: {', '.join(recipe_names())}.")
    if plan_file is not None:
        return read_plan(load_json(plan_file, PlanError), inventory, str(plan_file))
    assert recipe is not None
    loaded = load_recipe(recipe)
    plan = plan_by_recipe(inventory, loaded)
    if recipe not in recipe_names():  # those that ship are made for many models
        for number in idle_rules(inventory, loaded):
            console.note(f"recipe {loaded.name}: rule {number} decides no weight")
    return plan


def require_plots() -> None:
    """Raises InputError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'quantkit[plot]'")
