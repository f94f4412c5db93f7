"""SynVid for training: segments of trajectories at random, in an order that a seed and a step tell, whoever asks.

    dataset = SynVidDataset("synvid")
    sampler = SynVidSampler(dataset, batch=32, seed=0, rank=rank, world=world, start=step)
    for step, batch in enumerate(DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=4), step):

What a step trains on depends on the dataset's ids, the seed and the step alone, not on ranks, workers or what ran before; so a
run that goes on at its step sees what it would have seen. (With a remote dataset, workers must be spawned, not forked.)
"""

from __future__ import annotations

import bisect
import hashlib
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..dit import Conditioning
from ..errors import AccVideoWarning, InvalidValueError, SynVidError
from .reader import Damage, SynVidReader


class Draw(NamedTuple):
    """A segment of a trajectory: the sample's place in the dataset's `samples`, and key: from key + 1 to key."""

    sample: int
    key: int


@dataclass(frozen=True)
class Segment:
    """From `noisy`, key + 1, to `clean`, key: both (C, T, H, W) float32 in model space, with their sigmas; the prompt's text
    (L, D) and pooled vector (P,) as stored."""

    id: str
    prompt: str
    key: int
    clean: Tensor
    noisy: Tensor
    sigma: float
    sigma_noisy: float
    text: Tensor
    pooled: Tensor | None


