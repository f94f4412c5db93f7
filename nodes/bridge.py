"""The only module that uses ComfyUI's internals; every difference between its versions is dealt with here.

A model becomes a native MODEL through ComfyUI's own loader, so it offloads, casts and takes patches like any other;
the tiny world's text encoder and VAE become a native CLIP and VAE; sampling runs through a native CFGGuider, so
cfg, hooks, noise masks, previews, progress and interrupts are ComfyUI's own and only the update rule is ours.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import logging
import math
import sys
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import comfy.cli_args
import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.taesd.taesd
import comfy.utils
import comfy.weight_adapter
import folder_paths
import latent_preview
import node_helpers
import torch
from comfy_api.latest import InputImpl, io
from tqdm.auto import tqdm

from ..accvideo_core.checkpoint import FLOAT8
from ..accvideo_core.checkpoint.fingerprint import fingerprint
from ..accvideo_core.checkpoint.layouts import COMFYUI_NATIVE
from ..accvideo_core.devices import synchronize
from ..accvideo_core.dit.attention import AUTO, KERNELS, Call, check, usable, why_not
from ..accvideo_core.errors import (
    AccVideoError,
    AccVideoWarning,
    CheckpointError,
    InvalidValueError,
    KernelError,
    LoraError,
)
from ..accvideo_core.progress import byte_progress
from ..accvideo_core.sampling import Observer, Step, euler_flow

log = logging.getLogger("accvideo")


# ---- ComfyUI's versions ---------------------------------------------------------------------------------------------


def _knows(function: Callable[..., Any], keyword: str) -> bool:
    return keyword in inspect.signature(function).parameters


DIFFERENCES = {
    "scales by module": hasattr(comfy.utils, "convert_old_quants"),
    "dynamic memory": hasattr(comfy.model_patcher, "CoreModelPatcher"),
    "loading without dynamic memory": _knows(comfy.sd.load_diffusion_model_state_dict, "disable_dynamic"),
    "latents that tell their reduction": _knows(comfy.sample.fix_empty_latent_channels, "downscale_ratio_spacial"),
    "nested latents": find_spec("comfy.nested_tensor") is not None,
}
"""What ComfyUI has or has not, by version. What the pack does in each case is told in docs/compatibility.md, row by row."""

HOLDS_QUANTISED = DIFFERENCES["scales by module"]


def _call(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """Call one of ComfyUI's functions with those keywords that this version of it knows: its signatures grow."""
    known = inspect.signature(function).parameters
    return function(*args, **{name: value for name, value in keywords.items() if name in known})


def advanced(given: io.Input) -> io.Input:
    """The input, tucked away on its node until somebody asks for advanced ones. ComfyUI 0.3.64 has no argument for it, but hands
    on what else an input says."""
    given.extra_dict = {**given.extra_dict, "advanced": True}
    return given


# ---- files -----------------------------------------------------------------------------------------------------------


def diffusion_model_files() -> list[str]:
    """Names of the weight files in ComfyUI's `diffusion_models` folders: those it lists, and GGUF files and indices of shards."""
    names = folder_paths.get_filename_list("diffusion_models")
    for folder in map(Path, folder_paths.get_folder_paths("diffusion_models")):
        for pattern in ("*.gguf", "*.safetensors.index.json", "*.bin.index.json"):
            names = [*names, *(str(path.relative_to(folder)) for path in sorted(folder.rglob(pattern)))]
    return list(dict.fromkeys(names))


def diffusion_model_path(name: str) -> Path:
    """Where a file of `diffusion_model_files()` lies; CheckpointError when there is none of that name."""
    return _listed_path("diffusion_models", name, CheckpointError)


