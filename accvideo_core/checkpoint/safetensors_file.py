"""The safetensors format, read tensor by tensor and written so that nothing is ever half there.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the bytes. It is
read with plain reads rather than a memory map: a file that shrinks under us is an error and not a crash, and on Windows the
file can be replaced as soon as it is closed. Large tensors are read by several threads, because most of the time goes into
the system's handing out the memory. Mapped is for whoever asks for it: it takes no time and no memory that the system could
not take back.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError, OutputError
from ..files import atomic_path

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "F8_E8M0": torch.uint8,  # MXFP8's scales, powers of 2: their bytes, for torch 2.6 has no such dtype
    "U8": torch.uint8,  # after the one before, which is never written
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit
_OTHER_KINDS = (".pt", ".pth", ".bin", ".ckpt", ".gguf")
_CHUNK = 1 << 24  # bytes that a thread reads at a time
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file.

    dtype       what it is read as
    start, end  byte offsets from the beginning of the file, where the container has such
    encoding    how it is stored where no dtype says so (GGUF's Q4_K), else ""
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    encoding: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return self.end - self.start

    @property
    def stored_as(self) -> str:
        """Name of the stored encoding: bfloat16, float8_e4m3fn, Q4_K."""
        return self.encoding or str(self.dtype).removeprefix("torch.")


class SafetensorsFile:
    """An open file: `tensors` {stored name: TensorInfo} in file order, `metadata`, and `read(name)`. Close it after use."""

    container = "safetensors"

    def __init__(self, path: Path) -> None:
        """Reads the header alone. Raises CheckpointError if the file is truncated or its header makes no sense."""
        self.path = path
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror or error}") from error
        try:
            self.tensors, self.metadata = _read_header(self._file, path)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, mapped: bool = False) -> torch.Tensor:
        """The tensor on the CPU in its stored dtype, in memory of its own or `mapped` (see `Checkpoint.read`)."""
        info = self.tensors[name]
        if mapped and info.nbytes and info.start % info.dtype.itemsize == 0:
            return self._over_the_file(name, info)
        out = torch.empty(info.shape, dtype=info.dtype)
        view = out.reshape(-1).view(torch.uint8).numpy().data if out.numel() else memoryview(b"")
        starts = range(0, len(view), _CHUNK)
        try:
            if len(starts) > 1 and hasattr(os, "preadv"):
                with ThreadPoolExecutor(_THREADS) as pool:  # of this tensor alone: a pool that is kept would not survive a fork
                    list(pool.map(lambda start: self._fill(view[start : start + _CHUNK], info.start + start, name), starts))
            else:
                self._fill(view, info.start, name)
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {name} of {self.path}: {error.strerror or error}") from error
        return out

    def _fill(self, view: memoryview, position: int, name: str) -> None:
        """Read what lies at this position of the file."""
        done = 0
        while done < len(view):
            count = self._read_at(view[done:], position + done)
            if not count:
                raise CheckpointError(f"{self.path} ended while tensor {name} was read; is it still being written?")
            done += count

    def _read_at(self, view: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], position)
        with self._lock:
            self._file.seek(position)
            return self._file.readinto(view) or 0

    def _over_the_file(self, name: str, info: TensorInfo) -> torch.Tensor:
        """The map lives as long as one of its tensors; what is written to them stays in memory."""
        try:
            with self._lock:
                self._map = self._map or mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
            if info.end > len(self._map):
                raise CheckpointError(f"{self.path} ended before tensor {name} did; is it still being written?")
            if hasattr(mmap, "MADV_WILLNEED") and not self._cached(info):  # page by page it would be half as fast
                start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
                self._map.madvise(mmap.MADV_WILLNEED, start, info.end - start)
        except OSError as error:
            raise CheckpointError(f"cannot map {self.path}: {error.strerror or error}; read it without mapping") from error
        return torch.frombuffer(self._map, dtype=info.dtype, count=math.prod(info.shape), offset=info.start).view(info.shape)

    def _cached(self, info: TensorInfo) -> bool:
        """Whether the tensor's end can be read without waiting for the disk; False where nobody can tell."""
        try:
            return os.preadv(self._file.fileno(), [bytearray(1)], info.end - 1, os.RWF_NOWAIT) == 1
        except (AttributeError, OSError):
            return False

    def close(self) -> None:
        """Tensors that were mapped stay valid."""
        self._map = None
        self._file.close()


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length < 2 or length > _MAX_HEADER:
        raise CheckpointError(f"{path} ({size} bytes) is not a safetensors file; check what was downloaded")
    if 8 + length > size:
        raise CheckpointError(f"{path} is truncated: it has {size} bytes, its header alone needs {8 + length}; download it again")
    raw = bytearray()
    while len(raw) < length and (piece := file.read(length - len(raw))):
        raw += piece
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata is not text")
        tensors = {name: _tensor_info(name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged ({_one_line(error)}); download it again") from error
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    end = 8 + length
    for name, info in tensors.items():
        if info.start != end:
            raise CheckpointError(f"{path}: tensor {name} begins at byte {info.start} instead of {end}; the file is damaged")
        end = info.end
    if end > size:
        missing = sum(info.end > size for info in tensors.values())
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes and needs {end}, {missing} of {len(tensors)} tensors are cut off; "
            "download it again"
        )
    if end < size:
        raise CheckpointError(f"{path} has {size - end} bytes after its last tensor; the file is damaged")
    return tensors, metadata


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} appears twice")
    return out


