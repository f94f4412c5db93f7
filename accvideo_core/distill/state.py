"""Checkpoints of a training run: written by all processes at once, whole or not at all, readable by any number of them.

torch.distributed.checkpoint holds the tensors, each process writing its shards; a JSON file beside them the rest, so that
nothing is unpickled that could run code. A checkpoint is a folder `step_00001200`; it is written under a hidden name and
renamed once every file is on the disk, so that a folder of that name is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from ..errors import CheckpointError, InvalidValueError, OutputError
from ..files import atomic_path, make_folder, output_error, sync_folder

_NAME = "step_{:08d}"
_REST = "state.json"
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class Stateful(Protocol):
    """Anything with a state of tensors and JSON-able values, nested in dicts with names for keys."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class OptimizerState:
    """An optimizer's state under its parameters' names: what resharding needs, for parameters have no numbers then."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.network, self.optimizer = network, optimizer

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.network, self.optimizer, options=_OPTIONS)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.network, self.optimizer, state, options=_OPTIONS)


Parts = Mapping[str, Stateful | Mapping[str, Any]]


def save(folder: Path, step: int, parts: Parts, extra: Any = None, keep: int = 3) -> Path:
    """Write all parts of a run after `step`; every process calls it with its own shards. Returns the checkpoint's folder.

    parts  each a network, an `OptimizerState`, any `Stateful` or a dict; plain tensors in them are the same in every process
    extra  anything JSON can hold, from the main process
    keep   checkpoints that stay, the newest; older ones are removed once this one is whole
    Raises OutputError if it cannot be written; what was there is untouched. One run at a time writes into a folder.
    """
    tensors, values = _separate({name: _state(part) for name, part in parts.items()})
    path, temporary = folder / _NAME.format(step), _hidden(folder / _NAME.format(step))
    distributed = dist.is_available() and dist.is_initialized()
    main = not distributed or dist.get_rank() == 0
    if path.exists():
        raise OutputError(f"{str(path)!r} exists; resume from it or choose another folder")
    if main:
        make_folder(folder)
        _remove_unfinished(folder)
    _wait(distributed)
    try:
        with _alone(distributed) as no_dist:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), no_dist=no_dist)
    except CheckpointException as failure:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        error = next(iter(failure.failures.values()))[0]
        raise output_error(path, error if isinstance(error, OSError) else OSError(str(error))) from failure
    if main:
        sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
        with atomic_path(temporary / _REST) as rest:
            rest.write_text(json.dumps({"step": step, "values": values, "extra": extra, "files": sizes}), encoding="utf-8")
        os.replace(temporary, path)
        sync_folder(folder)
        for old in _whole(folder)[:-keep]:
            _remove(old)
    _wait(distributed)
    return path


def newest(folder: Path) -> Path | None:
    """The whole checkpoint of the highest step in a run's folder, or None."""
    return next(reversed(_whole(folder)), None)


