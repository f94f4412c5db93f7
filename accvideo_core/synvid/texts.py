"""Encoded prompts in a folder, each once, under the hash of its content: `text/` of datasets and of plans."""

from __future__ import annotations

import contextlib
from pathlib import Path

from torch import Tensor

from ..checkpoint import SafetensorsFile, write_safetensors
from ..errors import CheckpointError, SynVidError
from .tensors import tensor_hash


class Texts:
    """The `text` folder in `path`."""

    def __init__(self, path: Path) -> None:
        self._folder = path / "text"

    def path(self, name: str) -> Path:
        """Where the text of that hash lies."""
        return self._folder / name[:2] / f"{name}.safetensors"

    def put(self, text: Tensor, pooled: Tensor | None = None) -> str:
        """Store a prompt's text (L, D) at its valid length and its pooled vector (P,), in the dtypes they have; once, however
        often it is put. Returns its hash. SynVidError for other shapes, NaN and infinities."""
        tensors = {"text": text} if pooled is None else {"text": text, "pooled": pooled}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if text.ndim != 2 or not text.numel() or (pooled is not None and pooled.ndim != 1):
            raise SynVidError(f"text {tuple(text.shape)}; give one prompt's text (L, D) and pooled vector (P,)")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise SynVidError("a text encoding holds NaN or infinities; it is not stored: look at the text encoder's dtype")
        name = tensor_hash(*tensors.values())
        path = self.path(name)
        if not path.exists():
            write_safetensors(path, tensors)
        return name

    def read(self, name: str) -> tuple[Tensor, Tensor | None]:
        """(text (L, D), pooled (P,) or None) by hash. SynVidError if it is missing or not what was stored."""
        try:
            with contextlib.closing(SafetensorsFile(self.path(name))) as file:
                tensors = [file.read(part) for part in ("text", "pooled") if part in file.tensors]
        except CheckpointError as error:
            raise SynVidError(f"the text {name[:12]}... cannot be read: {error}") from error
        if tensor_hash(*tensors) != name:
            raise SynVidError(f"the text {self.path(name)} is not what was stored under its name")
        return tensors[0], tensors[1] if len(tensors) > 1 else None
