"""Runs inside a ComfyUI checkout, under its own Python: what `nodes/bridge` makes of a MODEL, a CONDITIONING and folders.

`python bridge_worker.py CHECKOUT FOLDER` writes FOLDER/told.json; test_bridge.py reads it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from worker import enter, pack


def main() -> None:
    folder = enter()
    import comfy.model_patcher
    import comfy.patcher_extension
    import folder_paths
    import torch
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_easycache import EasyCacheNode
    from safetensors.torch import load_file, save_file

    nodes = pack().NODE_CLASS_MAPPINGS
    from accvideo_pack.accvideo_core.errors import AccVideoError
    from accvideo_pack.accvideo_core.lora import LoraUse
    from accvideo_pack.accvideo_core.tiny import weights_path
    from accvideo_pack.nodes import bridge, lora_apply

    told: dict[str, Any] = {}
    teacher, clip, _ = nodes["AccVideoTinyModels"].execute("teacher").args

    def said(function: Callable[[], Any]) -> str | None:
        """What it is refused with; None where it is not."""
        try:
            function()
        except AccVideoError as error:
            return str(error)
        return None

    # What capture says of a teacher that other nodes have had in hand.
    def with_wrapper(kind: str, key: str | None = None) -> Callable[[Any], Any]:
        return lambda m: m.add_wrapper_with_key(getattr(comfy.patcher_extension.WrappersMP, kind), key, lambda run, *a: run(*a))

    def with_option(name: str, value: Any = True) -> Callable[[Any], Any]:
        return lambda m: m.model_options["transformer_options"].update({name: value})

    first = "diffusion_model.double_blocks.0"
    injection = comfy.model_patcher.PatcherInjection(inject=lambda m: None, eject=lambda m: None)
    altering: dict[str, Callable[[Any], Any]] = {
        "EasyCache": lambda m: EasyCacheNode.execute(m, 0.3, 0.15, 0.95, False).args[0],
        "post cfg": lambda m: m.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.8),
        "pre cfg": lambda m: m.set_model_sampler_pre_cfg_function(lambda args: args["conds_out"]),
        "cfg": lambda m: m.set_model_sampler_cfg_function(lambda args: args["cond"]),
        "calc cond batch": lambda m: m.set_model_sampler_calc_cond_batch_function(lambda args: args["conds"]),
        "function wrapper": lambda m: m.set_model_unet_function_wrapper(lambda apply, args: args["input"]),
        "nameless wrapper": with_wrapper("PREDICT_NOISE"),
        "wrapper in the options": with_option("wrappers", {"diffusion_model": {"far": [print]}}),
        "patch": lambda m: m.set_model_attn1_patch(lambda q, k, v, extra_options: (q, k, v)),
        "replacement": lambda m: m.set_model_patch_replace(print, "dit", "double_block", 0),
        "transformer option": with_option("rope_options", {"scale_x": 2.0}),
        "model option": lambda m: m.model_options.update(context_handler=object()),
        "injection": lambda m: m.set_injections("bypass_lora", [injection]),
        "weight wrapper": lambda m: m.add_weight_wrapper(f"{first}.img_mlp.0.weight", lambda w: w * 0),
        "object": lambda m: m.add_object_patch("diffusion_model.forward", print),
    }
    harmless: dict[str, Callable[[Any], Any]] = {
        "plain": lambda m: m,
        "another clone": lambda m: m.clone(),
        "our attention": lambda m: bridge.with_attention(m, "sdpa"),
        "another node's attention": with_option(
            "optimized_attention_override", lambda own, *args, **keywords: own(*args, **keywords)
        ),
        "torch.compile": lambda m: set_torch_compile_wrapper(m, backend="eager"),
        "compiled object": lambda m: m.add_object_patch(first, torch.compile(m.get_model_object(first), backend="eager")),
        "callback": lambda m: m.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, "preview", print),
        "shift": lambda m: bridge.with_shift(m, 3.0),
        "compute dtype": lambda m: m.set_model_compute_dtype(torch.float32),
        "emptied options": with_option("patches", {"attn1_patch": []}),
        "negative computed": lambda m: (
            m.disable_model_cfg1_optimization()
            if hasattr(m, "disable_model_cfg1_optimization")
            else m.model_options.update(disable_cfg1_optimization=True)
        ),
    }
    for name, changes in (("altering", altering), ("harmless", harmless)):
        told[name] = {}
        for what, change in changes.items():
            model = teacher.clone()
            changed = change(model)
            used = changed if isinstance(changed, comfy.model_patcher.ModelPatcher) else model
            told[name][what] = said(lambda used=used: bridge.teacher_fingerprint(used))
    capture = nodes["AccVideoTrajectorySampler"].execute
    with torch.inference_mode():
        positive = bridge.encode_prompt(clip, "a red circle moving left on a black background")
        latent = {"samples": torch.zeros(1, 16, 5, 8, 8)}
        given = dict(positive=positive, latent=latent, seed=1, family="tiny", steps=5)
        told["captured twice"] = said(lambda: [capture(model=teacher, **given) for _ in range(2)])
    told["refused capture"] = said(lambda: capture(model=altering["EasyCache"](teacher.clone()), **given))

    # A conditioning that is a batch.
    (text, extra), *_ = positive
    told["batch of texts"] = said(lambda: bridge.plain_text([[torch.cat([text, text]), extra]], "positive"))

    # LoRAs on weights that are kept in blocks.
    student = load_file(weights_path("student"))
    layer = "double_blocks.0.img_mlp"
    factors = {
        f"diffusion_model.{layer}.0.lora_down.weight": torch.ones(4, 128),
        f"diffusion_model.{layer}.0.lora_up.weight": torch.ones(512, 4),
    }
    save_file(factors, folder / "lora.safetensors")
    stack = [lora_apply.StackedLora("lora.safetensors", LoraUse(folder / "lora.safetensors"))]
    try:
        from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

        layout = QUANT_ALGOS["nvfp4"]["comfy_tensor_layout"]
    except (ImportError, KeyError):
        told["nvfp4"] = None
    else:
        import comfy.sd

        name = f"{layer}.fc1.weight"
        weight = QuantizedTensor.from_float(student[name].to(torch.bfloat16), layout, scale="recalculate")
        settings = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)
        state = student | {f"{layer}.fc1.comfy_quant": settings}
        del state[name]
        save_file(state | {key: part.contiguous() for key, part in weight.state_dict(name).items()}, folder / "nvfp4.safetensors")
        with torch.inference_mode():
            model = comfy.sd.load_diffusion_model(str(folder / "nvfp4.safetensors"))
            patched = []
            refused = said(lambda: patched.append(lora_apply.apply_stack(model, stack)[0]))
            shape = bridge.tensor_shapes(model)[f"{layer}.0.weight"]
            told["nvfp4"] = {"shape": shape, "refused": refused, "patches": sum(len(patched[0].patches) for _ in patched)}

    # A teacher in a folder of the user's whose own name is no part of what is chosen.
    teachers = folder / "accvideo_models"
    teachers.mkdir()
    shutil.copy(weights_path("teacher"), teachers / "hunyuan_video_720.safetensors")
    (teachers / "accvid_5_steps").mkdir()
    shutil.copy(weights_path("teacher"), teachers / "accvid_5_steps" / "model.safetensors")
    folder_paths.add_model_folder_path("diffusion_models", str(teachers))
    load = nodes["AccVideoStudentLoader"].execute
    told["noted"] = {}
    for name in ("hunyuan_video_720.safetensors", "accvid_5_steps/model.safetensors"):
        about = bridge.noted(load(name, "default").args[0])
        told["noted"][name] = None if about is None else [about.role, about.steps]

    # Linked folders, one of them into a circle, and names that only some systems know.
    far = folder / "far"
    far.mkdir()
    for name in ("a.safetensors", "b.gguf", "c.txt"):
        (far / name).touch()
    (far / "back").symlink_to(far)
    listing = Path(folder_paths.get_input_directory())
    listing.mkdir(exist_ok=True)
    models = folder / "models" / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    for place in (listing, models):
        (place / "linked").symlink_to(far)
    os.symlink(listing, listing / "circle")
    (listing / "what? 12:30.txt").touch()
    (folder / "outside.txt").touch()
    told["models"] = bridge.diffusion_model_files()
    told["inputs"] = bridge.input_files({".txt"})
    asked = [*told["inputs"], "nothing.txt", "../outside.txt", str(folder / "outside.txt"), "linked/../../outside.txt", ".", ""]
    told["input paths"] = {name: said(lambda name=name: bridge.input_path(name)) for name in asked}

    # A new file's name: one of another folder's files, a file's own, a free one. And null, which a workflow has that was saved
    # with an empty list.
    (models / "kept.safetensors").touch()
    names = ("hunyuan_video_720", "kept", "new")
    told["outputs"] = {name: said(lambda name=name: bridge.model_output("diffusion_models", name)) for name in names}
    finding = (bridge.diffusion_model_path, bridge.lora_path, bridge.input_path)
    told["null"] = [said(lambda find=find: find(None)) for find in finding]

    # Patches in few rounds, in their order on every tensor.
    calls = []
    plain = comfy.model_patcher.ModelPatcher.add_patches

    def counted(self: Any, patches: Any, *rest: Any, **keywords: Any) -> Any:
        calls.append(len(patches))
        return plain(self, patches, *rest, **keywords)

    comfy.model_patcher.ModelPatcher.add_patches = counted
    names = [name for name, shape in bridge.tensor_shapes(teacher).items() if len(shape) == 2 and "blocks." in name]
    patches = [(name, None, bridge.difference_patch(torch.zeros(1)), strength) for name in names for strength in (1.0, 0.8)]
    bridge.with_patches(teacher, patches)
    told["rounds of two"] = calls[:]
    calls.clear()
    # (tensor, rows, strength), told apart by the value
    mixed = [(0, None, 1.0), (1, None, 0.5), (0, (0, 8), 0.5), (0, (8, 8), 0.5), (1, None, 1.0), (0, None, 1.0), (1, None, 0.5)]
    mixed += [(1, None, 0.5), (2, None, 1.0), (0, (0, 8), 1.0)]
    made = [(names[i], rows, bridge.difference_patch(torch.tensor(float(n))), s) for n, (i, rows, s) in enumerate(mixed)]
    model = bridge.with_patches(teacher, made)
    told["mixed"] = [
        [
            [float(patch[1][0]), strength, offset and offset[1:]]
            for strength, patch, _, offset, _ in model.patches[f"diffusion_model.{name}"]
        ]
        for name in names[:3]
    ]
    told["mixed wanted"] = [[[float(n), s, rows] for n, (j, rows, s) in enumerate(mixed) if j == i] for i in range(3)]
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
