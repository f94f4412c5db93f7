"""Bytes a GPU needs to train a HunyuanVideo-like student, computed before anyone rents one: `docs/training.md` has the table.

What is counted is what the trainer keeps: bf16 blocks with activation checkpointing and float32 masters, sharded over all
processes as `World.shard` does, one sample at a time. The peak is in the student's adversarial step, where the blocks' inputs of
both student and teacher are kept while one block at a time is computed again. Measured against scaled models in
tests/core/test_distill_footprint.py. What an allocator holds beyond that is not counted; leave it a tenth.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..dit import DiTConfig, HunyuanVideoDiT
from ..errors import InvalidValueError

_HALF, _FULL = 2, 4  # bytes of bf16 and of float32
# Bytes for each token and channel that one block makes at most while it is computed again and differentiated, weights and their
# gradients not counted: in the frozen teacher, and in a student. Measured, as are the bytes of `_head`.
_FROZEN, _TRAINED = 58, 72


@dataclass(frozen=True)
class Footprint:
    """Bytes per GPU.

    weights      student's masters and teacher, this process's part
    training     gradients, AdamW's two moments and the average, its part
    gathered     one block's weights, the next one's and the gradients on their way
    kept         inputs of all blocks of student and teacher, and their tables of rotations
    working      one block computed again, or a head over the features, whichever takes more
    """

    weights: float
    training: float
    gathered: float
    kept: float
    working: float

    @property
    def total(self) -> float:
        return sum(getattr(self, item.name) for item in fields(self))


def footprint(
    config: DiTConfig,
    latent: Sequence[int],
    world: int,
    sequence: int = 1,
    text: int = 256,
    lora: int | None = None,
    adversarial: bool = True,
    head_channels: int = 256,
) -> Footprint:
    """Of one process.

    latent       (T, H, W) of a sample
    world        processes in all, sequence of which share a sample's tokens
    text         tokens of a prompt
    lora         rank of a LoRA student; alone on one GPU it shares its base with the teacher
    adversarial  whether there is a teacher beside the student, with heads of head_channels. The on-policy loss alone needs the
                 teacher's weights, too, but keeps nothing inside it: less than with heads
    Raises InvalidValueError where the sequence divides neither world nor heads.
    """
    if world % sequence or config.num_heads % sequence:
        raise InvalidValueError(
            f"{sequence} processes cannot share the tokens of a network of {config.num_heads} heads in a world of {world}; "
            "choose a divisor of both"
        )
    sizes = _sizes(config)
    everything, largest = sum(sizes.values()), max(size for name, size in sizes.items() if name)
    trained = everything if lora is None else _lora_size(config, lora)
    frozen = (0 if lora is None else everything) + (everything if adversarial and (lora is None or world > 1) else 0)
    networks = 2 if adversarial else 1

    image = math.prod(n // p for n, p in zip(latent, config.patch_size, strict=True))
    tokens = -(-image // sequence) + text
    unit = tokens * config.hidden_size
    gathered = 0.0
    if world > 1:
        # Unsharded in bf16: what is in no block of either network, a block and the one that is fetched behind it; the gradients
        # of what is trained in bf16 and, to be added up, in float32.
        gradients = (_HALF + _FULL) * largest if lora is None else 0
        gathered = _HALF * (networks * sizes[""] + 2 * largest) + gradients
    blocks = config.depth_double + config.depth_single
    working = _TRAINED * unit
    if adversarial:  # by the time the student's blocks are differentiated, the teacher's inputs are gone
        head = image * _head(config.hidden_size, head_channels)
        working = max(_FROZEN * unit, head, working - _HALF * blocks * unit)
    return Footprint(
        weights=(_FULL * trained + _HALF * frozen) / world,
        training=4 * _FULL * trained / world,
        gathered=gathered,
        kept=networks * (blocks * _HALF * unit + _FULL * (image + text) * config.head_dim),
        working=working,
    )


def _head(width: int, channels: int) -> int:
    """Bytes for each token that a 2-D head of two layers makes at most: at its own end, or at that of the features."""
    return max(8 * width + 40 * channels, 12 * width + 4 * channels)


@functools.lru_cache
def _sizes(config: DiTConfig) -> dict[str, int]:
    """Parameters of each block and, under "", of all that is in none."""
    network = HunyuanVideoDiT(config, device="meta")
    sizes = {name: sum(p.numel() for p in network.get_submodule(name).parameters()) for name in network.block_names()}
    return sizes | {"": sum(p.numel() for p in network.parameters()) - sum(sizes.values())}


def _lora_size(config: DiTConfig, rank: int) -> int:
    """Parameters of a LoRA in every Linear of the blocks: rank times the sides of each matrix."""
    network = HunyuanVideoDiT(config, device="meta")
    blocks = (network.get_submodule(name) for name in network.block_names())
    return rank * sum(sum(p.shape) for block in blocks for name, p in block.named_parameters() if p.ndim == 2)


SPLITS = {"544 x 960 x 93": (24, 68, 120), "720 x 1280 x 129": (33, 90, 160)}
_ROWS = ((1, 1, 64), (4, 4, 64), (8, 1, None), (8, 4, None), (16, 2, None), (16, 8, None), (32, 4, None), (64, 8, None))


def table() -> str:
    """Markdown: GB (10^9 bytes) per GPU for HunyuanVideo by world size, for both splits of SynVid."""
    titles = [item.name for item in fields(Footprint)]
    lines = [
        f"| video | GPUs | share a sample | student | {' | '.join(titles)} | GB per GPU |",
        f"|---|---|---|---|{'---|' * len(titles)}---|",
    ]
    for video, latent in SPLITS.items():
        for world, sequence, lora in _ROWS:
            found = footprint(DiTConfig.hunyuan_video(), latent, world, sequence, lora=lora)
            student = "full" if lora is None else f"LoRA {lora}"
            parts = " | ".join(f"{getattr(found, title) / 1e9:.1f}" for title in titles)
            lines.append(f"| {video} | {world} | {sequence} | {student} | {parts} | **{found.total / 1e9:.0f}** |")
    return "\n".join(lines)
