"""A network in several files: Hugging Face's index of shards, or a diffusers folder, as one container."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from ..errors import CheckpointError
from .safetensors_file import TensorInfo

_MAX_INDEX = 100_000_000


class Container(Protocol):
    """A file, or several, of named tensors."""

    path: Path

    @property
    def container(self) -> str: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    def read(self, name: str, mapped: bool = False) -> torch.Tensor: ...
    def close(self) -> None: ...


class Shards:
    """The files an index names, as one container. A tensor in a shard that the index puts elsewhere is an error."""

    def __init__(self, index: Path, open_file: Callable[[Path], Container]) -> None:
        """`open_file` opens one shard. Raises CheckpointError for an index that is damaged or disagrees with its shards."""
        self.path = index
        files = _read_index(index)
        self._shards: dict[str, Container] = {}
        try:
            for name in dict.fromkeys(files.values()):
                if not (index.parent / name).is_file():
                    raise CheckpointError(f"{index.name} names {name}, which is not beside it; download the missing file")
                self._shards[name] = open_file(index.parent / name)
            self._homes = files
            self.tensors: Mapping[str, TensorInfo] = {}
            self.metadata: Mapping[str, str] = {}
            for name, shard in self._shards.items():
                here = {tensor for tensor, home in files.items() if home == name}
                if wrong := sorted(here.symmetric_difference(shard.tensors)):
                    raise CheckpointError(
                        f"{index.name} and {name} disagree about {len(wrong)} tensors ({wrong[0]}); they do not belong together"
                    )
                self.tensors = {**self.tensors, **shard.tensors}
                self.metadata = {**self.metadata, **shard.metadata}
            self.container = f"{len(self._shards)} shards of {next(iter(self._shards.values())).container}"
        except BaseException:
            self.close()
            raise

    def read(self, name: str, mapped: bool = False) -> torch.Tensor:
        """The tensor on the CPU, in memory of its own or `mapped` (see `Checkpoint.read`)."""
        return self._shards[self._homes[name]].read(name, mapped)

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()


def _read_index(index: Path) -> dict[str, str]:
    """{tensor: file name}."""
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise ValueError("it is too large")
        content = json.loads(index.read_text(encoding="utf-8"))
        files = content["weight_map"]
        if not files or not all(isinstance(name, str) and isinstance(file, str) for name, file in files.items()):
            raise ValueError("its weight_map does not say which file holds which tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = "no weight_map" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise CheckpointError(f"{index} is no index of shards ({reason}); name the weights or their folder") from error
    for file in files.values():
        if not file or Path(file).name != file or file in (".", "..") or "\\" in file:
            raise CheckpointError(f"{index} names the file {file!r}, which does not lie beside it; the index is damaged")
    return dict(files)


def find_in_folder(folder: Path) -> Path:
    """The index or the one weight file of a diffusers folder (of a whole pipeline's, its transformer).

    Raises CheckpointError when there is none, or more than one.
    """
    if (folder / "model_index.json").is_file() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    indices = sorted(folder.glob("*.index.json"))
    files = [path for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf") for path in sorted(folder.glob(pattern))]
    if len(indices) == 1:
        return indices[0]
    if not indices and len(files) == 1:
        return files[0]
    if not indices and not files:
        raise CheckpointError(f"{folder} is a folder without weights; name a file or a diffusers folder")
    found = ", ".join(path.name for path in (indices or files)[:10])
    what = "several indices" if indices else "several weight files and no index"
    raise CheckpointError(f"{folder} has {what} ({found}); name the one to use")


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights `path` names: itself, or an index and its shards."""
    path = find_in_folder(path) if path.is_dir() else path
    return (
        [path] if path.suffix != ".json" else [path, *(path.parent / name for name in dict.fromkeys(_read_index(path).values()))]
    )
