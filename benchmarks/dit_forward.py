"""Our forward pass against ComfyUI's native HunyuanVideo and diffusers', on equal weights and inputs.

    python benchmarks/dit_forward.py [--comfyui ~/comfy/ComfyUI] [--json docs/benchmarks/dit_forward.json]
    python benchmarks/dit_forward.py --sizes 1k 4k 16k --repeats 20            # longer videos
    python benchmarks/dit_forward.py --device cuda --sizes 13b-544p 13b-720p   # the full model, on a GPU

Every implementation runs in a process of its own (ComfyUI's under its checkout's environment) in several settings: eager and
with compiled blocks, ComfyUI with each of its attentions too; the fastest stands for it. A peer that is not installed is named
and left out. On a CPU all processes stay and wait while another is timed: repeats go round all of them, in another order each
time, so that whatever else the machine does meets all alike. A GPU may hold one 13 B model only, so there they come and go
one after the other. The ratio is the faster peer's time over ours: above 1 we are faster. Its interval is the 95 % bootstrap
interval, of the median of paired ratios or, on a GPU, of the ratio of medians.

The floor is the time that the multiplications of the blocks alone would take at the rate of one large matrix product, measured
in the same run. Memory is what a call needs beyond weights and inputs, counted tensor by tensor (on a GPU by the allocator),
over the nine numbers a token and channel that the widest layer requires. Lossy settings are listed and never compared.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from paired import bootstrap
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from synthetic import SIZES, step_flops, tokens_of  # noqa: E402

DTYPES = ("float32", "bfloat16")
COMFYUI_ATTENTION = {
    "pytorch": ["--use-pytorch-cross-attention"],
    "sub-quadratic": [],
    "split": ["--use-split-cross-attention"],
}
TARGETS = {"float32": 0.97, "bfloat16": 1.0}
SETTING_TRIALS = 3  # rounds over all settings before the fastest is chosen
SHORTEST = 0.1  # seconds; quicker calls are repeated inside one timing
PATIENCE = 3  # trials of a setting that takes so many times the fastest's end after the first


@dataclass
class Args:
    """Measure the forward pass of three implementations and print a table."""

    comfyui: list[Path] = field(default_factory=lambda: [Path("~/comfy/ComfyUI")])
    """ComfyUI checkouts; each needs its environment beside it as <checkout>-venv (tests/comfyui/setup_envs.py makes it)."""
    repeats: int = 25
    """Repeats per row."""
    threads: int = os.cpu_count() or 1
    """Threads of every implementation."""
    sizes: list[str] = field(default_factory=lambda: ["tiny", "small", "medium"])
    """Which rows, as named in synthetic.py."""
    dtypes: list[str] = field(default_factory=lambda: list(DTYPES))
    """Which dtypes: float32, bfloat16."""
    device: str = "cpu"
    """cpu or cuda."""
    compile: bool = True
    """Also measure every implementation with compiled blocks."""
    lossy: list[str] = field(default_factory=list)
    """Lossy attention kernels of ours to measure beside, such as sage2."""
    attentions: list[str] = field(default_factory=lambda: list(COMFYUI_ATTENTION))
    """ComfyUI's attention settings to try."""
    json: Path | None = None
    """Also write the results here."""


class Setting(NamedTuple):
    """One way to run one implementation."""

    family: str
    name: str
    python: str
    arguments: tuple[str, ...]
    compile: bool = False
    attention: str | None = None
    lossy: bool = False

    @property
    def title(self) -> str:
        return f"{self.family} ({self.name})"


class Worker:
    """A process that holds one implementation."""

    def __init__(self, setting: Setting, args: Args) -> None:
        kind, *rest = setting.arguments
        worker = str(Path(__file__).with_name("dit_worker.py"))
        command = [setting.python, worker, kind, str(args.threads), args.device, *rest]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        self.setting = setting
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        self.torch = self._answer()["torch"]

    def load(self, size: str, dtype: str) -> dict[str, Any]:
        return self.ask(load=size, dtype=dtype, compile=self.setting.compile, attention=self.setting.attention)

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise WorkerError(f"{self.setting.title} ended: {self.errors.read()[-3000:]}")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class WorkerError(RuntimeError):
    """A process ended before its time."""


