"""Our forward pass against ComfyUI's native HunyuanVideo and diffusers', on equal weights and inputs.

    python benchmarks/dit_forward.py [--comfyui ~/comfy/ComfyUI] [--json docs/benchmarks/dit_forward.json]

Every implementation runs in a process of its own (ComfyUI's under its checkout's environment) and waits while another
is timed; repeats go round all of them, in another order each time, so that whatever else the machine does meets all
alike. ComfyUI is started with each of its attention settings and the fastest stands for it. The ratio is a peer's time
over ours, per repeat, to the peer with the lower median: above 1 we are faster. Its interval is the 95 % bootstrap
interval of the median.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from paired import bootstrap
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.checkpoint import expected_shapes  # noqa: E402
from accvideo_core.dit import DiTConfig  # noqa: E402

# name -> (network, latent (T, H, W), text tokens). "tiny" is the bundled world's; the others grow in width and tokens.
SIZES = {
    "tiny": (DiTConfig.tiny(), (5, 8, 8), 20),
    "small": (DiTConfig(hidden_size=384, num_heads=3, depth_double=2, depth_single=4, text_dim=512), (5, 16, 16), 32),
    "medium": (DiTConfig(hidden_size=768, num_heads=6, depth_double=1, depth_single=2, text_dim=1024), (5, 16, 16), 64),
}
DTYPES = ("float32", "bfloat16")
COMFYUI_ATTENTION = {
    "pytorch": ["--use-pytorch-cross-attention"],
    "sub-quadratic": [],
    "split": ["--use-split-cross-attention"],
}
TARGET = 0.97
SETTING_TRIALS = 5  # rounds over all attention settings before the fastest is chosen
SHORTEST = 0.1  # seconds; quicker calls are repeated inside one timing


@dataclass
class Args:
    """Measure the forward pass of three implementations and print a table."""

    comfyui: list[Path] = field(default_factory=lambda: [Path("~/comfy/ComfyUI")])
    """ComfyUI checkouts; each needs its environment beside it as <checkout>-venv (tests/comfyui/setup_envs.py makes it)."""
    repeats: int = 25
    """Paired repeats per row."""
    threads: int = os.cpu_count() or 1
    """Threads of every implementation."""
    sizes: list[str] = field(default_factory=lambda: list(SIZES))
    """Which rows: tiny, small, medium."""
    dtypes: list[str] = field(default_factory=lambda: list(DTYPES))
    """Which dtypes: float32, bfloat16."""
    json: Path | None = None
    """Also write the results here."""


class Worker:
    """A process that holds one implementation."""

    def __init__(self, name: str, python: Path | str, arguments: list[str], threads: int) -> None:
        self.name = name
        kind, *rest = arguments
        command = [str(python), str(Path(__file__).with_name("dit_worker.py")), kind, str(threads), *rest]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        self.torch = self._answer()["torch"]

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
            raise SystemExit(f"{self.name} ended:\n{self.errors.read()[-3000:]}")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def start_workers(args: Args) -> list[Worker]:
    workers = [
        Worker("ours", sys.executable, ["ours"], args.threads),
        Worker("diffusers", sys.executable, ["diffusers"], args.threads),
    ]
    for checkout in (path.expanduser() for path in args.comfyui):
        python = checkout.with_name(checkout.name + "-venv") / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not python.is_file():
            raise SystemExit(f"no {python}: clone ComfyUI there, run tests/comfyui/setup_envs.py, or name another --comfyui")
        for setting, flags in COMFYUI_ATTENTION.items():
            workers.append(Worker(f"{checkout.name} ({setting})", python, ["comfyui", str(checkout), *flags], args.threads))
    return workers


def write_case(folder: Path, config: DiTConfig, grid: tuple[int, int, int], tokens: int) -> None:
    """Random weights without a trivial tensor, and inputs; guidance 4, which bf16 holds after * 1000."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in expected_shapes(config).items():
        value = torch.randn(shape, generator=generator)
        scale = "norm" in name and name.endswith("weight") and len(shape) == 1
        state[name] = value * value[0].numel() ** -0.5 if len(shape) > 1 else 0.2 * value + scale
    save_file(state, folder / "weights")
    inputs = {
        "latent": torch.randn(1, 16, *grid, generator=generator),
        "text": torch.randn(1, tokens, config.text_dim, generator=generator),
        "pooled": torch.randn(1, config.pooled_dim, generator=generator),
    }
    save_file(inputs | {"sigma": torch.tensor([0.5]), "guidance": torch.tensor([4.0])}, folder / "inputs")