def _listed_path(kind: str, name: str, error: type[AccVideoError]) -> Path:
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(kind))
        raise error(f"no file {name!r} in ComfyUI's {kind} folders; put it into one of {folders} and refresh")
    return Path(path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A weight file as ComfyUI's own loaders read it: memory-mapped where it can, so that weights are not held twice."""
    return comfy.utils.load_torch_file(str(path), safe_load=True)


# ---- MODEL ----------------------------------------------------------------------------------------------------------


class Weights(Protocol):
    """What a MODEL is made from. It is kept by the MODEL, because newer ComfyUI loads a model again from its source when it
    needs a second, plain copy (weight hooks, several GPUs)."""

    source: str

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor in original naming, real."""

    def outline(self) -> dict[str, torch.Tensor] | None:
        """The same names, shapes and dtypes without memory (what is small may be real), or None: give `state` instead."""

    def fill(self, give: Callable[[str, torch.Tensor], None]) -> None:
        """Call `give(name, tensor)` for every tensor of the outline, one after the other."""


def load_model(
    weights: Weights, dtype: torch.dtype | None = None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """A native MODEL from weights in original naming (Tencent's, or Wan's own).

    ComfyUI copies the tensors it is given into a network of its own, unless it manages memory dynamically. So it is given an
    outline, and the network it makes is filled tensor by tensor: the peak is the network and one tensor.
    dtype  storage dtype of the weights; None leaves the choice to ComfyUI
    Raises CheckpointError when this ComfyUI does not recognise the model.
    """
    plain = comfy.model_patcher.ModelPatcher
    dynamic = not disable_dynamic and getattr(comfy.model_patcher, "CoreModelPatcher", plain) is not plain
    outline = None if dynamic else weights.outline()
    model = _call(
        comfy.sd.load_diffusion_model_state_dict,
        sd=weights.state() if outline is None else outline,
        model_options={} if dtype is None else {"dtype": dtype},
        disable_dynamic=disable_dynamic,
    )
    if model is None:
        raise CheckpointError(
            f"ComfyUI does not recognise the model in {weights.source}; update ComfyUI, or check the file with `accvideo inspect`"
        )
    if outline is not None:
        _fill(model.model, weights)
    model.cached_patcher_init = (load_model, (weights, dtype))
    return model


@torch.no_grad()
def _fill(model: Any, weights: Weights) -> None:
    """Give the weights to the network of a BaseModel. ComfyUI's own renaming says where each original name lies in it."""
    network = model.diffusion_model
    scaled = not HOLDS_QUANTISED and getattr(model.model_config, "scaled_fp8", None) is not None

    def give(name: str, tensor: torch.Tensor) -> None:
        (native,) = model.model_config.process_unet_state_dict({name: name})
        path, _, leaf = native.rpartition(".")
        module = network.get_submodule(path)
        parameter = getattr(module, leaf)
        if parameter.dtype in FLOAT8 and tensor.dtype not in FLOAT8 and scaled:
            # With scaled fp8, 0.3.64 makes every Linear's weight and bias fp8; what the file keeps finer stays finer.
            setattr(module, leaf, torch.nn.Parameter(tensor.to(parameter.device), requires_grad=False))
        else:
            parameter.copy_(tensor)

    weights.fill(give)


def progress_bar(total: int) -> Callable[[int], None]:
    """Shows `done` of `total` on the running node; raises where the user has cancelled."""
    bar = comfy.utils.ProgressBar(total)
    return lambda done: bar.update_absolute(done, total)


def with_shift(model: comfy.model_patcher.ModelPatcher, shift: float) -> comfy.model_patcher.ModelPatcher:
    """A clone of a flow MODEL whose own schedule uses this shift; InvalidValueError for a model that is not one."""
    original = model.get_model_object("model_sampling")
    if not isinstance(original, comfy.model_sampling.ModelSamplingDiscreteFlow):
        raise InvalidValueError(
            f"a {model_kind(model)} model is not sampled along a shifted flow; connect a HunyuanVideo or Wan model"
        )
    sampling = copy.deepcopy(original)
    sampling.set_parameters(shift=shift, multiplier=original.multiplier)
    clone = model.clone()
    clone.add_object_patch("model_sampling", sampling)
    return clone


def model_kind(model: comfy.model_patcher.ModelPatcher) -> str:
    """ComfyUI's name of the architecture: HunyuanVideo, WAN21, ..."""
    return type(model.model).__name__


def note(model: comfy.model_patcher.ModelPatcher, about: Any) -> comfy.model_patcher.ModelPatcher:
    """The MODEL itself, with what our nodes know of it; its clones keep it."""
    model.set_attachments("accvideo", about)
    return model


def noted(model: comfy.model_patcher.ModelPatcher) -> Any:
    """What `note` wrote on this MODEL or on one it was cloned from; None if nobody did."""
    return model.get_attachment("accvideo")


def _text_width(network: torch.nn.Module) -> int | None:
    """Width of the text a HunyuanVideo (txt_in) or Wan (text_embedding) network reads; None for others."""
    for path in ("txt_in.input_embedder", "text_embedding.0"):
        try:
            return int(network.get_submodule(path).in_features)
        except AttributeError:
            continue
    return None


# ---- attention ------------------------------------------------------------------------------------------------------

_OWN = "ComfyUI's own"
# What a caller may say beside q, k, v and heads, and we either heed or need not.
_HEEDED = {"transformer_options", "_inside_attn_wrapper", "scale", "enable_gqa", "low_precision_attention"}


def with_attention(model: comfy.model_patcher.ModelPatcher, kernel: str) -> comfy.model_patcher.ModelPatcher:
    """A clone whose network attends by this kernel wherever the kernel takes the call, and by ComfyUI's own, with the reason in
    the log, where it does not; `auto` is the model itself, with ComfyUI's choice.

    Raises InvalidValueError for a kernel that cannot run on ComfyUI's device in the model's dtype, KernelError for a broken one.
    """
    if kernel == AUTO:
        return model
    check(kernel, comfy.model_management.get_torch_device(), _computes_in(model), 128)
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = _attention_override(kernel)
    return clone


def _attention_override(name: str) -> Callable[..., torch.Tensor]:
    """What ComfyUI calls in the place of its attention, with that as the first argument. A plain function, because versions that
    copy a model's options deeply leave those as they are; `ran` counts the calls by what they ran on."""
    kernel, told = KERNELS[name], set[str]()
    ran: Counter[str] = Counter()

    def attend(
        own: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **keywords: Any,
    ) -> torch.Tensor:
        """q, k, v (B, h, N, d) with skip_reshape, else (B, N, h*d), the tokens in any order; gives (B, h, N, d) with
        skip_output_reshape, else (B, N, h*d)."""

        def fall_back(what: str, reason: str) -> torch.Tensor:
            if what not in told:
                told.add(what)
                log.info("AccVideo: attention by %s instead of %s where %s", _OWN, name, reason)
            ran[_OWN] += 1
            shapes = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
            return own(q, k, v, heads, mask=mask, attn_precision=attn_precision, **shapes, **keywords)

        if unknown := [key for key, value in keywords.items() if key not in _HEEDED and value is not None]:
            return fall_back(unknown[0], f"it is told {unknown[0]}, which AccVideo does not know")
        if kernel.lossy and keywords.get("low_precision_attention") is False:
            return fall_back("precision", "full precision is asked for")
        if attn_precision not in (None, q.dtype):
            return fall_back("attn_precision", f"{attn_precision} is asked for and q is {q.dtype}")
        parts = [q, k, v] if skip_reshape else [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
        if {(*x.shape[:2], x.shape[-1], x.dtype, x.device) for x in parts} != {
            (q.shape[0], heads, parts[0].shape[-1], q.dtype, q.device)
        }:
            return fall_back("shapes", f"q, k and v differ: {', '.join(f'{tuple(x.shape)} {x.dtype}' for x in parts)}")
        wide = mask
        if wide is not None:
            wide = wide[None] if wide.ndim == 2 else wide
            wide = wide[:, None] if wide.ndim == 3 else wide
            if wide.dtype not in (torch.bool, q.dtype):
                return fall_back("mask", f"its mask is {wide.dtype}")
        tokens, head_dim = parts[0].shape[2:]
        call = Call(
            device=q.device,
            dtype=q.dtype,
            head_dim=head_dim,
            queries=tokens,
            keys=parts[1].shape[2],
            elements=max(q.numel(), k.numel()),
            masked=wide is not None,
            gradients=torch.is_grad_enabled() and any(x.requires_grad for x in parts),
        )
        if (reason := why_not(kernel, call)) is not None:
            if reason.what == "self-test":
                raise KernelError(reason.sentence)
            return fall_back(reason.what, reason.sentence)
        ran[name] += 1
        out = kernel.run(*parts, keywords.get("scale"), wide, None)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    attend.ran = ran  # type: ignore[attr-defined]
    attend.kernel = kernel  # type: ignore[attr-defined]
    return attend


def _computes_in(model: comfy.model_patcher.ModelPatcher) -> torch.dtype:
    """The dtype of a MODEL's activations, whatever its weights are kept in."""
    return model.model.manual_cast_dtype or model.model.get_dtype()


def _override_of(model: comfy.model_patcher.ModelPatcher) -> Any:
    return model.model_options.get("transformer_options", {}).get("optimized_attention_override")


def attention_ran(model: comfy.model_patcher.ModelPatcher, again: bool = False) -> dict[str, int]:
    """{kernel: calls} since the model was loaded or last asked with `again`; for a model without a kernel of ours, the name of
    ComfyUI's function or of the override that another node set, and 0, for those count nothing."""
    override = _override_of(model)
    if override is None:
        return {comfy.ldm.modules.attention.optimized_attention.__name__: 0}
    ran = getattr(override, "ran", None)
    if not isinstance(ran, Counter):
        return {getattr(override, "__qualname__", type(override).__name__): 0}
    counts = dict(ran)
    if again:
        ran.clear()
    return counts


def attention_here(model: comfy.model_patcher.ModelPatcher, kernel: str) -> str:
    """Which kernel a model is to use, and which could be chosen on ComfyUI's device in the model's dtype, in lines."""
    kernels = usable(comfy.model_management.get_torch_device(), _computes_in(model))
    chosen = f"{kernel} ({kernels[kernel]})" if kernel != AUTO else f"{_OWN} ({', '.join(attention_ran(model))})"
    lines = [f"attention: {chosen}"]
    lines += [f"{'' if name != kernel else '> '}{name}: {told}" for name, told in kernels.items()]
    return "\n".join(lines)


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def lora_files() -> list[str]:
    """Names, as ComfyUI lists them, of the files in its `loras` folders."""
    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> Path:
    """Where a file of `lora_files()` lies; LoraError when there is none of that name."""
    return _listed_path("loras", name, LoraError)


def model_output(kind: str, name: str) -> tuple[Path, str]:
    """(file to write, its name in ComfyUI's list) for a `name` a user chose, in ComfyUI's folder of that kind (loras, ...).

    The ending .safetensors is added. Raises InvalidValueError for a name that leads out of the folder or is none.
    """
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(kind)]
    folder = next((folder for folder in folders if folder.name == kind), folders[0])
    path = _inside(folder, name)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    return path, str(path.relative_to(folder))


def _inside(folder: Path, name: str) -> Path:
    """A file or folder of that name in a folder; InvalidValueError for a name that leads out of it or is none."""
    parts = [part.strip() for part in name.replace("\\", "/").split("/")]
    path = folder.joinpath(*parts)
    if any(part in ("", ".", "..") or set(part) & set(':*?"<>|\0') for part in parts):
        raise InvalidValueError(f"{name!r} is no name for a file in {folder}; write one like my_file or subfolder/my_file")
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise InvalidValueError(f"{name!r} leads out of {folder}; write a name inside it")
    return path


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (bytes done, bytes in all) that moves the node's bar and the console's, and raises ComfyUI's own
    exception when the user has pressed cancel."""
    bar = comfy.utils.ProgressBar(1)
    with byte_progress(what, leave=True) as console:

        def report(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)
            console(done, total)

        yield report


def tensor_shapes(model: comfy.model_patcher.ModelPatcher) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a MODEL's network, as this version of ComfyUI names its tensors."""
    network = model.model.diffusion_model
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name, tensor in network.named_parameters():
        if hasattr(tensor, "tensor_shape"):  # ComfyUI-GGUF's: its state_dict has the shape of the quantised blocks
            shapes[name] = tuple(tensor.tensor_shape)
    return shapes


class _ComputedDifference(comfy.weight_adapter.WeightAdapterBase):
    """A patch whose difference is computed by `accvideo_core.lora` from the weight it meets: LoHa, LoKr, DoRA.

    ComfyUI's own adapters know these forms, but not all of their spellings, and take another norm for DoRA.
    """

    name = "accvideo"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        # (function, tensors): ComfyUI copies an adapter by these two arguments, moving the tensors it finds in `weights`.
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[torch.Tensor], torch.Tensor],
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        compute, tensors = self.weights
        weight += function((strength * compute(weight, tensors)).to(weight.device, weight.dtype))
        return weight