def settings(args: Args) -> list[Setting]:
    """What there is to measure here."""
    ways = [("eager", False), ("compiled", True)] if args.compile else [("eager", False)]
    found = [Setting("ours", name, sys.executable, ("ours",), compiled) for name, compiled in ways]
    found += [Setting("ours", kernel, sys.executable, ("ours",), False, kernel, True) for kernel in args.lossy]
    try:
        import diffusers  # noqa: F401

        found += [Setting("diffusers", name, sys.executable, ("diffusers",), compiled) for name, compiled in ways]
    except ImportError:
        print("diffusers is not installed and is left out")
    for checkout in (path.expanduser() for path in args.comfyui):
        beside = checkout.with_name(checkout.name + "-venv") / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        python = str(beside) if beside.is_file() else sys.executable
        if not (checkout / "main.py").is_file() or (python == sys.executable and args.device == "cpu"):
            print(f"{checkout} is left out: no ComfyUI with an environment beside it (tests/comfyui/setup_envs.py makes it)")
            continue
        for attention in args.attentions:
            given = ("comfyui", str(checkout), *COMFYUI_ATTENTION[attention])
            found.append(Setting(checkout.name, attention, python, given))
        if args.compile:
            given = ("comfyui", str(checkout), *COMFYUI_ATTENTION["pytorch"])
            found.append(Setting(checkout.name, "pytorch, compiled", python, given, True))
    return found


def check_equal(worker: Worker, reference: torch.Tensor | None, dtype: str) -> torch.Tensor:
    """The worker's velocity. Equal work is a condition of the comparison; in bf16 each errs by about 1 %."""
    with tempfile.TemporaryDirectory() as folder:
        worker.ask(save=f"{folder}/velocity")
        velocity = load_file(f"{folder}/velocity")["velocity"]
    if reference is not None and not worker.setting.lossy:
        error = float((velocity - reference).norm() / reference.norm())
        if not error < (2e-5 if dtype == "float32" else 0.05):
            raise SystemExit(f"{worker.setting.title} gives another velocity (relative error {error:.1e}); nothing is compared")
    return velocity


