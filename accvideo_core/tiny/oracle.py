"""Reads a clip of the tiny world back into attributes, and says whether each is a clean member of its class.

Classic image measurements, no learning: the background is the median of the border, the paint the median of what
stands out most, the shape follows from how the object fills its box, the motion from a line through its centres.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidValueError
from .clips import BACKGROUNDS, COLOURS

Floats = NDArray[np.float64]

BORDER = 3  # pixels
GROUND_TOLERANCE, PAINT_TOLERANCE = 0.08, 0.15  # RGB distance to the class's own colour
AREA = (60.0, 500.0)  # pixels a whole object covers in every frame
# per shape: range of the share of its bounding box it fills, and the most its second moment may exceed a disc's
FILL = {"square": (0.90, 1.01), "circle": (0.68, 0.87), "triangle": (0.40, 0.64)}
SPREAD = {"square": 1.16, "circle": 1.11, "triangle": 1.36}
SPEED = (1.1, 2.6)  # pixels a frame
DRIFT, STUTTER_RMS, STUTTER_MAX = 0.25, 1.0, 3.0  # sideways pixels a frame; pixels off the straight, even path


class Verdict(NamedTuple):
    """The class an attribute comes closest to, and whether it is a plain member of it rather than a blend or a wreck."""

    name: str
    clean: bool


def read(frames: Any) -> dict[str, Verdict]:
    """Verdicts {"colour", "shape", "motion", "background"} on one clip (T, H, W, 3): float in [0, 1], or uint8."""
    clip = np.asarray(frames)
    if clip.ndim != 4 or clip.shape[-1] != 3 or min(clip.shape) < 1:
        raise InvalidValueError(f"a clip is (T, H, W, 3), got {clip.shape}")
    clip = clip.astype(np.float64) / 255 if clip.dtype == np.uint8 else clip.astype(np.float64)

    ground = _border_colour(clip)
    distance = np.linalg.norm(clip - ground, axis=-1)
    peak = np.percentile(distance.reshape(len(clip), -1), 99.0, axis=1)
    core = distance > 0.75 * max(float(np.median(peak)), 1e-6)
    paint = np.median(clip[core], axis=0) if core.any() else ground
    verdicts = {
        "background": _nearest(ground, BACKGROUNDS, GROUND_TOLERANCE),
        "colour": _nearest(paint, COLOURS, PAINT_TOLERANCE),
    }
    span = paint - ground
    cover = np.clip((clip - ground) @ span / max(float(span @ span), 1e-9), 0, 1)
    area, seen, centre, fill, spread = _measure(cover)
    if seen.sum() < 8:
        return verdicts | {"shape": Verdict("circle", False), "motion": Verdict("right", False)}
    whole = bool((area > AREA[0]).all() and (area < AREA[1]).all() and area.std() < 0.2 * area.mean())
    verdicts["shape"] = _shape(fill[seen], spread[seen], whole)
    verdicts["motion"] = _motion(centre[seen], whole)
    return verdicts


def _border_colour(clip: Floats) -> Floats:
    n = BORDER
    sides = (clip[:, :n], clip[:, -n:], clip[:, :, :n], clip[:, :, -n:])
    return np.median(np.concatenate([s.reshape(-1, 3) for s in sides]), axis=0)


def _nearest(colour: Floats, table: dict[str, tuple[float, float, float]], tolerance: float) -> Verdict:
    distances = np.linalg.norm(np.array(list(table.values())) - colour, axis=1)
    best = int(distances.argmin())
    return Verdict(list(table)[best], bool(distances[best] < tolerance))


def _measure(cover: Floats) -> tuple[Floats, NDArray[np.bool_], Floats, Floats, Floats]:
    """Of each frame of cover (T, H, W): area, whether an object is seen, its centre (T, 2), fill of its box, spread."""
    mask = cover > 0.5
    count = mask.sum((1, 2))
    seen = count >= 12
    weight = np.where(cover > 0.25, cover, 0) * seen[:, None, None]
    area = weight.sum((1, 2))
    mass = np.maximum(area, 1e-9)
    xs, ys = np.arange(cover.shape[2]) + 0.5, np.arange(cover.shape[1]) + 0.5
    across, down = weight.sum(1), weight.sum(2)
    cx, cy = across @ xs / mass, down @ ys / mass
    moment = (across * (xs - cx[:, None]) ** 2).sum(1) + (down * (ys - cy[:, None]) ** 2).sum(1)
    box = _extent(np.asarray(mask.any(1))) * _extent(np.asarray(mask.any(2)))
    return area, seen, np.stack([cx, cy], 1), count / np.maximum(box, 1), 2 * np.pi * moment / mass**2


def _extent(line: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Length from the first to the last True of each row."""
    length = line.shape[1]
    return np.where(line.any(1), length - line[:, ::-1].argmax(1) - line.argmax(1), 0).astype(np.int64)


def _shape(fill: Floats, spread: Floats, whole: bool) -> Verdict:
    f = float(np.median(fill))
    shape = "square" if f > 0.885 else "circle" if f > 0.655 else "triangle"
    low, high = FILL[shape]
    compact = np.median(spread) < SPREAD[shape] and np.percentile(spread, 90) < SPREAD[shape] + 0.1
    return Verdict(shape, bool(whole and low <= f <= high and compact))


def _motion(centre: Floats, whole: bool) -> Verdict:
    t = np.arange(len(centre))
    slope, start = np.polyfit(t, centre, 1)
    axis = 0 if abs(slope[0]) > abs(slope[1]) else 1
    along, aside = slope[axis], slope[1 - axis]
    name = (("right", "left"), ("down", "up"))[axis][0 if along > 0 else 1]
    off = np.linalg.norm(centre - t[:, None] * slope - start, axis=1)
    smooth = np.sqrt((off**2).mean()) < STUTTER_RMS and off.max() < STUTTER_MAX
    return Verdict(name, bool(whole and SPEED[0] < abs(along) < SPEED[1] and abs(aside) < DRIFT and smooth))
