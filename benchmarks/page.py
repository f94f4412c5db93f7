"""docs/benchmarks.md and its picture, from what the benchmarks wrote into docs/benchmarks.

    python benchmarks/page.py

Each section belongs to one file; a benchmark that was never run has none. Nothing is typed in: a figure on the page stands
in a file.
"""

from __future__ import annotations

import json
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

DATA = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
WIDTH = 130
PICTURE = ROOT / "docs" / "images" / "forward.png"

HEAD = """# Benchmarks

Every figure is made by a script in `benchmarks/`, with its peers measured in the same run, in turn; ratios and their intervals
are what to quote, single times belong to one machine. The JSON in `docs/benchmarks` holds each run, and `python
benchmarks/page.py`
makes this page of it. Machines are lent, small and not the same from run to run; each section says what it ran on.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: int = 1) -> str:
    """Markdown; columns from number `right` on are aligned to the right."""
    lines = [head, ["---" if i < right else "--:" for i in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def between(interval: Sequence[float], digits: int = 2) -> str:
    return " to ".join(f"{value:.{digits}f}" for value in interval)


def speedup(d: dict[str, Any]) -> str:
    seconds, step, outside = d["seconds"], d["network_step_seconds"], d["outside_network"]
    rows = [
        (which, steps, f"{seconds[which]:.2f}", f"{1000 * step[which]:.0f}", f"{100 * outside[which]:.2f} %")
        for which, steps in (("teacher", 50), ("student", 5))
    ]
    one = d["prompt_to_mp4"]
    return f"""## Teacher against student

`python benchmarks/speedup.py --json docs/benchmarks/speedup.json`

{table(("", "Steps", "Sampling, s", "ms a step", "Outside the network"), rows)}

Speed-up of sampling **{d["speedup"]:.2f}** (95 % interval {between(d["speedup_95"])}; target 9.5). Time outside the network
{100 * max(outside.values()):.2f} % (target 2 %). The bundled models, {d["batch"]} clips a batch, {d["repeats"]} paired repeats,
{threads(d["threads"])} of a CPU.

One prompt to MP4 at batch 1, seconds: text {one["student"]["text"]:.3f}, sampling {one["teacher"]["sampling"]:.3f} (teacher) or
{one["student"]["sampling"]:.3f} (student), VAE {one["student"]["vae"]:.3f}, encoding {one["student"]["encoding"]:.3f}.
"""


def threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def forward(d: dict[str, Any]) -> str:
    rows = []
    for row in d["rows"]:
        median = row["median_seconds"]
        best = row["ours"]
        rows.append(
            (
                row["size"],
                row["dtype"],
                row["tokens"],
                f"{1e3 * median['ours (eager)']:.0f}",
                "" if best == "ours (eager)" else f"{1e3 * median[best]:.0f}",
                row["faster_peer"],
                f"{1e3 * median[row['faster_peer']]:.0f}",
                f"**{row['ratio']:.2f}** ({between(row['interval'])})",
                f"{row['ratio_eager']:.2f}" if "ratio_eager" in row else "",
                f"{100 * row['floor_seconds'] / median[best]:.0f} %",
                f"{row['memory_over_required']:.2f}",
            )
        )
    head = (
        "Size",
        "dtype",
        "Tokens",
        "Ours, ms",
        "Compiled, ms",
        "Faster peer",
        "Its ms",
        "Ratio (95 % interval)",
        "Ours not compiled",
        "Of the floor",
        "Memory",
    )
    machine = d["machine"]
    return f"""## The forward pass

`python benchmarks/dit_forward.py --sizes {" ".join(dict.fromkeys(row["size"] for row in d["rows"]))}
--repeats {d["repeats"]} --json docs/benchmarks/dit_forward.json`

Our transformer against ComfyUI's native one and diffusers' on equal weights and inputs, each in a process of its own and in its
fastest setting: with compiled blocks or without, ComfyUI in each of its attentions. The ratio is the faster peer's time over
ours:
above 1 we are faster. *Of the floor* is the share of the rate of one large matrix product that the blocks' multiplications
reach.
*Memory* is what a call takes beyond weights and inputs over what the widest layer's shapes require (nine numbers a token and
channel). The kernel that bfloat16 takes on some CPUs adds a tile of scores, 512 queries by all keys; that and the table of
rotations are two of these numbers in the 384 channels of 1k to 16k, and a quarter of one in the full model's 3 072, whose step
a test holds to 2 % of what its shapes require.

