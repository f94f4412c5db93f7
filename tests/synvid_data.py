"""Small SynVid datasets of made-up trajectories, known by their ids: what a reader finds can be told from what was committed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from accvideo_core.sampling import make_noise
from accvideo_core.synvid import Header, SampleInfo, SynVidStore, sample_id

SHAPE = (4, 2, 4, 6)
HEADER = Header.of("tiny", "f" * 64, steps=4, segments=2, teacher="made up")
PLAN = tuple(sample_id(f"prompt {i}", i, SHAPE) for i in range(400))


@functools.lru_cache
def seed_of(name: str) -> int:
    return PLAN.index(name)


def key_of(name: str, key: int, shape: Sequence[int] = SHAPE) -> Tensor:
    """What is captured as key latent `key` of the sample, (C, T, H, W) float32."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(1000 + 10 * seed_of(name) + key))


def commit(store: SynVidStore, names: Sequence[str], shape: Sequence[int] = SHAPE, videos: bool = False) -> None:
    """Capture the samples as one batch. The text is as long as the seed's last digit and one."""
    infos = []
    for name in names:
        seed = seed_of(name)
        text = store.put_text(torch.full((1 + seed % 10, 8), float(seed)), torch.full((6,), 1.0 + seed))
        infos.append(SampleInfo(name, f"prompt {seed}", text, seed, 0.5, f"videos/{name}.mp4" if videos else None))
        if videos:
            store.video_path(name).parent.mkdir(exist_ok=True)
            store.video_path(name).write_bytes(name.encode())
    keys = [torch.stack([key_of(name, key, shape) for name in names]) for key in range(store.header.segments)]
    store.commit(keys, infos, make_noise((len(names), *shape), [info.seed for info in infos]))


def dataset(path: Path, count: int = 6, batch: int = 3, shape: Sequence[int] = SHAPE, header: Header = HEADER) -> SynVidStore:
    """A dataset of the plan's first samples, `batch` in each latent file."""
    store = SynVidStore(path, header, "first")
    for begin in range(0, count, batch):
        commit(store, PLAN[begin : min(begin + batch, count)], shape)
    return store


def latent_files(path: Path) -> list[Path]:
    return sorted((path / "latents").rglob("*.safetensors"))


def flip(path: Path, at: int) -> None:
    """Change one bit of a file; `at` counts from the end if negative."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))
