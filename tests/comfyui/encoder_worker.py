"""Runs inside a ComfyUI checkout, under its own Python: native HunyuanVideo text encoders and VAE on small weights from files.

`python encoder_worker.py CHECKOUT FOLDER` reads FOLDER/case.json (the models' folder, the prompts, the encoders' sizes), and
FOLDER/latents (model space); writes FOLDER/native: text.<i>, pooled.<i>, and frames under each latent's name. Uses nothing of
AccVideo.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from worker import enter


def main() -> None:
    folder = enter("--use-pytorch-cross-attention")
    import comfy.diffusers_convert
    import comfy.latent_formats
    import comfy.sd1_clip
    import comfy.text_encoders.hunyuan_video as native
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from safetensors.torch import load_file, save_file

    case = json.loads((folder / "case.json").read_text())
    models = Path(case["models"])

    def tokenizer(*_: object, **options: object) -> comfy.sd1_clip.SDTokenizer:
        """ComfyUI's Llama 3 tokenizer with its own settings, but the small vocabulary."""
        fixed = {"pad_with_end": False, "has_end_token": False, "pad_to_max_length": False, "max_length": 99999999}
        fixed |= {"has_start_token": True, "pad_token": 128258, "min_length": 1, "embedding_key": "llama"}
        return comfy.sd1_clip.SDTokenizer(str(models / "tokenizer"), tokenizer_class=splits, **fixed)

    # 0.3.64 takes this class from transformers, whose version 5 splits words in a way of its own instead of as the file says.
    splits = native.LlamaTokenizerFast
    if not splits.__module__.startswith("comfy"):
        from transformers import PreTrainedTokenizerFast as splits
    native.LLAMA3Tokenizer = tokenizer
    sizes = {f"{name}_model_config": case[name] for name in ("llama", "clip_l")}
    clip = native.HunyuanVideoClipModel(dtype_llama=torch.float32, dtype=torch.float32, model_options=sizes)
    prefixes = {"text_encoder": "model.", "text_encoder_2": "text_model."}
    for part, prefix in prefixes.items():
        state = load_file(models / part / "model.safetensors")
        if not any(name.startswith(prefix) for name in state):  # which versions of transformers leave out
            state = {prefix + name: tensor for name, tensor in state.items()}
        absent = clip.load_sd(state)
        if absent.unexpected_keys or [name for name in absent.missing_keys if "text_projection" not in name]:
            raise SystemExit(f"{part} does not fit: {absent}")
    words, out = native.HunyuanVideoTokenizer(), {}
    with torch.no_grad():
        for i, prompt in enumerate(case["prompts"]):
            out[f"text.{i}"], out[f"pooled.{i}"], _ = clip.encode_token_weights(words.tokenize_with_weights(prompt))

    widths = case["vae_widths"]
    sizes = {"double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": widths[0]}
    sizes |= {"ch_mult": [n // widths[0] for n in widths], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    vae = AutoencoderKL(ddconfig={**sizes, "conv3d": True, "time_compress": 4}, embed_dim=16)
    state = load_file(models / "vae" / "diffusion_pytorch_model.safetensors")
    vae.load_state_dict(comfy.diffusers_convert.convert_vae_state_dict(state))
    with torch.no_grad():
        for name, latent in load_file(folder / "latents").items():
            out[name] = vae.eval().decode(comfy.latent_formats.HunyuanVideo().process_out(latent))
    save_file({name: tensor.float().contiguous() for name, tensor in out.items()}, folder / "native")


if __name__ == "__main__":
    main()
