"""Weight files of the network, opened lazily under original names, and the network built from them.

A file is told apart by its content, never by its name: its first bytes give the container, its tensor names the layout
(`layouts.py`), its shapes the sizes (`config.py`). What is recognised but cannot be read yet is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch

from ..dit import DiTConfig, HunyuanVideoDiT
from ..errors import AccVideoError, CheckpointError
from .config import Differences, family_of, find_differences, infer_config
from .layouts import recognise, some
from .safetensors_file import SafetensorsFile, write_safetensors

# (first bytes, what the file then is). safetensors has no magic of its own: its header's `{` stands at byte 8.
_REFUSED_CONTAINERS: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a PyTorch .pt file (zip)"),
    (b"\x80", "a PyTorch .pt file (pickle)"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<", "a web page, not weights: the download failed"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights: fetch the file itself"),
)

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Checkpoint:
    """An open weight file, lazy: nothing but the header is read until `read`. A context manager; close it after use.

    path      the file
    layout    "original" or "comfyui-native": how its tensors are named; prefix: what stands before every name
    family    key in `schedule.PRESETS`
    config    sizes, from the shapes
    dtypes    {dtype: number of tensors}
    metadata  the file's own text
    unexpected  stored names that are no tensor of the network (only with strict=False)
    """

    def __init__(self, path: Path, strict: bool) -> None:
        self.path = path
        self._file = SafetensorsFile(path)
        try:
            self._open(strict)
        except CheckpointError as error:
            self._file.close()
            raise CheckpointError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
        except BaseException:
            self._file.close()
            raise

    def _open(self, strict: bool) -> None:
        tensors = self._file.tensors
        if not tensors:
            raise CheckpointError("it holds no tensors; download it again")
        try:
            layout, self.prefix, table = recognise(tensors)
        except ValueError as error:
            raise CheckpointError(f"{error}; choose a HunyuanVideo text-to-video file in safetensors") from error
        self.layout = layout.name
        self.unexpected = tuple(stored for stored, original in table.items() if original is None)
        self._stored: dict[str, str] = {}
        for stored, original in table.items():
            if original is None:
                continue
            if original in self._stored:
                raise CheckpointError(f"{self._stored[original]} and {stored} are the same tensor; remove one of them")
            self._stored[original] = stored
        shapes = {original: tensors[stored].shape for original, stored in self._stored.items()}
        self.config: DiTConfig = infer_config(shapes)
        self.family: str = family_of(self.config)
        self.dtypes: Mapping[torch.dtype, int] = MappingProxyType(Counter(info.dtype for info in tensors.values()))
        self.metadata: Mapping[str, str] = MappingProxyType(self._file.metadata)
        self.differences: Differences = find_differences(shapes, self.config, self.unexpected)
        if not all(dtype.is_floating_point for dtype in self.dtypes):
            odd = [name for name, info in tensors.items() if not info.dtype.is_floating_point]
            raise CheckpointError(f"tensors are whole numbers ({some(odd)}), a quantised layout that cannot be read yet")
        if strict and self.differences:
            raise CheckpointError(
                f"the tensors do not fit the network: {self.differences}; the file is damaged or of another model, "
                "download it again or choose another"
            )

    def keys(self) -> list[str]:
        """Original names, in the order they lie in the file (the fast order to read them)."""
        return list(self._stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._file.tensors[self._stored_name(key)].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._file.tensors[self._stored_name(key)].dtype

    def nbytes(self, key: str) -> int:
        """Bytes the tensor takes in the file."""
        info = self._file.tensors[self._stored_name(key)]
        return info.end - info.start

    def read(self, key: str) -> torch.Tensor:
        """One tensor by its original name, on the CPU, in its stored dtype."""
        return self._file.read(self._stored_name(key))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors, in memory."""
        return {key: self.read(key) for key in self}

    @property
    def stored_names(self) -> dict[str, str]:
        """Original name -> the name in the file, for a host that reads the tensors itself."""
        return dict(self._stored)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(torch.Size(self.shape(key)).numel() for key in self._stored)

    def _stored_name(self, key: str) -> str:
        if key not in self._stored:
            raise CheckpointError(f"{self.path} has no tensor {key}")
        return self._stored[key]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_checkpoint(path: str | Path, strict: bool = True) -> Checkpoint:
    """Open the weights of a HunyuanVideo transformer, full or tiny.

    strict  refuse a file with missing, unexpected or mis-shaped tensors (listed by name); else they are in `.differences`
    Raises CheckpointError for a file that is missing, damaged, of another model, or in a layout that cannot be read yet.
    """
    path = Path(path)
    _check_container(path)
    return Checkpoint(path, strict)


def _check_container(path: Path) -> None:
    try:
        if path.is_dir():
            kind = "a diffusers folder" if (path / "config.json").is_file() else "a folder"
            raise CheckpointError(f"{path} is {kind}; name one safetensors file")
        if not path.exists():
            raise CheckpointError(f"no file {path}; check the path")
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error.strerror or error}; check that you may read it") from error
    if not head:
        raise CheckpointError(f"{path} is empty; download it again")
    for magic, what in _REFUSED_CONTAINERS:
        # Byte 8 tells safetensors from a header length that happens to begin like another format.
        if head.startswith(magic) and head[8:9] != b"{":
            raise CheckpointError(f"{path} is {what}, which cannot be read (yet); use safetensors in original or ComfyUI naming")


def load_student(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> HunyuanVideoDiT:
    """The network with the weights of `path`, tensor by tensor, so memory peaks at the network and one tensor.

    dtype  what it computes in; None takes the stored dtype: the widest where several are mixed, bfloat16 for plain fp8
           casts (which it holds exactly)
    Raises CheckpointError as `open_checkpoint` does.
    """
    with open_checkpoint(path) as checkpoint:
        if dtype is None:
            dtype = compute_dtype(checkpoint.dtypes)
        network = HunyuanVideoDiT(checkpoint.config, device="meta", dtype=dtype)
        state = {key: checkpoint.read(key).to(device=device, dtype=dtype) for key in checkpoint}
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
