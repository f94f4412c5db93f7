"""What the trainer's tests share: made-up trajectories, small networks, and a network so simple that a hand can follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accvideo_core.distill.adapters import HunyuanAdapter
from accvideo_core.distill.config import TrainConfig
from accvideo_core.distill.on_policy import Continuation
from accvideo_core.distill.parallel import World
from accvideo_core.distill.trainer import Trainer
from accvideo_core.dit import DiTConfig, HunyuanVideoDiT
from accvideo_core.synvid import Batch
from tests.networks import random_weights
from tests.synvid_data import SHAPE

MINUTE = DiTConfig(16, 1, 1, 2, text_dim=8, pooled_dim=6, in_channels=4, out_channels=4, rope_dims=(4, 6, 6), refiner_depth=1)
EXPORTABLE = DiTConfig(128, 1, 1, 1, text_dim=8, pooled_dim=6, in_channels=4, out_channels=4, mlp_ratio=1.0, refiner_depth=1)
SIGMAS = (0.0, 0.6, 1.0)
LEVELS = {0: (0.6, 0.3, 0.0), 1: (1.0, 0.8, 0.6)}
QUICK: dict[str, Any] = dict(
    batch=4, iterations=3, lr=1e-3, head_lr=1e-3, warmup=0, head_channels=8, head_depth=1, precision="float32"
)


def network(config: DiTConfig = MINUTE, seed: int = 0) -> HunyuanVideoDiT:
    made = HunyuanVideoDiT(config, device="meta")
    made.load_state_dict({name: t.clone() for name, t in random_weights(config, seed).items()}, assign=True)
    return made


class MadeUp:
    """A source of random trajectories, the same for every key of a draw; `rows` of the `batch` of each."""

    guidance: float | None = 6.0

    def __init__(self, batch: int = 4, rows: range | None = None, sigmas: Sequence[float] = SIGMAS, name: str = "-") -> None:
        self.sigmas, self.name = sigmas, name
        self.total, self.rows = batch, rows or range(batch)

    def batch(self, step: int, key: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        keys = torch.randn(len(self.sigmas), self.total, *SHAPE, generator=generator)[:, self.rows.start : self.rows.stop]
        text = torch.randn(self.total, 3, 8, generator=generator)[self.rows.start : self.rows.stop]
        count = len(self.rows)
        return Batch(
            ids=tuple(f"{step}.{row}" for row in self.rows),
            keys=(key,) * count,
            clean=keys[key],
            noisy=keys[key + 1],
            sigma=torch.full((count,), self.sigmas[key]),
            sigma_noisy=torch.full((count,), self.sigmas[key + 1]),
            text=text,
            mask=None,
            pooled=text.mean(1)[:, :6],
        )

    def state(self) -> dict[str, Any]:
        return {"name": self.name}


def trainer(config: DiTConfig = MINUTE, teacher: nn.Module | None = None, source: Any = None, **chosen: Any) -> Trainer:
    """One process on the CPU; `chosen` are fields of TrainConfig, or Trainer's own arguments."""
    own = {
        name: chosen.pop(name)
        for name in ("folder", "held_out", "judged", "going_on", "observers", "show", "adapter", "student")
        if name in chosen
    }
    adapter, student = own.pop("adapter", HunyuanAdapter("tiny")), own.pop("student", None) or network(config)
    settings = TrainConfig(**QUICK | chosen)
    if settings.on_policy_weight:
        own.setdefault("going_on", Continuation(adapter, LEVELS, MadeUp.guidance))
    world = World(device=torch.device("cpu"))
    return Trainer(settings, adapter, student, teacher or network(config), source or MadeUp(), world, **own)


def weights(made: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.student.named_parameters()}