def measure_paired(workers: list[Worker], size: str, dtype: str, repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """({setting: seconds of each repeat}, what was seen once): the best setting of each family timed in turn with the others'."""
    reference, seen = None, {}
    for worker in workers:
        seen[worker.setting.title] = worker.load(size, dtype)
        reference = check_equal(worker, reference, dtype) if reference is None else reference
        check_equal(worker, reference, dtype)
    trials: dict[Worker, list[float]] = {worker: [] for worker in workers}
    for _ in range(SETTING_TRIALS):
        fastest = min((min(times) for times in trials.values() if times), default=float("inf"))
        for worker, times in trials.items():
            if not times or min(times) < PATIENCE * fastest:
                times.append(worker.ask(run=1)["seconds"])
    quick = {worker: statistics.median(times) for worker, times in trials.items()}
    families: dict[str, list[Worker]] = {}
    for worker in (w for w in workers if not w.setting.lossy):
        families.setdefault(worker.setting.family, []).append(worker)
    timed = [min(group, key=lambda worker: quick[worker]) for group in families.values()]
    eager = next(w for w in workers if w.setting.family == "ours")
    timed += [w for w in (eager, *(w for w in workers if w.setting.lossy)) if w not in timed]
    inner = max(1, round(SHORTEST / min(quick.values())))
    shuffle = random.Random(0)
    seconds: dict[str, list[float]] = {worker.setting.title: [] for worker in timed}
    for _ in range(repeats):
        for worker in shuffle.sample(timed, len(timed)):
            seconds[worker.setting.title].append(worker.ask(run=inner)["seconds"])
    once = {
        "settings_tried_seconds": {w.setting.title: t for w, t in quick.items()},
        "first_call_seconds": {title: told["first"] for title, told in seen.items()},
        "kernel": seen[eager.setting.title]["kernel"],
        "memory": eager.ask(memory=True),
        "tflops": rate(eager, size, dtype),
    }
    return seconds, once


def measure_alone(chosen: list[Setting], args: Args, size: str, dtype: str) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The same, one process after the other. A setting that fails, for lack of memory say, is named and left out."""
    seconds: dict[str, list[float]] = {}
    once: dict[str, Any] = {"first_call_seconds": {}}
    reference = None
    for setting in chosen:
        try:
            worker = Worker(setting, args)
            told = worker.load(size, dtype)
            velocity = check_equal(worker, reference, dtype)
            reference = velocity if reference is None else reference
            once["first_call_seconds"][setting.title] = told["first"]
            seconds[setting.title] = [worker.ask(run=1)["seconds"] for _ in range(args.repeats)]
            if setting.title == "ours (eager)":
                once |= {"kernel": told["kernel"], "memory": worker.ask(memory=True), "tflops": rate(worker, size, dtype)}
            worker.close()
        except WorkerError as error:
            print(error, file=sys.stderr)
            if setting.title == "ours (eager)":
                raise SystemExit("ours did not run; nothing is compared") from error
    return seconds, once


def rate(worker: Worker, size: str, dtype: str) -> float:
    """TFLOP/s of one large product, the best of several sizes."""
    sides = (4096, 8192) if SIZES[size][0].hidden_size > 1000 else (512, 1024, 2048)
    return max(worker.ask(rate=side, dtype=dtype)["tflops"] for side in sides)


def interval(theirs: Sequence[float], ours: Sequence[float], paired: bool) -> tuple[float, float, float]:
    """Ratio of times and its 95 % interval."""
    if paired:
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        return statistics.median(ratios), *bootstrap(ratios)
    rng = random.Random(0)
    drawn = sorted(
        statistics.median(rng.choices(theirs, k=len(theirs))) / statistics.median(rng.choices(ours, k=len(ours)))
        for _ in range(4000)
    )
    return statistics.median(theirs) / statistics.median(ours), drawn[100], drawn[3900]


def row_of(size: str, dtype: str, seconds: dict[str, list[float]], once: dict[str, Any], lossy: set[str], paired: bool) -> Any:
    """What is told of one size and dtype."""
    median = {title: statistics.median(times) for title, times in seconds.items()}
    exact = {title: time for title, time in median.items() if title not in lossy}
    mine = min((t for t in exact if t.startswith("ours")), key=exact.__getitem__)
    theirs = [t for t in exact if not t.startswith("ours")]
    flops = sum(step_flops(size).values())
    tokens, width = tokens_of(size), SIZES[size][0].hidden_size
    bytes_of = 4 if dtype == "float32" else 2
    row = {
        "size": size,
        "dtype": dtype,
        "tokens": tokens,
        "median_seconds": median,
        "ours": mine,
        "tflop": flops / 1e12,
        "floor_seconds": flops / 1e12 / once["tflops"],
        "memory_over_required": once["memory"]["peak"] / (9 * tokens * width * bytes_of),
        **once,
        "seconds": seconds,
    }
    if theirs:
        peer = min(theirs, key=exact.__getitem__)
        ratio, *limits = interval(seconds[peer], seconds[mine], paired)
        row |= {"faster_peer": peer, "ratio": ratio, "interval": limits}
        if mine != "ours (eager)":
            ratio, *limits = interval(seconds[peer], seconds["ours (eager)"], paired)
            row |= {"ratio_eager": ratio, "interval_eager": limits}
    return row


def show(row: dict[str, Any]) -> None:
    median = row["median_seconds"]
    times = ", ".join(f"{title} {1e3 * median[title]:.1f}" for title in sorted(median, key=median.__getitem__))
    share = 100 * row["floor_seconds"] / median[row["ours"]]
    print(f"{row['size']:9}{row['dtype']:9}{row['tokens']:7d} tokens, ms: {times}; {share:.0f} % of the floor's rate", flush=True)
    if "ratio" in row:
        below = "" if row["ratio"] >= TARGETS[row["dtype"]] else f", below {TARGETS[row['dtype']]}"
        low, high = row["interval"]
        print(f"{'':25}{row['faster_peer']} over {row['ours']}: {row['ratio']:.3f} ({low:.3f} to {high:.3f}){below}", flush=True)


def rounded(value: Any) -> Any:
    """To microseconds, so that the file stays readable."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


def main(args: Args) -> int:
    chosen, paired = settings(args), args.device == "cpu"
    lossy = {setting.title for setting in chosen if setting.lossy}
    workers = [Worker(setting, args) for setting in chosen] if paired else []
    device = platform.machine() if paired else torch.cuda.get_device_name()
    print(f"{device}, {args.threads} threads, torch {torch.__version__}")
    rows = []
    try:
        for size in args.sizes:
            for dtype in args.dtypes:
                if paired:
                    seconds, once = measure_paired(workers, size, dtype, args.repeats)
                else:
                    seconds, once = measure_alone(chosen, args, size, dtype)
                rows.append(row_of(size, dtype, seconds, once, lossy, paired))
                show(rows[-1])
                write(args, device, workers, rows)
    finally:
        for worker in workers:
            worker.close()
    return 0 if all(row.get("ratio", 0) >= TARGETS[row["dtype"]] for row in rows) else 1


def write(args: Args, device: str, workers: list[Worker], rows: list[dict[str, Any]]) -> None:
    """After every row, so that what is cut short is not lost."""
    if args.json is None:
        return
    args.json.parent.mkdir(parents=True, exist_ok=True)
    versions = {worker.setting.title: worker.torch for worker in workers} or {"ours": torch.__version__}
    machine = {"device": device, "threads": args.threads, "torch": versions}
    args.json.write_text(json.dumps(rounded({"machine": machine, "repeats": args.repeats, "rows": rows})) + "\n")


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Args)))
