"""Where training data comes from. The trainer knows a `Source` alone; a SynVid dataset is one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..errors import SynVidError
from ..schedule import get_preset, key_sigmas
from ..synvid import Batch, Header, SynVidDataset, SynVidSampler


class Source(Protocol):
    """Segments of trajectories.

    sigmas    of key 0 .. m, rising from 0, clean, to 1, noise
    guidance  embedded guidance the trajectories were made with, in plain scale; None for a network without it
    """

    @property
    def sigmas(self) -> Sequence[float]: ...
    @property
    def guidance(self) -> float | None: ...

    def batch(self, step: int, key: int) -> Batch:
        """This process's rows of the global batch of draw `step`: segments from key + 1 to key, all of one shape. The same
        trajectories for any key of one draw. It depends on the two numbers alone, not on what was asked for before."""

    def state(self) -> dict[str, Any]:
        """What tells this data from other data, as JSON: a run goes on only with the data it began with."""


class SynVidSource:
    """Trajectories of a dataset, in the order `SynVidSampler` gives them.

    batch        trajectories a draw, of all processes together
    rank, world  this process takes its part
    """

    def __init__(self, dataset: SynVidDataset, batch: int, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self.dataset = dataset
        self._sampler = SynVidSampler(dataset, batch, seed, rank, world)

    @property
    def sigmas(self) -> Sequence[float]:
        return self.dataset.header.key_sigmas

    @property
    def guidance(self) -> float | None:
        return self.dataset.header.guidance

    @property
    def prompts(self) -> Mapping[str, str]:
        """By sample id."""
        return {sample.id: sample.prompt for sample in self.dataset.samples}

    def batch(self, step: int, key: int) -> Batch:
        return self.dataset.collate([self.dataset[draw.sample, key] for draw in self._sampler.draws(step)])

    def state(self) -> dict[str, Any]:
        state = self._sampler.state(0)
        return {name: state[name] for name in ("seed", "batch", "samples", "digest")} | {
            "fingerprint": self.dataset.header.fingerprint
        }


def split(address: str | os.PathLike[str], held_out: int, seed: int = 0) -> tuple[SynVidDataset, SynVidDataset | None]:
    """(dataset to train on, dataset to validate on): `held_out` samples of the commonest shape, chosen by the hash of their ids,
    are set aside; with 0 there are none. SynVidError if that leaves nothing to train on."""
    whole = SynVidDataset(address)
    if not held_out:
        return whole, None
    largest = max(whole.buckets.values(), key=len)
    if held_out >= len(largest):
        raise SynVidError(
            f"{held_out} of the {len(largest)} samples of shape {whole.samples[largest[0]].shape} in {address} cannot be held "
            "out for validation; capture more, or hold out fewer"
        )
    names = sorted((whole.samples[i].id for i in largest), key=lambda name: _rank(seed, name))
    aside = set(names[:held_out])
    rest = [sample.id for sample in whole.samples if sample.id not in aside]
    return SynVidDataset(address, ids=rest), SynVidDataset(address, ids=aside)


def check_schedule(header: Header) -> None:
    """SynVidError unless students of the dataset's family are sampled at its key sigmas."""
    preset = get_preset(header.family)
    own = None if preset.keys is None else key_sigmas(preset.teacher_steps, preset.keys, preset.shift)
    wanted = None if own is None else tuple(own.flip(0).tolist())
    if wanted is None or len(wanted) != len(header.key_sigmas) or _far(wanted, header.key_sigmas):
        told = "with UniPC, at no key sigmas" if wanted is None else f"at sigmas {_listed(wanted)}"
        raise SynVidError(
            f"the dataset's keys are at sigmas {_listed(header.key_sigmas)}, students of {header.family} are sampled {told}; "
            "capture with that schedule, or say --any-schedule and sample the student with the dataset's"
        )


def _far(a: Sequence[float], b: Sequence[float]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) > 1e-6


def _listed(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in reversed(sigmas))


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(json.dumps([seed, "held out", name]).encode()).digest()
