"""What kind of file weights lie in, told by its first bytes and never by its name, and that file opened."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError
from .gguf_file import GGUFFile
from .pytorch_file import PytorchFile
from .safetensors_file import SafetensorsFile
from .shards import Container, Shards, find_in_folder, weight_files

# (first bytes, what the file then is)
_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<", "a web page, not weights: the download failed"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights: fetch the file itself"),
)
_MAX_HEADER = 100_000_000  # of safetensors
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""What PEFT calls the LoRA in its folders."""


def open_container(path: Path, weights: str | None = None) -> Container:
    """The file, or the files of a folder or an index, as one container of named tensors.

    weights  which network of a `.pt` file that holds several (see PytorchFile)
    Raises CheckpointError for what is missing, damaged, ambiguous or of a kind that cannot be read.
    """
    head = _head(path)
    if head is None:
        return open_container(find_in_folder(path), weights)
    # A safetensors file begins with its header's length, which is small, and then a brace.
    length = int.from_bytes(head[:8], "little")
    is_safetensors = len(head) > 8 and length <= _MAX_HEADER and head[8:9] == b"{"
    pytorch = not is_safetensors and head.startswith((b"PK\x03\x04", b"\x80"))
    if weights is not None and not pytorch:
        raise CheckpointError(f"{path} holds one network; there is no {weights!r} to choose in it")
    if pytorch:
        return PytorchFile(path, weights)
    if head.startswith(b"GGUF"):
        return GGUFFile(path)
    if not is_safetensors:
        if head.lstrip()[:1] == b"{":
            return Shards(path, open_container)
        for magic, what in _REFUSED:
            if head.startswith(magic):
                raise CheckpointError(f"{path} is {what}; weights come as safetensors, .pt, GGUF or a diffusers folder")
    return SafetensorsFile(path)


def adapter_file(path: Path) -> Path | None:
    """The LoRA in a PEFT folder; None for any other folder, and for a file."""
    return next((path / name for name in PEFT_FILES if (path / name).is_file()), None)


def companion_map(path: Path) -> Path | None:
    """Tencent's map of scales beside an fp8 file: the one thing told by a name, because nothing in the files links them."""
    found = path.with_name(path.stem + "_map.pt")
    return found if path.is_file() and found.is_file() else None


def shard_hint(path: Path) -> str:
    """What to say about a file that looks like one shard of several, else nothing."""
    if re.search(r"-\d{5}-of-\d{5}\.", path.name) is None:
        return ""
    return "; it is one shard of several: name their folder or the .index.json instead"


def _head(path: Path) -> bytes | None:
    """The first bytes of a file, None for a folder."""
    try:
        if path.is_dir():
            return None
        if not path.exists():
            raise CheckpointError(f"no file {path}; check the path")
        if not path.is_file():
            raise CheckpointError(f"{path} is a device or a pipe; name a file")
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error.strerror or error}; check that you may read it") from error
    if not head:
        raise CheckpointError(f"{path} is empty; download it again")
    return head


def input_files(path: Path) -> list[Path]:
    """What is read of a checkpoint and may not be written over: what was named, its weight files, the scales beside them."""
    files = weight_files(path) if path.exists() else []
    maps = [companion_map(file) for file in files]
    return [path, *files, *(found for found in maps if found is not None)]
