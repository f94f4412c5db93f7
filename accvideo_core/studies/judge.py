"""`accvideo tiny judge`: the oracle's verdicts on captured trajectories of the tiny world, for `accvideo distill --verdicts`."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from ..devices import pick_device
from ..errors import InvalidValueError, SynVidError
from ..files import check_writable
from ..synvid import SynVidDataset
from ..synvid.verdicts import Verdict, write_verdicts
from ..tiny import load_vae
from ..tiny.clips import CLASSES
from ..tiny.prompts import read_prompt
from ..tiny.vae import LATENT_SCALE, to_pixels
from .exam import Row, read_clips, rights

LIGHTEST, HEAVIEST = 0.2, 5.0  # weights, of their mean, so that no few samples stand for many


@dataclass(frozen=True)
class JudgeArgs:
    """Judge the clips of a SynVid dataset of the tiny world and write a verdict on each.

    Accepted is a clip whose attributes are all clean, the named ones as named. Easy ones are accepted more often than others,
    circles more often than triangles; so the verdicts come with weights, by which the accepted clips, and the rejected, show what
    a prompt leaves open in the shares of all clips of the dataset."""

    dataset: tyro.conf.Positional[str]
    """The SynVid dataset, a folder or any fsspec address."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The file to write, JSON lines; nothing that is there is overwritten."""
    batch: int = 64
    """Clips decoded at once."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    json: bool = False
    """Print the counts as JSON."""


def run(args: JudgeArgs) -> int:
    if args.batch < 1:
        raise InvalidValueError(f"batch is {args.batch}; it must be at least 1")
    check_writable(args.out)
    if args.out.exists():
        raise InvalidValueError(f"{str(args.out)!r} is there already; name another file, or delete it")
    dataset = SynVidDataset(args.dataset)
    if dataset.header.family != "tiny":
        raise SynVidError(
            f"{args.dataset} is of the family {dataset.header.family}, and the oracle knows the tiny world alone; write down the "
            'verdicts of whoever judges yours as JSON lines, {"id": "...", "accepted": true}'
        )
    verdicts = judge(dataset, args.batch, args.device)
    write_verdicts(args.out, verdicts)
    accepted = sum(verdict.accepted for verdict in verdicts.values())
    told = {"verdicts": str(args.out), "accepted": accepted, "rejected": len(verdicts) - accepted}
    print(json_module.dumps(told) if args.json else f"{args.out}: {accepted} of {len(verdicts)} accepted")
    return 0


@torch.inference_mode()
def judge(dataset: SynVidDataset, batch: int = 64, device: str = "auto") -> dict[str, Verdict]:
    """{id: the oracle's verdict}, weighed by `weights`."""
    where = pick_device(device)
    vae, accepted, told = load_vae().to(where), [], []
    rows = [Row(sample.prompt, 0, read_prompt(sample.prompt)) for sample in dataset.samples]
    for start in tqdm(range(0, len(rows), batch), "judging", disable=None):
        part = range(start, min(start + batch, len(rows)))
        latents = torch.stack([dataset.trajectory(i)[0] for i in part]).to(where)
        reads = read_clips(to_pixels(vae.decode(latents / LATENT_SCALE)))
        accepted += rights(reads, rows[part.start : part.stop])
        for read, row in zip(reads, rows[part.start : part.stop], strict=True):
            told.append([None if kind in row.named else read[kind].name for kind in CLASSES])
    each = weights(told, np.array(accepted))
    return {
        sample.id: Verdict(yes, round(float(weight), 4))
        for sample, yes, weight in zip(dataset.samples, accepted, each, strict=True)
    }


def weights(told: Sequence[Sequence[str | None]], accepted: NDArray[np.bool_], rounds: int = 100) -> NDArray[np.float64]:
    """(N,) of mean 1 among the accepted and among the rejected, by which either have the whole's shares in every category.

    told  (N, categories): of each sample its value in each category; None where it has none, and does not count there

    Raking: the weights are brought to one category's shares after another's, again and again (Deming and Stephan 1940), and
    kept between 0.2 and 5. A value that the accepted, or the rejected, lack altogether stays missing there.
    """
    columns = []
    for column in zip(*told, strict=True):
        has = np.array([value is not None for value in column])
        values = np.unique([str(value) for value in column], return_inverse=True)[1]
        columns.append((has, values, np.bincount(values[has], minlength=values.max() + 1) / max(1, has.sum())))
    found = np.ones(len(told))
    for group in (accepted, ~accepted):
        own = group.astype(float)
        for _ in range(rounds if group.any() else 0):
            for has, values, whole in columns:
                counts = np.bincount(values[has], own[has], len(whole))
                factors = np.divide(whole * counts.sum(), counts, np.ones(len(whole)), where=counts > 0)
                own[has] *= factors[values[has]]
                own[group] = np.clip(own[group] / own[group].mean(), LIGHTEST, HEAVIEST)
        found[group] = own[group] / own[group].mean() if group.any() else 1.0
    return found
