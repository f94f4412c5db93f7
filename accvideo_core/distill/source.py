"""Where training data comes from. The trainer knows a `Source` alone; a SynVid dataset is one."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import AccVideoWarning, SynVidError
from ..schedule import get_preset, key_sigmas
from ..synvid import Batch, Header, SynVidDataset, SynVidSampler
from ..synvid.verdicts import digest, read_verdicts


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


@dataclass(frozen=True)
class Judged:
    """Trajectories by verdict, for the heads: accepted ones are real, rejected ones fake, as is what the student makes.

    weights  by sample id, of mean 1 among the accepted and among the rejected
    digest   of the verdicts
    """

    accepted: Source
    rejected: Source | None
    weights: Mapping[str, float]
    digest: str

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        address: str | os.PathLike[str],
        dataset: SynVidDataset,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Judged:
        """The trajectories of a dataset, at an address, by the verdicts of a file. Those without one are neither real nor fake,
        and an AccVideoWarning counts them. SynVidError unless accepted ones, and rejected ones if there are any, make a batch."""
        verdicts = read_verdicts(path)
        known = {sample.id: verdicts[sample.id] for sample in dataset.samples if sample.id in verdicts}
        weights: dict[str, float] = {}

        def part(accepted: bool) -> SynVidSource:
            chosen = {name: verdict.weight for name, verdict in known.items() if verdict.accepted is accepted}
            if len(chosen) < batch:
                raise SynVidError(
                    f"{str(path)!r} {'accepts' if accepted else 'rejects'} {len(chosen)} of the {len(dataset)} samples to train "
                    f"on, fewer than a batch of {batch}; judge more of them (by the dataset's own ids), or choose a smaller batch"
                )
            mean = sum(chosen.values()) / len(chosen)
            weights.update({name: weight / mean for name, weight in chosen.items()})
            return SynVidSource(SynVidDataset(address, ids=chosen), batch, seed, rank, world)

        if left := len(dataset) - len(known):
            warnings.warn(
                f"{str(path)!r} has no verdict on {left} of the {len(dataset)} samples to train on; the heads do not see these",
                AccVideoWarning,
                stacklevel=2,
            )
        accepted, rejects = part(True), any(not verdict.accepted for verdict in known.values())
        return cls(accepted, part(False) if rejects else None, weights, digest(known))


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
