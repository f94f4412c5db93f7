"""The curves of distillation runs beside one another, from what they wrote for TensorBoard.

    python docs/curves.py RUN [RUN ...] --titles "a title" ... -o docs/images/curves.png

docs/training.md says which runs its picture shows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.studies import plots

ROWS = (  # of panels: what each shows, by key; whether its axis is logarithmic
    ("trajectory/", "trajectory loss", True),
    ("logits/", "logits: real solid, fake dashed, rejected dotted", False),
    ("heads/right/", "share a head gets right", False),
    ("gradient/ratio/", "adversarial over trajectory gradient", True),
    ("validation/rolled/", "held out: distance to the teacher's key", True),
)
COLOURS = (plots.VERMILION, plots.ORANGE, plots.GREEN, plots.SKY, plots.BLUE)  # key 0, the clean one, first


def scalars(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """{name: (iterations, values)} of a run's folder."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={SCALARS: 0}).Reload()
    names = events.Tags()[SCALARS]
    if not names:
        raise SystemExit(f"{run} has no TensorBoard scalars; was it made with --no-tensorboard?")
    return {name: ([e.step for e in events.Scalars(name)], [e.value for e in events.Scalars(name)]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of accvideo distill, a column each")
    parser.add_argument("--titles", nargs="+", help="of the columns; default: the folders' names")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the PNG")
    args = parser.parse_args()
    titles = args.titles or [run.name for run in args.runs]
    if len(titles) != len(args.runs):
        raise SystemExit(f"{len(titles)} titles for {len(args.runs)} runs; give one each")
    figure = plots.new_figure(4.8 * len(args.runs), 2.1 * len(ROWS))
    grid = figure.subplots(len(ROWS), len(args.runs), sharey="row", sharex="col", squeeze=False)
    for column, (run, title) in enumerate(zip(args.runs, titles, strict=True)):
        found = scalars(run)
        for row, (prefix, what, logarithmic) in enumerate(ROWS):
            x = "iteration" if row == len(ROWS) - 1 else ""
            axes = plots.bare(grid[row][column], f"{title}\n{what}" if row == 0 else what, x)
            for name, (steps, values) in found.items():
                if name.startswith(prefix):
                    key = int(name.rpartition("_")[2])
                    style = {"fake": "--", "rejected": ":"}.get(name.split("/")[1], "-")
                    label = f"key {key}" if style == "-" else None
                    axes.plot(steps, values, style, color=COLOURS[key % len(COLOURS)], linewidth=1.1, label=label)
            if logarithmic:
                axes.set_yscale("log")
    grid[0][0].legend(fontsize=7, loc="upper right")
    plots.save(figure, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
