"""PyTorch's own `.pt` files, mapped and read tensor by tensor; no code in them is ever run.

Trainers wrap the tensors: {"module": ...} and {"ema": ...} (Tencent, whose loader takes `module`), {"model": ...},
{"state_dict": ...}, or not at all. The newer container is a zip whose members are stored, not packed; one with packed members
is refused before anything unpacks it. The older one is a bare pickle, which cannot be mapped and is read whole.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .safetensors_file import TensorInfo

WRAPPERS = ("module", "ema", "model", "state_dict")
"""Top-level names under which trainers put the tensors."""

_MAX_PICKLE = 256_000_000  # bytes of names and shapes; a 13 B checkpoint has 200 kB
_MAX_DEPTH = 3


class PytorchFile:
    """An open file: `tensors` {name: TensorInfo}, `metadata` (always empty), `read(name)`. Close it after use.

    wrapper  names under which the tensors lay, "" for a bare dictionary; others: further copies of the network in the file
    """

    def __init__(self, path: Path, weights: str | None = None) -> None:
        """weights  which wrapper to take where there are several; `module` before `ema` if None, as Tencent's loader does.

        Raises CheckpointError for a file that is damaged, holds code or no tensors, or several networks and `weights` does
        not say which.
        """
        self.path = path
        self.metadata: Mapping[str, str] = {}
        content, self.container = _load(path)
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors; it is no checkpoint")
        found, self.wrapper, self.others = _unwrap(content, path, weights)
        self._values = {name: _checked(name, value, path) for name, value in found.items()}
        self.tensors = {
            name: TensorInfo(value.dtype, tuple(value.shape), 0, value.numel() * value.dtype.itemsize)
            for name, value in self._values.items()
        }

    def read(self, name: str, mapped: bool = False) -> torch.Tensor:
        """The tensor on the CPU in its stored dtype, in memory of its own or `mapped` (see `Checkpoint.read`)."""
        value = self._values[name]
        return value if mapped and value.is_contiguous() else value.clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._values = {}


def _load(path: Path) -> tuple[Any, str]:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"  # not zipfile.is_zipfile, which raises on some damage
    if zipped:
        _check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped), "pytorch zip" if zipped else "pytorch pickle"
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+) was not an allowed global|Trying to (?:call|set|instantiate) .*?(\S+)", str(error))
        if code is None:
            raise CheckpointError(f"{path} is damaged ({_one_line(error)}); download it again") from error
        raise CheckpointError(
            f"{path} holds code beside tensors ({code[1] or code[2]}); it was not run. Use a safetensors file of the model, or "
            "save the tensors alone with a tool you trust"
        ) from error
    except Exception as error:  # damaged pickles surface as any kind of error from torch's unpickler
        raise CheckpointError(f"{path} is no PyTorch file that can be read ({_one_line(error)}); download it again") from error


def _check_zip(path: Path) -> None:
    """Refuse what no PyTorch wrote: packed members (a small file that unpacks to terabytes), members that overlap."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # BadZipFile, but damage surfaces in other ways too
        raise CheckpointError(f"{path} is a damaged zip ({_one_line(error)}); download it again") from error
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise CheckpointError(
                f"{path}: its member {member.filename} is packed ({member.compress_size} bytes for {member.file_size}); PyTorch "
                "stores tensors unpacked, so this is no checkpoint"
            )
        if member.filename.endswith(".pkl") and member.file_size > _MAX_PICKLE:
            raise CheckpointError(f"{path}: {member.filename} has {member.file_size} bytes, too many for names and shapes")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(f"{path}: its members say more bytes than the file has; it is damaged")


def _unwrap(content: dict[Any, Any], path: Path, weights: str | None) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """(tensors, names of the wrappers around them joined by dots, other wrappers with tensors)."""
    trail: list[str] = []
    others: tuple[str, ...] = ()
    for _ in range(_MAX_DEPTH):
        if any(isinstance(value, torch.Tensor) for value in content.values()):
            break
        inside = [name for name in WRAPPERS if isinstance(content.get(name), dict) and content[name]]
        if not inside:
            break
        name = inside[0]
        if weights in inside:
            name = weights
        elif len(inside) > 1 and set(inside) != {"module", "ema"}:
            choices = " or ".join(f"--weights {other}" for other in inside)
            raise CheckpointError(f"{path} holds several networks ({', '.join(inside)}); say which one: {choices}")
        others = tuple(other for other in inside if other != name)
        trail.append(name)
        content = content[name]
    if weights is not None and weights not in trail:
        has = ", ".join((*trail, *others)) or "bare tensors"
        raise CheckpointError(f"{path} has no weights called {weights!r}; it has {has}")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not all(isinstance(name, str) for name in tensors):
        raise CheckpointError(f"{path}: its tensors have no names; it is no checkpoint")
    if not tensors:
        keys = ", ".join(str(key)[:40] for key in list(content)[:10]) or "nothing"
        raise CheckpointError(f"{path} holds no tensors where they were looked for; it has: {keys}")
    if strange := [str(name)[:80] for name, value in content.items() if not isinstance(value, torch.Tensor)]:
        # Networks keep nothing but tensors; anything else among them means that this is not a network's dictionary.
        raise CheckpointError(f"{path}: among its tensors are other things ({', '.join(strange[:10])}); it is no checkpoint")
    return tensors, ".".join(trail), others


def _checked(name: str, value: torch.Tensor, path: Path) -> torch.Tensor:
    """The tensor, if it is a plain one whose values are all in the file: a repeated view of one value could fill any memory."""
    plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided and not value.is_quantized
    if not plain or value.device.type != "cpu":
        raise CheckpointError(f"{path}: tensor {name} is no plain tensor; save the network's state_dict() alone")
    if value.numel() * value.dtype.itemsize > value.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: tensor {name} of shape {tuple(value.shape)} has fewer bytes than values; it is damaged")
    return value.detach()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