def _tensor_info(name: str, entry: Mapping[str, Any], base: int) -> TensorInfo:
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if code not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {code}, which cannot be read; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"tensor {name} has shape {shape}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError(f"tensor {name} has offsets {offsets}")
    dtype, (start, end) = DTYPES[code], offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} of shape {shape} and dtype {code} cannot have {end - start} bytes")
    return TensorInfo(dtype, tuple(shape), base + start, base + end)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def check_suffix(path: Path) -> None:
    """OutputError for an output named as another kind of weight file: other programs go by the name."""
    if path.suffix.lower() in _OTHER_KINDS:
        raise OutputError(
            f"the output {str(path)!r} is named {path.suffix}, but safetensors is what is written; name it "
            f"{path.with_suffix('.safetensors').name}"
        )


def write_safetensors(path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to `path`, all or nothing, byte for byte as the format's own writer does.

    Tensors may be on any device and lazy (each is fetched from the mapping twice, one is held at a time). Raises
    OutputError where it cannot be written; `path` is then as it was before.
    """
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_safetensors(path, entries, ((name, tensors[name]) for name in file_order(entries)), metadata)


def file_order(entries: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> list[str]:
    """The order tensors lie in a file: widest dtype first, then by name, so that every tensor is aligned."""
    return sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))


def stream_safetensors(
    path: Path | str,
    entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
    late: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Write a file larger than memory, all or nothing: what it will hold is told first, the tensors come one by one.

    entries  {name: (dtype, shape)} of the whole file
    tensors  (name, tensor) for each of them once, in any order: every tensor is written at its own place (`file_order` is
             the fast order)
    late     called when the last tensor is written, for metadata known only then (a hash of what was read): it gives values
             for keys of `metadata` whose values there have the same length
    Raises OutputError where it cannot be written, CheckpointError when a tensor is not what `entries` says.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    places: dict[str, int] = {}
    offset = 0
    for name in file_order(entries):
        dtype, shape = entries[name]
        if dtype not in _CODES:
            raise OutputError(f"cannot write {name}: safetensors has no name for {dtype}; convert it first")
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        places[name], offset = offset, end
    text = _as_text(header)
    start = 8 + len(text)
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            if name not in places:
                raise CheckpointError(f"cannot write {path}: tensor {name} came twice or was not announced")
            dtype, shape = entries[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                raise CheckpointError(f"cannot write {path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
            place = start + places.pop(name)
            if file.tell() != place:
                file.seek(place)
            tensor = tensor.detach().to("cpu").contiguous()
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if places:
            raise CheckpointError(f"cannot write {path}: {len(places)} tensors never came, {next(iter(places))} the first")
        if late is not None:
            final = _as_text({**header, "__metadata__": {**(metadata or {}), **late()}})
            if len(final) != len(text):
                raise CheckpointError(f"cannot write {path}: late metadata has another length than what was announced")
            file.seek(8)
            file.write(final)


def _as_text(header: Mapping[str, object]) -> bytes:
    """The header as it lies in the file: padded so that the tensors after it are aligned."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % 8)
