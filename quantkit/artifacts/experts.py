"""Expert pruning: the blocks of experts, their ranking, and the experts that a plan keeps.

Stock mlx-lm reads one number of experts for all layers, so that every block keeps as many.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import isfinite
from typing import Any

from quantkit.artifacts.inventory import Inventory, UnquantizedTensor, Weight, is_count
from quantkit.artifacts.roles import EXPERT_ROLES
from quantkit.errors import InputError, MalformedError, PlanError

KeptExperts = Mapping[str, tuple[int, ...]]
"""block -> the numbers of the experts that it keeps, ascending."""

_SHARES = (Fraction(7, 8), Fraction(3, 4), Fraction(5, 8), Fraction(1, 2))


@dataclass(frozen=True)
class ExpertRanking:
    """The experts of one block, the one that is worth most first.

    `kl` maps a number of experts to the predicted KL divergence, in nats per token, of keeping only
    so many, the first ones; `stderr` to its standard error over the sequences.
    """

    ranking: tuple[int, ...]
    kl: Mapping[int, float]
    stderr: Mapping[int, float]

    def kept(self, count: int) -> tuple[int, ...]:
        """Return the numbers of the best experts, ascending."""
        return tuple(sorted(self.ranking[:count]))

    def to_json(self) -> dict[str, Any]:
        """Return the ranking as a JSON object."""
        costs = {str(k): {"kl": kl, "stderr": self.stderr[k]} for k, kl in self.kl.items()}
        return {"ranking": list(self.ranking), "costs": costs}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ExpertRanking":
        """Read the object that `to_json` returns. Raises MalformedError, KeyError or TypeError."""
        ranking = _numbers(data["ranking"])
        costs = {int(k): (float(c["kl"]), float(c["stderr"])) for k, c in data["costs"].items()}
        if sorted(ranking) != list(range(len(ranking))):
            raise MalformedError("a ranking does not list every expert once")
        for count, (kl, stderr) in costs.items():
            if not (0 < count <= len(ranking) and 0 <= kl < 1e6 and isfinite(stderr)):
                raise MalformedError(f"impossible cost of keeping {count} experts")
        by_count = ({count: cost[i] for count, cost in costs.items()} for i in (0, 1))
        return cls(ranking, *by_count)


@dataclass(frozen=True)
class Pruning:
    """The experts that a plan keeps, of the `experts` that every block of the source has.

    `source_parameters` are the parameters of the source, over which bits per weight are counted;
    `kl` is the predicted KL divergence of the removal alone, None without a profile.
    """

    experts: int
    kept: KeptExperts
    source_parameters: int
    kl: float | None = None

    @property
    def count(self) -> int:
        """The number of experts that every block keeps."""
        return len(next(iter(self.kept.values())))

    def removed(self, block: str) -> tuple[int, ...]:
        """Return the numbers of the experts that a block loses, ascending."""
        kept = set(self.kept[block])
        return tuple(number for number in range(self.experts) if number not in kept)

    def to_json(self) -> dict[str, Any]:
        """Return the pruning as a JSON object."""
        return {
            "experts": self.experts,
            "experts_kept": self.count,
            "source_parameters": self.source_parameters,
            "kl": self.kl,
            "kept": {block: list(numbers) for block, numbers in self.kept.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Pruning":
        """Read the object that `to_json` returns. Raises MalformedError, KeyError or TypeError."""
        kept = {str(block): _numbers(numbers) for block, numbers in data["kept"].items()}
        experts, parameters, kl = data["experts"], data["source_parameters"], data["kl"]
        if not (is_count(experts) and is_count(parameters)):
            raise MalformedError("its pruning holds impossible counts")
        if kl is not None and not 0 <= float(kl) < 1e6:
            raise MalformedError(f"{kl!r:.20} is not a KL divergence")
        _require_kept(kept, experts)
        return cls(experts, kept, parameters, None if kl is None else float(kl))


def _numbers(values: Any) -> tuple[int, ...]:
    """Return numbers of experts read from JSON. Raises MalformedError for anything else."""
    if not isinstance(values, list) or not values or not all(map(is_count, values)):
        raise MalformedError("a list of experts holds anything but numbers")
    return tuple(values)


def _require_kept(kept: KeptExperts, experts: int) -> None:
    """Check the experts that are kept against the number of `experts`. Raises MalformedError."""
    for block, numbers in kept.items():
        if double := {n for n in numbers if numbers.count(n) > 1}:
            raise MalformedError(f"{block} keeps expert {min(double)} twice")
        if max(numbers) >= experts:
            raise MalformedError(f"{block} keeps expert {max(numbers)}, the last is {experts - 1}")
        if list(numbers) != sorted(numbers):
            raise MalformedError(f"{block} keeps experts in another order than ascending")
    if len({len(numbers) for numbers in kept.values()}) != 1:
        raise MalformedError("all layers have to keep the same number of experts")


def require_fitting(pruning: Pruning, inventory: Inventory, where: str) -> None:
    """Check that a pruning is for a checkpoint. Raises PlanError naming `where`."""
    blocks, active = expert_blocks(inventory), inventory.experts_per_token or 1
    if wrong := pruning.kept.keys() ^ blocks.keys():
        raise PlanError(f"{where}: {min(wrong)} has no experts, or no list of those to keep.")
    if pruning.experts != inventory.experts:
        raise PlanError(
            f"{where}: prunes {pruning.experts} experts, {inventory.source.name} has "
            f"{inventory.experts}."
        )
    if pruning.count < active:
        raise PlanError(
            f"{where}: keeps {pruning.count} experts, but the router picks {active} per token. "
            f"Keep {active} or more."
        )


def expert_counts(inventory: Inventory) -> tuple[int, ...]:
    """Return the numbers of experts whose keeping a profile measures, largest first.

    They are 7/8, 3/4, 5/8 and 1/2 of all, at least as many as the router picks per token.
    """
    experts, active = inventory.experts or 0, inventory.experts_per_token or 1
    counts = dict.fromkeys(int(experts * share) for share in _SHARES)
    return tuple(count for count in counts if active <= count < experts)


def expert_blocks(inventory: Inventory) -> dict[str, frozenset[str]]:
    """Return block -> the names of its weights and tensors that hold a row or matrix per expert.

    A block is the module that holds the router, and the module with the stacks. Raises InputError
    for a model without experts, or with blocks of several sizes.
    """
    experts = inventory.experts
    stacks = [w for w in inventory.weights if w.role in EXPERT_ROLES and len(w.shape) == 3]
    if not stacks or experts is None:
        raise InputError(f"{inventory.source.name}: has no experts to remove.")
    holders = {_parent(w.name) for w in stacks}
    blocks: dict[str, set[str]] = {block_of(w.name): set() for w in stacks}
    for name, shape in _named_shapes(inventory):
        module = _parent(name)
        if module in blocks and shape and shape[0] == experts:
            raise InputError(
                f"{name}: this architecture keeps a value per expert outside its router, so "
                "quantkit cannot remove experts; leave out `experts`."
            )
        holder = _parent(module)
        block = _parent(holder) if holder in holders else holder
        if block in blocks and shape and shape[0] == experts:
            blocks[block].add(name)
    for weight in stacks:
        if weight.shape[0] != experts:
            raise InputError(
                f"{weight.name}: {weight.shape[0]} experts, config.json says {experts}; quantkit "
                "removes experts only where all layers have the same number."
            )
    return {block: frozenset(names) for block, names in blocks.items()}


def block_of(stack: str) -> str:
    """Return the block that holds the stack of experts called `stack`."""
    return _parent(_parent(stack))


def _named_shapes(inventory: Inventory) -> list[tuple[str, tuple[int, ...]]]:
    weights = [(f"{w.name}.weight", w.shape) for w in inventory.weights]
    return weights + [(t.name, t.shape) for t in inventory.unquantized]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def pruned_inventory(inventory: Inventory, kept: KeptExperts) -> Inventory:
    """Return the inventory of a checkpoint whose blocks hold only the experts `kept`."""
    cut = {name for names in expert_blocks(inventory).values() for name in names}
    count = len(next(iter(kept.values())))

    def weight(w: Weight) -> Weight:
        if f"{w.name}.weight" not in cut:
            return w
        return replace(w, shape=(count, *w.shape[1:]), bytes=w.bytes // w.shape[0] * count)

    def tensor(t: UnquantizedTensor) -> UnquantizedTensor:
        if t.name not in cut:
            return t
        return replace(t, shape=(count, *t.shape[1:]), bytes=t.bytes // t.shape[0] * count)

    return replace(
        inventory,
        experts=count,
        weights=tuple(map(weight, inventory.weights)),
        unquantized=tuple(map(tensor, inventory.unquantized)),
    )


def first_experts(inventory: Inventory, count: int) -> KeptExperts:
    """Return a choice of experts, to count the bytes of any choice of so many."""
    return dict.fromkeys(expert_blocks(inventory), tuple(range(count)))


def parse_expert_counts(text: str | None, inventory: Inventory) -> tuple[int, ...]:
    """Parse numbers of experts to keep, such as `96` or `96,64`, largest first; none for None.

    `auto` stands for all, and for those whose cost a profile measures.

    Raises InputError.
    """
    if text is None:
        return ()
    expert_blocks(inventory)  # refuses models without experts
    experts, active = inventory.experts or 0, inventory.experts_per_token or 1
    if text.strip() == "auto":
        return (experts, *expert_counts(inventory))
    try:
        counts = [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"`experts` {text!r}: write a number such as 96, or auto.") from None
    for count in counts:
        if not active <= count <= experts:
            raise InputError(
                f"`experts` {count}: this model has {experts} experts, of which the router picks "
                f"{active} per token. Keep {active} to {experts}."
            )
    return tuple(sorted(set(counts), reverse=True))
