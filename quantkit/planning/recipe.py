"""Recipes: tier rules as data. The first rule that matches a weight decides.

description = "Experts as published, everything else at 8 bits"
fallback = "native"           # if a rule's tier does not fit a weight; without it: refuse

[[rules]]
roles = ["expert"]            # roles or groups of roles; default: any
tier = "mxfp4"

[[rules]]
roles = ["q", "k"]
layers = { first = 6, last = 6 }        # or a list of numbers; default: any
layer_kinds = ["full_attention"]        # the config's layer_types; default: any
names = ["model.layers.*.mlp.*"]        # shell patterns; default: any
tier = "q6g64"
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from quantkit.artifacts.inventory import Inventory, Weight
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.roles import ROLE_GROUPS, ROLES
from quantkit.errors import RecipeError, TierError
from quantkit.formats.tiers import Tier, parse_tier
from quantkit.planning.plan import make_plan
from quantkit.storage.json_files import load_toml
from quantkit.storage.paths import recipes_folder, user_path

_KEYS = {"description", "source", "fallback", "rules"}
_RULE_KEYS = {"roles", "layers", "layer_kinds", "names", "tier"}


@dataclass(frozen=True)
class Rule:
    """A rule, which matches a weight if all of its conditions hold."""

    tier: Tier
    roles: frozenset[str] | None = None
    layers: frozenset[int] | None = None
    first: int | None = None
    last: int | None = None
    layer_kinds: frozenset[str] | None = None
    names: tuple[str, ...] | None = None

    def matches(self, weight: Weight, layers: int) -> bool:
        """Return whether the rule applies to `weight` in a model of `layers` layers."""
        return (
            (self.roles is None or weight.role in self.roles)
            and (self.layer_kinds is None or weight.layer_kind in self.layer_kinds)
            and (self.names is None or any(fnmatchcase(weight.name, p) for p in self.names))
            and self._matches_layer(weight.layer, layers)
        )

    def _matches_layer(self, layer: int | None, layers: int) -> bool:
        if self.layers is None and self.first is None and self.last is None:
            return True
        if layer is None:
            return False
        if self.layers is not None:
            return layer in self.layers
        return layer < (self.first or 0) or layer >= layers - (self.last or 0)


@dataclass(frozen=True)
class Recipe:
    """A named, ordered list of rules."""

    name: str
    description: str
    rules: tuple[Rule, ...]
    fallback: Tier | None = None

    def tier_for(self, weight: Weight, number: int) -> Tier:
        """Return the tier that rule `number` gives `weight`, or the fallback if that does not
        fit.
        """
        tier = self.rules[number].tier
        return tier if self.fallback is None or tier.fits(weight.shape) else self.fallback


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in recipes_folder().glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """Load a shipped recipe by name, or a TOML file by path. Raises RecipeError."""
    path = user_path(name)
    if path.suffix != ".toml":
        path = recipes_folder() / f"{name}.toml"
        if name not in recipe_names():
            raise RecipeError(
                f"unknown `recipe` {name!r}. Use {', '.join(recipe_names())}, "
                "or the path of a .toml file."
            )
    return parse_recipe(path.stem, load_toml(path, RecipeError))


def parse_recipe(name: str, data: Mapping[str, Any]) -> Recipe:
    """Parse a recipe's TOML table. Raises RecipeError naming the rule at fault."""
    if unknown := data.keys() - _KEYS:
        raise RecipeError(
            f"recipe {name}: unknown key {min(unknown)!r}. Use {', '.join(sorted(_KEYS))}."
        )
    rules = data.get("rules")
    if not isinstance(rules, list) or not rules:
        raise RecipeError(f"recipe {name}: [[rules]] is missing.")
    parsed = tuple(_parse_rule(f"recipe {name}, rule {i}", r) for i, r in enumerate(rules, 1))
    try:
        fallback = parse_tier(str(data["fallback"])) if "fallback" in data else None
    except TierError as exc:
        raise RecipeError(f"recipe {name}, fallback: {exc}") from exc
    return Recipe(name, str(data.get("description", "")), parsed, fallback)


