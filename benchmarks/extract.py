"""Factoring the difference of one module: our way against ComfyUI's, and the whole model projected from measured modules.

    python benchmarks/extract.py [--rows 3072] [--columns 12288] [--rank 32] [--json docs/benchmarks/extract.json]

The peer is the algorithm of ComfyUI's LoRA extraction: a full singular value decomposition, both factors clamped at the 0.99
quantile of their values. Residuals are the relative Frobenius norm of what fp32 factors leave of the matrix, over the optimum
that the decomposition's own values give. Then each shape of the 13 B model is factored once and multiplied by how often it
occurs.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accvideo_core.checkpoint import expected_shapes
from accvideo_core.dit import DiTConfig
from accvideo_core.lora.factor import _gram, factor

TARGETS = {"speed-up": 10.0, "residual over the optimum": 1.005}
CLAMP = 0.99


@dataclass
class Args:
    """Measure extraction and print a table."""

    rows: int = 3072
    """Rows of the module (fc2 of a double block)."""
    columns: int = 12288
    """Columns of the module."""
    rank: int = 32
    """Rank of the factors."""
    hidden: int = 3072
    """Width of the model that is projected."""
    repeats: int = 3
    """Repeats of ours; the full decomposition takes minutes and runs once for each matrix."""
    threads: int = os.cpu_count() or 1
    """Threads of both."""
    json: Path | None = None
    """Also write the results here."""


def matrices(args: Args) -> dict[str, Callable[[], torch.Tensor]]:
    """Differences as training leaves them lie between these two: a decaying spectrum, and noise without any structure."""

    def decaying() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        rank = min(args.rows, args.columns, 512)
        left = torch.randn(args.rows, rank, generator=generator)
        right = torch.randn(rank, args.columns, generator=generator)
        scale = torch.arange(1, rank + 1).float() ** -1.0
        return (left * scale) @ right * 1e-3 + torch.randn(args.rows, args.columns, generator=generator) * 1e-4

    def noise() -> torch.Tensor:
        return torch.randn(args.rows, args.columns, generator=torch.Generator().manual_seed(1)) * 1e-3

    return {"decaying spectrum": decaying, "noise": noise}


def comfyui_way(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(up, down, all singular values), in its order of steps."""
    left, values, right = torch.linalg.svd(matrix)
    up, down = left[:, :rank] * values[:rank], right[:rank]
    limit = torch.quantile(torch.cat([up.flatten(), down.flatten()]), CLAMP)
    return up.clamp(-limit, limit), down.clamp(-limit, limit), values


def residual(matrix: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    return float((matrix - up @ down).double().norm() / matrix.double().norm())


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def compare(args: Args, make: Callable[[], torch.Tensor]) -> dict[str, Any]:
    matrix = make()
    ours = [timed(lambda: factor(matrix, args.rank)) for _ in range(args.repeats)]
    gram_seconds, (left, values, right) = timed(lambda: _gram(matrix, args.rank))
    theirs_seconds, (up, down, every) = timed(lambda: comfyui_way(matrix, args.rank))
    optimum = float((every[args.rank :].double().square().sum() / every.double().square().sum()).sqrt())
    return {
        "seconds": statistics.median(seconds for seconds, _ in ours),
        "residual": residual(matrix, ours[0][1].up, ours[0][1].down),
        "gram_seconds": gram_seconds,
        "gram_residual": residual(matrix, left * values.float(), right),
        "comfyui_seconds": theirs_seconds,
        "comfyui_residual": residual(matrix, up, down),
        "optimum": optimum,
    }


def project(args: Args) -> dict[str, Any]:
    """Seconds for all matrices of the 13 B model, from one factoring of each shape."""
    text = 4096 if args.hidden == 3072 else 64
    config = DiTConfig(args.hidden, args.hidden // 128, 20, 40, text)
    shapes = Counter(shape for name, shape in expected_shapes(config).items() if len(shape) == 2 and name.endswith("weight"))
    rows = []
    for shape, count in sorted(shapes.items(), key=lambda item: -item[0][0] * item[0][1]):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 1e-3
        seconds, _ = timed(lambda matrix=matrix: factor(matrix, args.rank))
        rows.append({"shape": list(shape), "count": count, "seconds": seconds})
        print(f"{shape}: {seconds:.2f} s, {count} times", file=sys.stderr)
    return {"shapes": rows, "seconds": sum(row["seconds"] * row["count"] for row in rows)}


def main() -> None:
    args = tyro.cli(Args)
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()},
        "targets": TARGETS,
        "matrices": {name: compare(args, make) for name, make in matrices(args).items()},
    }
    results["model"] = project(args)
    print(f"\n{args.rows} x {args.columns}, rank {args.rank}, {args.threads} threads\n")
    print("| Difference | Ours, s | Gram, s | ComfyUI, s | Speed-up | Ours / optimum | Gram / optimum | ComfyUI / optimum |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in results["matrices"].items():
        over = " | ".join(f"{row[key] / row['optimum']:.4f}" for key in ("residual", "gram_residual", "comfyui_residual"))
        print(
            f"| {name} | {row['seconds']:.2f} | {row['gram_seconds']:.1f} | {row['comfyui_seconds']:.1f} | "
            f"{row['comfyui_seconds'] / row['seconds']:.1f} | {over} |"
        )
    print(
        f"\nAll {sum(r['count'] for r in results['model']['shapes'])} matrices of the model: {results['model']['seconds']:.0f} s"
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
