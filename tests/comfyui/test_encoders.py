"""Our HunyuanVideo text encoders and VAE outside ComfyUI are its native ones, on equal small weights, in every version found."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video
from safetensors.torch import load_file, save_file

from accvideo_core.sampling import make_noise
from accvideo_core.synvid.text_encoders import HunyuanText
from accvideo_core.synvid.video_vae import HunyuanVAE
from tests.comfyui.server import no_comfyui
from tests.comfyui.setup_envs import find_checkouts, prepare
from tests.hunyuan_files import CLIP, LLAMA, VAE_WIDTHS, make_text_encoders, make_vae
from tests.networks import error

WORKER = Path(__file__).with_name("encoder_worker.py")
CHECKOUTS = find_checkouts()
PROMPTS = ("a cat walks, then the user's dog", "", "A long take: " + "red birds over the sea, " * 8)
LIMIT = 1e-5


@pytest.fixture(scope="module", params=CHECKOUTS or [None], ids=lambda path: path.name if path else "no ComfyUI")
def native(request, tmp_path_factory):
    """(folder of the models, latents by name, what one checkout makes of them)."""
    if request.param is None:
        no_comfyui()
    python, folder = prepare(request.param), tmp_path_factory.mktemp("encoders")
    models = make_text_encoders(folder / "models")
    make_vae(models / "vae")
    shutil.rmtree(models / "tokenizer_2")  # ComfyUI brings CLIP's own
    shutil.copytree(request.param / "comfy" / "sd1_tokenizer", models / "tokenizer_2")
    latents = {name: make_noise((1, 16, frames, 4, 6), [frames]) for name, frames in (("image", 1), ("clip", 2))}
    save_file(latents, folder / "latents")
    llama = {name: value for name, value in LLAMA.items() if name != "head_dim"}  # 128 there, always
    case = {"models": str(models), "prompts": PROMPTS, "llama": llama, "clip_l": CLIP, "vae_widths": VAE_WIDTHS}
    (folder / "case.json").write_text(json.dumps(case))
    command = [str(python), str(WORKER), str(request.param), str(folder)]
    done = subprocess.run(command, cwd=request.param, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return models, latents, load_file(folder / "native")


def test_text_encoders_are_comfyuis(native):
    models, _, theirs = native
    encoder = HunyuanText.load(models, dtype=torch.float32)
    for i, prompt in enumerate(PROMPTS):
        text, pooled = encoder.encode(prompt)
        assert error(text, theirs[f"text.{i}"][0]) < LIMIT and error(pooled, theirs[f"pooled.{i}"][0]) < LIMIT, prompt
    assert error(encoder.encode("a dog")[1], theirs["pooled.0"][0]) > 1000 * LIMIT


@pytest.mark.parametrize("name", ["image", "clip"])
def test_vae_is_comfyuis(native, monkeypatch, name):
    """ComfyUI decodes a clip otherwise than the released code: in the middle every frame attends to all, not to those before
    alone, and from the third latent frame on it normalises two at a time. Without the first they are equal up to the second."""
    models, latents, theirs = native
    vae = HunyuanVAE.load(models, dtype=torch.float32, tiled=False)
    expected = (theirs[name][0].clamp(-1, 1).permute(1, 2, 3, 0).numpy() + 1) * 127.5
    if name == "clip":
        assert np.abs(vae.decode(latents[name][0]) - expected).max() > 2
        monkeypatch.setattr(autoencoder_kl_hunyuan_video, "prepare_causal_attention_mask", attend_to_all)
    frames = vae.decode(latents[name][0])
    assert frames.shape == expected.shape and np.abs(frames - expected).max() < 0.51


def attend_to_all(frames, size, dtype, device, batch_size=1):
    return torch.zeros(batch_size, frames * size, frames * size, dtype=dtype, device=device)
