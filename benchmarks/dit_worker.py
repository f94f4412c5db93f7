"""One implementation of the network in a process of its own, timed on request. Started by `dit_forward.py`.

`python dit_worker.py KIND THREADS [CHECKOUT FLAG...]`, KIND one of ours, diffusers, comfyui. Reads JSON lines from stdin:
{"load": folder, "dtype": name, "config": {...}} builds the network from folder/weights (original names) and keeps
folder/inputs; {"run": n} calls it n times and answers {"seconds": one call's}; {"save": file} writes the last velocity.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Velocity = Callable[[], Any]


def build_ours(state: dict, inputs: dict, config: dict, dtype: Any) -> Velocity:
    from accvideo_core.checkpoint import infer_config
    from accvideo_core.dit import Conditioning, HunyuanVideoDiT

    network = HunyuanVideoDiT(infer_config(state), device="meta", dtype=dtype).eval()
    network.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    conditioning = Conditioning(inputs["text"], inputs["pooled"], inputs["guidance"])
    return lambda: network(inputs["latent"], inputs["sigma"], conditioning)


def build_diffusers(state: dict, inputs: dict, config: dict, dtype: Any) -> Velocity:
    import torch
    from diffusers import HunyuanVideoTransformer3DModel

    from accvideo_core.checkpoint.layouts import to_diffusers

    with torch.device("meta"):
        network = HunyuanVideoTransformer3DModel(
            num_attention_heads=config["num_heads"],
            num_layers=config["depth_double"],
            num_single_layers=config["depth_single"],
            text_embed_dim=config["text_dim"],
        )
    network.load_state_dict({name: t.to(dtype) for name, t in to_diffusers(state).items()}, strict=True, assign=True)
    network.eval()
    mask = torch.ones(inputs["text"].shape[:2], dtype=torch.bool)
    arguments = (inputs["sigma"] * 1000, inputs["text"], mask, inputs["pooled"], inputs["guidance"] * 1000)
    return lambda: network(inputs["latent"], *arguments, return_dict=False)[0]


def build_comfyui(state: dict, inputs: dict, config: dict, dtype: Any) -> Velocity:
    import comfy.model_management
    import comfy.sd

    patcher = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype})
    if patcher is None:
        raise SystemExit("ComfyUI does not recognise the network")
    comfy.model_management.load_models_gpu([patcher])
    network = patcher.model.diffusion_model
    named = {"context": inputs["text"], "y": inputs["pooled"], "guidance": inputs["guidance"]}
    return lambda: network(inputs["latent"], inputs["sigma"] * 1000, **named)


BUILDERS = {"ours": build_ours, "diffusers": build_diffusers, "comfyui": build_comfyui}


def main() -> None:
    kind, threads, *rest = sys.argv[1:]
    # What a library prints must not meet the protocol.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if kind == "comfyui":
        checkout, *flags = rest
        sys.path.insert(0, checkout)
        sys.argv = [sys.argv[0], "--cpu", *flags]
        import comfy.options

        comfy.options.enable_args_parsing()
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(int(threads))
    velocity: Velocity = lambda: None  # noqa: E731 - replaced by the first "load"
    out = None

    def answer(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    answer(torch=torch.__version__)
    with torch.inference_mode():
        for line in sys.stdin:
            order = json.loads(line)
            if "load" in order:
                folder, dtype = Path(order["load"]), getattr(torch, order["dtype"])
                # sigma stays float32 in all three; everything else is in the network's dtype
                inputs = {n: t if n == "sigma" else t.to(dtype) for n, t in load_file(folder / "inputs").items()}
                velocity = BUILDERS[kind](load_file(folder / "weights"), inputs, order["config"], dtype)
                out = velocity()
                answer(loaded=True)
            elif "run" in order:
                start = time.perf_counter()
                for _ in range(order["run"]):
                    out = velocity()
                answer(seconds=(time.perf_counter() - start) / order["run"])
            else:
                save_file({"velocity": out.float().contiguous().clone()}, order["save"])
                answer(saved=True)


if __name__ == "__main__":
    main()