def low_rank_patch(up: torch.Tensor, down: torch.Tensor, scale: float) -> Any:
    """ComfyUI's own patch for weight + strength * scale * up @ down; up (out, rank), down (rank, in)."""
    return comfy.weight_adapter.LoRAAdapter(set(), (up, down, scale * len(down), None, None, None))


def difference_patch(value: torch.Tensor) -> Any:
    """ComfyUI's own patch for weight + strength * value."""
    return ("diff", (value,))


def computed_patch(compute: Callable[[torch.Tensor, tuple], torch.Tensor], tensors: tuple[torch.Tensor, ...]) -> Any:
    """A patch for weight + strength * compute(weight, tensors)."""
    return _ComputedDifference(set(), (compute, tensors))


Patch = tuple[str, tuple[int, int] | None, Any, float]
"""(name as in `tensor_shapes`, (start, length) of its rows or None for all, patch, strength)."""


def with_patches(model: comfy.model_patcher.ModelPatcher, patches: Iterable[Patch]) -> comfy.model_patcher.ModelPatcher:
    """A clone of a MODEL with patches on its weights, in their order; ComfyUI applies, offloads and removes them.

    Raises InvalidValueError for a name that the network does not have, which ComfyUI would pass over.
    """
    clone = model.clone()
    passed_over = _parameters_beside_modules(model.model.diffusion_model)
    rounds: list[tuple[float, dict[Any, Any]]] = []  # ComfyUI takes a strength and a dict, so a key only once at a time
    for name, rows, patch, strength in patches:
        key = f"diffusion_model.{name}"
        if name in passed_over:
            _replace_parameter(clone, key, (strength, patch, 1.0, None if rows is None else (0, *rows), None))
            continue
        place = key if rows is None else (key, (0, *rows))
        if not rounds or rounds[-1][0] != strength or place in rounds[-1][1]:
            rounds.append((strength, {}))
        rounds[-1][1][place] = patch
    for strength, places in rounds:
        if missing := set(places) - set(clone.add_patches(places, strength)):
            raise InvalidValueError(
                f"this model has no {', '.join(sorted(map(str, missing)))[:300]}; connect the model they are of"
            )
    return clone


