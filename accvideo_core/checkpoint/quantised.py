"""Weights stored with scales beside them: which tensors are scales, how weights are restored, how they are made.

ComfyUI has two forms. The older marks a file by a tensor `scaled_fp8` (of 2 values: multiply in full precision) and stores
`<module>.scale_weight`, sometimes `.scale_input`; the newer gives each module `.weight_scale` and says the format in JSON, as
bytes in `.comfy_quant` or for all modules in the file's metadata `_quantization_metadata`. Tencent keeps the scales of its fp8
weights in a second file, `<name>_map.pt`, by module. In all of them weight = stored value * scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from .layouts import some

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
MARKER = "scaled_fp8"
"""The tensor that marks a file of ComfyUI's older form; of 2 values: multiply in full precision."""
QUANTISATION_METADATA = "_quantization_metadata"
# leaf -> what it is, and the form it belongs to
_COMPANIONS = {
    "scale_weight": ("scale", "comfyui scaled fp8"),
    "scale_input": ("input_scale", "comfyui scaled fp8"),
    "weight_scale": ("scale", "comfyui quantised fp8"),
    "input_scale": ("input_scale", "comfyui quantised fp8"),
    "comfy_quant": ("settings", "comfyui quantised fp8"),
}


@dataclass(frozen=True)
class Scaled:
    """How one stored weight becomes its values.

    scale           float32; one number, or one for each row, or one for each block of a row (rows, blocks, 1)
    input_scale     what the layer's input may be divided by for an fp8 product, or None
    full_precision  the product is not to be taken in fp8
    """

    scale: torch.Tensor
    input_scale: torch.Tensor | None = None
    full_precision: bool = True


