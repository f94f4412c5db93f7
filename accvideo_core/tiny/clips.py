"""The tiny world: clips of one object moving at constant speed on a plain background, drawn in batches with torch.

A clip is (17, 64, 64, 3) float in [0, 1], 8 frames a second. Attributes are class numbers into the tables below;
everything is drawn from a generator the caller seeds, so a clip is reproducible from its seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

FRAMES, SIZE, FPS = 17, 64, 8
COLOURS = {
    "red": (0.90, 0.20, 0.20),
    "green": (0.20, 0.80, 0.20),
    "blue": (0.25, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.20),
    "purple": (0.75, 0.25, 0.85),
    "white": (0.96, 0.96, 0.96),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
BACKGROUNDS = {"black": (0.06, 0.06, 0.08), "teal": (0.10, 0.30, 0.32), "brown": (0.32, 0.20, 0.10), "grey": (0.45, 0.45, 0.47)}
CLASSES = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": tuple(MOTIONS), "background": tuple(BACKGROUNDS)}
RADIUS, SPEED = (6.5, 10.0), (1.4, 2.2)  # pixels; pixels a frame


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key alone, so that a draw never depends on what ran before it."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Scenes:
    """B scenes: class numbers (B,) long, radius (B,) in pixels, speed (B,) in pixels a frame, centre (B, 2) as x, y in
    frame 0, pixels from the top left corner."""

    colour: Tensor
    shape: Tensor
    motion: Tensor
    background: Tensor
    radius: Tensor
    speed: Tensor
    centre: Tensor

    def __len__(self) -> int:
        return len(self.colour)

    def rows(self, index: slice | Tensor) -> Scenes:
        return Scenes(*(getattr(self, f.name)[index] for f in fields(self)))

    def names(self, row: int) -> dict[str, str]:
        """Attribute names of one scene, as prompts use them."""
        return {kind: classes[int(getattr(self, kind)[row])] for kind, classes in CLASSES.items()}

    @classmethod
    def of(cls, scenes: Sequence[Mapping]) -> Scenes:
        """From dictionaries of attribute names and geometry (radius, speed, centre)."""
        numbers = {k: torch.tensor([classes.index(s[k]) for s in scenes]) for k, classes in CLASSES.items()}
        geometry = {
            k: torch.tensor([[float(x) for x in s[k]] if k == "centre" else float(s[k]) for s in scenes])
            for k in ("radius", "speed", "centre")
        }
        return cls(**numbers, **geometry)


def sample_scenes(count: int, generator: torch.Generator, named: Mapping[str, str] | None = None) -> Scenes:
    """`count` scenes; attributes not named are drawn uniformly, and the whole path stays inside the frame."""

    def uniform(low: float | Tensor, high: float | Tensor) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    chosen = {}
    for kind, classes in CLASSES.items():
        drawn = torch.randint(len(classes), (count,), generator=generator)
        chosen[kind] = torch.full_like(drawn, classes.index(named[kind])) if named and kind in named else drawn
    radius, speed = uniform(*RADIUS), uniform(*SPEED)
    margin, run = 1.3 * radius + 1, speed * (FRAMES - 1)
    step = torch.tensor(list(MOTIONS.values()))[chosen["motion"]]
    across = uniform(margin, SIZE - margin)
    start = uniform(margin, SIZE - margin - run)
    along = torch.where(step.sum(1) > 0, start, SIZE - start)
    horizontal = step[:, 0] != 0
    centre = torch.stack([torch.where(horizontal, along, across), torch.where(horizontal, across, along)], 1)
    return Scenes(**chosen, radius=radius, speed=speed, centre=centre)


def coverage(scenes: Scenes, frames: int = FRAMES, size: int = SIZE) -> Tensor:
    """(B, T, H, W) share of each pixel the object covers: clip(0.5 - signed distance at the pixel's centre)."""
    grid = torch.arange(size) + 0.5
    step = torch.tensor(list(MOTIONS.values()), dtype=torch.float32)[scenes.motion]
    place = scenes.centre[:, None] + (step * scenes.speed[:, None])[:, None] * torch.arange(frames)[None, :, None]  # (B, T, 2)
    x = grid[None, None, None, :] - place[..., 0][..., None, None]
    y = grid[None, None, :, None] - place[..., 1][..., None, None]
    r = scenes.radius[:, None, None, None]
    circle = torch.hypot(x, y) - r
    square = torch.maximum(x.abs(), y.abs()) - 0.886 * r
    triangle = torch.maximum(y, 0.8660254 * x.abs() - 0.5 * y) - 0.65 * r
    kind = scenes.shape[:, None, None, None]
    distance = torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))
    return (0.5 - distance).clamp(0, 1)


def paint(scenes: Scenes, cover: Tensor) -> Tensor:
    """(B, T, H, W, 3) float in [0, 1] from coverage (B, T, H, W)."""
    colour, ground = _colours(scenes)
    return torch.lerp(ground[:, None, None, None], colour[:, None, None, None], cover[..., None])


def contrast(scenes: Scenes) -> Tensor:
    """(B,) distance in RGB between object and background, 0.5 (green on grey) to 1.6 (white on black)."""
    colour, ground = _colours(scenes)
    return (colour - ground).norm(dim=-1)


def _colours(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """(B, 3) of the object and of the background."""
    colour = torch.tensor(list(COLOURS.values()))[scenes.colour]
    return colour, torch.tensor(list(BACKGROUNDS.values()))[scenes.background]


def render(scenes: Scenes) -> Tensor:
    """(B, 17, 64, 64, 3) float32 in [0, 1]."""
    return paint(scenes, coverage(scenes))
