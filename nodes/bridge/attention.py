"""A MODEL's attention by a kernel of ours, through ComfyUI's override for a single model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import torch

from ...accvideo_core.dit.attention import AUTO, KERNELS, Call, check, usable, why_not
from ...accvideo_core.errors import KernelError

log = logging.getLogger("accvideo")


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


def override_of(model: comfy.model_patcher.ModelPatcher) -> Any:
    return model.model_options.get("transformer_options", {}).get("optimized_attention_override")


def attention_ran(model: comfy.model_patcher.ModelPatcher, again: bool = False) -> dict[str, int]:
    """{kernel: calls} since the model was loaded or last asked with `again`; for a model without a kernel of ours, the name of
    ComfyUI's function or of the override that another node set, and 0, for those count nothing."""
    override = override_of(model)
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
