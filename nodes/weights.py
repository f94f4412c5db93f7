"""A checkpoint in any layout as the weights of a native MODEL (`bridge.Weights`).

fp8 weights with one scale each stay as they are, in the form that this ComfyUI reads; what it cannot use (a scale for each row,
GGUF's blocks) is restored and rounded to bf16; everything else keeps its dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from ..accvideo_core.checkpoint import FLOAT8, Checkpoint, find_student, open_checkpoint
from . import bridge


class StudentWeights:
    """The weights of a file. `family` is the key in `schedule.PRESETS`, `scaled` whether scaled fp8 is passed on,
    `student` what it was distilled for, None if nothing says that it is a student.

    dtype  what the user wants weights stored as, None for ComfyUI's choice. bf16 restores scaled fp8, others leave it.
    name   the file as it is listed, with its folders there; None for its own name alone
    """

    def __init__(self, path: Path, dtype: torch.dtype | None = None, name: str | None = None) -> None:
        """Raises CheckpointError, before anything large is read, for a file that is no whole network."""
        self.path, self.source, self._dtype = path, str(path), dtype
        with open_checkpoint(path) as checkpoint:
            self.family, self.notes = checkpoint.family, tuple(checkpoint.notes)
            self.student = find_student(path.name if name is None else name, checkpoint.metadata)
            wanted = dtype is None or dtype in FLOAT8
            self._kept = {key: form for key in checkpoint if wanted and (form := checkpoint.scaled_linear(key)) is not None}
            if not bridge.HOLDS_QUANTISED and len({checkpoint.stored_dtype(key) for key in self._kept}) > 1:
                self._kept = {}  # one dtype for all, there
        self.scaled = bool(self._kept)

    @property
    def storage_dtype(self) -> torch.dtype | None:
        """What to ask ComfyUI for: with scales, nothing; it tells from them."""
        return None if self.scaled else self._dtype

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor, real: mapped by ComfyUI itself where the file is safetensors and stores them as they are read."""
        with open_checkpoint(self.path) as checkpoint:
            stored = checkpoint.stored_names
            if checkpoint.container == "safetensors" and len(stored) == len(checkpoint.keys()) and self.path.suffix in _MAPPED:
                tensors = bridge.read_tensors(self.path)
                return {key: tensors[name] for key, name in stored.items()}
            return {key: self._read(checkpoint, key) for key in checkpoint} | self._companions(checkpoint)

    def outline(self) -> dict[str, torch.Tensor] | None:
        """Without memory; None where ComfyUI keeps the very tensors it is given, as it does with scales."""
        if self.scaled and bridge.HOLDS_QUANTISED:
            return None
        with open_checkpoint(self.path) as checkpoint:
            shapes = {key: torch.empty(1, dtype=self._dtype_of(checkpoint, key)) for key in checkpoint}
            expanded = {key: one.expand(checkpoint.shape(key)) for key, one in shapes.items()}
            return expanded | self._companions(checkpoint)

    def fill(self, give: Callable[[str, torch.Tensor], None]) -> None:
        with open_checkpoint(self.path) as checkpoint:
            done, show = 0, bridge.progress_bar(sum(checkpoint.nbytes(key) for key in checkpoint))
            for key in checkpoint:
                give(key, self._read(checkpoint, key))
                done += checkpoint.nbytes(key)
                show(done)

    def _dtype_of(self, checkpoint: Checkpoint, key: str) -> torch.dtype:
        if key in self._kept:
            return checkpoint.stored_dtype(key)
        return torch.bfloat16 if checkpoint.is_quantised(key) else checkpoint.dtype(key)

    def _read(self, checkpoint: Checkpoint, key: str) -> torch.Tensor:
        if key in self._kept:
            return checkpoint.read_stored(key)
        return checkpoint.read(key).to(self._dtype_of(checkpoint, key))

    def _companions(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """The scales in the form this ComfyUI reads: with settings for each module, or a marker for the whole."""
        out: dict[str, torch.Tensor] = {}
        full = all(scaled.full_precision for scaled in self._kept.values())
        if self._kept and not bridge.HOLDS_QUANTISED:  # it expects a scale beside every Linear
            linears = [key for key in checkpoint if key.endswith(".weight") and len(checkpoint.shape(key)) == 2]
            out |= {key.removesuffix("weight") + "scale_weight": torch.ones(()) for key in linears}
        for key, scaled in self._kept.items():
            module, dtype = key.removesuffix(".weight"), checkpoint.stored_dtype(key)
            out[f"{module}.weight_scale" if bridge.HOLDS_QUANTISED else f"{module}.scale_weight"] = scaled.scale.reshape(())
            if bridge.HOLDS_QUANTISED:
                settings = {"format": str(dtype).removeprefix("torch.")}
                if scaled.full_precision:
                    settings["full_precision_matrix_mult"] = True
                out[f"{module}.comfy_quant"] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
            else:
                out["scaled_fp8"] = torch.zeros(2 if full else 0).to(dtype)
            if scaled.input_scale is not None and not full:
                name = "input_scale" if bridge.HOLDS_QUANTISED else "scale_input"
                out[f"{module}.{name}"] = scaled.input_scale.reshape(())
        return out


_MAPPED = (".safetensors", ".sft")  # ComfyUI goes by the suffix