def _parameters_beside_modules(network: torch.nn.Module) -> set[str]:
    """Parameters of modules that have modules with parameters inside (Wan's modulations): ComfyUI patches no such weight."""
    found = set()
    for name, module in network.named_modules():
        own = [f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
        if own and len(own) < sum(1 for _ in module.parameters()):
            found.update(own)
    return found


def _replace_parameter(clone: comfy.model_patcher.ModelPatcher, key: str, patch: tuple[Any, ...]) -> None:
    """Put the patched value in place of a parameter for as long as this MODEL is loaded: an object patch."""
    old = clone.get_model_object(key)
    with torch.inference_mode(False):
        value = comfy.lora.calculate_weight([patch], old.detach().to(torch.float32, copy=True), key).to(old.dtype)
        clone.add_object_patch(key, torch.nn.Parameter(value, requires_grad=False))


# ---- CLIP and VAE of the tiny world ---------------------------------------------------------------------------------


class _Tokenizer:
    """What comfy.sd.CLIP asks of a tokenizer, on top of `TinyTextEncoder.tokenize`."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        self.tokenize = (tokenizer_data or {})["accvideo_tokenize"]

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, list]:
        """One row of (token, weight) or, with return_word_ids, (token, weight, word). The encoder knows no emphasis."""
        parts = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
        if any(weight != 1.0 for _, weight in parts):
            log.warning("AccVideo: the tiny text encoder has no emphasis; the weights in %r are ignored", text)
        plain = comfy.sd1_clip.unescape_important("".join(part for part, _ in parts))
        with warnings.catch_warnings(record=True) as caught:  # Python shows a warning once; a user should see it each time
            warnings.simplefilter("always", AccVideoWarning)
            ids = self.tokenize(plain)
        for warning in caught:
            log.warning("AccVideo: %s", warning.message)
        return {"accvideo": [[(token, 1.0, word) if return_word_ids else (token, 1.0) for word, token in enumerate(ids)]]}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}


class _TextEncoder(torch.nn.Module):
    """What comfy.sd.CLIP asks of a text model, around a TinyTextEncoder. Always float32: it is small and exact."""

    disable_offload = True  # plain weights, not ComfyUI's casting layers: load whole

    def __init__(self, encoder: torch.nn.Module, dtype: Any = None, device: Any = None, model_options: Any = None) -> None:
        super().__init__()
        self.encoder = encoder.float().to(device)
        self.dtypes = {torch.float32}

    def reset_clip_options(self) -> None:
        pass

    def set_clip_options(self, options: dict[str, Any]) -> None:
        if options.get("layer") is not None:
            log.warning("AccVideo: the tiny text encoder has one layer; 'CLIP Set Last Layer' is ignored")

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, L, D) text and (1, P) pooled of one prompt."""
        device = next(self.parameters()).device
        ids = torch.tensor([[token[0] for token in row] for row in tokens["accvideo"]], dtype=torch.long, device=device)
        text, pooled = self.encoder(ids, None)
        target = comfy.model_management.intermediate_device()
        return text.to(target), pooled.to(target)

    def load_sd(self, state: dict[str, torch.Tensor]) -> Any:
        return self.load_state_dict(state, strict=False)


def native_clip(encoder: torch.nn.Module) -> comfy.sd.CLIP:
    """A native CLIP around a TinyTextEncoder (`tokenize(prompt)`, `forward(ids, mask) -> text, pooled`)."""
    target = comfy.supported_models_base.ClipTarget(_Tokenizer, _TextEncoder)
    target.params = {"encoder": encoder}
    return comfy.sd.CLIP(target, tokenizer_data={"accvideo_tokenize": encoder.tokenize})


def native_vae(module: torch.nn.Module) -> comfy.sd.VAE:
    """A native VAE around a video autoencoder of HunyuanVideo's geometry: 16 channels, 4 x 8 x 8, causal in time.

    comfy.sd.VAE builds itself from a state dict it knows; it gets that of a small image autoencoder, which sets every
    attribute this version has, and then everything that describes the model is replaced.
    """
    vae = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=16).state_dict())
    vae.latent_channels, vae.latent_dim, vae.output_channels = 16, 3, 3
    vae.upscale_ratio = (lambda frames: max(0, frames * 4 - 3), 8, 8)
    vae.downscale_ratio = (lambda frames: max(0, math.floor((frames + 3) / 4)), 8, 8)
    vae.upscale_index_formula = vae.downscale_index_formula = (4, 8, 8)
    vae.process_input = lambda image: image * 2.0 - 1.0
    # In place and returned: older versions use the result, newer ones only the tensor they passed.
    vae.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
    vae.working_dtypes, vae.vae_dtype = [torch.float32], torch.float32
    vae.disable_offload = True  # plain weights, not ComfyUI's casting layers: load whole
    # Peak of a convolution with 64 channels at full resolution, input and output alive, in float32.
    vae.memory_used_decode = lambda shape, dtype: 2 * 64 * 256 * math.prod(_video_latent(shape)[2:]) * 4
    vae.memory_used_encode = lambda shape, dtype: 2 * 64 * math.prod(shape[2:]) * 4
    vae.first_stage_model = module.float().eval()
    vae.patcher = comfy.model_patcher.ModelPatcher(module, load_device=vae.device, offload_device=vae.patcher.offload_device)
    vae.size = None
    return vae


