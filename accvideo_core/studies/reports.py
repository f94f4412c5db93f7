"""The report of `accvideo evaluate --out`: JSON, Markdown and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_path
from ..tiny.clips import CLASSES
from . import plots
from .metrics import Estimate

NUMBERS, TABLES, PICTURE = FILES = ("report.json", "report.md", "report.png")
RATIOS = {  # of the model to the teacher: where it is found, and what it is called
    ("right_ratio",): "right clips",
    ("amplitude",): "amplitude, latent",
    ("temporal_energy", "latent"): "temporal difference, latent",
    ("temporal_energy", "pixels"): "temporal difference, pixels",
    ("high_frequency_energy", "latent"): "high frequencies, latent",
    ("high_frequency_energy", "pixels"): "high frequencies, pixels",
    ("diversity",): "diversity",
}
PER_KEY = {
    ("trajectory_error", "teacher_forced"): "trajectory error, teacher forced",
    ("trajectory_error", "self_rolled"): "trajectory error, self rolled",
    ("sliced_wasserstein", "model"): "sliced Wasserstein to the teacher",
    ("sliced_wasserstein", "floor"): "the same, teacher to teacher",
    ("sliced_wasserstein", "ratio"): "the ratio of the two",
    ("mmd", "model"): "MMD² to the teacher",
    ("mmd", "floor"): "the same, teacher to teacher",
}


def write(folder: Path, result: dict[str, Any], compared: dict[str, Any]) -> None:
    """report.json, report.md and report.png; `result` as printed, `compared` as `fidelity` gives it."""
    with atomic_path(folder / NUMBERS) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with atomic_path(folder / TABLES) as temporary:
        temporary.write_text(as_markdown(result, compared), encoding="utf-8")
    draw(folder / PICTURE, result, compared)


def pick(compared: dict[str, Any], path: Sequence[str]) -> Any:
    for name in path:
        compared = compared[name]
    return compared


def as_markdown(result: dict[str, Any], compared: dict[str, Any]) -> str:
    """Tables of everything, with 95 % intervals."""
    return "\n".join(_lines(result, compared)) + "\n"


def _lines(result: dict[str, Any], compared: dict[str, Any]) -> Iterator[str]:
    yield f"**{_named(result)}**, {result['dtype']}, {result['clips']} clips; 95 % intervals in brackets."
    yield ""
    yield "| Oracle | named right | clean | open: total variation to the teacher |"
    yield "|---|---|---|---|"
    shares = {name: _share(result[name], result[f"{name}_95"]) for name in ("right", "valid")}
    yield f"| all at once | {shares['right']} | {shares['valid']} | |"
    for kind in CLASSES:
        marks = [_share(result[kind][name], result["intervals_95"][kind][name]) for name in ("named_right", "clean")]
        yield f"| {kind} | {' | '.join(marks)} | {compared['open_tv'][kind] or '-'} |"
    yield f"| the teacher, all at once | {compared['right']['teacher']} | | |"
    yield ""
    yield "| Model over teacher | |"
    yield "|---|---|"
    for path, name in RATIOS.items():
        yield f"| {name} | {pick(compared, path) or '-'} |"
    yield ""
    keys = range(len(compared["mmd"]["model"]))
    yield f"| Key | {' | '.join(map(str, keys))} |"
    yield "|---" * (len(keys) + 1) + "|"
    for path, name in PER_KEY.items():
        yield f"| {name} | {' | '.join(map(str, pick(compared, path)))} |"


def _named(result: dict[str, Any]) -> str:
    return f"{result['model']}, {result['steps']} steps"


def _share(value: float | None, interval: Sequence[float]) -> str:
    return "-" if value is None else f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def draw(path: Path, result: dict[str, Any], compared: dict[str, Any]) -> None:
    """Per key, errors and distances with their floors; what the oracle sees; ratios to the teacher."""
    figure = plots.new_figure(14, 7.5)
    figure.suptitle(
        f"{result['model']}, {result['steps']} steps, against its teacher on {result['clips']} prompts; 95 % intervals"
    )
    axes = figure.subplots(2, 3)
    _by_key(
        plots.bare(axes[0][0], "trajectory error", "key (0 clean)", "of the distance the teacher went"),
        {
            "teacher forced": compared["trajectory_error"]["teacher_forced"],
            "self rolled": compared["trajectory_error"]["self_rolled"],
        },
    )
    for place, name, unit in ((1, "sliced_wasserstein", "latent units"), (2, "mmd", "squared")):
        title = {"sliced_wasserstein": "sliced Wasserstein distance", "mmd": "maximum mean discrepancy"}[name]
        series = {"model to teacher": compared[name]["model"], "teacher to teacher": compared[name]["floor"]}
        _by_key(plots.bare(axes[0][place], f"{title} per key", "key (0 clean)", unit), series)
    oracle = plots.bare(axes[1][0], "oracle", "", "share of clips")
    named = {"right": (result["right"], result["right_95"]), "valid": (result["valid"], result["valid_95"])}
    for kind in CLASSES:
        if result[kind]["named_right"] is not None:
            named[kind] = (result[kind]["named_right"], result["intervals_95"][kind]["named_right"])
        named[f"{kind}\nclean"] = (result[kind]["clean"], result["intervals_95"][kind]["clean"])
    _bars(oracle, {name: Estimate(value, *interval) for name, (value, interval) in named.items()})
    oracle.axhline(compared["right"]["teacher"].value, color=plots.VERMILION, linestyle="--", label="teacher, right")
    oracle.legend(loc="center right")
    shares = plots.bare(axes[1][1], "open attributes", "", "total variation to the teacher")
    shares.set_ylim(0, 1)
    _bars(shares, {kind: estimate for kind, estimate in compared["open_tv"].items() if estimate})
    ratios = plots.bare(axes[1][2], "model over teacher", "", "ratio")
    _bars(ratios, {name.replace(", ", "\n"): found for p, name in RATIOS.items() if (found := pick(compared, p))})
    ratios.axhline(1, color=plots.VERMILION, linestyle="--")
    plots.save(figure, path)


def _by_key(axes: Any, series: dict[str, list[Estimate]]) -> None:
    for (label, estimates), colour in zip(series.items(), (plots.BLUE, plots.GREY), strict=True):
        values = [e.value for e in estimates]
        axes.errorbar(range(len(values)), values, _reach(estimates), color=colour, label=label, capsize=3)
    axes.set_xticks(range(len(values)))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.legend(frameon=False)


def _bars(axes: Any, named: dict[str, Estimate]) -> None:
    found = list(named.values())
    axes.bar(range(len(found)), [e.value for e in found], yerr=_reach(found), color=plots.SKY, capsize=3)
    axes.set_xticks(range(len(found)), list(named), rotation=60, ha="right", fontsize=8)


def _reach(estimates: Sequence[Estimate]) -> list[list[float]]:
    """How far intervals reach below and above their values, as matplotlib takes it."""
    return [[max(0.0, e.value - e.low) for e in estimates], [max(0.0, e.high - e.value) for e in estimates]]
