"""The manifests of a SynVid dataset: a JSON line for every committed sample, appended and never changed, a file per writer.

A line ends with a check value, so that one torn by a crash or changed on the disk is known as such and passed over.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, fields

from ..errors import SynVidError

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")
"""What ids and writers may be called: they are file names, also where capitals do not count."""
HASH = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"latents/[0-9a-f]{2}/[0-9a-f]{32}\.safetensors")
_CRC = b',"crc":"00000000"}'


@dataclass(frozen=True)
class SampleInfo:
    """What the one who captures knows of a sample.

    id       its name in the plan (`sample_id`)
    prompt   as written
    text     hash of the stored text (`SynVidStore.put_text`)
    seed     of its noise
    seconds  its share of the sampling time
    video    its frames as "videos/<id>.mp4", where they were kept
    """

    id: str
    prompt: str
    text: str
    seed: int
    seconds: float
    video: str | None = None


Origin = tuple[str, int, tuple[int, ...]]
"""Prompt, seed and latent shape: what an id stands for."""


@dataclass(frozen=True)
class Sample(SampleInfo):
    """A committed sample: also where it lies, and the hashes that it is checked by.

    shape         (C, T, H, W) of its latents
    noise         sha256 of its noise, float32, little-endian
    file, row     "latents/<2 hex>/<name>.safetensors" and the row of its batch there
    bytes         size of that file, sha256 its hash
    sums          `bit_sum` of key 0 .. m-1 (and of the noise, if that is stored), to check one that is read alone
    video_sha256  hash of the video, if there is one
    attempt       how often it had been captured before, as far as its writer knew: more than 0 where that was lost
    """

    shape: tuple[int, ...] = ()
    noise: str = ""
    file: str = ""
    row: int = 0
    bytes: int = 0
    sha256: str = ""
    sums: tuple[str, ...] = ()
    video_sha256: str | None = None
    attempt: int = 0

    @property
    def origin(self) -> Origin:
        """What it is a sample of."""
        return self.prompt, self.seed, self.shape


_FIELDS = {item.name for item in fields(Sample)}


@dataclass(frozen=True)
class Withdrawal:
    """A line that takes back everything in a latent file, for good: it was found damaged, and its samples are to be captured
    again, or copied from where they are whole under another name (`free_file`)."""

    withdrawn: str


Line = Sample | Withdrawal


def to_line(entry: Line) -> bytes:
    """The entry as a line, newline and check value included: `{...,"crc":"<crc32 of the bytes before the comma>"}`."""
    text = json.dumps(asdict(entry), ensure_ascii=False, separators=(",", ":"))[:-1].encode("utf-8", "surrogatepass")
    return b'%s,"crc":"%08x"}\n' % (text, zlib.crc32(text))


def from_line(line: bytes) -> Line:
    """The entry in a line. ValueError if it is torn, changed, or says something impossible."""
    text, crc = line[: -len(_CRC)], line[-len(_CRC) :]
    if crc != b',"crc":"%08x"}' % zlib.crc32(text):
        raise ValueError("it was torn or changed")
    found = json.loads((text + b"}").decode("utf-8", "surrogatepass"))
    if set(found) == {"withdrawn"}:
        return Withdrawal(str(found["withdrawn"]))
    if set(found) != _FIELDS:
        raise ValueError(f"it has the fields {', '.join(sorted(found))}")
    sample = Sample(**{**found, "shape": tuple(found["shape"]), "sums": tuple(found["sums"])})
    check_info(sample)
    if not _FILE.fullmatch(sample.file):
        raise ValueError(f"its file is {sample.file!r}")
    if len(sample.shape) != 4 or not all(type(n) is int and n > 0 for n in sample.shape) or sample.row < 0:
        raise ValueError(f"its shape is {sample.shape}, its row {sample.row}")
    return sample


def parse(content: bytes, number: int = 1) -> tuple[list[Line], list[str]]:
    """(entries, what is wrong with the other lines) of a manifest, `number` being its first line's. A last line without its
    newline is being written, or was when its writer died: it says nothing."""
    entries, faults = [], []
    for line in content.split(b"\n")[:-1]:
        try:
            entries.append(from_line(line))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            faults.append(f"line {number}: {error}")
        number += 1
    return entries, faults


def check_info(info: SampleInfo) -> None:
    """SynVidError (a ValueError for what was read) unless the fields can be stored and found again."""
    if not isinstance(info.id, str) or not NAME.fullmatch(info.id):
        raise _Impossible(f"the id {info.id!r}; use small letters, digits, '_', '-' and '.', at most 100 (sample_id makes one)")
    if not isinstance(info.text, str) or not HASH.fullmatch(info.text):
        raise _Impossible(f"sample {info.id} with text {info.text!r}; give the hash that put_text returned")
    if type(info.seed) is not int or not 0 <= info.seed < 2**64:
        raise _Impossible(f"sample {info.id} with seed {info.seed!r}; it must be a whole number from 0 to 2**64 - 1")
    if not isinstance(info.prompt, str) or not math.isfinite(info.seconds):
        raise _Impossible(f"sample {info.id} with prompt {info.prompt!r} and {info.seconds!r} seconds")
    if info.video is not None and info.video != f"videos/{info.id}.mp4":
        raise _Impossible(f"sample {info.id} with video {info.video!r}; it must be 'videos/{info.id}.mp4' (store.video_path)")


def check_same(name: str, there: Origin, now: Origin, where: object) -> None:
    """SynVidError, naming what differs, if an id stands for another sample than it does in `where`."""
    differing = [(what, a, b) for what, a, b in zip(("prompt", "seed", "shape"), there, now, strict=True) if a != b]
    if differing:
        told = ", ".join(f"{what} {a!r} there, {b!r} now" for what, a, b in differing)
        raise SynVidError(f"{where} has another sample of the id {name!r} ({told}); give it another id, or choose another folder")


class _Impossible(SynVidError, ValueError):
    """A sample that cannot be stored."""


def withdrawn_files(entries: Iterable[Line]) -> set[str]:
    """The latent files whose samples were taken back."""
    return {entry.withdrawn for entry in entries if isinstance(entry, Withdrawal)}


def free_file(file: str, withdrawn: Container[str]) -> str:
    """The name that a whole copy of a latent file is to have: its own, or another where that is withdrawn. It depends on nothing
    else, so that a copy that was stopped is found when it is made again."""
    while file in withdrawn:
        name = hashlib.sha256(file.encode("utf-8")).hexdigest()[:32]
        file = f"latents/{name[:2]}/{name}.safetensors"
    return file


def union(entries: Sequence[Line]) -> dict[str, Sample]:
    """The samples by id, in order of id, less those withdrawn. Of two with one id the later attempt counts, and of writers that
    did not know of each other the one in the file of the smaller name."""
    withdrawn = withdrawn_files(entries)
    samples: dict[str, Sample] = {}
    for entry in entries:
        if isinstance(entry, Sample) and entry.file not in withdrawn:
            first = samples.get(entry.id)
            if first is None or (-entry.attempt, entry.file, entry.row) < (-first.attempt, first.file, first.row):
                samples[entry.id] = entry
    return dict(sorted(samples.items()))