def measure(workers: list[Worker], size: str, dtype: str, repeats: int) -> dict[str, Any]:
    """One row: every implementation checked against ours, the best setting of each peer timed."""
    config, grid, tokens = SIZES[size]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_case(folder, config, grid, tokens)
        for worker in workers:
            worker.ask(load=name, dtype=dtype, config=asdict(config))
            worker.ask(save=str(folder / "velocity"))
            velocity = load_file(folder / "velocity")["velocity"]
            if worker is workers[0]:
                ours = velocity
            # Equal work is a condition of the comparison. In bf16 each errs by about 1 %.
            error = float((velocity - ours).norm() / ours.norm())
            if error > (1e-5 if dtype == "float32" else 0.05):
                raise SystemExit(f"{worker.name} gives another velocity (relative error {error:.1e}); nothing is compared")
    trials = [{worker: worker.ask(run=1)["seconds"] for worker in workers} for _ in range(SETTING_TRIALS)]
    quick = {worker: statistics.median(trial[worker] for trial in trials) for worker in workers}
    families: dict[str, list[Worker]] = {}
    for worker in workers:
        families.setdefault(worker.name.split(" (")[0], []).append(worker)
    timed = [min(group, key=lambda worker: quick[worker]) for group in families.values()]
    inner = max(1, round(SHORTEST / min(quick[worker] for worker in timed)))
    shuffle = random.Random(0)
    seconds: dict[str, list[float]] = {worker.name: [] for worker in timed}
    for _ in range(repeats):
        for worker in shuffle.sample(timed, len(timed)):
            seconds[worker.name].append(worker.ask(run=inner)["seconds"])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    peer = min((name for name in median if name != "ours"), key=lambda name: median[name])
    ratios = [theirs / mine for theirs, mine in zip(seconds[peer], seconds["ours"], strict=True)]
    low, high = bootstrap(ratios)
    return {
        "size": size,
        "dtype": dtype,
        "tokens": grid[0] * grid[1] * grid[2] // 4 + tokens,
        "median_seconds": median,
        "faster_peer": peer,
        "ratio": statistics.median(ratios),
        "interval": [low, high],
        "settings_tried_seconds": {worker.name: quick[worker] for worker in workers},
        "seconds": seconds,
    }


def rounded(value: Any) -> Any:
    """To microseconds, so that the file stays readable."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value


def main(args: Args) -> int:
    workers = start_workers(args)
    print(f"{platform.machine()}, {args.threads} threads, torch {', '.join(sorted({w.torch for w in workers}))}")
    print(f"{'size':8}{'dtype':10}{'tokens':>7}{'ours ms':>10}  {'faster peer':34}{'ms':>9}  ratio (95 % interval)")
    rows = []
    try:
        for size in args.sizes:
            for dtype in args.dtypes:
                row = measure(workers, size, dtype, args.repeats)
                rows.append(row)
                mine, theirs = row["median_seconds"]["ours"], row["median_seconds"][row["faster_peer"]]
                verdict = "" if row["ratio"] >= TARGET else f"  below {TARGET}"
                print(
                    f"{size:8}{dtype:10}{row['tokens']:7d}{1e3 * mine:10.1f}  {row['faster_peer']:34}{1e3 * theirs:9.1f}  "
                    f"{row['ratio']:.3f} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f}){verdict}",
                    flush=True,
                )
    finally:
        for worker in workers:
            worker.close()
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        machine = {"processor": platform.machine(), "threads": args.threads, "torch": {w.name: w.torch for w in workers}}
        args.json.write_text(json.dumps(rounded({"machine": machine, "repeats": args.repeats, "rows": rows})) + "\n")
    return 0 if all(row["ratio"] >= TARGET for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Args)))
