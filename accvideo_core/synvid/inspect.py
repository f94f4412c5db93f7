"""What a SynVid dataset holds, and whether all of it is as it was committed: the report of `accvideo inspect DATASET`."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from .manifest import Sample, union
from .reader import SynVidReader, grouped
from .texts import text_file


def describe(
    address: str | os.PathLike[str], verify: bool = False, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Counts, sizes, shapes, prompts; "problems" is a list of lines, empty for a sound dataset.

    verify    hash everything again; without it only what is missing or of another size is found
    progress  called with (bytes done, of all) while verifying
    Raises SynVidError if there is no dataset that can be read.
    """
    reader = SynVidReader(address)
    entries, faults = reader.entries()
    samples = list(union(entries).values())
    damages = reader.verify(progress) if verify else faults + reader.faults(samples)
    unsound = sorted({damage.id for damage in damages if damage.id})
    shown = [f"{damage.file}: {damage.what}" + (f" (sample {damage.id})" if damage.id else "") for damage in damages]
    unnamed = reader.unnamed()
    header = reader.header
    return {
        "dataset": str(reader.folder),
        "samples": len(samples),
        "damaged": len(unsound),
        "verified": verify,
        "captured again": sum(isinstance(entry, Sample) for entry in entries) - len(samples),
        "shapes": {str(list(shape)): count for shape, count in sorted(Counter(sample.shape for sample in samples).items())},
        "bytes": _bytes(reader, samples),
        "files": _files(samples),
        "unnamed": {"files": len(unnamed), "bytes": sum(unnamed.values())},
        "prompts": _prompts(samples),
        "seconds a sample": round(statistics.fmean(sample.seconds for sample in samples), 3) if samples else None,
        "header": {**asdict(header), "sigmas": f"{len(header.sigmas)}, {header.sigmas[0]} to {header.sigmas[-1]}"},
        "key sigmas": [round(sigma, 5) for sigma in header.key_sigmas],
        "damaged samples": unsound,
        "damaged files": sorted({damage.file for damage in damages if damage.file.startswith("latents/")}),
        "problems": shown,
    }


def _bytes(reader: SynVidReader, samples: Sequence[Sample]) -> dict[str, int]:
    latents = sum(members[0].bytes for members in grouped(samples).values())
    sizes = {under: reader.sizes(under) for under in ("text", "videos", "manifest")}
    return {"latents": latents, **{under: sum(found.values()) for under, found in sizes.items()}}


def _files(samples: Sequence[Sample]) -> dict[str, int]:
    return {
        "latents": len({sample.file for sample in samples}),
        "texts": len({text_file(sample.text) for sample in samples}),
        "videos": sum(sample.video is not None for sample in samples),
    }


def _prompts(samples: Sequence[Sample]) -> dict[str, Any]:
    lengths = [len(sample.prompt.split()) for sample in samples]
    if not lengths:
        return {}
    return {
        "different": len({sample.prompt for sample in samples}),
        "words": f"{min(lengths)} to {max(lengths)}, median {statistics.median(lengths):g}",
        "first": samples[0].prompt,
    }
