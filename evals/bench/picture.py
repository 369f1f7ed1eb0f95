"""Draw docs/frontier.png from the measured tables in README.md here.

python evals/bench/picture.py
"""

import re
from pathlib import Path

from quantkit.publish.plot import pyplot

SAME = {
    "mxfp4-q8": "mxfp4-q8, as mlx_lm.convert --q-bits 8",
    "mxfp4-q4": "mxfp4-q4, as mlx_lm.convert --q-bits 4",
}
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def table(marker: str) -> list[list[str]]:
    """The cells of the rows between two markers."""
    text = (HERE / "README.md").read_text().partition(f"<!-- {marker} -->")[2]
    rows = text.partition(f"<!-- /{marker} -->")[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if "|" in row]


def points() -> dict[str, list[tuple[float, float, str]]]:
    """(bits per weight, KL divergence, name) of recipes, and of our plans at their bytes."""
    found: dict[str, list[tuple[float, float, str]]] = {
        "recipes, rounded to nearest": [],
        "quantkit's plans, rounded to nearest": [],
        "quantkit's plans, gptq": [],
    }
    recipes, nearest, gptq = found.values()
    for cells in table("allocation"):
        if (name := re.fullmatch(r"`([\w.-]+)`", cells[0])) and len(cells) == 8:
            recipes.append((float(cells[1]), float(cells[3]), name[1]))
            nearest.append((float(cells[4]), float(cells[6]), ""))
    for cells in table("quantizer-recipes"):
        if cells[0] == "ours, gptq":
            gptq.append((float(cells[1]), float(cells[2].split()[0]), ""))
    return found


def main() -> None:
    """Draw."""
    figure, axes = pyplot().subplots(figsize=(8, 4.5), layout="constrained")
    for (label, found), marker in zip(points().items(), "xo^", strict=True):
        found.sort()
        line = "none" if marker == "x" else "-"
        color = "black" if marker == "x" else None
        x, y, _ = zip(*found, strict=True)
        axes.plot(x, y, marker=marker, linestyle=line, color=color, label=label)
        for bits, kl, name in found:
            right = bits > 5.2  # of the picture: text goes to the left
            axes.annotate(
                SAME.get(name, name),
                (bits, kl),
                textcoords="offset points",
                xytext=(-6, 8) if right else (6, 4),
                ha="right" if right else "left",
                fontsize=8,
            )
    axes.set(
        yscale="log",
        xlabel="bits per weight, everything stored counted",
        ylabel="KL divergence to native, nats per token",
        title="The demo model, measured on other documents",
    )
    axes.legend()
    (ROOT / "docs").mkdir(exist_ok=True)
    figure.savefig(ROOT / "docs" / "frontier.png", dpi=110)


if __name__ == "__main__":
    main()
