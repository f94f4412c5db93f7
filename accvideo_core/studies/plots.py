"""Figures as PNG, drawn by matplotlib without a window and without touching its global state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from ..files import atomic_path

# Okabe and Ito's colours, which everyone can tell apart.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#777777"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches. MissingExtraError without matplotlib; call it before the work, too."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("figures need", "matplotlib", "train") from error
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure, all or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def bare(axes: Any, title: str, x: str = "", y: str = "") -> Any:
    """Title, axis labels, a faint grid, and no box around it."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