{table(head, rows)}

![Ratio to the faster peer and share of the floor by tokens](images/{PICTURE.name})

{threads(machine["threads"]).capitalize()} of a CPU ({machine["device"]}), {d["repeats"]} paired repeats. Goals: 0.97 in
float32, 1.0
in bfloat16.
"""


def draw_forward(d: dict[str, Any], path: Path) -> None:
    """Ratios with their intervals, and shares of the floor, over tokens."""
    from accvideo_core.studies import plots

    figure = plots.new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    plots.bare(left, "faster peer's time over ours", "tokens")
    plots.bare(right, "share of one matrix product's rate, %", "tokens")
    for dtype, colour in (("float32", plots.BLUE), ("bfloat16", plots.VERMILION)):
        rows = sorted((r for r in d["rows"] if r["dtype"] == dtype), key=lambda r: r["tokens"])
        tokens, ratios = [r["tokens"] for r in rows], [r["ratio"] for r in rows]
        below = [max(0.0, a - r["interval"][0]) for a, r in zip(ratios, rows, strict=True)]
        above = [max(0.0, r["interval"][1] - a) for a, r in zip(ratios, rows, strict=True)]
        left.errorbar(tokens, ratios, yerr=[below, above], marker="o", capsize=3, color=colour, label=dtype)
        shares = [100 * r["floor_seconds"] / r["median_seconds"][r["ours"]] for r in rows]
        right.plot(tokens, shares, marker="o", color=colour, label=dtype)
    left.axhline(1, color=plots.GREY, linewidth=0.8)
    left.set(xscale="log")
    right.set(xscale="log", ylim=(0, 100))
    left.legend(frameon=False)
    plots.save(figure, path)


def lossy(d: dict[str, Any]) -> str:
    rows = []
    for row in d["rows"]:
        right = f"{100 * row['right']:.1f} % ({between([100 * x for x in row['right_95']], 0)})"
        difference = "" if row["difference_95"] is None else between([100 * x for x in row["difference_95"]], 1) + " points"
        rows.append((row["mode"], row["model"], right, difference, f"{100 * row['latent_error']:.1f} %"))
    return f"""## Lossy modes

`python benchmarks/lossy.py --json docs/benchmarks/lossy.json`

What is chosen by name and never by default, against exact arithmetic on the tiny world: {d["rows"][0]["clips"]} held-out
prompts judged by
the oracle, and the relative error of the clean latents, which the steps' own errors add up to. The speed is a GPU's to show.

{table(("Mode", "Model", "Right (95 % interval)", "Over exact, paired 95 % interval", "Latent error"), rows, 2)}

{d["note"]}
"""


def extract(d: dict[str, Any]) -> str:
    rows = []
    for name, m in d["matrices"].items():
        over = [m[f"{which}residual"] / m["optimum"] for which in ("", "gram_", "comfyui_")]
        times = (f"{m['seconds']:.2f}", f"{m['gram_seconds']:.1f}", f"{m['comfyui_seconds']:.1f}")
        rows.append((name, *times, f"{m['comfyui_seconds'] / m['seconds']:.1f}", *(f"{value:.4f}" for value in over)))
    head = (
        "Difference",
        "Ours, s",
        "Gram, s",
        "ComfyUI's, s",
        "Speed-up",
        "Ours / optimum",
        "Gram / optimum",
        "ComfyUI's / optimum",
    )
    s = d["settings"]
    return f"""## Extracting a LoRA

`python benchmarks/extract.py --json docs/benchmarks/extract.json`

One module of the full model, {s["rows"]} x {s["columns"]}, at rank {s["rank"]}, against ComfyUI's algorithm (full SVD,
factors clamped at the
0.99 quantile) and against our own exact way (Gram matrix and eigenvectors). The residual is given over the optimum that a
full SVD
reaches.

{table(head, rows)}

