"""One implementation of the network in a process of its own, timed on request. Started by `dit_forward.py`.

`python dit_worker.py KIND THREADS DEVICE [CHECKOUT FLAG...]`, KIND one of ours, diffusers, comfyui. Reads JSON lines from stdin:
{"load": size, "dtype": name, "compile": bool, "attention": name} builds the network of `synthetic.py` and calls it once;
{"run": n} calls it n times and answers {"seconds": one call's}; {"save": file} writes the last velocity; {"rate": n} multiplies
n x n matrices and answers {"tflops": ...}; {"memory": true} answers {"weights": bytes, "peak": bytes beyond them in one call}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def build_ours(state: dict, inputs: dict, config: Any, order: dict) -> tuple[Any, Callable[[], Any]]:
    from accvideo_core.dit import Conditioning, HunyuanVideoDiT

    network = HunyuanVideoDiT(config, device="meta", dtype=inputs["latent"].dtype).eval()
    network.load_state_dict(state, assign=True)
    network.attention_kernel = order.get("attention") or "auto"
    conditioning = Conditioning(inputs["text"], inputs["pooled"], inputs["guidance"])
    return network, lambda: network(inputs["latent"], inputs["sigma"], conditioning)


def build_diffusers(state: dict, inputs: dict, config: Any, order: dict) -> tuple[Any, Callable[[], Any]]:
    import torch
    from diffusers import HunyuanVideoTransformer3DModel

    from accvideo_core.checkpoint.layouts import to_diffusers

    with torch.device("meta"):
        network = HunyuanVideoTransformer3DModel(
            num_attention_heads=config.num_heads,
            num_layers=config.depth_double,
            num_single_layers=config.depth_single,
            text_embed_dim=config.text_dim,
        )
    network.load_state_dict(to_diffusers(state), strict=True, assign=True)
    network.eval()
    mask = torch.ones(inputs["text"].shape[:2], dtype=torch.bool, device=inputs["text"].device)
    arguments = (inputs["sigma"] * 1000, inputs["text"], mask, inputs["pooled"], inputs["guidance"] * 1000)
    return network, lambda: network(inputs["latent"], *arguments, return_dict=False)[0]


def build_comfyui(state: dict, inputs: dict, config: Any, order: dict) -> tuple[Any, Callable[[], Any]]:
    import comfy.model_management
    import comfy.sd

    patcher = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": inputs["latent"].dtype})
    if patcher is None:
        raise SystemExit("ComfyUI does not recognise the network")
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    network = patcher.model.diffusion_model
    named = {"context": inputs["text"], "y": inputs["pooled"], "guidance": inputs["guidance"]}
    return network, lambda: network(inputs["latent"], inputs["sigma"] * 1000, **named)


BUILDERS = {"ours": build_ours, "diffusers": build_diffusers, "comfyui": build_comfyui}


def compile_blocks(network: Any) -> None:
    """Block by block, as our trainer, diffusers' compile_repeated_blocks and most users of ComfyUI do."""
    kinds = ("double_blocks", "single_blocks", "transformer_blocks", "single_transformer_blocks")
    for blocks in (getattr(network, kind) for kind in kinds if hasattr(network, kind)):
        for block in blocks:
            block.compile()


def main() -> None:
    kind, threads, device, *rest = sys.argv[1:]
    # What a library prints must not meet the protocol.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    if kind == "comfyui":
        checkout, *flags = rest
        sys.path.insert(0, checkout)
        sys.argv = [sys.argv[0], *(["--cpu"] if device == "cpu" else ["--highvram"]), *flags]
        import comfy.options

        comfy.options.enable_args_parsing()
    import torch
    from safetensors.torch import save_file
    from synthetic import SIZES, inputs, weights

    from accvideo_core.devices import synchronize

    torch.set_num_threads(int(threads))
    place = torch.device(device)
    network: Any = None
    velocity: Callable[[], Any] = lambda: None  # noqa: E731 - replaced by the first "load"
    out: Any = None

    def answer(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    def memory() -> dict[str, int]:
        held = sum(t.untyped_storage().nbytes() for t in (*network.parameters(), *network.buffers()))
        if place.type != "cuda":
            from tests.peak import Peak

            with Peak([*network.parameters(), *network.buffers()]) as peak:
                velocity()
            return {"weights": held, "peak": peak.peak}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        velocity()
        return {"weights": held, "peak": torch.cuda.max_memory_allocated() - before}

    answer(torch=torch.__version__)
    with torch.inference_mode():
        for line in sys.stdin:
            order = json.loads(line)
            if "load" in order:
                network = velocity = out = None
                config, dtype = SIZES[order["load"]][0], getattr(torch, order["dtype"])
                given = inputs(order["load"], device, dtype)
                network, velocity = BUILDERS[kind](weights(config, device, dtype), given, config, order)
                if order.get("compile"):
                    compile_blocks(network)
                start = time.perf_counter()
                out = velocity()
                synchronize(place)
                answer(first=time.perf_counter() - start, kernel=getattr(network, "attention_ran", None))
            elif "run" in order:
                start = time.perf_counter()
                for _ in range(order["run"]):
                    out = velocity()
                synchronize(place)
                answer(seconds=(time.perf_counter() - start) / order["run"])
            elif "rate" in order:
                n, dtype = order["rate"], getattr(torch, order["dtype"])
                a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
                for _ in range(2):
                    a @ b
                synchronize(place)
                start = time.perf_counter()
                for _ in range(5):
                    a @ b
                synchronize(place)
                answer(tflops=5 * 2 * n**3 / (time.perf_counter() - start) / 1e12)
            elif "memory" in order:
                answer(**memory())
            else:
                save_file({"velocity": out.float().cpu().contiguous().clone()}, order["save"])
                answer(saved=True)


if __name__ == "__main__":
    main()
