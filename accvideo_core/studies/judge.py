"""`accvideo tiny judge`: the oracle's verdicts on captured trajectories of the tiny world, for `accvideo distill --verdicts`."""

from __future__ import annotations

import json as json_module
import math
from collections import Counter
from collections.abc import Mapping, Sequence
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
from ..tiny.clips import CLASSES, FRAMES, SIZE
from ..tiny.pipeline import latent_shape
from ..tiny.prompts import read_prompt
from ..tiny.vae import LATENT_SCALE, to_pixels
from .evaluation import EvaluateArgs, load
from .exam import Reads, Row, read_clips, rights

LIGHTEST, HEAVIEST = 0.2, 5.0  # weights, of their mean, so that no few samples stand for many
SHOWN = 2048  # clips by which a student's shares are told

Told = Sequence[Sequence[str | None]]


@dataclass(frozen=True)
class JudgeArgs:
    """Judge the clips of a SynVid dataset of the tiny world and write a verdict on each.

    Accepted is a clip whose attributes are all clean, the named ones as named. Some are accepted more often than others, white
    objects more often than green ones; so the verdicts come with weights, by which the accepted clips, and the rejected, show
    what a prompt leaves open in the shares of all clips of the dataset."""

    dataset: tyro.conf.Positional[str]
    """The SynVid dataset, a folder or any fsspec address."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The file to write, JSON lines; nothing that is there is overwritten."""
    student: Path | None = None
    """A student's file: weigh the rejected clips to what this student shows of prompts left open instead, so that the heads see
    what it shows too often, and too rarely."""
    lean: float = 0.0
    """With --student: how far to lean against that. What it shows half as often as the dataset is given 2 to this power of its
    share among the accepted clips, and that part of it among the rejected."""
    batch: int = 64
    """Clips decoded, or made, at once."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    json: bool = False
    """Print the counts as JSON."""


def run(args: JudgeArgs) -> int:
    if args.batch < 1:
        raise InvalidValueError(f"batch is {args.batch}; it must be at least 1")
    if args.lean and (args.student is None or not 0 < args.lean < math.inf):
        raise InvalidValueError(
            f"lean is {args.lean}; it must be at least 0, and needs a student to lean against: give --student"
        )
    check_writable(args.out)
    if args.out.exists():
        raise InvalidValueError(f"{str(args.out)!r} is there already; name another file, or delete it")
    dataset = SynVidDataset(args.dataset)
    if dataset.header.family != "tiny":
        raise SynVidError(
            f"{args.dataset} is of the family {dataset.header.family}, and the oracle knows the tiny world alone; write down the "
            'verdicts of whoever judges yours as JSON lines, {"id": "...", "accepted": true}'
        )
    if other := set(dataset.buckets) - {latent_shape(FRAMES, SIZE, SIZE)}:
        raise SynVidError(
            f"{args.dataset} has latents of shape {min(other)}, and the oracle knows clips of {FRAMES} x {SIZE} x {SIZE}"
        )
    verdicts = judge(dataset, args.batch, args.device, args.student, args.lean)
    write_verdicts(args.out, verdicts)
    accepted = sum(verdict.accepted for verdict in verdicts.values())
    told = {"verdicts": str(args.out), "accepted": accepted, "rejected": len(verdicts) - accepted}
    print(json_module.dumps(told) if args.json else f"{args.out}: {accepted} of {len(verdicts)} accepted")
    return 0


@torch.inference_mode()
def judge(
    dataset: SynVidDataset, batch: int = 64, device: str = "auto", student: Path | None = None, lean: float = 0.0
) -> dict[str, Verdict]:
    """{id: the oracle's verdict}, weighed by `weights`."""
    where = pick_device(device)
    pipeline = None if student is None else load(EvaluateArgs(Path(), weights=student, device=device))
    vae, reads = load_vae().to(where), []
    made: Reads = []
    rows = [Row(sample.prompt, sample.seed, read_prompt(sample.prompt)) for sample in dataset.samples]
    parts = [range(start, min(start + batch, len(rows))) for start in range(0, len(rows), batch)]
    for part in tqdm(parts, "judging", disable=None):
        latents = torch.stack([dataset.trajectory(i)[0] for i in part]).to(where)
        reads += read_clips(to_pixels(vae.decode(latents / LATENT_SCALE)))
        if pipeline is not None and len(made) < SHOWN:
            chunk = rows[part.start : part.stop]
            made += read_clips(pipeline.generate([row.prompt for row in chunk], [row.seed for row in chunk]).frames)
    accepted = rights(reads, rows)
    each = weights(_open(reads, rows), np.array(accepted), _open(made, rows[: len(made)]), lean)
    return {
        sample.id: Verdict(yes, round(float(weight), 4))
        for sample, yes, weight in zip(dataset.samples, accepted, each, strict=True)
    }


def _open(reads: Reads, rows: Sequence[Row]) -> Told:
    """Of each clip what it shows of every attribute that its prompt leaves open."""
    return [[None if kind in row.named else read[kind].name for kind in CLASSES] for read, row in zip(reads, rows, strict=True)]


def weights(
    told: Told, accepted: NDArray[np.bool_], others: Told = (), lean: float = 0.0, rounds: int = 100
) -> NDArray[np.float64]:
    """(N,) of mean 1 among the accepted and among the rejected, by which either have the whole's shares in every category.

    told    (N, categories): of each sample its value in each category; None where it has none, and does not count there
    others  (M, categories): what the rejected are to have the shares of instead, if there are any
    lean    a value of share w in the whole and o in the others is to have w (w/o)^lean among the accepted, and o (o/w)^lean
            among the rejected, each over the sum of these; w/o counts as 0.2 to 5

    Raking: the weights are brought to one category's shares after another's, again and again (Deming and Stephan 1940), and
    kept between 0.2 and 5. A value that the accepted, or the rejected, lack altogether stays missing there.
    """
    found, columns = np.ones(len(told)), []
    for ours, theirs in zip(zip(*told, strict=True), zip(*(others or told), strict=True), strict=True):
        numbers = {value: number for number, value in enumerate(sorted({*ours, *theirs} - {None}))}
        whole, other = _shares(ours, numbers), _shares(theirs, numbers)
        ratio = np.divide(whole, other, np.full(len(numbers), HEAVIEST), where=other > 0).clip(LIGHTEST, HEAVIEST) ** lean
        columns.append((np.array([numbers.get(value, -1) for value in ours]), {True: whole * ratio, False: other / ratio}))
    for verdict in (True, False):
        group = accepted == verdict
        if not group.any():
            continue
        own = group.astype(float)
        for _ in range(rounds):
            for values, targets in columns:
                has, wanted = values >= 0, targets[verdict]
                counts = np.bincount(values[has], own[has], len(wanted))
                there = wanted * (counts > 0)  # what the group lacks cannot be weighed
                factors = np.divide(
                    there * counts.sum(), counts * there.sum(), np.ones(len(wanted)), where=counts * there.sum() > 0
                )
                own[has] *= factors[values[has]]
                own[group] = np.clip(own[group] / own[group].mean(), LIGHTEST, HEAVIEST)
        found[group] = own[group] / own[group].mean()
    return found


def _shares(values: Sequence[str | None], numbers: Mapping[str, int]) -> NDArray[np.float64]:
    """Of every value its share of those that there are."""
    counts = Counter(value for value in values if value is not None)
    return np.array([counts[value] for value in numbers]) / max(1, counts.total())
