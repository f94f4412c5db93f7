"""Our HunyuanVideo text encoders and VAE outside ComfyUI are its native ones, on equal small weights, in every version found."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
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
    """(folder of the models, latent, what one checkout makes of them)."""
    if request.param is None:
        no_comfyui()
    python, folder = prepare(request.param), tmp_path_factory.mktemp("encoders")
    models = make_text_encoders(folder / "models")
    make_vae(models / "vae")
    shutil.rmtree(models / "tokenizer_2")  # ComfyUI brings CLIP's own
    shutil.copytree(request.param / "comfy" / "sd1_tokenizer", models / "tokenizer_2")
    latent = make_noise((1, 16, 3, 4, 6), [5])
    save_file({"latent": latent}, folder / "latent")
    llama = {name: value for name, value in LLAMA.items() if name != "head_dim"}  # 128 there, always
    case = {"models": str(models), "prompts": PROMPTS, "llama": llama, "clip_l": CLIP, "vae_widths": VAE_WIDTHS}
    (folder / "case.json").write_text(json.dumps(case))
    command = [str(python), str(WORKER), str(request.param), str(folder)]
    done = subprocess.run(command, cwd=request.param, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return models, latent, load_file(folder / "native")


def test_text_encoders_are_comfyuis(native):
    models, _, theirs = native
    encoder = HunyuanText.load(models, dtype=torch.float32)
    for i, prompt in enumerate(PROMPTS):
        text, pooled = encoder.encode(prompt)
        assert error(text, theirs[f"text.{i}"][0]) < LIMIT and error(pooled, theirs[f"pooled.{i}"][0]) < LIMIT, prompt
    assert error(encoder.encode("a dog")[1], theirs["pooled.0"][0]) > 1000 * LIMIT


def test_vae_is_comfyuis(native):
    models, latent, theirs = native
    frames = HunyuanVAE.load(models, dtype=torch.float32, tiled=False).decode(latent[0])
    expected = (theirs["frames"][0].clamp(-1, 1).permute(1, 2, 3, 0).numpy() + 1) * 127.5
    assert frames.shape == (9, 32, 48, 3) and np.abs(frames - expected).max() < 0.51
