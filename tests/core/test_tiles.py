"""Tiles for a decoder: against every other plan where they can all be tried, and against what ComfyUI would do."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from accvideo_core.errors import InvalidValueError
from accvideo_core.tiles import Extent, TilePlan, plan_tiles, tile_lengths

FULL: Extent = (24, 68, 120)  # 93 frames of 544 x 960


def covered(plan: TilePlan) -> list[list[int]]:
    """How many tiles hold each place, along each axis, cut as ComfyUI cuts."""
    counts = []
    for size, tile, overlap in zip(plan.shape, plan.tile, plan.overlap, strict=True):
        count = [0] * size
        starts = range(0, size - overlap, tile - overlap) if size > tile else [0]
        for start in starts:
            for place in range(start, min(start + tile, size)):
                count[place] += 1
        counts.append(count)
    return counts


def budget(volume: float) -> object:
    return lambda tile: math.prod(tile) <= volume


def test_what_fits_is_left_whole() -> None:
    plan = plan_tiles(FULL, lambda tile: True)
    assert plan.whole and plan.tile == FULL and plan.twice == 0 and str(plan) == "24 x 68 x 120 latents in one piece"


def test_half_the_memory_is_two_tiles_across_the_longer_side() -> None:
    plan = plan_tiles(FULL, budget(0.6 * math.prod(FULL)))
    assert plan.tile == (24, 68, 64) and plan.tiles == 2
    assert str(plan) == "2 tiles of 24 x 68 x 64 latents, 6.7 % computed twice"


@pytest.mark.parametrize("seed", range(40))
def test_no_other_plan_is_better(seed: int) -> None:
    """Every size of tile along every axis is tried, not only those of equal cuts."""
    draw = random.Random(seed)
    shape = (draw.randint(1, 7), draw.randint(4, 22), draw.randint(4, 22))
    overlap, overlap_t = draw.randint(1, 3), draw.randint(1, 2)
    volume = draw.uniform(0.05, 1.1) * math.prod(shape)
    fits = budget(volume)
    plan = plan_tiles(shape, fits, overlap, overlap_t)
    wide = [range(min(size, 3 * overlap), size + 1) for size in shape[1:]]
    narrow = [range(min(size, 2 * overlap), size + 1) for size in shape[1:]]
    frames = range(min(shape[0], 2 * overlap_t), shape[0] + 1)
    for axes in (([shape[0]], *wide), (frames, *wide), (frames, *narrow)):
        others = []
        for tile in itertools.product(*axes):
            if fits(tile):
                along = [tile_lengths(*axis) for axis in zip(shape, tile, (overlap_t, overlap, overlap), strict=True)]
                others.append((math.prod(map(sum, along)), math.prod(map(len, along))))
        if others:
            assert fits(plan.tile) and (plan.volume, plan.tiles) == min(others)
            return
    assert math.prod(plan.tile) == math.prod(min(axis) for axis in (frames, *narrow))


@pytest.mark.parametrize("shape", [FULL, (33, 90, 160), (1, 68, 120), (16, 46, 80), (5, 8, 8), (2, 200, 17)])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.3, 0.1, 0.03, 1e-6])
def test_every_place_is_in_a_tile_and_the_volume_is_what_is_computed(shape: Extent, share: float) -> None:
    plan = plan_tiles(shape, budget(share * math.prod(shape)))
    counts = covered(plan)
    assert all(min(count) >= 1 for count in counts)
    assert plan.volume == math.prod(map(sum, counts))
    assert plan.tiles == math.prod(len(tile_lengths(*axis)) for axis in zip(plan.shape, plan.tile, plan.overlap, strict=True))


@pytest.mark.parametrize("tile", [32, 64])
def test_no_more_is_computed_than_by_square_tiles(tile: int) -> None:
    """ComfyUI's own fall-back: a power of two, overlapping by a quarter; the same memory, and the same overlap in places."""
    square = [tile_lengths(size, tile, tile // 4) for size in FULL[1:]]
    plan = plan_tiles(FULL, budget(FULL[0] * tile * tile), overlap=tile // 4)
    assert plan.tile[0] == FULL[0] and plan.volume <= FULL[0] * math.prod(map(sum, square))


def test_time_is_cut_only_where_space_does_not_do() -> None:
    for share in (0.8, 0.4, 0.2, 0.09):
        assert plan_tiles(FULL, budget(share * math.prod(FULL))).tile[0] == 24
    assert plan_tiles(FULL, budget(24 * 24 * 24 - 1)).tile[0] < 24


def test_the_next_plan_after_a_failure_is_smaller() -> None:
    plan, sizes = None, []
    for _ in range(6):
        plan = plan_tiles(FULL, lambda tile: True, largest=None if plan is None else math.prod(plan.tile))
        sizes.append(math.prod(plan.tile))
    assert sizes == sorted(set(sizes), reverse=True)
    assert plan_tiles(FULL, lambda tile: True, largest=1).tile == (4, 16, 16)  # nothing smaller is left


def test_nothing_fits() -> None:
    assert plan_tiles(FULL, lambda tile: False).tile == (4, 16, 16)


@pytest.mark.parametrize(("shape", "overlap"), [((0, 8, 8), 8), ((1, 8, -1), 8), ((1, 8, 8), 0)])
def test_no_latent(shape: Extent, overlap: int) -> None:
    with pytest.raises(InvalidValueError, match="at least 1"):
        plan_tiles(shape, lambda tile: True, overlap)
