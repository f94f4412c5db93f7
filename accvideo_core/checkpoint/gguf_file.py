"""GGUF files, read tensor by tensor and dequantised by the `gguf` package's own arithmetic.

A file is a magic, a version, counts, key-value pairs, tensor infos and the aligned data (ggml's docs/gguf.md). The header is
walked here, every length checked against the file's size, because the package's reader maps the file, holds it, and loops
without end on a damaged count. Sizes in memory order stand reversed, as ggml counts dimensions from the fastest; a tensor of
more than four dimensions stores its shape under `comfy.gguf.orig_shape.<name>` or, in ComfyUI's converters, as it is.
"""

from __future__ import annotations

import math
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch

from ..errors import CheckpointError, MissingExtraError
from .safetensors_file import TensorInfo

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_NAME = 65_535
_MAX_HEADER = 100_000_000  # bytes of metadata and tensor infos; the largest vocabularies are a tenth of it
_MAX_DIMS = 8
# What needs no dequantisation keeps its dtype; everything else is read as the package gives it, in float32.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_SHAPE_KEY = "comfy.gguf.orig_shape."


class GGUFFile:
    """An open file: `tensors` {name: TensorInfo}, `metadata` (texts and numbers as text), `read(name)`. Close it after use."""

    container = "gguf"

    def __init__(self, path: Path) -> None:
        """Reads the header alone. Raises CheckpointError if it makes no sense, MissingExtraError without the package."""
        self._gguf = _package()
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror or error}") from error
        try:
            self._open()
        except (struct.error, ValueError, OverflowError, RecursionError) as error:
            self._file.close()
            raise CheckpointError(f"{path}: the GGUF header is damaged ({error}); download it again") from error
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        header = _Header(self._file, min(size, _MAX_HEADER))
        magic, version = header.take("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"magic {magic!r}, version {version}; versions 2 and 3 can be read")
        count, pairs = header.take("QQ")
        values = dict(header.pair() for _ in range(header.possible(pairs, 12)))
        infos = dict(header.tensor() for _ in range(header.possible(count, 24)))
        if len(values) != pairs or len(infos) != count:
            raise ValueError("a name appears twice")
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment}")
        start = -(-header.position // alignment) * alignment
        self.tensors = {name: self._info(name, *info, values, start, size) for name, info in infos.items()}
        self.metadata: Mapping[str, str] = MappingProxyType(
            {key: str(value) for key, value in values.items() if not isinstance(value, list)}
        )

    def _info(
        self, name: str, dims: tuple[int, ...], kind: int, offset: int, values: Mapping[str, Any], start: int, size: int
    ) -> TensorInfo:
        try:
            quantisation = self._gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(f"tensor {name} has type {kind}, which the gguf package does not know; update it") from None
        block, width = self._gguf.GGML_QUANT_SIZES[quantisation]
        if quantisation.name not in _PLAIN:
            try:
                self._gguf.quants.dequantize(np.zeros((1, width), np.uint8), quantisation)
            except NotImplementedError:
                raise ValueError(f"tensor {name} is {quantisation.name}, which the gguf package cannot dequantise") from None
        if math.prod(dims) % block or (dims and dims[0] % block):
            raise ValueError(f"tensor {name} of shape {dims} cannot be in blocks of {block}")
        nbytes = math.prod(dims) // block * width
        if start + offset + nbytes > size:
            raise ValueError(f"it has {size} bytes and tensor {name} ends at {start + offset + nbytes}: it is truncated")
        shape = tuple(reversed(dims))
        original = values.get(_SHAPE_KEY + name)
        if original is not None:
            if not isinstance(original, list) or not all(isinstance(n, int) and n > 0 for n in original):
                raise ValueError(f"{_SHAPE_KEY}{name} is {original}")
            if math.prod(original) != math.prod(shape):
                raise ValueError(f"tensor {name} has {math.prod(shape)} values, its original shape {original} others")
            shape = tuple(original)
        return TensorInfo(
            dtype=_PLAIN.get(quantisation.name, torch.float32),
            shape=shape,
            start=start + offset,
            end=start + offset + nbytes,
            encoding="" if quantisation.name in _PLAIN else quantisation.name,
        )

    def read(self, name: str, mapped: bool = False) -> torch.Tensor:
        """The tensor on the CPU, in memory of its own: as stored where that is a plain dtype, else dequantised to float32.
        Nothing is mapped."""
        info = self.tensors[name]
        raw = np.empty(info.nbytes, np.uint8)
        with self._lock:
            try:
                self._file.seek(info.start)
                done = self._file.readinto(raw.data)
            except OSError as error:
                raise CheckpointError(f"cannot read tensor {name} of {self.path}: {error.strerror or error}") from error
        if done != len(raw):
            raise CheckpointError(f"{self.path} ended while tensor {name} was read; is it still being written?")
        if not info.encoding:
            return torch.from_numpy(raw).view(info.dtype).view(info.shape)
        quantisation = self._gguf.GGMLQuantizationType[info.encoding]
        block, width = self._gguf.GGML_QUANT_SIZES[quantisation]
        rows = raw.reshape(-1, info.shape[-1] // block * width) if info.shape[-1] % block == 0 else raw.reshape(1, -1)
        # Blocks with NaN or infinite scales are for the self-check to name; numpy's own warning would name nothing.
        with np.errstate(all="ignore"):
            values = self._gguf.quants.dequantize(rows, quantisation)
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(info.shape)

    def close(self) -> None:
        self._file.close()


class _Header:
    """A cursor over the header that never reads past `limit`."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._limit, self.position = file, limit, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self._bytes(struct.calcsize("<" + layout)))

    def _bytes(self, count: int) -> bytes:
        if count > self._limit - self.position:
            raise ValueError(f"{count} bytes at {self.position} are more than it has")
        self.position += count
        return self._file.read(count)

    def possible(self, count: int, least: int) -> int:
        """`count` itself, if so many things of at least `least` bytes each can still follow."""
        if count * least > self._limit - self.position:
            raise ValueError(f"it says that {count} things follow at byte {self.position}, more than it has room for")
        return count

    def _text(self) -> str:
        (length,) = self.take("Q")
        return self._bytes(length).decode("utf-8")

    def pair(self) -> tuple[str, Any]:
        key = self._text()
        (kind,) = self.take("I")
        return key, self._value(kind)

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind != _ARRAY or depth > 4:
            raise ValueError(f"a value of type {kind}")
        element, count = self.take("IQ")
        if element in _SCALARS:
            layout = _SCALARS[element]
            return list(self.take(f"{self.possible(count, struct.calcsize('<' + layout))}{layout}"))
        return [self._value(element, depth + 1) for _ in range(self.possible(count, 8))]

    def tensor(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        """(name, (dimensions, fastest first; type; offset))."""
        name = self._text()
        (rank,) = self.take("I")
        if rank > _MAX_DIMS or len(name) > _MAX_NAME:
            raise ValueError(f"tensor {name[:100]} has {rank} dimensions")
        dims = self.take(f"{rank}Q")
        kind, offset = self.take("IQ")
        return name, (dims, kind, offset)


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("GGUF files need", "gguf", "gguf") from error
    return gguf
