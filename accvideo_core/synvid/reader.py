"""Reading a SynVid dataset, from a folder or any fsspec address: what is in it, single key latents, texts, and whether all is as
it was committed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint.safetensors_file import DTYPES
from ..errors import AccVideoWarning, SynVidError
from .folder import Folder, RemoteFolder, open_folder
from .header import Header
from .manifest import Line, Sample, parse, union
from .tensors import bit_sum, noise_hash, raw, seeded_noise
from .texts import read_text, text_file

HEADER = "synvid.json"
_CURE = "accvideo inspect --verify names all that is damaged"
_OTHER_NOISE = (
    f"torch {torch.__version__} on this machine draws other numbers from its seed; read it where it was captured, or capture "
    "with --store-noise"
)
_LAST_DIGITS = (
    "seeds give noise here that differs from what was captured in its last digits, as between kinds of CPU; it is taken as it is"
)


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was committed: the sample's id ("" where it concerns none), the file, what is wrong."""

    id: str
    file: str
    what: str


class _Place(NamedTuple):
    """A stored batch of one key: where its first row begins, bytes of a row, rows, dtype."""

    begin: int
    row: int
    rows: int
    dtype: torch.dtype


@dataclass
class _Parsed:
    """What has been read of a manifest: bytes and lines up to the end of the last whole line."""

    size: int = 0
    lines: int = 0
    entries: list[Line] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class SynVidReader:
    """A dataset to read. It may grow meanwhile: what is committed later is seen by later calls.

    Raises SynVidError if there is none at `address`, or it is of a format version that cannot be read.
    """

    def __init__(self, address: str | os.PathLike[str]) -> None:
        self.folder = open_folder(address)
        self.header = _read_header(self.folder)
        self._parsed: dict[str, _Parsed] = {}
        self._places: OrderedDict[str, dict[str, _Place]] = OrderedDict()

    def samples(self) -> dict[str, Sample]:
        """All committed samples by id, in order of id: the union of the manifests as they are now. Lines that are damaged are
        named in a warning."""
        entries, damages = self.entries()
        for damage in damages:
            message = f"{self.folder}: {damage.file}: {damage.what}; the samples it named count as not captured"
            warnings.warn(message, AccVideoWarning, stacklevel=2)
        return union(entries)

    def sample(self, name: str) -> Sample:
        """One of `samples()`; SynVidError if there is none of that id."""
        found = self.samples().get(name)
        if found is None:
            raise SynVidError(f"there is no sample {name!r} in {self.folder}; its manifests name those there are")
        return found

    def read(self, sample: str | Sample, key: int) -> Tensor:
        """Key latent (C, T, H, W) in the stored dtype, key m the noise (float32). As `read_keys`."""
        return self.read_keys(sample, [key])[0]

    def read_keys(self, sample: str | Sample, keys: Sequence[int]) -> list[Tensor]:
        """Several keys of a sample. Nothing else of its file is read; each is checked by its sum of bits, the noise by its hash.
        SynVidError if one is missing or not what was committed."""
        sample = self.sample(sample) if isinstance(sample, str) else sample
        segments = self.header.segments
        if outside := [key for key in keys if not 0 <= key <= segments]:
            raise SynVidError(f"there is no key {outside[0]} in {self.folder}; keys go from 0, clean, to {segments}, noise")
        stored = [key for key in dict.fromkeys(keys) if key < segments or self.header.store_noise]
        found = dict(zip(stored, self._read_rows(sample, stored), strict=True))
        if segments in keys:
            noise = found[segments] if segments in found else seeded_noise(sample.shape, sample.seed)
            if noise_hash(noise) != sample.noise:
                self._check_last_digits(sample, noise)
            found[segments] = noise
        return [found[key] for key in keys]

    def noise(self, sample: str | Sample) -> Tensor:
        """The noise (C, T, H, W) float32 that a sample began with: key m."""
        return self.read(sample, self.header.segments)

    def text(self, name: str) -> tuple[Tensor, Tensor | None]:
        """(text (L, D), pooled (P,) or None) by hash. SynVidError if it is missing or not what was stored."""
        return read_text(self.folder, name)

    def sizes(self, under: str) -> dict[str, int]:
        """{name: bytes} of the files below a folder of the dataset. SynVidError if they cannot be listed."""
        try:
            return self.folder.sizes(under)
        except OSError as error:
            raise SynVidError(f"{self.folder}/{under} cannot be listed: {error}") from error

    # ---- what is whole ---------------------------------------------------------------------------------------------------

    def faults(self, samples: Iterable[Sample]) -> list[Damage]:
        """Samples whose latent file is gone or of another size; found by listing alone, nothing is opened."""
        sizes = self.sizes("latents")
        found = []
        for sample in samples:
            size = sizes.get(sample.file)
            if size != sample.bytes:
                what = "it is missing" if size is None else f"it has {size} bytes instead of {sample.bytes}"
                found.append(Damage(sample.id, sample.file, what))
        return found

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[Damage]:
        """Hash everything again: latent files, texts, videos, noise from its seed. What is not as it was committed, an entry
        for each sample it concerns; damaged manifest lines and the negative prompt's text have no id. `progress` is called with
        (bytes done, of all)."""
        entries, found = self.entries()
        samples = union(entries)
        lacking = self.faults(samples.values())
        found += lacking
        absent = {damage.file for damage in lacking}
        files = grouped(samples.values())
        done, total = 0, sum(members[0].bytes for members in files.values())
        texts: dict[str, str] = {}
        if (negative := self.header.negative_text) and (fault := self._text_fault(negative)):
            found.append(Damage("", text_file(negative), fault))
        for file, members in files.items():
            if file not in absent and self.file_hash(file) != members[0].sha256:
                found += [Damage(sample.id, file, "its content has changed") for sample in members]
            for sample in members:
                if sample.text not in texts:
                    texts[sample.text] = self._text_fault(sample.text)
                found += self._faults_beside(sample, texts[sample.text])
            done += members[0].bytes
            if progress is not None:
                progress(done, total)
        return found

    def unnamed(self) -> dict[str, int]:
        """{file: bytes} of what no manifest names: left by writers that were killed, or about to be committed. Such a file does
        not exist for any reader."""
        named = {name for sample in self.samples().values() for name in (sample.file, sample.video)}
        sizes = {name: size for under in ("latents", "videos", "text", "manifest") for name, size in self.sizes(under).items()}
        is_text = ("text/", "manifest/")
        return {
            name: n for name, n in sizes.items() if name not in named and (not name.startswith(is_text) or name.endswith(".tmp"))
        }

    def file_hash(self, name: str) -> str:
        """sha256 of a file of the dataset; "" if it cannot be read."""
        digest = hashlib.sha256()
        try:
            with self.folder.open(name) as file:
                for piece in iter(partial(file.read, 1 << 20), b""):
                    digest.update(piece)
        except OSError:
            return ""
        return digest.hexdigest()

    def _text_fault(self, name: str) -> str:
        try:
            self.text(name)
        except SynVidError as error:
            return str(error)
        return ""

    def _faults_beside(self, sample: Sample, text_fault: str) -> Iterator[Damage]:
        if text_fault:
            yield Damage(sample.id, text_file(sample.text), text_fault)
        if not self.header.store_noise and noise_hash(noise := seeded_noise(sample.shape, sample.seed)) != sample.noise:
            try:
                self._check_last_digits(sample, noise)
            except SynVidError as error:  # not the latents' fault, which stay
                yield Damage(sample.id, f"noise of seed {sample.seed}", str(error))
        if sample.video is not None and self.file_hash(sample.video) != sample.video_sha256:
            yield Damage(sample.id, sample.video, "it is missing or its content has changed")

    def entries(self) -> tuple[list[Line], list[Damage]]:
        """(what all manifests say, their damaged lines). They only grow, so that only what is new is read."""
        entries: list[Line] = []
        damages = []
        for name, size in sorted(self.sizes("manifest").items()):
            if not name.endswith(".jsonl"):
                continue
            known = self._parsed.setdefault(name, _Parsed())
            if size > known.size:
                content = bytearray(size - known.size)
                try:
                    self.folder.read_parts(name, [(known.size, memoryview(content))])
                except (OSError, EOFError) as error:
                    raise SynVidError(f"{self.folder}/{name} cannot be read: {error}") from error
                whole = bytes(content[: content.rfind(b"\n") + 1])
                found, faults = parse(whole, known.lines + 1)
                known.entries += found
                known.faults += faults
                known.size += len(whole)
                known.lines += whole.count(b"\n")
            entries += known.entries
            damages += [Damage("", name, fault) for fault in known.faults]
        return entries, damages

    def _check_last_digits(self, sample: Sample, noise: Tensor) -> None:
        """A warning if the noise of the seed is another here than it was in its last digits only, as between kinds of CPU
        (torch's generator rounds otherwise with and without vector instructions); SynVidError if it is other noise."""
        if self.header.store_noise:
            raise SynVidError(f"the noise of sample {sample.id} is not what it was captured with; {_CURE}")
        sigma = self.header.key_sigmas[key := self.header.segments - 1]
        near = self._read_rows(sample, [key])[0]
        alike = float(torch.corrcoef(torch.stack([noise.flatten(), near.float().flatten()]))[0, 1])
        if not (sigma > 0.5 and alike > 0.5):  # the first key after the noise is still mostly that noise
            raise SynVidError(f"the noise of sample {sample.id} is not what it was captured with; {_OTHER_NOISE}")
        warnings.warn(f"{self.folder}: {_LAST_DIGITS}", AccVideoWarning, stacklevel=3)

    def _read_rows(self, sample: Sample, keys: Sequence[int]) -> list[Tensor]:
        names = ["noise" if key == self.header.segments else f"key_{key}" for key in keys]
        out, parts = [], []
        try:
            places = self._layout(sample.file) if names else {}
            for name in names:
                place = places[name]
                tensor = torch.empty(sample.shape, dtype=place.dtype)
                if not sample.row < place.rows or tensor.nbytes != place.row:
                    raise ValueError(f"{name} has no row {sample.row} of shape {sample.shape}")
                out.append(tensor)
                parts.append((place.begin + sample.row * place.row, raw(tensor)))
            if parts:
                self.folder.read_parts(sample.file, parts)
        except (OSError, EOFError, KeyError, ValueError, TypeError) as error:
            raise SynVidError(f"sample {sample.id}: {self.folder}: {sample.file} cannot be read ({error}); {_CURE}") from error
        for key, name, tensor in zip(keys, names, out, strict=True):
            if bit_sum(tensor) != sample.sums[key]:
                raise SynVidError(
                    f"sample {sample.id}: {name} in {self.folder}: {sample.file} is not what was committed; {_CURE}"
                )
        return out

    def _layout(self, file: str) -> dict[str, _Place]:
        """Where the tensors of a latent file lie, from its header; the last files' are remembered."""
        if file in self._places:
            self._places.move_to_end(file)
            return self._places[file]
        length = bytearray(8)
        self.folder.read_parts(file, [(0, memoryview(length))])
        text = bytearray(min(int.from_bytes(length, "little"), 1 << 20))
        self.folder.read_parts(file, [(8, memoryview(text))])
        header = json.loads(text)
        header.pop("__metadata__", None)
        places = {}
        for name, entry in header.items():
            dtype, (rows, *shape), (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            row = math.prod(shape) * dtype.itemsize
            if end - begin != rows * row:
                raise ValueError(f"{name} of shape {entry['shape']} has {end - begin} bytes")
            places[name] = _Place(8 + len(text) + begin, row, rows, dtype)
        self._places[file] = places
        if len(self._places) > 4096:
            self._places.popitem(last=False)
        return places


def grouped(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """The samples by their latent file, in order of file."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.file, []).append(sample)
    return dict(sorted(groups.items()))


def _read_header(folder: Folder | RemoteFolder) -> Header:
    where = f"{folder}/{HEADER}"
    for _ in range(40):
        try:
            content = folder.read(HEADER)
        except FileNotFoundError as error:
            raise SynVidError(f"{folder} holds no SynVid dataset ({HEADER} is missing); choose its folder") from error
        except OSError as error:
            raise SynVidError(f"{where} cannot be read: {error}") from error
        if content.rstrip().endswith(b"}"):
            break
        time.sleep(0.05)  # where there are no hard links, it may be in the middle of being written
    return Header.from_json(content.decode("utf-8", "replace"), where)
