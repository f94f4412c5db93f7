"""How to cut a video latent into tiles for a decoder whose memory does not hold it whole: the plan that computes least twice.

Tiles are cut as ComfyUI's `tiled_scale_multidim` does: along an axis of size s, tiles of size t start every t - o places, where
o is the overlap, and the last one is what is left. Every cut costs its overlap in computing and a seam in the picture; cuts in
time are seen as flicker, so they come last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .errors import InvalidValueError

Extent = tuple[int, int, int]
LEAST_OVERLAPS = 3  # a tile is at least so many overlaps long while that fits: then at least a third of it is its own


class TilePlan(NamedTuple):
    """Tiles of (frames, height, width) of a latent of `shape`, their overlap, how many there are, and the volume they compute."""

    shape: Extent
    tile: Extent
    overlap: Extent
    tiles: int
    volume: int

    @property
    def whole(self) -> bool:
        return self.tiles == 1

    @property
    def twice(self) -> float:
        """Places computed more than needed, as a share of the latent's."""
        return self.volume / math.prod(self.shape) - 1

    def __str__(self) -> str:
        if self.whole:
            return f"{' x '.join(map(str, self.shape))} latents in one piece"
        return f"{self.tiles} tiles of {' x '.join(map(str, self.tile))} latents, {100 * self.twice:.1f} % computed twice"


def tile_lengths(size: int, tile: int, overlap: int) -> list[int]:
    """The tiles along one axis, as they are cut."""
    if size <= tile:
        return [size]
    return [min(tile, size - start) for start in range(0, size - overlap, tile - overlap)]


def plan_tiles(
    shape: Extent, fits: Callable[[Extent], bool], overlap: int = 8, overlap_t: int = 2, largest: int | None = None
) -> TilePlan:
    """The plan of the least computed volume whose tile fits; of equal ones that with fewer tiles.

    shape      of the latent: frames, height, width
    fits       whether a tile of so many (frames, height, width) can be decoded; what fits still fits when it is made smaller
    overlap    of neighbouring tiles in height and width, in latent places; overlap_t in frames
    largest    only tiles of less volume than this are taken (after one that failed), as long as there are any
    Cuts in time are made only where no tile of all frames, three overlaps wide, fits; and where nothing fits, the plan is the one
    of the smallest tile. InvalidValueError for a shape or an overlap below 1.
    """
    if min(*shape, overlap, overlap_t) < 1:
        raise InvalidValueError(f"a latent of {shape} with overlaps of {overlap_t}, {overlap}; each must be at least 1")
    overlaps = (overlap_t, overlap, overlap)
    smallest = None
    for axes in _stages(shape, overlaps):
        best = None
        for frames, height, width in itertools.product(*axes):
            tile = frames, height, width
            plan = _plan(shape, tile, overlaps)
            if smallest is None or math.prod(tile) < math.prod(smallest.tile):
                smallest = plan
            if largest is not None and math.prod(tile) >= largest:
                continue
            if (best is None or (plan.volume, plan.tiles) < (best.volume, best.tiles)) and fits(tile):
                best = plan
        if best is not None:
            return best
    assert smallest is not None
    return smallest


def _plan(shape: Extent, tile: Extent, overlaps: Extent) -> TilePlan:
    along = [tile_lengths(*axis) for axis in zip(shape, tile, overlaps, strict=True)]
    return TilePlan(shape, tile, overlaps, math.prod(map(len, along)), math.prod(map(sum, along)))


def _stages(shape: Extent, overlaps: Extent) -> Iterator[tuple[list[int], ...]]:
    """Sizes to try along each axis: all frames in tiles of some width, then fewer frames, then narrower tiles too."""
    frames, *narrow = (_sizes(*axis, 2) for axis in zip(shape, overlaps, strict=True))
    wide = [_sizes(*axis, LEAST_OVERLAPS) for axis in zip(shape[1:], overlaps[1:], strict=True)]
    yield [shape[0]], *wide
    yield frames, *wide
    yield frames, *narrow


def _sizes(size: int, overlap: int, least: int) -> list[int]:
    """The least tile for each number of equal cuts, the largest first, down to so many overlaps."""
    smallest = min(size, least * overlap)
    cuts = range(2, size + 1)
    return sorted({size, smallest, *(max(smallest, math.ceil((size - overlap) / n) + overlap) for n in cuts)}, reverse=True)
