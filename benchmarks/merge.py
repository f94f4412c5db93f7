"""Merging a LoRA into a checkpoint on disk: time against a plain copy, memory, and how many values are rounded wrongly.

    python benchmarks/merge.py [--folder /tmp] [--full] [--json docs/benchmarks/merge.json]

A random bf16 checkpoint with half of HunyuanVideo's blocks (12.8 GB) and LoRAs of rank 32 on every block's Linear, factors in
bf16, fp16 and fp32. In every repeat the base is copied with fsync and merged with each LoRA, in another order each time, the page
cache of both files evicted before; a merge runs in a process of its own, whose peak memory is its own account. Rounding is
counted on rows of every merged tensor against float64, and beside it two other ways to add: in the stored dtypes (as musubi-tuner
does), and widened to fp32 with the product added in fp32 (as ComfyUI does in memory). `--full` merges once into the whole
model's 25.6 GB, read from a sparse file, and shows memory along the way.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from paired import bootstrap
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.checkpoint import SafetensorsFile, expected_shapes  # noqa: E402
from accvideo_core.checkpoint.safetensors_file import file_order, stream_safetensors  # noqa: E402
from accvideo_core.dit import DiTConfig  # noqa: E402

TARGETS = {"time over a copy": 1.6, "peak RSS, GB": 1.5, "values rounded wrongly": 1e-4}
FACTORS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = 32  # of every tensor, checked against float64
# Runs in a process of its own: merges, and tells its time, its peak memory and, if asked, its memory along the way.
WORKER = """
import json, sys, time
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
from accvideo_core.lora import merge_lora
samples = []
def memory(kind):  # not getrusage's peak, which a process inherits from the one that started it
    return int(next(line for line in open("/proc/self/status") if line.startswith(kind)).split()[1]) * 1024
def progress(done, total):
    if len(samples) < 20 * done / total:
        samples.append(memory("VmRSS"))
began = time.perf_counter()
merge_lora(sys.argv[3], [sys.argv[4]], sys.argv[5], progress=progress)
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "peak": memory("VmHWM"), "along": samples}))
"""


@dataclass
class Args:
    """Measure merging and print a table."""

    folder: Path | None = None
    """Where the files go; about three times the checkpoint's size is needed. Default: a temporary folder."""
    hidden: int = 3072
    """Width of the network."""
    double: int = 10
    """Double blocks (the model has 20)."""
    single: int = 20
    """Single blocks (the model has 40)."""
    rank: int = 32
    """Rank of the LoRAs."""
    factors: list[str] = field(default_factory=lambda: list(FACTORS))
    """Dtypes of their factors: bf16, fp16, fp32."""
    repeats: int = 3
    """Paired repeats."""
    threads: int = os.cpu_count() or 1
    """Threads of the merge."""
    full: bool = False
    """Also one pass over all 20 + 40 blocks from a sparse file (writes 25.6 GB at the default width)."""
    json: Path | None = None
    """Also write the results here."""