@dataclass(frozen=True)
class Batch:
    """B segments of one shape: clean and noisy (B, C, T, H, W) float32; sigma and sigma_noisy (B,) float32; text (B, L, D)
    filled up with zeros to the longest, mask (B, L) bool or None where all are as long; pooled (B, P) or None."""

    ids: tuple[str, ...]
    keys: tuple[int, ...]
    clean: Tensor
    noisy: Tensor
    sigma: Tensor
    sigma_noisy: Tensor
    text: Tensor
    mask: Tensor | None
    pooled: Tensor | None

    @property
    def velocity(self) -> Tensor:
        """(B, C, T, H, W): of the segments, what the trajectory loss regresses (paper, Eq. 6)."""
        difference = (self.sigma - self.sigma_noisy).view(-1, 1, 1, 1, 1)
        return (self.clean - self.noisy) / difference

    def conditioning(self, guidance: float | None) -> Conditioning:
        """For our network, at one guidance in plain scale (`header.guidance`)."""
        if self.pooled is None:
            raise SynVidError("these texts have no pooled vector; they are of a model family that runs in ComfyUI alone")
        scale = None if guidance is None else torch.full((len(self.ids),), guidance, device=self.text.device)
        return Conditioning(self.text, self.pooled, scale, self.mask)

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """For DataLoader, which calls it."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)


class SynVidDataset(Dataset[Segment]):
    """The samples of a dataset that are whole, as they are when it is opened.

    address  a folder, or any fsspec address
    shapes   take only latents of these shapes (C, T, H, W)
    ids      take only these samples: what a run began with, where the dataset has grown since

    `samples` lists them in order of id; `buckets` has their indices by shape; `skipped` names what is damaged or missing and
    is left out, a warning too. Raises SynVidError where there is nothing to train on, or one of `ids` is not there.
    """

    def __init__(
        self,
        address: str | os.PathLike[str],
        shapes: Collection[Sequence[int]] | None = None,
        ids: Collection[str] | None = None,
    ) -> None:
        self.reader = SynVidReader(address)
        self.header = self.reader.header
        found = self.reader.samples()
        if ids is not None:
            if lacking := sorted(set(ids) - set(found)):
                raise SynVidError(f"{address} lacks {len(lacking)} of the samples asked for, {lacking[0]} the first")
            found = {name: found[name] for name in sorted(set(ids))}
        self.skipped: list[Damage] = []
        for damage in self.reader.faults(found.values()):
            del found[damage.id]
            self._skip(damage)
        wanted = None if shapes is None else {tuple(shape) for shape in shapes}
        self.samples = [sample for sample in found.values() if wanted is None or sample.shape in wanted]
        if not self.samples:
            asked = "" if wanted is None else f" of shape {' or '.join(map(str, sorted(wanted)))}"
            raise SynVidError(f"{address} holds no whole samples{asked}; capture some, or look with accvideo inspect --verify")
        self.buckets: dict[tuple[int, ...], tuple[int, ...]] = {}
        for shape in sorted({sample.shape for sample in self.samples}):
            self.buckets[shape] = tuple(i for i, sample in enumerate(self.samples) if sample.shape == shape)
        self._damaged: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def digest(self) -> str:
        """sha256 over the ids: two datasets of one digest give the same order."""
        return hashlib.sha256("\n".join(sample.id for sample in self.samples).encode()).hexdigest()

    def __getitem__(self, draw: Draw | tuple[int, int]) -> Segment:
        """The segment. For a sample that turns out to be damaged, the next whole one of its shape, and a warning."""
        index, key = draw
        bucket = self.buckets[self.samples[index].shape]
        place = bisect.bisect_left(bucket, index)
        for offset in range(len(bucket)):
            other = bucket[(place + offset) % len(bucket)]
            if other in self._damaged:
                continue
            try:
                return self.segment(other, key)
            except SynVidError as error:
                self._damaged.add(other)
                self._skip(Damage(self.samples[other].id, self.samples[other].file, str(error)))
        raise SynVidError(f"no sample of shape {self.samples[index].shape} is whole in {self.reader.folder}")

    def segment(self, index: int, key: int) -> Segment:
        """The segment from key + 1 to key of a sample; SynVidError if the sample is damaged."""
        if not 0 <= key < self.header.segments:
            raise InvalidValueError(f"there is no segment {key}; segments go from 0 to {self.header.segments - 1}")
        sample = self.samples[index]
        clean, noisy = self.reader.read_keys(sample, (key, key + 1))
        text, pooled = self.reader.text(sample.text)
        sigmas = self.header.key_sigmas
        return Segment(sample.id, sample.prompt, key, clean.float(), noisy.float(), sigmas[key], sigmas[key + 1], text, pooled)

    def trajectory(self, index: int) -> list[Tensor]:
        """Key 0 to key m of a sample, (C, T, H, W) float32 each; SynVidError if the sample is damaged."""
        return [key.float() for key in self.reader.read_keys(self.samples[index], range(self.header.segments + 1))]

    @staticmethod
    def collate(segments: Sequence[Segment]) -> Batch:
        """Segments of one shape as a batch."""
        lengths = [len(segment.text) for segment in segments]
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        pooled = [segment.pooled for segment in segments if segment.pooled is not None]
        return Batch(
            ids=tuple(segment.id for segment in segments),
            keys=tuple(segment.key for segment in segments),
            clean=torch.stack([segment.clean for segment in segments]),
            noisy=torch.stack([segment.noisy for segment in segments]),
            sigma=torch.tensor([segment.sigma for segment in segments]),
            sigma_noisy=torch.tensor([segment.sigma_noisy for segment in segments]),
            text=torch.nn.utils.rnn.pad_sequence([segment.text for segment in segments], batch_first=True),
            mask=None if len(set(lengths)) == 1 else mask,
            pooled=torch.stack(pooled) if pooled else None,
        )

    def _skip(self, damage: Damage) -> None:
        self.skipped.append(damage)
        message = f"{self.reader.folder}: sample {damage.id} is left out: {damage.file}: {damage.what}"
        warnings.warn(message, AccVideoWarning, stacklevel=3)


class SynVidSampler(Sampler[list[Draw]]):
    """Which segments a step trains on; a batch sampler for DataLoader, endless, from step `start` on.

    batch        segments a step, of all ranks together; a multiple of `world`
    seed         of the order
    rank, world  this process takes its part of each batch
    key          the segment that a step trains on; by default as in the paper's Algorithm 1, m-1 down to 0 and again

    In an epoch every bucket's samples come in an order of their own, cut into batches, and the batches of all buckets in an
    order of theirs; fewer than a batch of a bucket sit out, others each epoch. Raises InvalidValueError for a batch that
    cannot be shared, or that a bucket is too small for.
    """

    def __init__(
        self,
        dataset: SynVidDataset,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        key: Callable[[int], int] | None = None,
    ) -> None:
        if batch < 1 or batch % world or not 0 <= rank < world or start < 0:
            raise InvalidValueError(
                f"batch {batch}, rank {rank} of {world}, start {start}; batch must be a multiple of the ranks, rank below them"
            )
        for shape, members in dataset.buckets.items():
            if len(members) < batch:
                raise InvalidValueError(
                    f"{len(members)} samples of shape {shape} make no batch of {batch}; choose a smaller batch, or leave them "
                    "out by the dataset's shapes"
                )
        segments = dataset.header.segments
        self.batch, self.seed, self.rank, self.world, self.start = batch, seed, rank, world, start
        self._key = key or (lambda step: segments - 1 - step % segments)
        self._dataset = dataset
        self._planned = -1
        self._batches: list[list[int]] = []

    @property
    def steps_per_epoch(self) -> int:
        return sum(len(members) // self.batch for members in self._dataset.buckets.values())

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self.start
        while True:
            yield self.draws(step)
            step += 1

    def draws(self, step: int) -> list[Draw]:
        """What this rank trains on in a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._planned:
            self._planned, self._batches = epoch, self._plan(epoch)
        share = self.batch // self.world
        return [Draw(index, self._key(step)) for index in self._batches[place][self.rank * share :][:share]]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint must keep to go on before `step`: JSON."""
        return {
            "step": step,
            "seed": self.seed,
            "batch": self.batch,
            "samples": len(self._dataset),
            "digest": self._dataset.digest,
        }

    @classmethod
    def resume(
        cls, dataset: SynVidDataset, state: dict[str, Any], rank: int = 0, world: int = 1, key: Callable[[int], int] | None = None
    ) -> SynVidSampler:
        """The sampler that `state` was taken of, at its step; ranks may be others. SynVidError if the dataset has changed."""
        if dataset.digest != state["digest"]:
            raise SynVidError(
                f"the run began with {state['samples']} samples, here are {len(dataset)}, or others; open the dataset with the "
                "ids it began with, or begin a new run"
            )
        return cls(dataset, state["batch"], state["seed"], rank, world, state["step"], key)

    def _plan(self, epoch: int) -> list[list[int]]:
        def rank_of(*what: object) -> bytes:
            return hashlib.sha256("/".join(map(str, (self.seed, epoch, *what))).encode()).digest()

        samples = self._dataset.samples
        batches = []
        for members in self._dataset.buckets.values():
            order = sorted(members, key=lambda i: rank_of(samples[i].id))
            batches += [order[i : i + self.batch] for i in range(0, len(order) - self.batch + 1, self.batch)]
        return sorted(batches, key=lambda batch: rank_of("batch", samples[batch[0]].id))