class Scales:
    """The scales of a file: `form` names it ("" for none), `weights` lists the tensors that are no scales."""

    def __init__(self, names: Iterable[str], metadata: Mapping[str, str], read: Callable[[str], torch.Tensor]) -> None:
        """`read` gives a tensor by its stored name. Raises CheckpointError for a format that cannot be restored, by name."""
        self._read = read
        self._companions: dict[str, dict[str, str]] = {}
        self._settings: dict[str, dict[str, object]] = {}
        self._external: dict[str, torch.Tensor] = {}
        self.form = ""
        known = dict.fromkeys(names)
        self.orphans: list[str] = []
        markers = [name for name in known if name == MARKER or name.endswith("." + MARKER)]
        companions = [name for name in known if name.rpartition(".")[2] in _COMPANIONS and name.rpartition(".")[0]]
        for name in companions:
            module, _, leaf = name.rpartition(".")
            role, form = _COMPANIONS[leaf]
            if f"{module}.weight" not in known:
                self.orphans.append(name)
            elif role in self._companions.setdefault(f"{module}.weight", {}):
                raise CheckpointError(f"{name} and {self._companions[f'{module}.weight'][role]} are both a {role} of one weight")
            else:
                self._companions[f"{module}.weight"][role] = name
                self.form = form
        if markers:
            self.form = "comfyui scaled fp8"
        self._full_precision = not markers or read(markers[0]).numel() == 2
        self.weights = [name for name in known if name not in {*markers, *companions}]
        for weight, found in self._companions.items():
            if "settings" in found:
                self._set(weight, bytes(read(found["settings"]).flatten().to(torch.uint8).tolist()))
        if QUANTISATION_METADATA in metadata:
            self.form = "comfyui quantised fp8"
            self._set_all(metadata[QUANTISATION_METADATA])

    def _set(self, weight: str, text: bytes) -> None:
        try:
            settings = json.loads(text)
            form = settings["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"the quantisation of {weight} cannot be told: {text[:80]!r} is no setting of it") from error
        if form not in _FORMATS:
            raise CheckpointError(
                f"{weight} is quantised as {form!r}, which cannot be read; use a file in {', '.join(_FORMATS)}, bf16 or fp16"
            )
        self._settings[weight] = settings

    def _set_all(self, text: str) -> None:
        try:
            layers = json.loads(text)["layers"]
            items = list(layers.items())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"the file's {QUANTISATION_METADATA} is damaged: {text[:80]!r}") from error
        for module, settings in items:
            self._set(f"{module}.weight", json.dumps(settings).encode())

    def check(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Raise CheckpointError where a weight's dtype ({stored name: dtype}) is not what its settings say."""
        for weight, settings in self._settings.items():
            if weight not in dtypes:
                raise CheckpointError(f"a quantisation is given for {weight}, which the file does not have")
            if dtypes[weight] != _FORMATS[str(settings["format"])]:
                raise CheckpointError(f"{weight} is said to be {settings['format']} but is stored as {dtypes[weight]}")

    def add_map(self, scales: Mapping[str, torch.Tensor], stored: Mapping[str, str]) -> None:
        """Tencent's map {original module: scale}, for the weights {original tensor name: stored name}."""
        unknown = [module for module in scales if f"{module}.weight" not in stored]
        if unknown:
            raise CheckpointError(f"the map of scales names {len(unknown)} modules the network lacks ({some(unknown)})")
        self._external = {stored[f"{module}.weight"]: scale for module, scale in scales.items()}
        self.form = "tencent fp8 with map"

    def has(self, stored: str) -> bool:
        """Whether a weight, by its stored name, has a scale."""
        return stored in self._external or "scale" in self._companions.get(stored, {})

    def of(self, stored: str) -> Scaled | None:
        """The scales of a weight, None for one stored as it is."""
        if stored in self._external:
            return Scaled(self._external[stored].float())
        found = self._companions.get(stored, {})
        if "scale" not in found:
            return None
        given = self._read(found["input_scale"]).float() if "input_scale" in found else None
        full = self._full_precision
        if stored in self._settings:
            full = bool(self._settings[stored].get("full_precision_matrix_mult", False))
        return Scaled(self._read(found["scale"]).float(), given, full)

    def restore(self, stored: str, values: torch.Tensor) -> torch.Tensor:
        """The weight's values: float32 where it has a scale, else as stored."""
        scaled = self.of(stored)
        return values if scaled is None else apply_scale(values, scaled.scale, stored)


def apply_scale(values: torch.Tensor, scale: torch.Tensor, name: str) -> torch.Tensor:
    """values * scale in float32; CheckpointError where the scale's shape fits neither the whole, the rows nor their blocks."""
    result = values.float()
    rows = values.shape[0] if values.ndim else 1
    if scale.numel() == 1:
        return result.mul_(scale.reshape(())) if result is not values else result * scale.reshape(())
    if scale.shape in ((rows,), (rows, 1)):
        return result * scale.reshape(rows, *[1] * (values.ndim - 1))
    if scale.ndim == 3 and scale.shape[0] == rows and scale.shape[2] == 1 and values[0].numel() % scale.shape[1] == 0:
        return (result.view(rows, scale.shape[1], -1) * scale).view(values.shape)
    raise CheckpointError(
        f"the scale of {name} has shape {tuple(scale.shape)}, which does not fit its weight {tuple(values.shape)}"
    )


def quantise_fp8(
    values: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, name: str = "a tensor"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp8 values, float32 scale of shape ()) with values = fp8 * scale to fp8's rounding, the largest at fp8's largest.

    As ComfyUI quantises: scale = max |values| / max of the dtype, computed in float32; a tensor of zeros has scale 1. Raises
    CheckpointError, with the tensor's `name`, for values that are not finite.
    """
    values = check_finite(values.float(), name)
    largest = values.abs().max() if values.numel() else torch.tensor(0.0)
    limit = torch.finfo(dtype).max
    scale = largest / limit if largest > 0 else torch.ones(())
    if scale == 0:  # the largest value is so small that float32 has no such scale
        scale = torch.tensor(torch.finfo(torch.float32).tiny)
    return (values / scale).clamp_(-limit, limit).to(dtype), scale


def cast(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The values in `dtype`, rounded to nearest. CheckpointError, with the tensor's `name`, for values that are not finite or
    that the dtype cannot hold."""
    check_finite(values, name)
    if dtype in (torch.float16, *FLOAT8) and values.dtype != dtype and values.numel():
        largest = float((values.float() if values.dtype in FLOAT8 else values).abs().max())
        if largest > torch.finfo(dtype).max:
            short = str(dtype).removeprefix("torch.").replace("float", "fp")
            raise CheckpointError(f"{name} reaches {largest:g}, which {short} cannot hold; choose bf16 or scaled_fp8")
    return values.to(dtype)


def check_finite(values: torch.Tensor, name: str) -> torch.Tensor:
    """The values themselves; CheckpointError, with the tensor's `name`, for NaN and infinities."""
    if not all_finite(values):
        raise CheckpointError(f"{name} has values that are NaN or infinite; check the file with `accvideo inspect --self-check`")
    return values


def scale_name(weight: str) -> str:
    """The name of a weight's scale in ComfyUI's older form."""
    return weight.removesuffix("weight") + "scale_weight"


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite, of any dtype."""
    return bool(_finite(values).all())


def count_not_finite(values: torch.Tensor) -> int:
    """How many values are NaN or infinite, of any dtype."""
    return int((~_finite(values)).sum())


def _finite(values: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(values.to(torch.bfloat16) if values.dtype.itemsize == 1 else values)  # fp8 has no isfinite of its own


def is_scaled_without_scales(values: torch.Tensor) -> bool:
    """Whether fp8 values can only be meant together with a scale: a network's own weights stay far below 64."""
    return values.dtype in FLOAT8 and values.numel() >= 1024 and float(values.float().abs().nan_to_num(0).max()) >= 64
