"""Plots; they need matplotlib (extra `plot`)."""

from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from quantkit.artifacts.fidelity import Fidelity
from quantkit.artifacts.plan import Plan
from quantkit.artifacts.roles import ROLES
from quantkit.artifacts.sensitivity import SensitivityProfile
from quantkit.errors import InputError, OutputError
from quantkit.storage.json_files import write_bytes_atomically

PICTURES = (".png", ".svg", ".pdf")
_SHOWN = "q4g64", "q3g64", "q2g64"


def plot_profile(profile: SensitivityProfile, path: Path) -> None:
    """Plot a heat map role x layer of the KL cost in one tier, and the KL cost of roles by bits.

    Raises OutputError.
    """
    plt = pyplot()
    from matplotlib.colors import LogNorm

    if not profile.tiers:
        raise OutputError("the profile has no tiers to plot.")
    tier = next((t for t in (*_SHOWN[1:], _SHOWN[0]) if t in profile.tiers), profile.tiers[0])
    weights = [w for w in profile.weights if w.layer is not None and tier in w.by_tier]
    roles = [role for role in ROLES if any(w.role == role for w in weights)]
    layers = 1 + max((w.layer or 0 for w in weights), default=0)
    grid = [[float("nan")] * layers for _ in roles]
    for weight in weights:
        row = roles.index(weight.role)
        grid[row][weight.layer or 0] = max(weight.by_tier[tier].kl, 1e-9)
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    if roles:
        image = left.imshow(grid, aspect="auto", norm=LogNorm(), cmap="viridis")
        figure.colorbar(image, ax=left, label="KL divergence, nats per token")
    left.set(
        title=f"KL cost in {tier}", xlabel="layer", yticks=range(len(roles)), yticklabels=roles
    )
    for role in ROLES:
        points = _curve(profile, role)
        if points:
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=role)
    right.set(
        title="KL cost of each role, all of its weights in one tier",
        xlabel="bits per weight",
        ylabel="sum of KL divergences, nats per token",
        yscale="log",
    )
    right.legend(fontsize="small")
    _save(figure, path)


def plot_fidelity(results: Sequence[Fidelity], path: Path) -> None:
    """Plot the share of tokens below each KL divergence, a curve per repo. Raises OutputError."""
    figure, axes = pyplot().subplots(figsize=(8, 5), layout="constrained")
    for result in results:
        label = f"{result.repo} ({result.bits_per_weight:.2f} bpw, mean {result.kl_mean.value:.3g})"
        axes.plot([max(kl, 1e-7) for kl in result.quantiles], range(101), label=label)
    axes.set(
        xscale="log",
        xlabel="KL divergence to native, nats",
        ylabel="tokens below it, %",
        title=f"{results[0].tokens} tokens of held-out text",
    )
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_frontier(
    plans: Sequence[Plan], recipes: Sequence[Plan], path: Path, pruned: Sequence[Plan] = ()
) -> None:
    """Plot predicted KL against size: the best plans as a line, recipes as points.

    `pruned` are the best plans that may remove experts, a second line. Raises OutputError.
    """
    figure, axes = pyplot().subplots(figsize=(8, 5), layout="constrained")
    for label, line in (("the best plan", plans), ("experts removed, too", pruned)):
        points = [(plan.total_bytes / 1e9, plan.predicted_kl) for plan in line if plan.predicted_kl]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    for plan in recipes:
        if plan.predicted_kl:
            name = plan.origin.removeprefix("recipe ")
            axes.scatter([plan.total_bytes / 1e9], [plan.predicted_kl], marker="x", color="black")
            axes.annotate(
                name,
                (plan.total_bytes / 1e9, plan.predicted_kl),
                textcoords="offset points",
                xytext=(5, 3),
                fontsize="small",
            )
    axes.set(
        yscale="log",
        xlabel="size, GB",
        ylabel="predicted KL divergence, nats per token",
        title=plans[0].source.name,
    )
    axes.legend(fontsize="small")
    _save(figure, path)


def require_picture(path: Path) -> None:
    """Check that a picture can be written to `path`. Raises OutputError."""
    if path.suffix.lower() not in PICTURES:
        raise OutputError(f"{path}: use a file name that ends with {', '.join(PICTURES)}.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: its folder does not exist.")


def require_plots(path: Path) -> None:
    """Check that matplotlib is installed, and that a picture can be written. Raises InputError."""
    if find_spec("matplotlib") is None:
        raise InputError("`plot` needs matplotlib: pip install 'quantkit[plot]'")
    require_picture(path)


def pyplot() -> Any:
    """Return matplotlib's pyplot, which draws to files only."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    drawn = BytesIO()
    try:
        figure.savefig(drawn, dpi=120, format=path.suffix.lower().removeprefix("."))
    finally:
        pyplot().close(figure)
    write_bytes_atomically(path, drawn.getvalue())


def _curve(profile: SensitivityProfile, role: str) -> list[tuple[float, float]]:
    """Return (bits per weight, KL) of every tier that all weights of a role have, fewest bits
    first.
    """
    weights = [weight for weight in profile.weights if weight.role == role]
    result: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for weight in weights:
        for cost in weight.costs:
            result[cost.tier].append((cost.bytes, cost.kl))
    parameters = sum(weight.parameters for weight in weights)
    return sorted(
        (8 * sum(b for b, _ in entries) / parameters, sum(kl for _, kl in entries))
        for entries in result.values()
        if len(entries) == len(weights) and sum(kl for _, kl in entries) > 0
    )
