"""The student's own few-step trajectories: the queues of the paper's Algorithm 1.

Queue k holds latents at key k. Fresh noise enters queue m; what is popped from queue k+1 moves one student step and enters
queue k. Nothing leaves queue 0, so that what would enter it is dropped. Nothing in a queue has a gradient.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidValueError
from ..sampling import make_noise


class Entry(NamedTuple):
    """Latents (B, C, T, H, W) on their way from noise to clean, with the draw (`Source.batch(draw, key)`) whose prompts they
    are made for and whose key latents they are held against."""

    draw: int
    latent: Tensor


class Queues:
    """Q_1 .. Q_m, first in, first out.

    segments  m
    length    entries that a queue holds before one is popped. 1, as Algorithm 1 is written: each entry goes on at once, so
              every latent was made by the present student. With L, a stage works on what was made L - 1 iterations before
              it; the first iterations, until the queue is filled, have nothing to pop.
    """

    def __init__(self, segments: int, length: int = 1) -> None:
        if length < 1:
            raise InvalidValueError(f"queue_length is {length}; it must be at least 1")
        self.segments, self.length = segments, length
        self._queues: dict[int, deque[Entry]] = {key: deque() for key in range(1, segments + 1)}

    def push(self, key: int, entry: Entry) -> None:
        """Add an entry, without its gradient; dropped at key 0, which nobody pops."""
        if key > 0:
            self._queues[key].append(Entry(entry.draw, entry.latent.detach()))

    def pop(self, key: int) -> Entry | None:
        """The oldest entry, or None while there are fewer than `length`."""
        queue = self._queues[key]
        return queue.popleft() if len(queue) >= self.length else None

    def __len__(self) -> int:
        """Entries in all queues."""
        return sum(map(len, self._queues.values()))

    def state(self, gather: Callable[[Tensor], Tensor] = lambda rows: rows) -> dict[str, Any]:
        """What a checkpoint keeps: {key: {place, 0 the oldest: {draw, latent}}}. `gather` makes this process's rows those of
        all processes."""
        return {
            str(key): {str(place): {"draw": entry.draw, "latent": gather(entry.latent)} for place, entry in enumerate(queue)}
            for key, queue in self._queues.items()
        }

    def restore(self, state: Mapping[str, Any], rows: range, device: torch.device) -> None:
        """What `state` gave, in place of what there is; of every latent these rows."""
        for key, queue in self._queues.items():
            places = state.get(str(key), {})
            kept = (places[str(place)] for place in range(len(places)))
            queue.clear()
            queue.extend(Entry(entry["draw"], entry["latent"][rows.start : rows.stop].to(device)) for entry in kept)


def keyed_seed(seed: int, what: str, step: int, sample: int) -> int:
    """A generator's seed that hangs on the run's seed, what is drawn, the step and the global sample alone."""
    key = json.dumps([seed, what, step, sample]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def keyed_noise(like: Tensor, seed: int, what: str, step: int, first: int) -> Tensor:
    """Standard normal noise of the shape of `like`, whose rows are the global samples first, first + 1, ... of a step; float32,
    on its device. Which process holds a sample changes nothing of it."""
    seeds = [keyed_seed(seed, what, step, first + row) for row in range(like.shape[0])]
    return make_noise(like.shape, seeds).to(like.device)