def step_of(checkpoint: Path) -> int:
    """After how many steps a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step_"))


def load(checkpoint: Path, parts: Parts) -> Any:
    """Restore parts in place, whatever number of processes wrote them. Returns what `extra` was.

    Raises CheckpointError for a damaged checkpoint, and for parts whose tensors differ in name or shape, naming them.
    """
    rest, reader = _open(checkpoint)
    states = {name: _state(part) for name, part in parts.items()}
    tensors, values = _separate(states)
    stored: dict[str, torch.Size | None] = {key: item.size for key, item in reader.tensors().items()}
    wanted: dict[str, torch.Size | None] = {key: tensor.shape for key, tensor in tensors.items()}
    stored |= dict.fromkeys(rest["values"])
    wanted |= dict.fromkeys(values)
    _compare(checkpoint, wanted, {key: size for key, size in stored.items() if key.split("/")[0] in parts})
    _read(tensors, reader, checkpoint)
    for key in values:
        _put(states, key, rest["values"][key])
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            part.load_state_dict(states[name])
    return rest["extra"]


def read(checkpoint: Path, part: str) -> dict[str, Any]:
    """One part, whole, on the CPU, nested as it was saved: for what has no fixed shape (queues), and for looking at."""
    rest, reader = _open(checkpoint)
    found = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in reader.tensors().items()
        if key.split("/")[0] == part
    }
    _read(found, reader, checkpoint)
    nested: dict[str, Any] = {part: {}}
    for key, value in (found | {k: v for k, v in rest["values"].items() if k.split("/")[0] == part}).items():
        _put(nested, key, value)
    return nested[part]


def _state(part: Stateful | Mapping[str, Any]) -> Any:
    return part if isinstance(part, Mapping) else part.state_dict()


def _walk(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of everything nested in dicts; paths are joined by slashes, for names hold dots."""
    for name, value in state.items():
        if not isinstance(name, str) or "/" in name:
            raise InvalidValueError(f"a state's names must be strings without slashes, not {prefix}{name!r}")
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _separate(states: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for path, value in _walk(states):
        if isinstance(value, Tensor):
            tensors[path] = value
        else:
            try:
                json.dumps(value)
            except TypeError as error:
                raise InvalidValueError(
                    f"{path} holds a {type(value).__name__}, which is no tensor and which JSON cannot hold"
                ) from error
            values[path] = value
    return tensors, values


def _put(states: dict[str, Any], path: str, value: Any) -> None:
    *above, name = path.split("/")
    for part in above:
        states = states.setdefault(part, {})
    # JSON knows no tuples
    states[name] = tuple(value) if isinstance(states.get(name), tuple) else value


def _open(checkpoint: Path) -> tuple[dict[str, Any], _Reader]:
    try:
        rest = json.loads((checkpoint / _REST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(checkpoint)!r} is no whole checkpoint of a training run: {error}") from error
    for name, size in rest["files"].items():
        file = checkpoint / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(
                f"{str(checkpoint)!r} is damaged: {name} {state}; remove the folder to resume from the one before"
            )
    return rest, _Reader(checkpoint)


def _read(tensors: dict[str, Tensor], reader: dcp.FileSystemReader, checkpoint: Path) -> None:
    distributed = dist.is_available() and dist.is_initialized()
    try:
        with _alone(distributed) as no_dist:
            dcp.load(tensors, storage_reader=reader, no_dist=no_dist)
    except CheckpointException as failure:
        error = next(iter(failure.failures.values()))[0]
        raise CheckpointError(f"{str(checkpoint)!r} cannot be read: {error}") from failure


def _compare(checkpoint: Path, wanted: Mapping[str, torch.Size | None], stored: Mapping[str, torch.Size | None]) -> None:
    """Shapes by name, None for what is no tensor."""
    problems = [
        *(f"{key} is not in it" for key in wanted if key not in stored),
        *(f"{key} has no place here" for key in stored if key not in wanted),
        *(f"{k} is {_shape(stored[k])}, not {_shape(wanted[k])}" for k in wanted if k in stored and stored[k] != wanted[k]),
    ]
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(
            f"{str(checkpoint)!r} is of another run: {listed}; resume with the configuration it was written with"
        )


def _shape(size: torch.Size | None) -> str:
    return "no tensor" if size is None else str(tuple(size))


class _Metadata(pickle.Unpickler):
    """Reads the index of torch.distributed.checkpoint, a pickle, and refuses all but the few classes it consists of."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name in _PATHS:
            return _PATHS[name]  # where it was written; a system cannot make another's own paths
        if (module, name) not in _KNOWN:
            raise CheckpointError(f"a checkpoint's index may not hold {module}.{name}; this one comes from elsewhere")
        return super().find_class(module, name)


_PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}
_DCP = "torch.distributed.checkpoint"
_KNOWN = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "StorageMeta", "TensorStorageMetadata", "TensorProperties")),
    *((f"{_DCP}.metadata", name) for name in ("ChunkStorageMetadata", "MetadataIndex", "_MEM_FORMAT_ENCODING")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", str(value).removeprefix("torch.")) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Metadata(file).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{str(self.path)!r} has an index that is none")
        _tensors(metadata)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Shape and dtype of every tensor."""
        return _tensors(self.read_metadata())


def _tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Everything in an index, which may hold nothing but tensors: torch unpickles what is none."""
    found = {}
    for key, item in metadata.state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata):
            raise CheckpointError(f"a checkpoint's tensors include {key}, which is none; this one comes from elsewhere")
        found[key] = item
    return found


def _whole(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.name.removeprefix("step_").isdigit() and (p / _REST).is_file())


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _remove(checkpoint: Path) -> None:
    """Under its hidden name first: a checkpoint that is half removed must not look whole."""
    with contextlib.suppress(OSError):
        os.replace(checkpoint, _hidden(checkpoint))
        shutil.rmtree(_hidden(checkpoint))


def _remove_unfinished(folder: Path) -> None:
    for left in folder.glob(".step_*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _alone(distributed: bool) -> Iterator[bool]:
    """Whether this process is the only one, which torch must be told and warns of all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield not distributed


def _wait(distributed: bool) -> None:
    if distributed:
        dist.barrier()
