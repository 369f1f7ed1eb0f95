"""Pictures of the model card: the tier map, KL against size, and the scores on benchmarks.

They need matplotlib (extra `plot`); without it a card has no pictures. Their background is white,
so that they can be read on a light and on a dark page.
"""

from importlib.util import find_spec
from io import BytesIO
from typing import Any

from quantkit.artifacts.fidelity import Interval
from quantkit.artifacts.report import Report
from quantkit.artifacts.roles import ROLES

TIERS_PICTURE, FRONTIER_PICTURE, SCORES_PICTURE = "tiers.png", "frontier.png", "scores.png"


def pictures(report: Report) -> dict[str, bytes]:
    """Return the pictures of a report, name -> PNG; none without matplotlib.

    Equal reports give equal bytes with one version of matplotlib.
    """
    if find_spec("matplotlib") is None:
        return {}
    drawn = {TIERS_PICTURE: _tier_map(report)}
    if report.frontier:
        drawn[FRONTIER_PICTURE] = _frontier(report)
    if report.scores:
        drawn[SCORES_PICTURE] = _score_plot(report)
    return drawn


def _tier_map(report: Report) -> bytes:
    """Draw bits per weight by role and layer; the last column has weights outside all layers."""
    assignments = report.plan.assignments
    roles = [role for role in ROLES if any(a.role == role for a in assignments)]
    layers = 1 + max((a.layer for a in assignments if a.layer is not None), default=-1)
    bits = [[0.0] * (layers + 1) for _ in roles]
    parameters = [[0] * (layers + 1) for _ in roles]
    for a in assignments:
        row, column = roles.index(a.role), layers if a.layer is None else a.layer
        bits[row][column] += 8 * a.bytes
        parameters[row][column] += a.parameters
    grid = [
        [b / p if p else float("nan") for b, p in zip(*rows, strict=True)]
        for rows in zip(bits, parameters, strict=True)
    ]
    figure, axes = _figure(10, 1.2 + 0.3 * len(roles))
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=2, vmax=9)
    figure.colorbar(image, ax=axes, label="bits per weight", extend="both")
    axes.set(xlabel=f"layer ({layers}: outside all layers)", yticks=range(len(roles)))
    axes.set_yticklabels(roles)
    return _png(figure)


def _frontier(report: Report) -> bytes:
    """Draw predicted KL against size: the best plans, recipes, this quant, and its measured KL."""
    figure, axes = _figure(8, 4.5)
    best = [(p.bytes / 1e9, p.kl) for p in report.frontier if p.recipe is None and p.kl > 0]
    if best:
        axes.plot(*zip(*best, strict=True), marker="o", markersize=3, label="best plans, predicted")
    recipes = [p for p in report.frontier if p.recipe is not None and p.kl > 0]
    for point in recipes:
        place = point.bytes / 1e9, point.kl
        axes.plot(*place, "x", color="black")
        axes.annotate(
            point.recipe, place, textcoords="offset points", xytext=(5, 3), fontsize="small"
        )
    size, predicted = report.total_bytes / 1e9, report.plan.predicted_kl
    if predicted:
        axes.plot(size, predicted, "*", markersize=12, label="this quant, predicted")
    if report.fidelity is not None and report.fidelity.kl_mean.value > 0:
        mean = report.fidelity.kl_mean
        ends = [[length] for length in _lengths(mean)]
        axes.errorbar(
            [size], [mean.value], yerr=ends, fmt="D", capsize=3, label="this quant, measured"
        )
    axes.set(yscale="log", xlabel="size, GB", ylabel="KL divergence, nats per token")
    axes.legend(fontsize="small")
    return _png(figure)


def _score_plot(report: Report) -> bytes:
    """Draw accuracies with their intervals, and those of the other model as crosses."""
    scores = report.scores
    figure, axes = _figure(8, 1.2 + 0.4 * len(scores))
    places = list(range(len(scores)))
    values = [100 * score.accuracy.value for score in scores]
    ends = [[100 * x for x in _lengths(score.accuracy)] for score in scores]
    errors = [[end[side] for end in ends] for side in (0, 1)]
    axes.errorbar(values, places, xerr=errors, fmt="o", capsize=3, label="this quant")
    compared = [(place, s.against) for place, s in zip(places, scores, strict=True) if s.against]
    for name in dict.fromkeys(against.other for _, against in compared):
        some = [(100 * a.accuracy, place) for place, a in compared if a.other == name]
        axes.plot(*zip(*some, strict=True), "x", color="black", label=name)
    axes.set(xlabel="accuracy, %", xlim=(-2, 102), yticks=places, ylim=(len(scores) - 0.5, -0.5))
    axes.set_yticklabels([score.title for score in scores])
    axes.legend(fontsize="small")
    return _png(figure)


def _lengths(value: Interval) -> tuple[float, float]:
    """Return the distances from a value to the ends of its interval."""
    if value.low is None or value.high is None:
        return 0.0, 0.0
    return max(0.0, value.value - value.low), max(0.0, value.high - value.value)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _png(figure: Any) -> bytes:
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100, format="png", metadata={"Software": None})
    return drawn.getvalue()
