"""Encoded prompts, each once, under the hash of its content: `text/` of datasets and of plans."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoint import write_safetensors
from ..errors import SynVidError
from ..files import make_folder
from .folder import Folder, RemoteFolder
from .tensors import tensor_hash

_CURE = (
    "delete it if it is there, and encode the prompts into the plan again (accvideo encode), which puts it back, and capture, "
    "which copies it into the dataset"
)


def text_file(name: str) -> str:
    """Where the text of that hash lies in a dataset or a plan."""
    return f"text/{name[:2]}/{name}.safetensors"


def names_there(folder: Folder | RemoteFolder) -> set[str]:
    """The hashes of the texts in a dataset or a plan, by listing alone. OSError where that fails."""
    return {PurePosixPath(name).stem for name in folder.sizes("text") if name.endswith(".safetensors")}


def put_text(folder: Path, text: Tensor, pooled: Tensor | None = None) -> str:
    """Store a prompt's text (L, D) at its valid length and its pooled vector (P,), in the dtypes they have; once, however
    often it is put; one that is damaged is written again. Returns its hash. SynVidError for other shapes, NaN and infinities."""
    if text.ndim != 2 or not text.numel() or (pooled is not None and pooled.ndim != 1):
        raise SynVidError(f"text {tuple(text.shape)}; give one prompt's text (L, D) and pooled vector (P,)")
    tensors = {"text": text} if pooled is None else {"text": text, "pooled": pooled}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise SynVidError("a text encoding holds NaN or infinities; it is not stored: look at the text encoder's dtype")
    name = tensor_hash(*tensors.values())
    path = folder / text_file(name)
    if not _is_whole(folder, name):
        make_folder(path.parent)
        write_safetensors(path, tensors)
    return name


def _is_whole(folder: Path, name: str) -> bool:
    try:
        read_text(Folder(folder), name)
    except SynVidError:
        return False
    return True


def read_text(folder: Folder | RemoteFolder, name: str) -> tuple[Tensor, Tensor | None]:
    """(text (L, D), pooled (P,) or None) by hash. SynVidError if it is missing or not what was stored."""
    file = text_file(name)
    try:
        found = safetensors.torch.load(folder.read(file))
    except (OSError, SafetensorError) as error:
        raise SynVidError(f"{folder}: {file} cannot be read ({error}); {_CURE}") from error
    tensors = [found[part] for part in ("text", "pooled") if part in found]
    if tensor_hash(*tensors) != name:
        raise SynVidError(f"{folder}: {file} is not what was stored under its name; {_CURE}")
    return tensors[0], tensors[1] if len(tensors) > 1 else None
