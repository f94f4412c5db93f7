"""Weight files of the network, opened lazily under original names, and the network built from them.

A file is told apart by its content, never by its name: its first bytes give the container (`containers.py`), its tensor names
the layout (`recognition.py`) and where the scales of quantised weights are (`quantised.py`), its shapes the sizes (`config.py`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch

from ..dit import DiTConfig, HunyuanVideoDiT
from ..errors import AccVideoError, CheckpointError
from .config import Differences, NetworkConfig, family_of, find_differences, infer_any_config, infer_config
from .containers import adapter_file, companion_map, open_container, shard_hint
from .layouts import Layout, Place, some
from .pytorch_file import PytorchFile
from .quantised import FLOAT8, Scaled, Scales, is_scaled_without_scales
from .recognition import is_lora, recognise
from .safetensors_file import TensorInfo, write_safetensors
from .shards import Container, Shards


class Checkpoint:
    """An open weight file, lazy: nothing but headers and scales is read until `read`. A context manager; close it after use.

    path          the file
    container     "safetensors", "pytorch zip", "gguf", "2 shards of safetensors", ...
    layout        "original", "comfyui-native" or "diffusers": how its tensors are named; prefix: what stands before every name
    family        key in `schedule.PRESETS`
    config        sizes, from the shapes
    dtypes        {dtype: number of tensors}, as stored (of GGUF's quantised ones: as they are read, float32)
    encodings     {how tensors are stored: number of them}: bfloat16, float8_e4m3fn, Q4_K
    quantisation  "" or how weights are quantised: "plain fp8", "comfyui scaled fp8", "comfyui quantised fp8",
                  "tencent fp8 with map", "gguf"
    metadata      the file's own text
    notes         what a user should know: which of several networks was taken, a size no student has
    differences   how the tensors depart from the network's (empty unless opened with strict=False)
    """

    def __init__(self, path: Path, strict: bool, weights: str | None = None) -> None:
        self.path = path
        self._file: Container = open_container(path, weights)
        try:
            self._open(strict)
        except CheckpointError as error:
            self._file.close()
            message = f"{path}: {error}" if str(path) not in str(error) else str(error)
            raise CheckpointError(message + shard_hint(path)) from error
        except BaseException:
            self._file.close()
            raise

    def _open(self, strict: bool) -> None:
        tensors, self.metadata, self.container = self._file.tensors, self._file.metadata, self._file.container
        if not tensors:
            raise CheckpointError("it holds no tensors; download it again")
        self._scales = Scales(tensors, self.metadata, self._file.read)
        self._layout, self.prefix, table = self._recognise(self._scales.weights)
        self.layout = self._layout.name
        self.notes: list[str] = []
        if isinstance(self._file, PytorchFile):
            self.notes += [f"the network under {self._file.wrapper!r} is used"] if self._file.others else []
            self.notes += [f"it also holds one under {other!r}" for other in self._file.others]
        self._parts, incomplete = _assemble(table)
        unexpected = [stored for stored, place in table.items() if place is None] + self._scales.orphans
        infos = {stored: tensors[stored] for parts in self._parts.values() for stored in parts}
        odd = [name for name, info in infos.items() if not info.dtype.is_floating_point]
        if odd:
            raise CheckpointError(f"tensors are whole numbers ({some(odd)}), a quantised layout that cannot be read")
        self._scales.check({name: info.dtype for name, info in infos.items()})
        self._add_map()
        self._check_parts()
        shapes = {key: self.shape(key) for key in self._parts}
        self.config: NetworkConfig = infer_any_config(self._layout.family, shapes)
        self.family: str = family_of(self.config)
        self.dtypes: Mapping[torch.dtype, int] = MappingProxyType(Counter(info.dtype for info in infos.values()))
        self.encodings: Mapping[str, int] = MappingProxyType(Counter(info.stored_as for info in infos.values()))
        self.quantisation = self._tell_quantisation(infos)
        self.differences: Differences = find_differences(shapes, self.config, (*unexpected, *incomplete))
        if strict and self.differences:
            raise CheckpointError(
                f"the tensors do not fit the network: {self.differences}; the file is damaged or of another model, "
                f"download it again or choose another"
            )

    def _recognise(self, names: list[str]) -> tuple[Layout, str, dict[str, Place | None]]:
        try:
            return recognise(names)
        except ValueError as error:
            if names and all(self._file.tensors[name].dtype.is_floating_point and "." in name for name in names):
                tiny = all(self._file.tensors[name].nbytes <= 8 for name in names)
                if tiny and isinstance(self._file, PytorchFile):
                    raise CheckpointError("it is a map of fp8 scales; name the model file it belongs to") from error
            raise CheckpointError(f"{error}; choose a file of HunyuanVideo or Wan 2.1") from error

    def _check_parts(self) -> None:
        """Rows stacked from parts: q, k and v are of one size, and what lies beside the rows agrees."""
        for key, parts in self._parts.items():
            shapes = [self._file.tensors[part].shape for part in parts]
            if len(parts) > 1 and (not shapes[0] or len({s[1:] for s in shapes}) > 1 or len({s[:1] for s in shapes[:3]}) > 1):
                raise CheckpointError(f"the parts of {key} do not fit together: {', '.join(map(str, shapes))}")

    def _add_map(self) -> None:
        """Tencent's scales, where the file has fp8 weights and none of its own."""
        path = companion_map(self.path) if isinstance(self._file, PytorchFile) and not self._scales.form else None
        has_fp8 = any(self._file.tensors[stored].dtype in FLOAT8 for parts in self._parts.values() for stored in parts)
        if path is None or not has_fp8:
            return
        scales = PytorchFile(path)
        if not all(info.dtype.is_floating_point for info in scales.tensors.values()):
            raise CheckpointError(f"{path} is no map of scales: it holds whole numbers")
        values = {name: scales.read(name) for name in scales.tensors}
        self._scales.add_map(values, {key: parts[0] for key, parts in self._parts.items() if len(parts) == 1})
        self.notes.append(f"its scales are from {path.name}")

    def _tell_quantisation(self, infos: Mapping[str, TensorInfo]) -> str:
        if self._scales.form:
            bare = [name for name, info in infos.items() if info.dtype in FLOAT8 and not self._scales.has(name)]
        else:
            bare = [name for name, info in infos.items() if info.dtype in FLOAT8]
        # One weight is read: fp8 that was scaled makes noise without its scales, and nothing in the header tells.
        probe = min((name for name in bare if len(infos[name].shape) == 2), key=lambda name: infos[name].nbytes, default=None)
        if probe is not None and is_scaled_without_scales(self._file.read(probe)):
            raise CheckpointError(
                f"its fp8 weights ({probe}) are made for scales that are not in the file; put {self.path.stem}_map.pt, which "
                "belongs to it, beside it, or use another file"
            )
        if self._scales.form:
            return self._scales.form
        if any(info.encoding for info in infos.values()):
            return "gguf"
        return "plain fp8" if bare else ""

    def keys(self) -> list[str]:
        """Original names, in the order they lie in the file (the fast order to read them)."""
        return list(self._parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def shape(self, key: str) -> tuple[int, ...]:
        first, *rest = (self._file.tensors[stored].shape for stored in self._stored(key))
        if not rest:
            return first
        return (first[0] + sum(shape[0] for shape in rest), *first[1:])

    def dtype(self, key: str) -> torch.dtype:
        """Of what `read` gives: float32 for scaled weights, else the stored dtype."""
        stored = self._stored(key)
        if any(self._scales.has(name) for name in stored):
            return torch.float32
        return functools.reduce(_widest, (self._file.tensors[name].dtype for name in stored))

    def stored_dtype(self, key: str) -> torch.dtype:
        """Of the stored values, before any scale."""
        return functools.reduce(_widest, (self._file.tensors[name].dtype for name in self._stored(key)))

    def is_quantised(self, key: str) -> bool:
        """Whether the tensor is stored with scales or in blocks (not: as a plain fp8 cast)."""
        return any(self._scales.has(name) or self._file.tensors[name].encoding for name in self._stored(key))

    def nbytes(self, key: str) -> int:
        """Bytes the tensor takes in the file."""
        return sum(self._file.tensors[name].nbytes for name in self._stored(key))

    def read(self, key: str, mapped: bool = False) -> torch.Tensor:
        """One tensor by its original name, on the CPU: in its stored dtype, quantised ones restored to float32.

        mapped  where the file has the very values (safetensors, zipped .pt), let the tensor lie over the file instead of in
                memory of its own: nothing is copied, processes share it, and it outlives `close`. Writing to it does not
                reach the file. Replacing the file, as this project does, leaves it alone (Windows refuses); overwriting the
                file in place changes it or ends the process.
        """
        parts = [self._scales.restore(name, self._file.read(name, mapped)) for name in self._stored(key)]
        return self._in_order(key, _stack(parts, self.dtype(key)))

    def scaled(self, key: str) -> Scaled | None:
        """The scale of a tensor that `read_stored` gives without it; None where there is none, or more than one."""
        stored = self._stored(key)
        return self._scales.of(stored[0]) if len(stored) == 1 else None

    def scaled_linear(self, key: str) -> Scaled | None:
        """The scale of a Linear's weight that is fp8 with one number for all of it, which is what ComfyUI computes with and
        what can be kept as it is; None for every other tensor."""
        linear = len(self.shape(key)) == 2 and key.endswith(".weight") and self.stored_dtype(key) in FLOAT8
        scaled = self.scaled(key) if linear else None
        return scaled if scaled is not None and scaled.scale.numel() == 1 else None

    def read_stored(self, key: str) -> torch.Tensor:
        """One tensor as it is stored, without its scale (see `scaled`)."""
        stored = self._stored(key)
        if len(stored) > 1 and any(self._scales.has(name) for name in stored):
            raise CheckpointError(f"{self.path}: {key} is stored in {len(stored)} parts with scales of their own; use read()")
        return self._in_order(key, _stack([self._file.read(name) for name in stored], self.stored_dtype(key)))

    def state_dict(self, mapped: bool = False) -> dict[str, torch.Tensor]:
        """All tensors, as `read` gives them."""
        return {key: self.read(key, mapped) for key in self}

    @property
    def stored_names(self) -> dict[str, str]:
        """Original name -> the name in the file, for the tensors that are stored whole, as they are read."""
        return {
            key: parts[0]
            for key, parts in self._parts.items()
            if len(parts) == 1 and not self._layout.is_swapped(key) and not self.is_quantised(key)
        }

    @property
    def compute_dtype(self) -> torch.dtype:
        """The one dtype to compute in: bfloat16 if weights are quantised, else what holds every stored value exactly."""
        if any(self.is_quantised(key) for key in self._parts):
            return torch.bfloat16
        return compute_dtype(self.dtypes)

    @property
    def nbytes_on_disk(self) -> int:
        """Size of the file; of several files, that of the network's tensors."""
        if self.path.is_file() and not isinstance(self._file, Shards):
            return self.path.stat().st_size
        return sum(self.nbytes(key) for key in self._parts)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(torch.Size(self.shape(key)).numel() for key in self._parts)

    def _stored(self, key: str) -> tuple[str, ...]:
        if key not in self._parts:
            raise CheckpointError(f"{self.path} has no tensor {key}")
        return self._parts[key]

    def _in_order(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(tensor.chunk(2)[::-1]) if self._layout.is_swapped(key) else tensor

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _assemble(table: Mapping[str, Place | None]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """({original name: stored names of its rows in order}, stored names whose other parts are not there)."""
    slots: dict[str, list[str | None]] = {}
    for stored, place in table.items():
        if place is None:
            continue
        parts = slots.setdefault(place.name, [None] * place.count)
        if len(parts) != place.count or parts[place.index] is not None:
            other = next(name for name in parts if name is not None)
            raise CheckpointError(f"{other} and {stored} are the same tensor; remove one of them")
        parts[place.index] = stored
    whole = {name: tuple(part for part in parts if part is not None) for name, parts in slots.items() if None not in parts}
    return whole, [f"{part} without its siblings" for parts in slots.values() if None in parts for part in parts if part]


def _widest(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    if a == b:
        return a
    return torch.promote_types(*(torch.bfloat16 if dtype in FLOAT8 else dtype for dtype in (a, b)))


def _stack(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Rows of several tensors as one of `dtype`."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.to(dtype) for part in parts])


def open_checkpoint(path: str | Path, strict: bool = True, weights: str | None = None) -> Checkpoint:
    """Open the weights of a transformer: HunyuanVideo's, full or tiny, or Wan 2.1's.

    path     safetensors, PyTorch's .pt, GGUF, an index of shards, or a diffusers folder
    strict   refuse a file with missing, unexpected or mis-shaped tensors (listed by name); else they are in `.differences`
    weights  which network of a `.pt` file that holds several: module (the default, as Tencent's loader), ema, ...
    Raises CheckpointError for what is missing, damaged, ambiguous, of another model, or in a layout that cannot be read.
    """
    return Checkpoint(Path(path), strict, weights)


def holds_lora(path: str | Path, weights: str | None = None) -> bool:
    """Whether the tensors of a file, or of a PEFT folder's own, are named as a LoRA's. CheckpointError if it cannot be opened."""
    file = open_container(adapter_file(Path(path)) or Path(path), weights)
    try:
        return is_lora(file.tensors)
    finally:
        file.close()


def load_student(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    mapped: bool = False,
) -> HunyuanVideoDiT:
    """The network with the weights of `path`, tensor by tensor, so memory peaks at the network and one tensor.

    dtype    what it computes in; None takes the stored dtype: the widest where several are mixed, bfloat16 for plain fp8
             casts (which it holds exactly) and for quantised weights
    weights  as for `open_checkpoint`
    mapped   as for `Checkpoint.read`: on the CPU in its stored dtype the network then takes no memory of its own
    Raises CheckpointError as `open_checkpoint` does, and for Wan, which runs in ComfyUI alone.
    """
    with open_checkpoint(path, weights=weights) as checkpoint:
        if not isinstance(checkpoint.config, DiTConfig):
            raise CheckpointError(
                f"{path} is a Wan model ({checkpoint.family}), which runs in ComfyUI alone; load it with AccVideo Student Loader"
            )
        dtype = checkpoint.compute_dtype if dtype is None else dtype
        network = HunyuanVideoDiT(checkpoint.config, device="meta", dtype=dtype)
        state = {key: checkpoint.read(key, mapped).to(device=device, dtype=dtype) for key in checkpoint}
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


def compute_dtype(dtypes: Mapping[torch.dtype, int]) -> torch.dtype:
    """The one dtype that holds every stored value exactly and that torch computes in."""
    result: torch.dtype | None = None
    for stored in dtypes:
        stored = torch.bfloat16 if stored in FLOAT8 else stored
        result = stored if result is None else torch.promote_types(result, stored)
    assert result is not None, "an open checkpoint has tensors"
    return result


def save_original(path: str | Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a network's tensors, under original names, as safetensors, all or nothing.

    Raises CheckpointError if `state` is not a whole network, OutputError if it cannot be written.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        differences = find_differences(shapes, infer_config(shapes))
    except AccVideoError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    if differences:
        raise CheckpointError(f"cannot write {path}: the tensors do not fit the network: {differences}")
    write_safetensors(path, state, metadata)
