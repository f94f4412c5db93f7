"""Loading a checkpoint into CPU tensors: ours against safetensors' own loader, cold and warm, and streaming the full 13 B.

    python benchmarks/load.py --json docs/benchmarks/load.json        # needs 26 GB of disk, 10 GB of memory
    python benchmarks/load.py --gb 0.3 --stream-gb 0.6 --repeats 3    # a small proof

Every load runs in a process of its own, which tells seconds (open to last tensor in memory) and peak memory; they are measured
in turn, so that what the machine does meanwhile falls on all. Cold evicts the file from the page cache first (posix_fadvise).
Both are measured in both manners, like with like. "mapped": the tensors lie over the file and are in memory only once touched, so
one byte of every page is touched, the least that any use does. "copied": they have memory of their own, which is what ours reads
unless it is asked to map. A ratio is safetensors' time over ours: above 1 we are faster.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from paired import bootstrap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.checkpoint import expected_shapes, open_checkpoint, stream_safetensors
from accvideo_core.dit import DiTConfig

GOAL, STREAM_GOAL = 0.97, 1e9
KINDS = ("ours mapped", "safetensors mapped", "ours copied", "safetensors copied")
ORDERS = ((0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1))  # what one leaves of memory and caches, the next one feels
FULL = DiTConfig.hunyuan_video()


def config_of(gigabytes: float) -> DiTConfig:
    """The released network with as many blocks as make a bf16 file of this size, or a narrow one for a small proof."""
    width = 3072 if gigabytes > 3 else 768
    blocks = 1
    while True:
        config = DiTConfig(width, width // 128, depth_double=blocks, depth_single=2 * blocks, text_dim=4096)
        shapes = expected_shapes(config).values()
        if config.depth_double >= FULL.depth_double or 2e-9 * sum(map(math.prod, shapes)) >= gigabytes:
            return config
        blocks += 1


def write(path: Path, config: DiTConfig) -> int:
    """Random bf16 weights, one block of values repeated: what is in them does not matter to a loader. Returns the bytes."""
    pool = torch.randn(1 << 22).bfloat16()
    shapes = expected_shapes(config)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        count = math.prod(shape)
        return pool.repeat(-(-count // len(pool)))[:count].view(shape)

    entries = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    stream_safetensors(path, entries, ((name, values(shape)) for name, shape in sorted(shapes.items())))
    return path.stat().st_size


def evict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def peak_rss() -> int:
    """Most bytes resident so far (VmHWM), mapped files included."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def load(kind: str, path: Path) -> dict[str, Any]:
    """In the worker: seconds, bytes, peak memory above the start."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    gc.collect()
    before, begun = peak_rss(), time.perf_counter()
    if kind.startswith("ours"):
        with open_checkpoint(path) as checkpoint:
            state = checkpoint.state_dict(mapped=kind.endswith("mapped"))
    elif kind == "safetensors mapped":
        state = load_file(path)
    elif kind == "safetensors copied":
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    else:
        with open_checkpoint(path) as checkpoint:
            seen = sum(checkpoint.read(key).numel() * 2 for key in checkpoint)
        return {"seconds": time.perf_counter() - begun, "bytes": seen, "peak": peak_rss() - before, "rss": peak_rss()}
    if kind.endswith("mapped"):
        for tensor in state.values():
            tensor.view(torch.uint8).flatten()[::4096].sum()
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "bytes": sum(t.nbytes for t in state.values()), "peak": peak_rss() - before, "rss": peak_rss()}


def measure(kind: str, path: Path, cold: bool) -> dict[str, Any]:
    if cold:
        evict(path)
    done = subprocess.run(
        [sys.executable, __file__, "--worker", kind, str(path)], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(path: Path, cold: bool, repeats: int) -> dict[str, Any]:
    """Paired: each repeat measures all, in an order that turns, and in which each comes as often after every other."""
    if not cold:
        measure(KINDS[0], path, False)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for repeat in range(repeats):
        for kind in (KINDS[place] for place in ORDERS[repeat % len(ORDERS)]):
            runs[kind].append(measure(kind, path, cold))
    size = runs[KINDS[0]][0]["bytes"]
    result: dict[str, Any] = {"cache": "cold" if cold else "warm"}
    for kind, found in runs.items():
        seconds = statistics.median(run["seconds"] for run in found)
        peak = max(run["peak"] for run in found) / size
        ours = runs[f"ours {kind.split()[1]}"]
        ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(ours, found, strict=True)]
        result[kind] = {"seconds": seconds, "gb_per_s": size / 1e9 / seconds, "peak_above_start_over_file": peak}
        result[kind] |= {"ratio": statistics.median(ratios), "interval": bootstrap(ratios)}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8.0, help="size of the file that is loaded whole, GB of 10^9 bytes")
    parser.add_argument("--stream-gb", type=float, default=25.6, help="size of the file that is read key by key; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--caches", nargs="+", choices=("cold", "warm"), default=("cold", "warm"))
    parser.add_argument("--folder", type=Path, help="where the files are made (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(load(args.worker[0], Path(args.worker[1]))))
        return 0
    report: dict[str, Any] = {"goal": GOAL, "repeats": args.repeats, "torch": torch.__version__, "threads": os.cpu_count()}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "load.safetensors"
        report["bytes"] = write(path, config_of(args.gb))
        report["loads"] = [compare(path, cache == "cold", args.repeats) for cache in args.caches]
        path.unlink()
        if args.stream_gb:
            config = FULL if args.stream_gb >= 25 else config_of(args.stream_gb)
            size = write(path, config)
            report["stream"] = measure("stream", path, cold=True) | {"file_bytes": size}
    print(f"{report['bytes'] / 1e9:.2f} GB of bf16, {args.repeats} paired repeats")
    print("| Cache | Loader | s | GB/s | peak / file | its time over ours (95 % interval) |\n|---|---|---|---|---|---|")
    for row in report["loads"]:
        for kind in KINDS:
            it = row[kind]
            ratio = "" if kind.startswith("ours") else f"{it['ratio']:.3f} ({it['interval'][0]:.3f} to {it['interval'][1]:.3f})"
            told = f"{it['seconds']:.2f} | {it['gb_per_s']:.2f} | {it['peak_above_start_over_file']:.3f}"
            print(f"| {row['cache']} | {kind} | {told} | {ratio} |")
    good = all(row[kind]["ratio"] >= GOAL for row in report["loads"] for kind in KINDS)
    if "stream" in report:
        stream = report["stream"]
        told = f"{stream['seconds']:.1f} s, peak {stream['rss'] / 1e9:.3f} GB resident"
        print(f"streaming {stream['bytes'] / 1e9:.2f} GB key by key: {told}")
        good &= stream["rss"] < STREAM_GOAL
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
