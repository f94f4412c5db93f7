"""Runs inside a ComfyUI checkout, under its own Python: the loader's attention kernels through ComfyUI's per-model override.

`python attention_worker.py CHECKOUT FOLDER` writes FOLDER/told.json; test_attention.py reads it. The kernels are stood in for by
ones that compute what SDPA does and keep what they were given.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from worker import enter, pack


def main() -> None:
    folder = enter()
    import comfy.ldm.modules.attention as native
    import comfy.model_management
    import torch

    pack()
    from accvideo_pack.accvideo_core import tiny
    from accvideo_pack.accvideo_core.dit.attention import KERNELS, choice
    from accvideo_pack.accvideo_core.errors import AccVideoError
    from accvideo_pack.nodes import bridge, loaders

    given: list[tuple[list[int], bool]] = []

    def recording(q: Any, k: Any, v: Any, scale: Any, mask: Any, lengths: Any) -> Any:
        given.append(([*q.shape], mask is not None))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    errors = dict.fromkeys((torch.float32, torch.bfloat16), 1e-2)
    everywhere = choice.Kernel("sdpa-cudnn", recording, errors, masks=True)
    stand_ins = {
        "sdpa-cudnn": everywhere,
        "flash2": dataclasses.replace(everywhere, name="flash2", masks=False),
        "sage2": dataclasses.replace(everywhere, name="sage2", masks=False, lossy=True, key_multiple=1000, ragged_from=50),
        "flash3": dataclasses.replace(everywhere, name="flash3", run=lambda q, *_: q * float("nan")),
    }
    KERNELS.update(stand_ins)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("accvideo").addHandler(handler)
    logging.getLogger("accvideo").setLevel(logging.INFO)

    student, _ = loaders.load_student(tiny.weights_path("student"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    noise, text = torch.randn(1, 16, 5, 8, 8, generator=generator), torch.randn(1, 7, 256, generator=generator)
    inputs = {"c_crossattn": text, "y": torch.randn(1, 768, generator=generator), "guidance": torch.tensor([6.0])}
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])

    def denoised(model: Any, **more: Any) -> Any:
        comfy.model_management.load_models_gpu([model])
        options = model.model_options["transformer_options"]
        with torch.inference_mode():
            return model.model.apply_model(noise, torch.tensor([0.9]), transformer_options=options, **inputs, **more).float()

    def error(value: Any, reference: Any) -> float:
        return float((value - reference).norm() / reference.norm())

    plain, masked = denoised(student), denoised(student, attention_mask=mask)
    told: dict[str, Any] = {"masks matter": error(masked, plain)}
    for name in ("sdpa", "sdpa-cudnn", "flash2", "sage2"):
        model = bridge.with_attention(student, name)
        copied = model.clone()  # as every sampling does
        given.clear()
        messages.clear()
        seen = {"plain": error(denoised(copied), plain)}
        seen |= {"ran": bridge.attention_ran(copied, again=True), "given": given[:], "said": messages[:]}
        given.clear()
        messages.clear()
        seen |= {"masked": error(denoised(copied, attention_mask=mask), masked)}
        seen |= {"ran masked": bridge.attention_ran(model), "given masked": given[:], "said masked": messages[:]}
        told[name] = seen
    told["auto is the model itself"] = bridge.with_attention(student, "auto") is student
    told["auto ran"] = bridge.attention_ran(student)
    told["refused"] = {}
    for name in ("flash3", "sage1", "magic"):
        try:
            bridge.with_attention(student, name)
        except AccVideoError as refused:
            told["refused"][name] = f"{type(refused).__name__}: {refused}"

    # Every way to call it: heads split or not, before and after; a scale; a mask of two, three and four dimensions.
    options = bridge.with_attention(student, "sdpa-cudnn").model_options["transformer_options"]
    lossy = bridge.with_attention(student, "sage2").model_options["transformer_options"]
    q, k, v = (torch.randn(2, 3, n, 128, generator=generator) for n in (10, 60, 60))
    flat = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    bias = torch.randn(2, 10, 60, generator=generator)
    told["forms"] = {}
    told["called"] = {}

    def form(name: str, expected: Any, *tensors: Any, transformer_options: Any = options, **keywords: Any) -> None:
        given.clear()
        with torch.inference_mode():
            out = native.optimized_attention(*tensors, 3, transformer_options=transformer_options, **keywords)
        told["forms"][name] = error(out, expected) if out.shape == expected.shape else f"{out.shape} not {expected.shape}"
        told["called"][name] = len(given)

    def exact(bias: Any = None, scale: Any = None) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    joined = exact().transpose(1, 2).flatten(2)
    form("flat", joined, *flat)
    form("split", joined, q, k, v, skip_reshape=True)
    form("split both", exact(), q, k, v, skip_reshape=True, skip_output_reshape=True)
    form("flat to split", exact(), *flat, skip_output_reshape=True)
    wide = {"skip_reshape": True, "skip_output_reshape": True}
    form("mask of 2", exact(bias[0]), q, k, v, mask=bias[0], **wide)
    form("mask of 3", exact(bias[:, None]), q, k, v, mask=bias, **wide)
    form("mask of 4", exact(bias[:, None]), q, k, v, mask=bias[:, None], **wide)
    if "scale" in native.attention_basic.__wrapped__.__code__.co_consts:  # 0.3.64 knows no scale, nor do its callers
        form("scale", exact(scale=0.2), q, k, v, scale=0.2, **wide)
    form("full precision", joined, *flat, transformer_options=lossy, low_precision_attention=False)
    form("lossy", joined, *flat, transformer_options=lossy)
    if container := getattr(native, "AttentionTensorContainer", None):
        form("containers", joined, *map(container, flat))
    form("heads shared", exact(), q, k, v, skip_reshape=True, skip_output_reshape=True, some_new_keyword=None)
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
