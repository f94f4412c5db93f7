"""`accvideo merge-synvid`: datasets of one header joined into one, every file hashed on its way."""

from __future__ import annotations

import hashlib
import json as json_module
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ..errors import InvalidValueError, OutputError, SynVidError
from ..files import atomic_path, make_folder
from ..progress import byte_progress
from .manifest import Sample, check_same, free_file, withdrawn_files
from .reader import Damage, SynVidReader, grouped
from .store import SynVidStore
from .texts import names_there, text_file


@dataclass(frozen=True)
class MergeArgs:
    """Join SynVid datasets that were made in the same way into one.

    What the output holds already is not copied again, so a merge that was stopped is simply run again, and a dataset that
    has grown is merged again. What was withdrawn from the output is not held, so a good copy restores it. Exit code 1 if
    something was damaged: it is named and left out.
    """

    datasets: tyro.conf.Positional[tuple[str, ...]]
    """Folders of datasets, or addresses that fsspec knows. Of samples in more than one the first whole one is taken."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The dataset to add to; made if missing."""
    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True)
class MergeReport:
    """What was done: samples copied, samples that the output had already, bytes copied, and what was damaged and left out."""

    copied: int
    already: int
    bytes: int
    damages: tuple[Damage, ...]


def run(args: MergeArgs) -> int:
    """Merge and print the report; 1 if anything was damaged."""
    with byte_progress("merging", leave=True) as progress:
        report = merge_synvid(args.datasets, args.out, progress)
    if args.json:
        print(json_module.dumps({**vars(report), "damages": [vars(damage) for damage in report.damages]}, indent=1))
    else:
        print(f"{args.out}: {report.copied} samples copied ({report.bytes / 1e9:.3f} GB), {report.already} were there already")
        for damage in report.damages:
            print(f"DAMAGED  {damage.file}: {damage.what} (sample {damage.id}); left out")
    return 1 if report.damages else 0


def merge_synvid(
    datasets: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> MergeReport:
    """Add every whole sample of `datasets` to the dataset `out`, made if missing; `progress` has (bytes done, of all).

    A latent file is copied as it is, under its own name unless that is withdrawn in `out` (`free_file`), and its samples are
    committed once it has been flushed and its hash is right; text and videos likewise. What is damaged in one of the datasets is
    taken from the next that has it. Raises SynVidError, naming the fields, if the headers differ, and naming the id, if it stands
    for several samples, before anything is copied, and OutputError where the output cannot be written; what was committed
    until then stays.
    """
    readers = [SynVidReader(address) for address in datasets]
    if not readers:
        raise InvalidValueError("nothing to merge; name at least one dataset")
    for reader in readers[1:]:
        readers[0].header.check(reader.header)
    store = SynVidStore(out, readers[0].header)
    if any(str(reader.folder) == str(store.folder) for reader in readers):
        raise InvalidValueError(f"{out} is one of the datasets to merge; choose another output")
    entries, _ = store.entries()
    held, there = store.samples(), names_there(store.folder)
    withdrawn = withdrawn_files(entries)
    attempts: dict[str, int] = {}  # of all lines of an id, also those withdrawn
    for entry in entries:
        if isinstance(entry, Sample):
            attempts[entry.id] = max(entry.attempt, attempts.get(entry.id, 0))
    sources = [(reader, reader.samples()) for reader in readers]
    known = dict(held)
    for reader, samples in sources:
        earlier = f"{out}, or what comes before {reader.folder},"
        for name, sample in samples.items():
            check_same(name, known.setdefault(name, sample).origin, sample.origin, earlier)
    already = len(set(held) & {name for _, samples in sources for name in samples})
    total = sum(members[0].bytes for members in grouped(known[name] for name in known.keys() - held.keys()).values())
    done = copied = moved = 0
    damages: list[Damage] = []
    if negative := store.header.negative_text:
        reader = next((reader for reader in readers if reader.header.negative_text == negative), readers[0])
        damages += _copy_text(reader, store, negative)
    for reader, samples in sources:
        for name in {held[name].text for name in samples.keys() & held.keys() if held[name].text == samples[name].text} - there:
            damages += _copy_text(reader, store, name)
        for file, members in grouped(sample for name, sample in samples.items() if name not in held).items():
            name = free_file(file, withdrawn)
            whole, found = _copy(reader, store, file, name, members)
            if name != file:
                later = [max(sample.attempt, attempts.get(sample.id, 0)) + 1 for sample in whole]
                whole = [replace(sample, file=name, attempt=attempt) for sample, attempt in zip(whole, later, strict=True)]
            store.adopt(whole)
            held |= {sample.id: sample for sample in whole}
            damages += found
            copied += len(whole)
            moved += members[0].bytes if whole else 0
            done += members[0].bytes
            if progress is not None:
                progress(min(done, total), total)  # a file that is damaged in one source is copied from another, too
    return MergeReport(copied, already, moved, tuple(damage for damage in damages if damage.id not in held))


def _copy(
    reader: SynVidReader, store: SynVidStore, file: str, name: str, members: list[Sample]
) -> tuple[list[Sample], list[Damage]]:
    """Copy a latent file to `name`, and what belongs to its samples: (those that are whole, what is damaged of the others)."""
    if not _copy_file(reader, store, file, name, members[0].sha256):
        return [], [Damage(sample.id, file, "it is missing or its content has changed") for sample in members]
    whole, damages = [], []
    for sample in members:
        if lacking := _copy_text(reader, store, sample.text, sample.id):
            damages += lacking
            continue
        if sample.video is not None and not _copy_file(reader, store, sample.video, sample.video, sample.video_sha256 or ""):
            damages.append(Damage(sample.id, sample.video, "it is missing or its content has changed"))
            continue
        whole.append(sample)
    return whole, damages


def _copy_text(reader: SynVidReader, store: SynVidStore, name: str, sample: str = "") -> list[Damage]:
    """Copy a text; what is wrong with it, if anything is."""
    try:
        store.put_text(*reader.text(name))
    except SynVidError as error:
        return [Damage(sample, text_file(name), str(error))]
    return []


def _copy_file(reader: SynVidReader, store: SynVidStore, origin: str, name: str, expected: str) -> bool:
    """Copy a file to `name` unless it is there already; False, and nothing is left, if it cannot be read or has another hash."""
    if store.file_hash(name) == expected:
        return True
    path, digest = store.path / name, hashlib.sha256()
    make_folder(path.parent)
    try:
        with reader.folder.open(origin) as source, atomic_path(path) as temporary:
            with open(temporary, "xb") as file:
                for piece in iter(partial(source.read, 1 << 20), b""):
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() != expected:
                raise _Changed
    except OutputError:
        raise
    except (OSError, _Changed):
        return False
    return True


class _Changed(Exception):
    """What was copied is not what was committed."""
