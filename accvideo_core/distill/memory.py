"""When memory does not suffice: what to change, the cheapest first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..errors import TrainingError
from .config import TrainConfig
from .parallel import World


class _Cure(NamedTuple):
    helps: Callable[[TrainConfig, int], bool]
    what: str


# In order of what they cost: nothing, time, the student's freedom, machines, the video.
_CURES = (
    _Cure(lambda c, rows: (c.micro_batch or rows) > 1, "--micro-batch 1 (the same result, more passes)"),
    _Cure(lambda c, rows: c.precision == "float32", "--precision bfloat16"),
    _Cure(lambda c, rows: not c.checkpointing, "--checkpointing (a third more time)"),
    _Cure(lambda c, rows: c.queue_length > 1, "--queue-length 1"),
    _Cure(lambda c, rows: c.lora is None, "--lora 64 (optimizer states and averages of a LoRA alone)"),
    _Cure(lambda c, rows: True, "more GPUs by torchrun, over which weights and optimizer states are divided"),
    _Cure(lambda c, rows: True, "a larger --sequence, which divides each sample's tokens"),
    _Cure(lambda c, rows: True, "a dataset of smaller videos"),
)


@contextlib.contextmanager
def explained(config: TrainConfig, world: World) -> Iterator[None]:
    """Inside the block, memory that does not suffice is a TrainingError that says what to change, of what has not been changed
    yet, in order."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        cures = [cure.what for cure in _CURES if cure.helps(config, len(world.rows(config.batch)))]
        listed = "; ".join(f"{place}. {what}" for place, what in enumerate(cures, 1))
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(
            f"the memory of {world.device} does not suffice ({reason}). Change, in this order: {listed}. Checkpoints are whole: "
            "started again, the run goes on from the last"
        ) from error