All 343 matrices of the 13 B model, projected from each shape's own time: {d["model"]["seconds"]:.0f} s.
{threads(s["threads"]).capitalize()}
of an AVX2 machine.
"""


def merge(d: dict[str, Any]) -> str:
    half, full = d["half"], d["full"]
    rows = []
    for name, f in half["factors"].items():
        wrong = (f"{f['wrong'][which]:.1e}" for which in ("ours", "in stored dtypes", "in fp32"))
        over = f"{f['ratio']:.2f} ({between(f['interval'])})"
        rows.append((name, f"{statistics.median(f['seconds']):.1f}", over, f"{f['peak_rss'] / 1e9:.2f}", *wrong))
    copy = statistics.median(half["copy_seconds"])
    return f"""## Merging a LoRA

`python benchmarks/merge.py --full --json docs/benchmarks/merge.json`

A bf16 checkpoint of {half["bytes"] / 1e9:.1f} GB (half the blocks of the 13 B model), a LoRA of rank {d["settings"]["rank"]}
on every Linear of
the blocks, against a plain
copy of the same file with fsync ({copy:.1f} s, {half["bytes"] / 1e9 / copy:.2f} GB/s: the disk's rate, which varied by a
quarter during the run).
"Wrong" is the
share of values that are not the float64 result rounded; beside it what musubi-tuner's arithmetic in the stored dtypes, and
ComfyUI's in fp32, get wrong on the same tensors.

{table(("Factors", "Merge, s", "Over a copy (95 % interval)", "Peak RSS, GB", "Wrong", "In stored dtypes", "In fp32"), rows)}

All {full["bytes"] / 1e9:.1f} GB of the 13 B model, streamed from a sparse file: {full["seconds"]:.0f} s, peak RSS
{full["peak"] / 1e9:.2f} GB,
flat along the way.
"""


def load(d: dict[str, Any]) -> str:
    rows = []
    for found in d["loads"]:
        for way in ("mapped", "copied"):
            for who, title in (("ours", "AccVideo"), ("safetensors", "safetensors")):
                m = found[f"{who} {way}"]
                over = "" if who == "ours" else f"{m['ratio']:.2f} ({between(m['interval'])})"
                peak = f"{m['peak_above_start_over_file']:.2f}"
                rows.append((found["cache"], f"{title} {way}", f"{m['seconds']:.2f}", f"{m['gb_per_s']:.2f}", peak, over))
    head = ("Cache", "Loader", "s", "GB/s", "Peak over the file's size", "safetensors' time over ours (95 % interval)")
    stream = d["stream"]
    return f"""## Loading a checkpoint

`python benchmarks/load.py --json docs/benchmarks/load.json`

{d["bytes"] / 1e9:.1f} GB of bf16 in the network's names into CPU tensors, every load in a process of its own. *Mapped*
tensors lie over the file,
which is what safetensors' `load_file` does; each is then touched page by page. *Copied* ones have memory of their own, what
ours
gives unless asked to map.

{table(head, rows, 2)}

{d["repeats"]["cold"]} paired repeats cold, in which each loader came after the same other one, and {d["repeats"]["warm"]}
warm, in which each came
after every other; the disk
gives 0.4 to 1.1 GB/s as it likes. Warm and mapped, nothing is read: AccVideo takes about 10 ms longer to check every name,
shape and
offset, which is less than the same load varies by from run to run. Copying takes half of safetensors' memory;
1.0 is within both intervals of its time.

Streaming all {stream["bytes"] / 1e9:.1f} GB of the 13 B model key by key: {stream["seconds"]:.1f} s, peak RSS
{stream["rss"] / 1e9:.2f} GB (goal
below 1 GB).
"""


def synvid_read(d: dict[str, Any]) -> str:
    rows = []
    for m in d["reading"]:
        over = "1" if m["way"] == "disk" else f"{m['ratio']:.2f} ({between(m['interval'])})"
        rows.append((m["way"], m["threads"], f"{m['gb_per_s']:.2f}", over))
    memory = d["memory"]
    return f"""## Reading SynVid

`python benchmarks/synvid_read.py --json docs/benchmarks/synvid_read.json`