def shapes_of(args: Args, double: int, single: int) -> dict[str, tuple[int, ...]]:
    text = 4096 if args.hidden == 3072 else 64
    return expected_shapes(DiTConfig(args.hidden, args.hidden // 128, double, single, text))


def block_linears(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {n: s for n, s in shapes.items() if len(s) == 2 and n.startswith(("double_blocks", "single_blocks"))}


def write_base(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Random values; one block of them, rolled differently for each tensor, because drawing 6.4 G of them takes minutes."""
    generator = torch.Generator().manual_seed(0)
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    block = (torch.randn(largest + 1_000_003, generator=generator) * 0.02).bfloat16()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for i, name in enumerate(file_order(entries)):
            start = i * 7919 % 1_000_003
            yield name, block[start : start + torch.Size(shapes[name]).numel()].reshape(shapes[name])

    entries = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    stream_safetensors(path, entries, tensors())


def write_sparse_base(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Zeros that take no disk space."""
    header, offset = {}, 0
    for name in sorted(shapes):
        end = offset + 2 * torch.Size(shapes[name]).numel()
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def write_lora(path: Path, shapes: dict[str, tuple[int, ...]], rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (rows, columns) in block_linears(shapes).items():
        stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = (torch.randn(rank, columns, generator=generator) * columns**-0.5).to(dtype)
        tensors[f"{stem}.lora_up.weight"] = (torch.randn(rows, rank, generator=generator) * 0.02).to(dtype)
        tensors[f"{stem}.alpha"] = torch.tensor(rank * 0.7)
    save_file(tensors, path)


def evict(*paths: Path) -> None:
    for path in paths:
        if path.exists() and hasattr(os, "posix_fadvise"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, out: Path) -> float:
    evict(source)
    began = time.perf_counter()
    shutil.copyfile(source, out)
    with open(out, "rb+") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    out.unlink()
    return seconds


def merge(base: Path, lora: Path, out: Path, threads: int) -> dict[str, Any]:
    evict(base, lora)
    command = [sys.executable, "-c", WORKER, str(ROOT), str(threads), str(base), str(lora), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if run.returncode:
        raise SystemExit(run.stderr[-3000:])
    return dict(json.loads(run.stdout.splitlines()[-1]))


def count_wrong(base: Path, lora: Path, out: Path, names: list[str]) -> dict[str, float]:
    """Share of values, of ROWS rows of every block Linear, that are not the float64 result rounded once."""
    files = [SafetensorsFile(path) for path in (base, lora, out)]
    wrong: dict[str, int] = {"ours": 0, "in stored dtypes": 0, "in fp32": 0}
    total = 0
    try:
        for i, name in enumerate(names):
            before, merged = files[0].read(name), files[2].read(name)
            stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            down, up = files[1].read(f"{stem}.lora_down.weight"), files[1].read(f"{stem}.lora_up.weight")
            scale = float(files[1].read(f"{stem}.alpha")) / len(down)
            rows = torch.arange(ROWS) * 131 * (i + 1) % len(before)
            before, merged, up = before[rows], merged[rows], up[rows]
            right = (before.double() + scale * up.double() @ down.double()).bfloat16()
            stored = (before + (up @ down) * scale).bfloat16()
            wide = (before.float() + scale * (up.float() @ down.float())).bfloat16()
            for way, values in zip(wrong, (merged, stored, wide), strict=True):
                wrong[way] += int((values != right).sum())
            total += right.numel()
    finally:
        for file in files:
            file.close()
    return {way: count / total for way, count in wrong.items()}


def measure(args: Args, folder: Path) -> dict[str, Any]:
    shapes = shapes_of(args, args.double, args.single)
    base, out = folder / "base.safetensors", folder / "out.safetensors"
    write_base(base, shapes)
    loras = {name: folder / f"lora_{name}.safetensors" for name in args.factors}
    for name, path in loras.items():
        write_lora(path, shapes, args.rank, FACTORS[name])
    copies: list[float] = []
    merges: dict[str, list[dict[str, Any]]] = {name: [] for name in loras}
    wrong: dict[str, dict[str, float]] = {}
    order = random.Random(0)
    for repeat in range(args.repeats):
        for job in order.sample([None, *loras], len(loras) + 1):
            if job is None:
                copies.append(copy(base, out))
                print(f"repeat {repeat + 1}: copy {copies[-1]:.1f} s", file=sys.stderr)
                continue
            merges[job].append(merge(base, loras[job], out, args.threads))
            print(f"repeat {repeat + 1}: {job} {merges[job][-1]['seconds']:.1f} s", file=sys.stderr)
            if repeat == 0:
                wrong[job] = count_wrong(base, loras[job], out, list(block_linears(shapes)))
            out.unlink()
    rows = {}
    for name in loras:
        ratios = [found["seconds"] / copied for found, copied in zip(merges[name], copies, strict=True)]
        rows[name] = {
            "seconds": [found["seconds"] for found in merges[name]],
            "ratio": statistics.median(ratios),
            "interval": bootstrap(ratios),
            "peak_rss": max(found["peak"] for found in merges[name]),
            "wrong": wrong[name],
        }
    return {"bytes": base.stat().st_size, "tensors": len(shapes), "copy_seconds": copies, "factors": rows}


def measure_full(args: Args, folder: Path) -> dict[str, Any]:
    shapes = shapes_of(args, 2 * args.double, 2 * args.single)
    base, lora, out = folder / "sparse.safetensors", folder / "lora.safetensors", folder / "out.safetensors"
    write_sparse_base(base, shapes)
    write_lora(lora, shapes, args.rank, torch.bfloat16)
    found = merge(base, lora, out, args.threads)
    out.unlink()
    return {"bytes": base.stat().st_size, **found}


def main() -> None:
    args = tyro.cli(Args)
    with TemporaryDirectory(dir=args.folder, prefix="accvideo-merge-") as name:
        results: dict[str, Any] = {
            "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
            "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()},
            "targets": TARGETS,
            "half": measure(args, Path(name)),
        }
        if args.full:
            for path in Path(name).iterdir():
                path.unlink()
            results["full"] = measure_full(args, Path(name))
    half = results["half"]
    copied = statistics.median(half["copy_seconds"])
    print(f"\n{half['bytes'] / 1e9:.2f} GB, copy with fsync {copied:.1f} s ({half['bytes'] / 1e9 / copied:.2f} GB/s)\n")
    print("| Factors | Merge, s | Over a copy (95 % interval) | Peak RSS, GB | Wrong | In stored dtypes | In fp32 |")
    print("|---|---|---|---|---|---|---|")
    for name, row in half["factors"].items():
        low, high = row["interval"]
        shares = " | ".join(f"{share:.1e}" for share in row["wrong"].values())
        print(
            f"| {name} | {statistics.median(row['seconds']):.1f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) | "
            f"{row['peak_rss'] / 1e9:.2f} | {shares} |"
        )
    if "full" in results:
        along = [f"{sample / 1e9:.2f}" for sample in results["full"]["along"]]
        print(
            f"\n{results['full']['bytes'] / 1e9:.1f} GB streamed in {results['full']['seconds']:.0f} s, peak RSS "
            f"{results['full']['peak'] / 1e9:.2f} GB; along the way {' '.join(along)}"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
