"""SynVid on disk: trajectories written by any number of processes at once, so that none is lost, doubled or half there.

Latents are flushed to the disk under their final name before a manifest names them, and a manifest line counts only when it
is whole; so after a crash at any moment the manifests tell exactly what there is. docs/synvid-format.md has the format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import write_safetensors
from ..errors import OutputError, SynVidError
from ..files import append_at, atomic_path, make_folder
from .header import Header
from .manifest import NAME, Sample, SampleInfo, Withdrawal, check_info, to_line, union
from .reader import HEADER, SynVidReader
from .tensors import bit_sum, noise_hash, seeded_noise, stored_key
from .texts import put_text, text_file


def sample_id(prompt: str, seed: int, shape: Sequence[int]) -> str:
    """The id of the sample of a prompt, a seed and a latent shape (C, T, H, W), known before anything is encoded."""
    key = json.dumps([prompt, int(seed), [int(n) for n in shape]])
    return hashlib.sha256(key.encode("utf-8")).hexdigest()[:32]


class SynVidStore(SynVidReader):
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
            _write_once(self.path / HEADER, header.to_json())
        super().__init__(self.path)
        if header is not None:
            self.header.check(header)

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those of a plan's ids that are not captured yet, in the plan's order, each once. A sample whose latent file is gone
        or cut short counts as not captured."""
        samples = self.samples()
        lacking = {damage.id for damage in self.faults(samples.values())}
        return [name for name in dict.fromkeys(ids) if name not in samples or name in lacking]

    def video_path(self, name: str) -> Path:
        """Where a sample's frames belong, if they are kept: write them there before it is committed."""
        return self.path / "videos" / f"{name}.mp4"

    def put_text(self, text: Tensor, pooled: Tensor | None = None) -> str:
        """Store a prompt's text (L, D) at its valid length and its pooled vector (P,), in the dtypes they have; once, however
        often it is put. Returns the hash that samples name it by."""
        return put_text(self.path, text, pooled)

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
        noise = stored_key(noise, torch.float32, ids, "the noise")
        if self.header.store_noise:
            tensors["noise"] = noise
        else:
            _check_seeds(samples, noise)
        name = secrets.token_hex(16)
        file = f"latents/{name[:2]}/{name}.safetensors"
        path = self.path / file
        self._write(path, tensors, {"ids": json.dumps(ids)})
        stored: dict[str, Any] = {
            "shape": tuple(noise.shape[1:]),
            "file": file,
            "bytes": path.stat().st_size,
            "sha256": self.file_hash(file),
        }
        before = union(self.entries()[0])
        entries = []
        for row, info in enumerate(samples):
            attempt = before[info.id].attempt + 1 if info.id in before else 0
            video = None if info.video is None else self.file_hash(info.video)
            sums = tuple(bit_sum(tensor[row]) for tensor in tensors.values())
            noted: dict[str, Any] = {"noise": noise_hash(noise[row]), "sums": sums, "video_sha256": video, "attempt": attempt}
            entries.append(Sample(**asdict(info), **stored, row=row, **noted))
        try:
            self._append(entries)
        except OutputError:
            if name not in self._manifest_text():  # else it was written after all, and the file must stay
                path.unlink(missing_ok=True)
            raise

    def adopt(self, samples: Sequence[Sample]) -> None:
        """Commit samples of another dataset whose files have been copied into this one, under the same names."""
        self._append(samples)

    def withdraw(self, file: str) -> None:
        """Take back all samples of a latent file, found damaged: they count as not captured. The file itself stays."""
        self._append([Withdrawal(file)])

    def _check_batch(self, keys: Sequence[Tensor], samples: Sequence[SampleInfo], noise: Tensor) -> None:
        shapes = {tuple(tensor.shape) for tensor in (*keys, noise)}
        if len(keys) != self.header.segments or len(shapes) != 1 or noise.ndim != 5 or not len(samples) == len(noise) > 0:
            raise SynVidError(
                f"{len(keys)} key latents and noise of shapes {sorted(shapes)} for {len(samples)} samples; this dataset has "
                f"{self.header.segments} keys, and keys and noise are (B, C, T, H, W) for B samples"
            )
        if len({info.id for info in samples}) != len(samples):
            raise SynVidError("a batch has one id twice; give each sample its own")
        for info in samples:
            check_info(info)
            if not (self.path / text_file(info.text)).is_file():
                raise SynVidError(f"the text {info.text[:12]}... of sample {info.id} is not in the dataset; put_text it first")
            if info.video is not None and not self.video_path(info.id).is_file():
                raise SynVidError(f"the video of sample {info.id} is not at {self.video_path(info.id)}; write it there first")

    def _write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        make_folder(path.parent)
        write_safetensors(path, tensors, metadata)

    def _append(self, entries: Iterable[Sample | Withdrawal]) -> None:
        """Add whole lines to this writer's manifest, in one write, and flush them; on failure the manifest is as it was."""
        path = self._manifest
        make_folder(path.parent)
        end = _whole_lines(path)  # a line that a writer of this name died in was never committed
        try:
            append_at(path, end, b"".join(map(to_line, entries)))
        except OutputError:
            with contextlib.suppress(OSError):
                os.truncate(path, end)
            raise

    def _manifest_text(self) -> str:
        try:
            return self._manifest.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    @property
    def _manifest(self) -> Path:
        return self.path / "manifest" / f"{self.writer}.jsonl"


def _check_seeds(samples: Sequence[SampleInfo], noise: Tensor) -> None:
    for info, row in zip(samples, noise, strict=True):
        if not torch.equal(row, seeded_noise(row.shape, info.seed)):
            raise SynVidError(
                f"the noise of sample {info.id} is not what its seed {info.seed} gives; use make_noise with one seed per sample, "
                "or make the dataset with store_noise"
            )


def _writer_name() -> str:
    host = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in socket.gethostname().lower())
    return f"{host[:40].strip('-') or 'host'}-{os.getpid()}-{secrets.token_hex(4)}"


def _write_once(path: Path, text: str) -> None:
    """Write a file unless there is one, whole, also when several processes try at once: the first wins."""
    if path.exists():
        return
    with contextlib.suppress(FileExistsError), atomic_path(path, replace=False) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _whole_lines(path: Path) -> int:
    """Bytes of a manifest up to the end of its last whole line; 0 if there is none yet."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - 65536)
            file.seek(begin)
            last = file.read(end - begin).rfind(b"\n")
            if last >= 0:
                return begin + last + 1
            end = begin
    return 0
