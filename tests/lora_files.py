"""LoRA files in the formats users have, for a network given by its tensors, each with the change it must make.

Every format is a row of FORMATS: a naming of modules, a spelling of keys, a form of the change. The writers follow the
tools' published rules and use nothing of `accvideo_core.lora`, so that reading, merging and applying can be held against
them. A change is a function of the original weight in float64, because DoRA's depends on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from accvideo_core.checkpoint.layouts import COMFYUI_NATIVE, HUNYUAN_DIFFUSERS, ORIGINAL

Change = Callable[[Tensor], Tensor]
RANK = 4
ALPHA = 2.0
SIZE = 0.2  # of a change, relative to the weight's own norm


@dataclass(frozen=True)
class Module:
    """A module under a tool's name, the original one it is (rows `start` to `start + length` of) and its weight there."""

    name: str
    original: str
    start: int
    length: int
    swapped: bool
    weight: Tensor

    def rows(self, weight: Tensor) -> Tensor:
        rows = weight[self.start : self.start + self.length]
        return torch.cat(rows.chunk(2)[::-1]) if self.swapped else rows


@dataclass
class LoraFile:
    """tensors and metadata as the tool writes them.

    changes  {original tensor name: weight float64 -> its difference at strength 1}
    modules  {module as the file names it: original tensors it changes}
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    changes: dict[str, list[tuple[Module, Change]]] = field(default_factory=dict)
    modules: dict[str, list[str]] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path, self.metadata or None)
        return path

    def merged(self, state: Mapping[str, Tensor], strength: float | Callable[[str], float] = 1.0) -> dict[str, Tensor]:
        """`state` with the LoRA in it, in float64; `strength` may depend on the original tensor's name."""
        out = {name: tensor.double() for name, tensor in state.items()}
        for name, changes in self.changes.items():
            factor = strength(name) if callable(strength) else strength
            for module, change in changes:
                weight = state[name].double()
                difference = change(module.rows(weight))
                if module.swapped:
                    difference = torch.cat(difference.chunk(2)[::-1])
                out[name][module.start : module.start + module.length] += factor * difference
        return out

    def score(self, base: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> tuple[int, int]:
        """(how many modules of this file have changed something in `got`, how many have changed it as they should)."""
        want = self.merged(base)
        changed: dict[str, list[bool]] = {}
        exact: dict[str, list[bool]] = {}
        for name, changes in self.changes.items():
            for module, _ in changes:
                before, after, should = (module.rows(state[name].double()) for state in (base, got, want))
                changed.setdefault(module.name, []).append(not torch.equal(before, after))
                exact.setdefault(module.name, []).append(bool((after - should).norm() <= 1e-3 * (should - before).norm()))
        return sum(map(all, changed.values())), sum(map(all, exact.values()))

    def _add(self, module: Module, leaf: str, change: Change) -> None:
        tensor = f"{module.original}.{leaf}"
        self.changes.setdefault(tensor, []).append((module, change))
        self.modules.setdefault(module.name, []).append(tensor)


Form = Callable[[Module, torch.Generator, torch.dtype, float | None], tuple[dict[str, Tensor], Change]]


def _factors(module: Module, generator: torch.Generator, dtype: torch.dtype, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """up (out, r), down (r, in), of a product about as large as the weight."""
    out, width = module.weight.shape[0], module.weight[0].numel()
    up = torch.randn(out, rank, generator=generator) * rank**-0.5
    down = torch.randn(rank, width, generator=generator) * module.weight.std()
    return up.to(dtype), down.to(dtype)


def _low_rank(up_leaf: str, down_leaf: str) -> Form:
    def form(module: Module, generator: torch.Generator, dtype: torch.dtype, alpha: float | None):
        up, down = _factors(module, generator, torch.float32)
        up = (up * SIZE).to(dtype)
        down = down.to(dtype)
        scale = 1.0 if alpha is None else alpha / RANK
        return {up_leaf: up, down_leaf: down}, lambda weight: scale * up.double() @ down.double()

    return form


def _dora(rowwise: bool) -> Form:
    """rowwise: a magnitude for every output row (PEFT, LyCORIS); else for every input column (OneTrainer's default)."""
    plain = _low_rank("lora_up.weight", "lora_down.weight")
    dim = 1 if rowwise else 0

    def form(module: Module, generator: torch.Generator, dtype: torch.dtype, alpha: float | None):
        tensors, product = plain(module, generator, dtype, alpha)
        norms = module.weight.norm(dim=dim, keepdim=True)
        magnitude = (norms * (1 + 0.1 * torch.randn(norms.shape, generator=generator))).to(dtype)

        def change(weight: Tensor) -> Tensor:
            moved = weight + product(weight)
            return magnitude.double() * moved / moved.norm(dim=dim, keepdim=True) - weight

        return tensors | {"dora_scale": magnitude}, change

    return form


def _loha(module: Module, generator: torch.Generator, dtype: torch.dtype, alpha: float | None):
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    first, second = (_factors(module, generator, torch.float32) for _ in range(2))
    values = [first[0] * SIZE, first[1], second[0], second[1] / module.weight.std()]
    tensors = {name: value.to(dtype) for name, value in zip(names, values, strict=True)}
    a, b, c, d = (tensor.double() for tensor in tensors.values())
    scale = 1.0 if alpha is None else alpha / RANK
    return tensors, lambda weight: scale * (a @ b) * (c @ d)


def _lokr(module: Module, generator: torch.Generator, dtype: torch.dtype, alpha: float | None):
    out, width = module.weight.shape
    first = torch.randn(4, 4, generator=generator)
    up = torch.randn(out // 4, RANK, generator=generator) * SIZE * RANK**-0.5
    down = torch.randn(RANK, width // 4, generator=generator) * module.weight.std()
    tensors = {"lokr_w1": first.to(dtype), "lokr_w2_a": up.to(dtype), "lokr_w2_b": down.to(dtype)}
    a, b, c = (tensor.double() for tensor in tensors.values())
    scale = 1.0 if alpha is None else alpha / RANK
    return tensors, lambda weight: scale * torch.kron(a, b @ c)


BLOCKS = r"^(double|single)_blocks\.|^(single_)?transformer_blocks\."
"""Modules inside the blocks, in the original or diffusers' naming."""
UP_DOWN = _low_rank("lora_up.weight", "lora_down.weight")
A_B = _low_rank("lora_B.weight", "lora_A.weight")


@dataclass(frozen=True)
class Format:
    """How a tool writes a LoRA.

    naming       "original", "native" (ComfyUI's, of HunyuanVideo) or "diffusers"
    key          what a module's key begins with; `{}` is its name, `{_}` its name with underscores for dots
    form         the tensors of one module
    alpha        "none", "tensor" (beside each module) or "metadata" (diffusers' adapter metadata, one for all)
    trained      finds the names, its own or the original ones, of what the tool trains by default, for the table in the docs
    differences  also write what is no matrix: .diff of norms and the patch embedding, .diff_b of biases, .diff_m of modulations
    """

    naming: str
    key: str
    form: Form
    alpha: str = "none"
    trained: str = BLOCKS
    differences: bool = False
    dtype: torch.dtype = torch.float32


_KOHYA_DEFAULT = r"(double|single)_blocks\.\d+\.(?!.*mod)"  # musubi leaves the modulations out
_ATTENTION = r"^(single_)?transformer_blocks\..*\.to_(q|k|v|out\.0)$"  # what diffusers' training scripts name
FORMATS: dict[str, Format] = {
    "diffusion-pipe": Format("original", "transformer.{}", A_B),
    "diffusion-pipe (old prefix)": Format("original", "diffusion_model.{}", A_B),
    "musubi / kohya": Format("original", "lora_unet_{_}", UP_DOWN, "tensor", _KOHYA_DEFAULT),
    "ComfyUI / KJ extraction": Format("native", "diffusion_model.{}", UP_DOWN, "none", ".", True),
    "KJ extraction, fp8": Format("native", "diffusion_model.{}", UP_DOWN, "none", ".", False, torch.float8_e4m3fn),
    "diffusers": Format("diffusers", "transformer.{}", A_B, "metadata", _ATTENTION),
    "PEFT": Format("diffusers", "base_model.model.{}", A_B, "none", _ATTENTION),
    "OneTrainer": Format("diffusers", "lora_transformer_{_}", UP_DOWN, "tensor"),
    "OneTrainer DoRA": Format("diffusers", "lora_transformer_{_}", _dora(rowwise=False), "tensor"),
    "Tencent I2V": Format("original", "Hunyuan_video_I2V_lora_{_}", UP_DOWN, "tensor"),
    "kohya DoRA": Format("original", "lora_unet_{_}", _dora(rowwise=True), "tensor", _KOHYA_DEFAULT),
    "kohya LoHa": Format("original", "lora_unet_{_}", _loha, "tensor", _KOHYA_DEFAULT),
    "kohya LoKr": Format("original", "lora_unet_{_}", _lokr, "tensor", _KOHYA_DEFAULT),
}
WAN_FORMATS: dict[str, Format] = {
    "diffusion-pipe": Format("original", "diffusion_model.{}", A_B, trained=r"blocks\."),
    "musubi / kohya": Format("original", "lora_unet_{_}", UP_DOWN, "tensor", r"blocks\."),
    "kohya, two underscores": Format("original", "lora_unet__{_}", UP_DOWN, "tensor", r"blocks\."),
    "ComfyUI / KJ extraction": Format("original", "diffusion_model.{}", UP_DOWN, "none", ".", True),
    "diffusers": Format("diffusers", "transformer.{}", A_B, "metadata", r"attn\d\.to_"),
}


def write(name: str, state: Mapping[str, Tensor], seed: int = 0, trained: str = ".") -> LoraFile:
    """A LoRA of `name`d format for the network `state` (original names), on every matrix whose name, there or in the
    original, `trained` finds."""
    row = (WAN_FORMATS if "head.head.weight" in state else FORMATS)[name]
    generator = torch.Generator().manual_seed(seed)
    file = LoraFile()
    alpha = None if row.alpha == "none" else ALPHA
    for module in modules(state, row.naming):
        if module.weight.ndim != 2 or not any(re.search(trained, name) for name in (module.name, module.original)):
            continue
        tensors, change = row.form(module, generator, row.dtype, alpha)
        stem = row.key.replace("{_}", module.name.replace(".", "_")).replace("{}", module.name)
        file.tensors |= {f"{stem}.{leaf}": tensor for leaf, tensor in tensors.items()}
        if row.alpha == "tensor":
            file.tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
        file._add(module, "weight", change)
    if row.alpha == "metadata":
        adapter = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.lora_bias": False}
        file.metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter, sort_keys=True)}
    if row.differences:
        _add_differences(file, row, state, generator)
    return file


def _add_differences(file: LoraFile, row: Format, state: Mapping[str, Tensor], generator: torch.Generator) -> None:
    """What an extraction keeps whole: every bias, every norm's weight, the patch embedding."""
    for module in modules(state, row.naming):
        for leaf, key in (("weight", "diff"), ("bias", "diff_b")):
            tensor = state.get(f"{module.original}.{leaf}")
            if tensor is None or (leaf == "weight" and tensor.ndim == 2):
                continue
            value = SIZE * 0.3 * torch.randn(tensor.shape, generator=generator) * (tensor.std() if tensor.ndim > 1 else 1)
            file.tensors[f"{row.key.replace('{}', module.name)}.{key}"] = value
            file._add(module, leaf, lambda weight, value=value: value.double())
    for name in (name for name in state if name.endswith("modulation")):  # Wan's, parameters of no layer
        value = 0.1 * torch.randn(state[name].shape, generator=generator)
        stem = name.removesuffix(".modulation")
        file.tensors[f"{row.key.replace('{}', stem)}.diff_m"] = value
        file._add(Module(stem, stem, 0, 1, False, state[name]), "modulation", lambda weight, value=value: value.double())


def modules(state: Mapping[str, Tensor], naming: str) -> Iterator[Module]:
    """Every module of the network that has a weight, as `naming` has it."""
    if "head.head.weight" in state:
        yield from _wan_modules(state, naming)
        return
    width = state["img_in.proj.weight"].shape[0]
    layout = {"original": ORIGINAL, "native": COMFYUI_NATIVE, "diffusers": HUNYUAN_DIFFUSERS}[naming]
    for name, weight in state.items():
        if not name.endswith(".weight"):
            continue
        names = [stored.rpartition(".")[0] for stored in layout.stored(name)]
        sizes = [width] * (len(names) - 1)
        start = 0
        for foreign, size in zip(names, [*sizes, len(weight) - sum(sizes)], strict=True):
            part = Module(foreign, name.removesuffix(".weight"), start, size, layout.is_swapped(name), weight)
            yield replace(part, weight=part.rows(weight))
            start += size


def from_native(native: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a ComfyUI network's state dict holds, under the original names of `state`."""
    if "head.head.weight" in state:
        return {name: native[name] for name in state}
    found = {f"{m.original}.{leaf}": m.name for m in modules(state, "native") for leaf in ("weight", "bias")}
    names = {name: f"{found[name]}.{name.rpartition('.')[2]}" for name in state}
    # Older ComfyUI calls a qk-norm's weight `scale`.
    return {name: native[n] if n in native else native[n.replace(".weight", ".scale")] for name, n in names.items()}


def _wan_modules(state: Mapping[str, Tensor], naming: str) -> Iterator[Module]:
    """Wan's released names, or diffusers' through its own conversion."""
    names = {name: name for name in state}
    if naming == "diffusers":
        from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

        # It renames a dict; the values tell which name became which.
        names = {old: new for new, old in convert_wan_transformer_to_diffusers({name: name for name in state}).items()}
    for name, weight in state.items():
        if name.endswith(".weight"):
            yield Module(names[name].removesuffix(".weight"), name.removesuffix(".weight"), 0, len(weight), False, weight)