Pairs of key latents at random from {d["samples"]} samples of the medium split's shape ({d["bytes"] / 1e9:.0f} GB), the page
cache emptied
before every round, over
the disk's own rate for plain reads of such blocks ({d["block"] / 1e6:.2f} MB) in the same round: `keys` is what the store
reads, `segment` what
`SynVidDataset` gives (float32, with its text), `mapped` a memory map for comparison.

{table(("Way", "Threads", "GB/s", "Over the disk's own (95 % interval)"), rows)}

Memory over an epoch: {memory["early"] / 1e6:.0f} MB after a tenth of it, at most {memory["late"] / 1e6:.0f} MB later.
"""


def capture(d: dict[str, Any]) -> str:
    tiny, size = d["runs"][0]["results"][:2]
    rows = []
    titles = (
        "tiny teacher, 64 trajectories a batch, 5 steps",
        "latents of 16 x 24 x 68 x 120, 50 steps of 0.8 s",
        "the same, 50 steps of 3.11 s, beside training",
    )
    for title, run in zip(titles, d["runs"], strict=True):
        m = run["results"][0]
        seconds = m["part"] == "stand-in"
        unit, scale, digits = ("s", 1, 2) if seconds else ("ms", 1000, 1)
        limits = between([scale * x for x in m["extra_interval"]], digits)
        added = f"{scale * m['extra_seconds_a_trajectory']:.{digits}f} {unit} ({limits})"
        whole, *limits = m.get("of_real_trajectory") or m["at_real_step"]
        share = f"{100 * whole:.2f} % ({between([100 * x for x in limits])} %)"
        digits = 1 if seconds else 2
        plain, captured = (f"{m[which]:.{digits}f}" for which in ("plain_seconds", "capture_seconds"))
        rows.append((title, run["repeats"], plain, captured, added, share))
    assert tiny["part"] == "tiny" and size["part"] == "bytes"
    head = ("", "Repeats", "Plain, s", "Captured, s", "Added a trajectory (95 % interval)", "Of a whole trajectory")
    return f"""## Capturing

```
python benchmarks/capture.py --only tiny bytes --steps 5 --repeats 50       # OMP_NUM_THREADS=1
python benchmarks/capture.py --only stand-in --batches 1 --step-seconds 0.8
```

A capture keeps the same five latents however many steps a trajectory has and however long they take, so what it adds is
measured on
short trajectories, where it stands out from what the machine varies by.

{table(head, rows)}

A whole trajectory has 50 steps, the tiny teacher's as long as the measured ones, those of the medium split 3.11 s, which is
computed
from an H200's measured rate of plain matrix products, so the shortest a step could take (`accvideo budget` reckons with 3.7 s).
Most of what is added is waiting for the disk at the end, and only where no next trajectory follows to hide it. Goal:
the upper
end at most 2 %. Bytes on disk are {size["ratio"]:.3f} times the information (goal 1.02).
"""


def train_step(d: dict[str, Any]) -> str:
    told = d["arguments"]
    rows = []
    for r in d["rows"]:
        rate = 1e3 * r["tflop"] / r["seconds"]
        spread = f"{r['seconds']:.2f} ({between(r['spread'])})"
        rows.append((r["variant"], spread, f"{r['first_seconds']:.1f}", f"{r['peak_gb']:.2f}", f"{rate:.0f}"))
    parts = d["rows"][0]["components"]
    whole = sum(parts.values())
    shares = [(name, f"{100 * s / whole:.1f} %") for name, s in sorted(parts.items(), key=lambda item: -item[1])]
    first = d["rows"][0]
    return f"""## An iteration of training

`python benchmarks/train_step.py --size {told["size"]} --batch {told["batch"]} --json docs/benchmarks/train_step.json`

One iteration of Algorithm 1: {told["segments"]} keys, {told["batch"]} trajectories, the trajectory and the adversarial loss,
heads and optimizers; {first["parameters"] / 1e6:.1f} M parameters in {first["precision"]}. Memory is the process's, PyTorch
itself included.

{table(("Variant", "s (least to most)", "First, s", "Peak, GB", "Model GFLOP/s"), rows)}

Where it goes, in the first variant:

{table(("Part", "Share"), shares)}

