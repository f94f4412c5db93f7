"""SynVid on disk: trajectories written by any number of processes at once, so that none is lost, doubled or half there.

Latents are flushed to the disk under their final name before a manifest names them, and a manifest line counts only when it
is whole; so after a crash at any moment the manifests tell exactly what there is. docs/synvid-format.md has the format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import SafetensorsFile, write_safetensors
from ..errors import CheckpointError, OutputError, SynVidError
from ..files import atomic_path, output_error, sync_folder
from .header import Header
from .manifest import NAME, Sample, SampleInfo, Withdrawal, check_info, parse, to_line, union
from .tensors import bit_sum, noise_hash, raw, seeded_noise, stored_key, tensor_hash

HEADER = "synvid.json"


@dataclass(frozen=True)
class Damage:
    """Something that is not as its manifest says: a sample's id ("" where it concerns none), the file, what is wrong."""

    id: str
    file: str
    what: str


def sample_id(prompt: str, seed: int, shape: Sequence[int]) -> str:
    """The id of the sample of a prompt, a seed and a latent shape (C, T, H, W), known before anything is encoded."""
    key = json.dumps([prompt, int(seed), [int(n) for n in shape]])
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class SynVidStore:
    """A dataset folder, to read and to add to. Several stores, in any processes, may have one folder open.

    path    the folder; made if missing
    header  how trajectories are made; may be left out for a dataset that exists
    writer  name of this store's manifest, unique among the stores that are open at once; by default one of its own

    Raises SynVidError if there is no dataset and no header, or if its header says otherwise than this one; OutputError where
    it cannot be written. Nothing but the header is written before something is committed.
    """

    def __init__(self, path: str | os.PathLike[str], header: Header | None = None, writer: str | None = None) -> None:
        self.path = Path(path)
        self.writer = writer or _writer_name()
        if not NAME.fullmatch(self.writer):
            raise SynVidError(f"a writer named {self.writer!r}; use small letters, digits, '_', '-' and '.', at most 100")
        if header is not None:
            _write_once(self.path / HEADER, header.to_json().encode("utf-8"))
        self.header = self._read_header()
        if header is not None:
            self.header.check(header)

    # ---- writing --------------------------------------------------------------------------------------------------------

    def put_text(self, text: Tensor, pooled: Tensor | None = None) -> str:
        """Store a prompt's text (L, D) at its valid length and its pooled vector (P,), in the dtypes they have; once, however
        often it is put. Returns the hash that samples name it by."""
        tensors = {"text": text} if pooled is None else {"text": text, "pooled": pooled}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if text.ndim != 2 or not text.numel() or (pooled is not None and pooled.ndim != 1):
            raise SynVidError(f"text {tuple(text.shape)}; give one prompt's text (L, D) and pooled vector (P,)")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise SynVidError("a text encoding holds NaN or infinities; it is not stored: look at the text encoder's dtype")
        name = tensor_hash(*tensors.values())
        path = self._text_path(name)
        if not path.exists():
            _make_folder(path.parent)
            write_safetensors(path, tensors)
        return name

    def commit(self, keys: Sequence[Tensor], samples: Sequence[SampleInfo], noise: Tensor) -> None:
        """Store a captured batch; when this returns it is on the disk and stays there.

        keys     key 0 (clean) .. key m-1, each (B, C, T, H, W) float32 in model space, on any device
        samples  B of them, whose texts have been put and whose videos lie at `video_path`
        noise    (B, C, T, H, W) float32: key m. Kept if the header says so, else only its hash; then it must be what the
                 seed gives
        Raises SynVidError, naming the sample, for values that must not be stored, and OutputError where the disk refuses;
        the dataset is then as before.
        """
        self._check_batch(keys, samples, noise)
        ids = [info.id for info in samples]
        tensors = {f"key_{k}": stored_key(key, self.header.torch_dtype, ids, f"key {k}") for k, key in enumerate(keys)}
        noise = noise.detach().to("cpu", torch.float32).contiguous()
        if self.header.store_noise:
            tensors["noise"] = stored_key(noise, torch.float32, ids, "the noise")
        else:
            for info, row in zip(samples, noise, strict=True):
                if not torch.equal(row, seeded_noise(row.shape, info.seed)):
                    raise SynVidError(
                        f"the noise of sample {info.id} is not what its seed {info.seed} gives; use make_noise with one seed "
                        "per sample, or make the dataset with store_noise"
                    )
        name = secrets.token_hex(16)
        file = f"latents/{name[:2]}/{name}.safetensors"
        path = self.path / file
        _make_folder(path.parent)
        write_safetensors(path, tensors, {"ids": json.dumps(ids)})
        size, digest = path.stat().st_size, file_hash(path)
        self._append(
            Sample(
                **asdict(info),
                shape=tuple(noise.shape[1:]),
                noise=noise_hash(noise[row]),
                file=file,
                row=row,
                bytes=size,
                sha256=digest,
                sums=tuple(bit_sum(tensor[row]) for tensor in tensors.values()),
                video_sha256=None if info.video is None else file_hash(self.video_path(info.id)),
            )
            for row, info in enumerate(samples)
        )

    def video_path(self, name: str) -> Path:
        """Where a sample's frames belong, if they are kept: write them there before it is committed."""
        return self.path / "videos" / f"{name}.mp4"

    def withdraw(self, file: str) -> None:
        """Take back all samples of a latent file, found damaged: they count as not captured. The file itself stays."""
        self._append([Withdrawal(file)])

    def _check_batch(self, keys: Sequence[Tensor], samples: Sequence[SampleInfo], noise: Tensor) -> None:
        shapes = {tuple(key.shape) for key in (*keys, noise)}
        if len(keys) != self.header.segments or len(shapes) != 1 or noise.ndim != 5 or len(samples) != len(noise):
            raise SynVidError(
                f"{len(keys)} key latents of shapes {sorted(shapes)} for {len(samples)} samples; this dataset has "
                f"{self.header.segments} keys (B, C, T, H, W) to a sample"
            )
        if len({info.id for info in samples}) != len(samples):
            raise SynVidError("a batch with one id twice; give each sample its own")
        for info in samples:
            check_info(info)
            if not self._text_path(info.text).is_file():
                raise SynVidError(f"the text {info.text[:12]}... of sample {info.id} is not in the dataset; put_text it first")
            if info.video is not None and not self.video_path(info.id).is_file():
                raise SynVidError(f"the video of sample {info.id} is not at {self.video_path(info.id)}; write it there first")

    def _append(self, entries: Iterable[Sample | Withdrawal]) -> None:
        """Add whole lines to this writer's manifest and flush them; on failure the manifest is as it was."""
        lines = b"".join(map(to_line, entries))
        path = self._manifest
        try:
            new = not path.exists()
            _make_folder(path.parent)
            with open(path, "ab", buffering=0) as file:
                begin = file.seek(0, os.SEEK_END)
                try:
                    if begin and not _ends_line(path):  # this writer died here before; its torn line stays torn
                        lines = b"\n" + lines
                    if file.write(lines) != len(lines):
                        raise OSError(28, "No space left on device")
                    os.fsync(file.fileno())
                except BaseException:
                    with contextlib.suppress(OSError):
                        file.truncate(begin)
                    raise
            if new:
                sync_folder(path.parent)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise output_error(path, error) from error

    # ---- reading --------------------------------------------------------------------------------------------------------

    def samples(self) -> dict[str, Sample]:
        """All committed samples by id, in order of id: the union of the manifests as they are now."""
        return union(self._entries()[0])

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those of a plan's ids that are not captured yet, in the plan's order, each once. A sample whose latent file is gone
        or cut short counts as not captured."""
        samples = self.samples()
        return [name for name in dict.fromkeys(ids) if name not in samples or self._file_fault(samples[name])]

    def read(self, sample: str | Sample, key: int) -> Tensor:
        """Key latent (C, T, H, W) in the stored dtype, key m the noise (float32); nothing else of its file is read. SynVidError
        if it is missing or not what was committed."""
        sample = self._sample(sample)
        if not 0 <= key <= self.header.segments:
            raise SynVidError(f"there is no key {key} in {self.path}; keys go from 0, clean, to {self.header.segments}, noise")
        if key == self.header.segments:
            return self.noise(sample)
        return self._read_row(sample, f"key_{key}", key)

    def noise(self, sample: str | Sample) -> Tensor:
        """The noise (C, T, H, W) float32 a sample began with, checked by its hash."""
        sample = self._sample(sample)
        stored = self.header.store_noise
        noise = self._read_row(sample, "noise", self.header.segments) if stored else seeded_noise(sample.shape, sample.seed)
        if noise_hash(noise) != sample.noise:
            raise SynVidError(
                f"the noise of sample {sample.id} is not what it was captured with; "
                + ("its file is damaged" if stored else f"seed {sample.seed} gives other numbers under torch {torch.__version__}")
            )
        return noise

    def text(self, name: str) -> tuple[Tensor, Tensor | None]:
        """(text (L, D), pooled (P,) or None) by hash. SynVidError if it is missing or not what was stored."""
        try:
            with contextlib.closing(SafetensorsFile(self._text_path(name))) as file:
                tensors = [file.read(part) for part in ("text", "pooled") if part in file.tensors]
        except CheckpointError as error:
            raise SynVidError(f"the text {name[:12]}... cannot be read: {error}") from error
        if tensor_hash(*tensors) != name:
            raise SynVidError(f"the text {self._text_path(name)} is not what was stored under its name")
        return tensors[0], tensors[1] if len(tensors) > 1 else None

    def verify(self) -> list[Damage]:
        """Hash everything again; what is not as it was committed, an entry for each sample it concerns."""
        entries, found = self._entries()
        samples = union(entries)
        for file, members in _by_file(samples.values()):
            fault = self._file_fault(members[0])
            if not fault and file_hash(self.path / file) != members[0].sha256:
                fault = "its content has changed"
            found += [Damage(sample.id, file, fault) for sample in members if fault]
        for sample in samples.values():
            found += self._beside_fault(sample)
        return found

    def _beside_fault(self, sample: Sample) -> Iterator[Damage]:
        try:
            self.text(sample.text)
        except SynVidError as error:
            yield Damage(sample.id, self._text_path(sample.text).relative_to(self.path).as_posix(), str(error))
        if sample.video is not None:
            path = self.video_path(sample.id)
            if not path.is_file():
                yield Damage(sample.id, sample.video, "it is missing")
            elif file_hash(path) != sample.video_sha256:
                yield Damage(sample.id, sample.video, "its content has changed")

    def _file_fault(self, sample: Sample) -> str:
        try:
            size = (self.path / sample.file).stat().st_size
        except OSError:
            return "it is missing"
        return "" if size == sample.bytes else f"it has {size} bytes instead of {sample.bytes}"

    def _read_row(self, sample: Sample, name: str, check: int) -> Tensor:
        path = self.path / sample.file
        if fault := self._file_fault(sample):
            raise SynVidError(f"sample {sample.id}: {path}: {fault}; accvideo inspect --verify names all that is damaged")
        try:
            with contextlib.closing(SafetensorsFile(path)) as file:
                info = file.tensors[name]
            size = info.nbytes // info.shape[0]
            begin = info.start + sample.row * size
            out = torch.empty(info.shape[1:], dtype=info.dtype)
            with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                raw(out)[:] = mapped[begin : begin + size]
        except (OSError, CheckpointError, KeyError, ValueError) as error:
            raise SynVidError(f"sample {sample.id}: {path} cannot be read ({error}); accvideo inspect --verify") from error
        if tuple(out.shape) != sample.shape or bit_sum(out) != sample.sums[check]:
            raise SynVidError(f"sample {sample.id}: {name} in {path} is not what was committed; accvideo inspect --verify")
        return out

    def _sample(self, sample: str | Sample) -> Sample:
        if isinstance(sample, Sample):
            return sample
        found = self.samples().get(sample)
        if found is None:
            raise SynVidError(f"there is no sample {sample!r} in {self.path}")
        return found

    def _entries(self) -> tuple[list[Sample | Withdrawal], list[Damage]]:
        entries, damages = [], []
        for path in sorted((self.path / "manifest").glob("*.jsonl")):
            found, faults = parse(path.read_bytes())
            entries += found
            damages += [Damage("", f"manifest/{path.name}", fault) for fault in faults]
        return entries, damages

    def _read_header(self) -> Header:
        path = self.path / HEADER
        for attempt in range(20):  # where there are no hard links, it may be in the middle of being written
            try:
                return Header.from_json(path.read_text(encoding="utf-8"), str(path))
            except FileNotFoundError as error:
                raise SynVidError(f"{self.path} holds no SynVid dataset ({HEADER} is missing); choose its folder") from error
            except (SynVidError, UnicodeDecodeError, OSError) as error:
                if attempt == 19 or time.time() - path.stat().st_mtime > 10:
                    if isinstance(error, SynVidError):
                        raise
                    raise SynVidError(f"{path} cannot be read ({error}); restore it from a copy") from error
                time.sleep(0.05)
        raise AssertionError("unreachable")

    @property
    def _manifest(self) -> Path:
        return self.path / "manifest" / f"{self.writer}.jsonl"

    def _text_path(self, name: str) -> Path:
        return self.path / "text" / name[:2] / f"{name}.safetensors"


def file_hash(path: Path) -> str:
    """sha256 of a file. SynVidError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise SynVidError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _by_file(samples: Iterable[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.file, []).append(sample)
    yield from sorted(groups.items())


def _writer_name() -> str:
    host = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in socket.gethostname().lower())[:40]
    return f"{host or 'host'}-{os.getpid()}-{secrets.token_hex(4)}".lstrip("-")


def _write_once(path: Path, content: bytes) -> None:
    """Write a file unless there is one, whole, also when several processes try at once: the first wins."""
    if path.exists():
        return
    with contextlib.suppress(FileExistsError), atomic_path(path, replace=False) as temporary:
        temporary.write_bytes(content)


def _make_folder(folder: Path) -> None:
    """Make a folder of the dataset, and make its name survive a power cut."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)


def _ends_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
