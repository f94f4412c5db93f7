"""MODEL: made from weights through ComfyUI's own loader, so that it offloads, casts and takes patches like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import comfy.model_patcher
import comfy.model_sampling
import comfy.sd
import torch

from ...accvideo_core.checkpoint import FLOAT8
from ...accvideo_core.errors import CheckpointError, InvalidValueError
from .versions import HOLDS_QUANTISED, call


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
    model = call(
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


def text_width(network: torch.nn.Module) -> int | None:
    """Width of the text a HunyuanVideo (txt_in) or Wan (text_embedding) network reads; None for others."""
    for path in ("txt_in.input_embedder", "text_embedding.0"):
        try:
            return int(network.get_submodule(path).in_features)
        except AttributeError:
            continue
    return None


def tensor_shapes(model: comfy.model_patcher.ModelPatcher) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a MODEL's network, as this version of ComfyUI names its tensors."""
    network = model.model.diffusion_model
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name, tensor in network.named_parameters():  # the state_dict has quantised ones as they are packed
        shapes[name] = tuple(getattr(tensor, "tensor_shape", tensor.shape))  # ComfyUI-GGUF has the first
    return shapes