def plan_by_recipe(inventory: Inventory, recipe: Recipe) -> Plan:
    """Return the plan of a recipe for a checkpoint.

    Raises RecipeError if the recipe matches no weight or leaves a weight unmatched, TierError if a
    tier does not fit.
    """
    tiers = {}
    unmatched = []
    for weight in inventory.weights:
        number = _deciding_rule(inventory, recipe, weight)
        if number is None:
            unmatched.append(weight)
        else:
            tiers[weight.name] = recipe.tier_for(weight, number)
    if not tiers:
        raise RecipeError(f"recipe {recipe.name}: no rule matches any weight of this checkpoint.")
    if unmatched:
        first = unmatched[0]
        raise RecipeError(
            f"recipe {recipe.name}: no rule matches {first.name} (role {first.role}), like "
            f'{len(unmatched) - 1} others. End it with a rule for every weight: tier = "native".'
        )
    return make_plan(inventory, tiers, f"recipe {recipe.name}")


def idle_rules(inventory: Inventory, recipe: Recipe) -> list[int]:
    """Return the numbers, from 1, of rules that decide no weight, often for a misspelt name."""
    deciding = {_deciding_rule(inventory, recipe, weight) for weight in inventory.weights}
    return [number + 1 for number in range(len(recipe.rules)) if number not in deciding]


def fallen_back(inventory: Inventory, recipe: Recipe) -> list[str]:
    """Return the names of weights that get the fallback, since the tier of their rule does not
    fit.
    """
    names = []
    for weight in inventory.weights:
        number = _deciding_rule(inventory, recipe, weight)
        if number is not None and recipe.tier_for(weight, number) != recipe.rules[number].tier:
            names.append(weight.name)
    return names


def _deciding_rule(inventory: Inventory, recipe: Recipe, weight: Weight) -> int | None:
    matching = (i for i, r in enumerate(recipe.rules) if r.matches(weight, inventory.layers))
    return next(matching, None)


def _parse_rule(where: str, rule: Any) -> Rule:
    if not isinstance(rule, dict) or "tier" not in rule:
        raise RecipeError(f"{where}: tier is missing.")
    if unknown := rule.keys() - _RULE_KEYS:
        raise RecipeError(
            f"{where}: unknown key {min(unknown)!r}. Use {', '.join(sorted(_RULE_KEYS))}."
        )
    try:
        tier = parse_tier(str(rule["tier"]))
    except TierError as exc:
        raise RecipeError(f"{where}: {exc}") from exc
    layers = rule.get("layers")
    ends = layers if isinstance(layers, dict) else {}
    if ends.keys() - {"first", "last"} or not all(_is_count(n) for n in ends.values()):
        raise RecipeError(f"{where}: layers takes {{ first = N, last = N }} or a list of numbers.")
    listed = None if layers is None or isinstance(layers, dict) else _numbers(where, layers)
    roles = rule.get("roles")
    kinds = rule.get("layer_kinds")
    names = rule.get("names")
    return Rule(
        tier=tier,
        roles=None if roles is None else _roles(where, _words(where, "roles", roles)),
        layers=listed,
        first=ends.get("first"),
        last=ends.get("last"),
        layer_kinds=None if kinds is None else frozenset(_words(where, "layer_kinds", kinds)),
        names=None if names is None else tuple(_words(where, "names", names)),
    )


def _roles(where: str, names: list[str]) -> frozenset[str]:
    roles: set[str] = set()
    for name in names:
        if name not in ROLES and name not in ROLE_GROUPS:
            names_ = ", ".join((*ROLE_GROUPS, *ROLES))
            raise RecipeError(f"{where}: unknown role {name!r}. Use one of {names_}.")
        roles.update(ROLE_GROUPS.get(name, (name,)))
    return frozenset(roles)


def _words(where: str, key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise RecipeError(f"{where}: {key} takes a list of strings.")
    return value


def _numbers(where: str, value: Any) -> frozenset[int]:
    if not isinstance(value, list) or not all(_is_count(number) for number in value):
        raise RecipeError(f"{where}: layers takes {{ first = N, last = N }} or a list of numbers.")
    return frozenset(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
