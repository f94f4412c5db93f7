"""The table and the figure of the ablation, made of the results of its arms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ..files import atomic_path
from . import plots
from .arms import ARMS
from .metrics import Estimate, of_values

TABLE, PICTURE = "ablation.md", "ablation.png"


class Measure(NamedTuple):
    """A column: where it stands in a result, its title, what would be perfect, and how it is written."""

    path: tuple[str | int, ...]
    title: str
    ideal: float | None
    form: str = ".3f"


MEASURES = (
    Measure(("right", "model"), "right clips", None, ".1%"),
    Measure(("sliced_wasserstein", "ratio", 0), "sliced Wasserstein, × floor", 1.0, ".2f"),
    Measure(("mmd", "model", 0), "MMD²", 0.0, ".4f"),
    Measure(("trajectory_error", "teacher_forced", 0), "trajectory error, teacher forced", 0.0),
    Measure(("trajectory_error", "self_rolled", 0), "trajectory error, self rolled", 0.0),
    Measure(("high_frequency_energy", "latent"), "high frequencies, latent", 1.0),
    Measure(("high_frequency_energy", "pixels"), "high frequencies, pixels", 1.0),
    Measure(("temporal_energy", "latent"), "temporal difference, latent", 1.0),
    Measure(("diversity",), "diversity", 1.0),
)


def paths(folder: Path, images: str = "") -> tuple[Path, Path]:
    """Of table and figure."""
    return folder / TABLE, folder / images / PICTURE


def write(folder: Path, results: Sequence[Mapping[str, Any]], images: str = "") -> str:
    """Write both, the figure into the sub-folder `images`; returns the table."""
    table, picture = paths(folder, images)
    estimates = summary(results)
    draw(picture, results, estimates)
    text = as_markdown(results, estimates)
    with atomic_path(table) as temporary:
        shown = f"![Every measure by arm, with 95 % intervals]({f'{images}/' if images else ''}{PICTURE})"
        temporary.write_text(f"{text}\n{shown}\n", encoding="utf-8")
    return text


def value_of(result: Mapping[str, Any], measure: Measure) -> dict[str, float | None]:
    found: Any = result["to_teacher"]
    for name in measure.path:
        found = found[name]
    return dict(found)


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Estimate]]:
    """{arm: an estimate for each measure}. Over the seeds where there are several; of a single run, over the prompts."""
    found = {}
    for arm in ARMS:
        own = [result for result in results if result["arm"] == arm]
        if not own:
            continue
        found[arm] = [
            _single(value_of(own[0], m)) if len(own) == 1 else of_values([_single(value_of(r, m)).value for r in own])
            for m in MEASURES
        ]
    return found


def _single(value: Mapping[str, float | None]) -> Estimate:
    bounds = (math.nan if v is None else v for v in (value["value"], value["low"], value["high"]))
    return Estimate(*bounds)


def as_markdown(results: Sequence[Mapping[str, Any]], estimates: Mapping[str, Sequence[Estimate]]) -> str:
    """What was done, and the table."""
    recipe = results[0]["recipe"]
    seeds = max(sum(result["arm"] == arm for result in results) for arm in estimates)
    judged = results[0]["score"]["clips"]  # of a plan that has fewer rows than asked for, what it has
    minutes = {arm: [r["seconds"] / 60 for r in results if r["arm"] == arm] for arm in estimates}
    lines = [
        "# Ablation on the tiny world",
        "",
        f"Made by `accvideo ablate`: {recipe['updates']} updates of the student in every arm, batch {recipe['batch']}, "
        f"learning rate {recipe['lr']:g} (heads {recipe['head_lr']:g}), {recipe['trajectories']} trajectories, up to {seeds} "
        f"seeds, judged on {judged} prompts. In brackets 95 % intervals: over the seeds (Student), or over the prompts "
        "where there is a single run. Distances and errors are those of the clean end, key 0; energies and diversity are over "
        "the teacher's.",
        "",
        f"| Arm | {' | '.join(m.title for m in MEASURES)} | minutes |",
        "|---" * (len(MEASURES) + 2) + "|",
    ]
    for arm, row in estimates.items():
        cells = [_cell(estimate, measure) for estimate, measure in zip(row, MEASURES, strict=True)]
        lines.append(f"| {ARMS[arm].what} | {' | '.join(cells)} | {sum(minutes[arm]) / len(minutes[arm]):.1f} |")
    return "\n".join(lines) + "\n"


def _cell(estimate: Estimate, measure: Measure) -> str:
    if math.isnan(estimate.value):
        return "-"
    low, high = estimate.low, estimate.high
    if measure.form.endswith("%"):  # Student's interval knows nothing of a share's ends
        low, high = max(low, 0.0), min(high, 1.0)
    return f"{estimate.value:{measure.form}} ({low:{measure.form}} to {high:{measure.form}})"


def draw(path: Path, results: Sequence[Mapping[str, Any]], estimates: Mapping[str, Sequence[Estimate]]) -> None:
    """A panel for each measure: arms below one another, each seed a dot, the mean with its interval; dashed what is perfect. An
    arm far from all others is told by a number at the edge: else it alone would be seen."""
    columns = 3
    rows = math.ceil(len(MEASURES) / columns)
    figure = plots.new_figure(15, 1.2 + rows * (0.9 + 0.27 * len(estimates)))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    names = list(estimates)
    for number, measure in enumerate(MEASURES):
        axes = plots.bare(grid[number // columns][number % columns], measure.title)
        own = [estimates[arm][number] for arm in names]
        left, right = _span([bound for e in own for bound in (e.value, e.low, e.high)], measure.ideal)
        axes.set_xlim(left, right)
        for place, arm in enumerate(names):
            estimate = estimates[arm][number]
            colour = plots.VERMILION if arm == "full" else plots.GREY if ARMS[arm].config is None else plots.BLUE
            reach = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
            axes.errorbar([estimate.value], [place], xerr=reach, fmt="o", color=colour, capsize=3)
            if not left <= estimate.value <= right:
                edge, side = (left, "left") if estimate.value < left else (right, "right")
                told = f"{estimate.value:{measure.form}}"
                axes.text(edge, place + 0.1, f"‹ {told}" if side == "left" else f"{told} ›", ha=side, va="top", color=colour)
            seeds = [value_of(r, measure)["value"] for r in results if r["arm"] == arm]
            if len(seeds) > 1:
                axes.plot(seeds, [place + 0.25] * len(seeds), ".", color=colour, alpha=0.5, markersize=4)
        if measure.ideal is not None:
            axes.axvline(measure.ideal, color="0.4", linestyle="--", linewidth=0.8)
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks(range(len(names)), [ARMS[arm].what for arm in names])
    axes.invert_yaxis()
    for empty in grid.flat[len(MEASURES) :]:
        empty.set_visible(False)
    plots.save(figure, path)


def _span(values: Sequence[float], ideal: float | None) -> tuple[float, float]:
    """The axis that shows these, but for what lies 20 times as far from their median as half of them do."""
    found = [value for value in values if math.isfinite(value)]
    middle = median(found)
    far = 20 * median(abs(value - middle) for value in found)
    near = [value for value in found if abs(value - middle) <= far] + ([] if ideal is None else [ideal])
    margin = 0.06 * (max(near) - min(near)) or 0.1
    return min(near) - margin, max(near) + margin