def _video_latent(shape: Sequence[int]) -> Sequence[int]:
    """The shape of what a VAE is to decode; InvalidValueError for what is no latent of HunyuanVideo's. ComfyUI asks for the
    memory first."""
    if len(shape) != 5 or shape[1] != 16:
        raise InvalidValueError(
            f"the latent has shape {tuple(shape)}, but this VAE decodes (batch, 16, frames, height, width); connect the VAE that "
            "belongs to the latent's model"
        )
    return shape


def set_preview_colours(model: comfy.model_patcher.ModelPatcher, factors: torch.Tensor, bias: torch.Tensor) -> None:
    """Let ComfyUI preview this MODEL's latents with its own linear map: factors (16, 3), bias (3,), giving RGB in [-1, 1]."""
    # The latent format is an object of this model alone; a decoder for real HunyuanVideo latents would show noise here.
    latent_format = model.model.latent_format
    latent_format.latent_rgb_factors = factors.tolist()
    latent_format.latent_rgb_factors_bias = bias.tolist()
    latent_format.taesd_decoder_name = None


# ---- sampling -------------------------------------------------------------------------------------------------------


def _sample_euler_flow(
    model: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    observers: tuple[Observer, ...] = (),
) -> torch.Tensor:
    """`euler_flow` as a ComfyUI sampler function. The callback drives progress and preview, and raises on an interrupt."""
    extra_args = extra_args or {}

    def velocity(latent: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        denoised = model(latent, sigma, **extra_args)
        return (latent - denoised) / sigma.view(-1, *[1] * (latent.ndim - 1))

    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

        def report(step: Step) -> None:
            if callback is not None:
                callback(
                    {"i": step.index, "x": step.latent, "denoised": step.denoised, "sigma": step.sigma, "sigma_hat": step.sigma}
                )
            bar.update()

        return euler_flow(velocity, x, sigmas, observers=[*observers, report])


class _Timed(comfy.samplers.Sampler):
    """A SAMPLER that knows how many seconds its last run took, without the loading before it."""

    def __init__(self, sampler: comfy.samplers.Sampler) -> None:
        self.sampler, self.seconds = sampler, 0.0

    def sample(self, *args: Any, **keywords: Any) -> torch.Tensor:
        begin = time.perf_counter()
        result = self.sampler.sample(*args, **keywords)
        synchronize(result.device)
        self.seconds = time.perf_counter() - begin
        return result


def solver(name: str, *observers: Observer) -> comfy.samplers.Sampler:
    """The native SAMPLER for a preset's solver; Euler steps are shown to observers. Wan's authors run a UniPC; ComfyUI's own
    ("bh2") is near it, not equal."""
    if name == "euler":
        return comfy.samplers.KSAMPLER(_sample_euler_flow, extra_options={"observers": observers})
    if name == "uni_pc" and not observers:
        return comfy.samplers.sampler_object("uni_pc_bh2")
    raise InvalidValueError(f"unknown solver {name!r}; known: euler, uni_pc, and to observers euler alone")


def with_guidance(conditioning: list, guidance: float) -> list:
    """The conditioning with its embedded guidance set (as the native FluxGuidance node does), in plain scale."""
    return node_helpers.conditioning_set_values(conditioning, {"guidance": guidance})


def check_conditioning(model: comfy.model_patcher.ModelPatcher, conditioning: list, name: str) -> None:
    """InvalidValueError for text of another encoder, which would fail deep in the network with a matrix shape."""
    width = _text_width(model.model.diffusion_model)
    for text, _ in conditioning:
        if width is not None and text.shape[-1] != width:
            raise InvalidValueError(
                f"the {name} conditioning is {text.shape[-1]} wide but this model reads text of width {width}; "
                "encode the prompt with the CLIP that belongs to the model"
            )


def prepare_latent(model: comfy.model_patcher.ModelPatcher, latent: dict[str, Any]) -> torch.Tensor:
    """The samples of a LATENT as this model takes them, (B, C, T, H, W); InvalidValueError when it cannot take them."""
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        raise InvalidValueError("the latent holds several streams (video with audio); connect a plain video latent")
    samples = _call(
        comfy.sample.fix_empty_latent_channels,
        model,
        samples,
        downscale_ratio_spacial=latent.get("downscale_ratio_spacial"),
        downscale_ratio_temporal=latent.get("downscale_ratio_temporal"),
    )
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 5 or samples.shape[1] != channels:
        raise InvalidValueError(
            f"the latent has shape {tuple(samples.shape)} but this model reads (batch, {channels}, frames, height, width); "
            "make it with EmptyHunyuanLatentVideo or this model's VAE"
        )
    patch = tuple(getattr(model.model.diffusion_model, "patch_size", (1, 2, 2)))[-2:]
    for name, size, step in zip(("height", "width"), samples.shape[3:], patch, strict=True):
        if size % step:
            below = (size - size % step) * 8
            raise InvalidValueError(
                f"the latent's {name} is {size} ({size * 8} pixels), which this model cannot cut into patches of {step}; "
                f"use a {name} that is a multiple of {8 * step} pixels, {below} or {below + 8 * step}"
            )
    return samples


def sample(
    model: comfy.model_patcher.ModelPatcher,
    positive: list,
    negative: list | None,
    cfg: float,
    latent: dict[str, Any],
    samples: torch.Tensor,
    seed: int,
    sigmas: torch.Tensor,
    sampler: comfy.samplers.Sampler,
    noise: torch.Tensor | None = None,
) -> tuple[dict[str, Any], float]:
    """A new LATENT: `samples` (from `prepare_latent`) noised to sigmas[0] and sampled to sigmas[-1]; and the seconds it took,
    without loading the model.

    Noise (unless it is given), batch_index and noise_mask are handled as by the native KSampler; without a negative the
    guider knows only the positive, as the native BasicGuider.
    """
    result = {name: value for name, value in latent.items() if not name.startswith("downscale_ratio_")}
    if len(sigmas) < 2:
        return result | {"samples": samples}, 0.0
    sampler = _Timed(sampler)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive} if negative is None else {"positive": positive, "negative": negative})
    guider.set_cfg(cfg)
    try:
        sampled = guider.sample(
            comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")) if noise is None else noise,
            samples,
            sampler,
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
    except torch.cuda.OutOfMemoryError as error:  # still of that type: ComfyUI then gives all memory back
        shape = "x".join(map(str, samples.shape))
        raise torch.cuda.OutOfMemoryError(
            f"out of memory while sampling a latent of {shape}; make the video shorter or smaller, or take the weights as fp8 or "
            "GGUF (docs/workflows.md says what fits which card)."
        ) from error
    return result | {"samples": sampled.to(comfy.model_management.intermediate_device())}, sampler.seconds


# ---- videos ---------------------------------------------------------------------------------------------------------


def preview_file(suffix: str) -> tuple[Path, dict[str, str]]:
    """A new file in ComfyUI's temporary folder, and how its front end and HTTP clients are told of it."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    name = f"accvideo_{uuid.uuid4().hex[:16]}{suffix}"
    return folder / name, {"filename": name, "subfolder": "", "type": "temp"}


def workflow_metadata(node: type[Any]) -> dict[str, str]:
    """What a file carries so that it can be dragged back into ComfyUI, for a node whose schema asks for both hidden values."""
    if comfy.cli_args.args.disable_metadata:
        return {}
    extra = {"prompt": node.hidden.prompt, **(node.hidden.extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in extra.items() if value is not None}


def native_video(path: Path) -> Any:
    """A video file as a native VIDEO."""
    return InputImpl.VideoFromFile(str(path))


# ---- SynVid ---------------------------------------------------------------------------------------------------------


def input_files(suffixes: Iterable[str]) -> list[str]:
    """Names of the files in ComfyUI's input folder that end so, as its lists show them."""
    folder = Path(folder_paths.get_input_directory())
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def input_path(name: str) -> Path:
    """Where a file of `input_files` lies; InvalidValueError when there is none of that name."""
    folder = Path(folder_paths.get_input_directory())
    path = _inside(folder, name)
    if not path.is_file():
        raise InvalidValueError(f"no file {name!r} in ComfyUI's input folder; put it into {folder} and refresh")
    return path


def synvid_path(name: str) -> Path:
    """The folder of a dataset or plan: a name in ComfyUI's output folder, `synvid/` there, or in a folder that
    extra_model_paths.yaml lists under `synvid`, which goes before. A whole path may be given if it is inside one of them.

    Raises InvalidValueError for a name that leads out of them or is none.
    """
    folders = [Path(folder) for folder in folder_paths.folder_names_and_paths.get("synvid", ([],))[0]]
    folders.append(Path(folder_paths.get_output_directory(), "synvid"))
    if Path(name).is_absolute():
        home = next((folder for folder in folders if Path(name).is_relative_to(folder)), None)
        if home is None:
            raise InvalidValueError(f"{name!r} is in none of {', '.join(map(str, folders))}; write a name inside the first")
        return _inside(home, str(Path(name).relative_to(home)))
    paths = [_inside(folder, name) for folder in folders]
    return next((path for path in paths if path.is_dir()), paths[0])


def add_route(path: str, answer: Callable[[dict[str, Any]], Awaitable[Any]]) -> None:
    """Let ComfyUI's server answer POST requests there: `answer` is given the request's JSON object and returns what is sent as
    JSON; an AccVideoError becomes status 400 with its sentence. Without a running server there is nothing to add it to."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web

    async def handle(request: web.Request) -> web.Response:
        try:
            body = await request.json()
            return web.json_response(await answer(body if isinstance(body, dict) else {}))
        except (AccVideoError, ValueError, TypeError, KeyError) as error:
            return web.json_response({"error": str(error)}, status=400)

    server.routes.post(path)(handle)


def teacher_fingerprint(model: comfy.model_patcher.ModelPatcher) -> str:
    """`checkpoint.fingerprint` of a MODEL's weights, the same as of the file it was loaded from, in the same dtype. One with
    patches (LoRA, ...) has another, which hangs on them too."""
    if found := [name for name in ("model_function_wrapper", "sampler_cfg_function") if name in model.model_options]:
        log.warning("AccVideo: the model has a %s, which its fingerprint does not see", " and a ".join(found))
    if (kernel := getattr(_override_of(model), "kernel", None)) is not None and kernel.lossy:
        log.warning("AccVideo: the model attends by %s (%s), which its fingerprint does not see", kernel.name, kernel.quality)
    return fingerprint(_teacher_tensors(model))


def _teacher_tensors(model: comfy.model_patcher.ModelPatcher) -> Iterator[tuple[str, torch.Tensor]]:
    is_hunyuan = model_kind(model).startswith("HunyuanVideo")
    scales = {}
    tensors = dict(model.model.diffusion_model.named_parameters())
    for name in [name for name in tensors if name.endswith((".scale_weight", ".scale_input"))]:  # 0.3.64's scaled fp8
        scales[name.replace("scale_weight", "weight")] = tensors.pop(name)
    for name, tensor in tensors.items():
        key = f"diffusion_model.{name}"
        tensor = model.backup[key].weight if key in model.backup else model.object_patches_backup.get(key, tensor)
        if name in scales:
            tensor = tensor.to(scales[name].dtype) * scales[name].to(tensor.device)
        elif hasattr(tensor, "_qdata"):
            tensor = tensor.dequantize()
        elif hasattr(tensor, "tensor_shape"):  # ComfyUI-GGUF's: the bytes of its blocks, for want of their values
            tensor = tensor.as_subclass(torch.Tensor)
        yield (COMFYUI_NATIVE.original(name) or name) if is_hunyuan else name, tensor
    for key, patches in model.patches.items():
        for i, (strength, patch, kept, rows, _) in enumerate(patches):
            for j, tensor in enumerate(_tensors_in(getattr(patch, "weights", patch))):
                yield f"{key} patch {i}.{j} {strength:g} {kept:g} {rows}", tensor
    for key, value in model.object_patches.items():
        if isinstance(value, torch.Tensor):
            yield f"{key} replaced", value


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors_in(part)


_PLAIN = {"pooled_output", "guidance", "attention_mask"}


def encode_prompt(clip: comfy.sd.CLIP, prompt: str) -> list:
    """CONDITIONING of a prompt, as the native CLIPTextEncode makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def plain_text(conditioning: list, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(text (1, L, D) at its valid length, pooled (1, P) or None) of a CONDITIONING, on the CPU.

    Raises InvalidValueError for one that is more than a prompt: several texts, areas, pictures, hooks, time ranges.
    """
    if len(conditioning) != 1 or conditioning[0][0].shape[0] != 1:
        raise InvalidValueError(
            f"the {name} conditioning has {len(conditioning)} parts; a trajectory has one prompt, so connect a CLIP Text Encode"
        )
    text, extra = conditioning[0]
    if beside := sorted(key for key, value in extra.items() if key not in _PLAIN and value is not None):
        raise InvalidValueError(
            f"the {name} conditioning carries {', '.join(beside)}, which a SynVid dataset does not hold; connect plain text"
        )
    if (mask := extra.get("attention_mask")) is not None:
        valid = mask.reshape(-1).bool()
        if not valid[: int(valid.sum())].all():
            raise InvalidValueError(f"the {name} conditioning has padding between its words; connect a CLIP Text Encode")
        text = text[:, : int(valid.sum())]
    pooled = extra.get("pooled_output")
    return text.detach().cpu().clone(), None if pooled is None else pooled.detach().cpu().clone()


_LATENT_FORMATS = {"wan": comfy.latent_formats.Wan21}  # by the family's first word; all others are HunyuanVideo's


def decode_latent(vae: comfy.sd.VAE, latent: torch.Tensor, family: str) -> torch.Tensor:
    """Frames (T', H', W', 3) in [0, 1] of one model-space latent (C, T, H, W) by a native VAE; InvalidValueError if it is
    another model's."""
    if vae.latent_channels != latent.shape[0]:
        raise InvalidValueError(
            f"the VAE has latents of {vae.latent_channels} channels, the dataset's have {latent.shape[0]}; connect the VAE of "
            f"the {family} model"
        )
    formats = _LATENT_FORMATS.get(family.split("-")[0], comfy.latent_formats.HunyuanVideo)
    frames = vae.decode(formats().process_out(latent[None].float()))
    return frames.reshape(-1, *frames.shape[-3:])
