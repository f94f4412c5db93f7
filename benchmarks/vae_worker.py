"""Decoding inside a ComfyUI checkout, under its own Python: what its two nodes and ours compute. Started by `vae_decode.py`.

`python vae_worker.py CHECKOUT THREADS FOLDER` reads one JSON object from stdin and writes FOLDER/told.json:
    {"cut": [{"shape": [T, H, W], "gigabytes": memory of a card}, ...]}     places each way decodes over those of the latent, None
                                                                             where it runs out of memory, by the VAE's estimate
    {"time": {"shape", "width", "bytes_of": [T, H, W], "tile", "repeats"}}   seconds of each way and its error against the whole
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "comfyui"))
from worker import pack  # noqa: E402

# ComfyUI's description of HunyuanVideo's VAE; `ch` is replaced where a narrower one is timed.
ARCHITECTURE = {
    "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0, "conv3d": True, "time_compress": 4,
}  # fmt: skip


def main() -> None:
    checkout, threads, folder = sys.argv[1:4]
    sys.path.insert(0, checkout)
    sys.argv = [sys.argv[0], "--cpu", "--base-directory", folder]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management
    import comfy.sd
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL

    import nodes

    bridge = sys.modules[pack().__name__ + ".nodes.bridge"]
    torch.set_num_threads(int(threads))
    order = json.load(sys.stdin)

    def network(width: int) -> torch.nn.Module:
        """The VAE's network with weights of a fixed seed, as large as keep the values' size from layer to layer."""
        torch.manual_seed(0)
        made = AutoencoderKL(ddconfig={**ARCHITECTURE, "ch": width}, embed_dim=16).eval()
        for name, parameter in made.named_parameters():
            fan = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 0
            parameter.data.normal_(0, fan**-0.5) if fan else parameter.data.fill_(float(name.endswith("weight")))
        return made

    # A VAE is built from weights it recognises; the narrower network takes its place where it is timed.
    vae = comfy.sd.VAE(sd=network(128).state_dict())
    management, original_free = comfy.model_management, comfy.model_management.get_free_memory

    def ways(latent: torch.Tensor, memory: float, tile: int) -> dict[str, Callable[[], torch.Tensor]]:
        given = {"samples": latent}
        return {
            "ours": lambda: bridge.decode(vae, latent, memory)[0],
            "VAE Decode": lambda: nodes.VAEDecode().decode(vae, given)[0],
            "VAE Decode (Tiled)": lambda: nodes.VAEDecodeTiled().decode(vae, given, tile, 64, 64, 8)[0],
        }

    def with_memory(size: float, decode: Callable[[torch.Tensor], torch.Tensor]) -> list[int]:
        """Let the device have so many bytes: a tile whose estimate is above runs out. Gives the places of each tile decoded."""
        places: list[int] = []

        def limited(tile: torch.Tensor, **options: Any) -> torch.Tensor:
            if vae.memory_used_decode(tile.shape, vae.vae_dtype) > size:
                raise torch.cuda.OutOfMemoryError("more than the card has")
            places.append(math.prod(tile.shape[2:]))
            return decode(tile)

        vae.first_stage_model.decode = limited
        management.get_free_memory = vae.patcher.get_free_memory = lambda *_: size
        management.get_total_memory = lambda *_: size
        management.load_models_gpu = lambda *_, **__: None
        return places

    told: dict[str, Any] = {"torch": torch.__version__}
    with torch.inference_mode():
        if "cut" in order:
            # Only the cutting matters here: a latent's place is decoded into one place, and nothing is computed.
            vae.vae_dtype, vae.upscale_ratio, vae.upscale_index_formula = torch.bfloat16, (1, 1, 1), (1, 1, 1)
            vae.spacial_compression_decode, vae.temporal_compression_decode = lambda: 8, lambda: 4
            told["cut"] = []
            for case in order["cut"]:
                latent, size = torch.zeros(1, 16, *case["shape"]), case["gigabytes"] * 2**30
                row = dict(case)
                for name, way in ways(latent, size, 512).items():
                    places = with_memory(size, lambda tile: torch.zeros(1, 3, *tile.shape[2:], dtype=tile.dtype))
                    try:
                        way()
                    except torch.cuda.OutOfMemoryError:
                        row[name] = None
                    else:
                        row[name] = sum(places) / math.prod(case["shape"])
                        row[f"{name} tiles"] = len(places)
                told["cut"].append(row)
        else:
            case = order["time"]
            vae.first_stage_model = network(case["width"])
            decode = vae.first_stage_model.decode
            latent = torch.randn(1, 16, *case["shape"], generator=torch.Generator().manual_seed(0))
            whole = vae.decode(latent).flatten(0, 1)
            memory = vae.memory_used_decode((1, 16, *case["bytes_of"]), vae.vae_dtype)
            told["time"] = {"whole": {"seconds": []}}
            for _ in range(case["repeats"]):
                for name, way in {"whole": lambda: decode(latent), **ways(latent, memory, case["tile"])}.items():
                    places = with_memory(memory, decode)
                    start = time.perf_counter()
                    made = way()
                    found = told["time"].setdefault(name, {"seconds": []})
                    found["seconds"].append(time.perf_counter() - start)
                    if name != "whole":
                        error = made - whole
                        found["computed"] = sum(places) / math.prod(case["shape"])
                        found["error"] = float(error.std() / whole.std())
                        found["largest"] = float(error.abs().max() / whole.std())
                        found["flicker"] = float(error.diff(dim=0).std() / whole.std())
    management.get_free_memory = original_free
    Path(folder, "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
