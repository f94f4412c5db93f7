"""Every attention kernel that runs here, by the time it takes beside SDPA's in the same run.

    python benchmarks/attention.py [--device cuda] [--json docs/benchmarks/attention.json]

Heads are 128 wide: 24 of them as in HunyuanVideo, and 1 as in the tiny world. Repeats go round all kernels, in another order each
time, so that whatever else the machine does meets all alike. The ratio is SDPA's time over the kernel's, per repeat: above 1 the
kernel is faster; its interval is the 95 % bootstrap interval of the median. "auto" is what `auto` chooses, named. Beside each the
error measured on these very tensors, against float32 over every 16th query, and TFLOP/s (4 N^2 d a head).
Kernels that cannot run are listed with the reason; nothing is downloaded or installed.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from paired import bootstrap
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from accvideo_core.devices import pick_device, synchronize  # noqa: E402
from accvideo_core.dit.attention import AUTO, KERNELS, Call, attention, settle, usable, why_not  # noqa: E402

HEADS = {"full": 24, "tiny": 1}
SHORTEST = 0.02  # seconds; quicker calls are repeated inside one timing
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# 100 tokens are the tiny world's, 48 960 a video of 544 x 960 x 93, 118 800 one of 720 x 1280 x 129; text comes beside them.
LENGTHS = {"cpu": (100, 256, 1024, 4096), "cuda": (100, 1024, 4096, 16_384, 48_960 + 64, 118_800 + 64)}


@dataclass
class Args:
    """Time the attention kernels and print a table."""

    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    dtypes: list[str] = field(default_factory=lambda: ["bfloat16"])
    """Which of float32, bfloat16, float16."""
    lengths: list[int] = field(default_factory=list)
    """Tokens; default 100 to 4096, on a GPU to 118 864."""
    heads: list[str] = field(default_factory=lambda: list(HEADS))
    """full (24 heads) or tiny (1)."""
    rows: int = 1
    """Batch."""
    ragged: bool = False
    """Rows of several lengths, each 8 tokens shorter than the one before, as batches of prompts are. Wants --rows."""
    repeats: int = 20
    """Paired repeats per row of the table."""
    minutes: float = 8.0
    """Stop before the next row once so many have passed."""
    json: Path | None = None
    """Also write the results here."""


def tensors(args: Args, heads: int, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the network has them before attention: q and k after rotation, v a view of the projection."""
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(args.rows, tokens, 3, heads, 128, generator=generator, device=device, dtype=dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q.contiguous(), k.contiguous(), v


def error_of(out: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | None) -> float:
    """||out - exact|| / ||exact|| over every 16th query, exact in float32 one head at a time."""
    tokens, difference, norm = k.shape[2], 0.0, 0.0
    found = out.unflatten(2, (q.shape[1], -1)).transpose(1, 2)
    for row in range(q.shape[0]):
        n = tokens if lengths is None else lengths[row]
        for head in range(q.shape[1]):
            parts = (q[row, head, ::16], k[row, head, :n], v[row, head, :n])
            exact = scaled_dot_product_attention(*(part.float()[None, None] for part in parts))[0, 0]
            difference += float((found[row, head, ::16].float() - exact).square().sum())
            norm += float(exact.square().sum())
    return (difference / norm) ** 0.5


def measure(args: Args, heads: str, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """One row of the table: every kernel that takes these tensors."""
    q, k, v = tensors(args, HEADS[heads], tokens, dtype, device)
    lengths = tuple(tokens - i % 8 * 8 for i in range(args.rows)) if args.ragged else None
    call = Call(device, dtype, 128, tokens, tokens, q.numel())
    refused: dict[str, str] = {}
    runs: dict[str, Callable[[], Tensor]] = {}
    errors: dict[str, float] = {}

    def run(name: str) -> Callable[[], Tensor]:
        return lambda: attention(q, k, v, lengths, name)

    for name, kernel in KERNELS.items():
        reasons = [why_not(kernel, call._replace(keys=n)) for n in lengths or (tokens,)]
        if any(reasons) and not (lengths and (kernel.masks or kernel.ragged)):
            refused[name] = next(reason.sentence for reason in reasons if reason)
            continue
        try:
            errors[name] = error_of(run(name)(), q, k, v, lengths)
        except Exception as failure:  # told, and the others are measured all the same
            refused[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
            continue
        runs[name] = run(name)

    def timed(name: str, times: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            runs[name]()
        synchronize(device)
        return (time.perf_counter() - start) / times

    inner = {name: max(1, round(SHORTEST / min(timed(name, 1) for _ in range(2)))) for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    shuffle = random.Random(0)
    for _ in range(args.repeats):
        for name in shuffle.sample(list(runs), len(runs)):
            seconds[name].append(timed(name, inner[name]))
    found = {}
    for name, values in seconds.items():
        ratios = [base / own for base, own in zip(seconds["sdpa"], values, strict=True)]
        low, high = bootstrap(ratios)
        median = statistics.median(values)
        found[name] = {
            "seconds": median,
            "ratio": statistics.median(ratios),
            "interval": [low, high],
            "error": errors[name],
            "tflops": 4 * args.rows * HEADS[heads] * tokens**2 * 128 / median / 1e12,
        }
    chosen = settle(AUTO, call, lengths)
    row = {"heads": HEADS[heads], "tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "rows": args.rows}
    return row | {"ragged": args.ragged, "auto": chosen, "kernels": found, "refused": refused}


def show(row: dict[str, Any]) -> None:
    stem = f"{row['heads']:>5}{row['tokens']:>8} {row['dtype']:9}"
    for name, it in row["kernels"].items():
        low, high = it["interval"]
        mark = "  <- auto" if name == row["auto"] else ""
        print(
            f"{stem} {name:11}{1e3 * it['seconds']:>11.3f}{it['ratio']:>8.3f} ({low:.3f} to {high:.3f}){it['error']:>9.1e}"
            f"{it['tflops']:>8.2f}{mark}",
            flush=True,
        )


def main(args: Args) -> int:
    device, start, rows = pick_device(args.device), time.monotonic(), []
    lengths = args.lengths or LENGTHS["cpu" if device.type == "cpu" else "cuda"]
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.rows} rows")
    for name, told in usable(device).items():
        print(f"  {name:11} {told}")
    print(f"{'heads':>5}{'tokens':>8} {'dtype':9} {'kernel':11}{'ms':>11}{'ratio':>8} (95 % interval)    error TFLOP/s")
    left: list[str] = []
    with torch.inference_mode():
        for dtype in args.dtypes:
            for heads in args.heads:
                for tokens in lengths:
                    if time.monotonic() - start > 60 * args.minutes:
                        left.append(f"{heads} {tokens} {dtype}")
                        continue
                    row = measure(args, heads, tokens, DTYPES[dtype], device)
                    rows.append(row)
                    show(row)
    for reason in dict.fromkeys(reason for row in rows for reason in row["refused"].values()):
        print(f"refused: {reason}")
    if left:
        print(f"left out for want of time: {', '.join(left)}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"device": machine, "threads": torch.get_num_threads(), "torch": torch.__version__, "repeats": args.repeats}
        args.json.write_text(json.dumps({"machine": about, "rows": rows, "left_out": left}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Args)))
