"""The sum that a merge writes: a weight and the differences of LoRAs, in fp32, rounded once.

A weight is widened in tiles of rows that fit the cache and multiplied there: multiplying in bf16 would round fp16 and fp32
factors wrongly (12 % of the values), adding in bf16 would round the sum twice (4 %), and whole copies in fp32 would be slow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import LoraError
from .adapters import LoraModule

TILE_ROWS = 256
"""Rows of a weight that are in fp32 at one time: 256 x 12288 values are 12 MB."""


def add_differences(weight: torch.Tensor, changes: Sequence[tuple[float, LoraModule]], dtype: torch.dtype) -> torch.Tensor:
    """weight + sum of factor * difference, summed in fp32 (fp64 for an fp64 weight) and rounded once to `dtype`.

    `weight` is used up where it has that dtype. Raises LoraError for sums that are not finite.
    """
    rows = weight.shape[0] if weight.ndim else 1
    flat = weight.reshape(rows, -1)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    terms = [term for factor, module in changes for term in _terms(module, factor, flat, wide)]
    out = flat if dtype == weight.dtype else torch.empty(flat.shape, dtype=dtype)
    tile = torch.empty(min(TILE_ROWS, rows), flat.shape[1], dtype=wide)
    for start in range(0, rows, TILE_ROWS):
        end = min(start + TILE_ROWS, rows)
        sums = tile[: end - start].copy_(flat[start:end])
        for first, up, down in terms:
            a, b = max(start, first), min(end, first + len(up))
            if a < b:
                part, chosen = sums[a - start : b - start], up[a - first : b - first]
                part.add_(chosen) if down is None else part.addmm_(chosen, down)
        if not math.isfinite(float(sums.sum())):
            raise LoraError(f"{changes[0][1].tensor} has values that are NaN or infinite in the base, or would have when merged")
        out[start:end].copy_(sums)
    return out.reshape(weight.shape)


def _terms(
    module: LoraModule, factor: float, flat: torch.Tensor, wide: torch.dtype
) -> list[tuple[int, torch.Tensor, torch.Tensor | None]]:
    """(first row, B with scale and factor, A) of low-rank parts, (first row, difference, None) of others."""
    terms: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []
    for part in module.parts:
        start, length = part.rows or (0, len(flat))
        if part.rank is not None and not part.needs_weight:
            down, up = part.low_rank()
            terms.append((start, up.to(wide) * (factor * part.scale), down.to(wide).contiguous()))
        else:
            terms.append((start, part.delta(flat[start : start + length].to(wide)).mul_(factor), None))
    return terms