{threads(d["threads"]).capitalize()} of a CPU, {told["repeats"]} iterations each. Compiling and recomputing are for networks
that fill a GPU. `--size 1b`, with its utilisation, waits for one.
"""


def vae_decode(d: dict[str, Any]) -> str:
    ways = ("ours", "VAE Decode", "VAE Decode (Tiled)")

    def computed(row: dict[str, Any], way: str) -> str:
        return "out of memory" if row[way] is None else f"{row[way]:.2f} ({row[way + ' tiles']})"

    newest = max(d["counted"], key=lambda version: tuple(map(int, version.split("."))))
    counted = [(row["video"], row["gigabytes"], *(computed(row, way) for way in ways)) for row in d["counted"][newest]]
    timed = []
    for version, found in d["timed"].items():
        for way in ways:
            m = found[way]
            ratio = "" if way == "ours" else f"{m['ratio']:.2f} ({between(m['interval'])})"
            errors = (f"{100 * m[name]:.1f} %" for name in ("error", "largest", "flicker"))
            seconds = f"{statistics.median(m['seconds']):.1f}"
            timed.append((version, way, f"{m['computed']:.2f}", seconds, ratio, *errors))
    s = d["settings"]
    return f"""## Decoding

`python benchmarks/vae_decode.py --repeats {s["repeats"]} --json docs/benchmarks/vae_decode.json`

AccVideo VAE Decode beside ComfyUI's two nodes. First the latent places each decodes over those of the video, and in how many
tiles, by the memory that is free and the estimate of ComfyUI {newest} for HunyuanVideo's VAE; the nodes' own code was run, with a
network that only counts. VAE Decode (Tiled) has its defaults.

{table(("Video", "GB free", "AccVideo VAE Decode", "VAE Decode", "VAE Decode (Tiled)"), counted, 2)}

And timed: the VAE's network at {s["width"]} instead of 128 channels with random weights, a latent of
{" x ".join(map(str, s["shape"]))}, memory for {" x ".join(map(str, s["fits"]))} of it, VAE Decode (Tiled) with tiles of
{s["tile"]} pixels. The errors are against the whole decoded at once, in its standard deviations: of all values, the largest, and
of what changes from frame to frame.

{table(("ComfyUI", "Way", "Computed", "s", "Its time over ours (95 % interval)", "Error", "Largest", "Flicker"), timed, 2)}

{threads(d["threads"]).capitalize()} of a CPU, {s["repeats"]} paired repeats.
"""


NO_GPU = """## On a GPU

`make bench-gpu` runs everything that wants one within nine minutes and writes into `out/bench-gpu`: the 13 B model's step at
544 x 960 x 93 and 720 x 1280 x 129 beside diffusers and ComfyUI, 5 steps against 50, the attention kernels, a training
iteration with
its utilisation, and the growth with tokens. No GPU was at hand where this was built, so none of it has been measured; `python
benchmarks/gpu.py --device cpu` has gone through the same parts in small sizes.
"""

SECTIONS = {
    "speedup": speedup,
    "dit_forward": forward,
    "lossy": lossy,
    "vae_decode": vae_decode,
    "extract": extract,
    "merge": merge,
    "load": load,
    "synvid_read": synvid_read,
    "capture": capture,
    "train_step": train_step,
}


def read(name: str) -> dict[str, Any] | None:
    path = DATA / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def wrapped(text: str) -> str:
    """Its paragraphs filled to the width of the other documents; tables, titles, pictures and code as they are."""
    blocks, code = [], False
    for block in text.split("\n\n"):
        plain = not code and not block.lstrip().startswith(("|", "#", "!", "```"))
        code ^= block.count("```") % 2 == 1
        blocks.append(
            textwrap.fill(" ".join(block.split()), WIDTH, break_long_words=False, break_on_hyphens=False) if plain else block
        )
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def page() -> str:
    """The whole page."""
    made = [HEAD]
    for name, section in SECTIONS.items():
        if (data := read(name)) is not None:
            made.append(section(data))
        if name == "lossy":
            made.append(NO_GPU)
    return wrapped("\n".join(made))


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    if (data := read("dit_forward")) is not None:
        draw_forward(data, PICTURE)
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
