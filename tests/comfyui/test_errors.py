"""Bad input over HTTP: one sentence that names the value and what to do, at the node it concerns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from accvideo_core.comfy_client import ComfyError
from accvideo_core.tiny import weights_path
from tests.comfyui.server import Server, node, tiny_prompt


def refusal(server: Server, prompt: dict) -> str:
    with pytest.raises(ComfyError) as caught:
        server.run(prompt)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"steps": 0}, "Value 0 smaller than min of 1: steps"),
        ({"shift": -1.0}, "Value -1.0 smaller than min of 0.01: shift"),
        ({"shift": math.nan}, "shift is nan; it must be a finite number above 0"),
        ({"guidance": math.nan}, "guidance is nan; it must be a finite number of at least 0"),
        ({"denoise": math.nan}, "denoise is nan; it must be from 0 (keep the latent) to 1 (start from pure noise)"),
        (
            {"family": "hunyuan"},
            "unknown model family 'hunyuan'; known families: hunyuan-t2v, tiny, wan-t2v-14b, wan-i2v-14b-480p",
        ),
        ({"cfg": 2.0}, "cfg is 2 but no negative is connected; connect one, or set cfg to 1"),
        ({"model": ["1", 1]}, "Return type mismatch between linked nodes: model, received_type(CLIP) mismatch input_type(MODEL)"),
    ],
)
def test_a_value_that_cannot_be(server: Server, inputs: dict, sentence: str) -> None:
    message = refusal(server, tiny_prompt(**inputs))
    assert "AccVideoSampler (node 4): " in message
    assert sentence in message
    assert message.count(sentence) == 1


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"steps": 0}, "Value 0 smaller than min of 1: steps"),
        ({"family": "nobody"}, "AccVideoSigmas (node s): unknown model family 'nobody'; known families:"),
    ],
)
def test_a_schedule_that_cannot_be(server: Server, inputs: dict, sentence: str) -> None:
    prompt = tiny_prompt() | {
        "s": node("AccVideoSigmas", **{"family": "tiny"} | inputs),
        "guider": node("BasicGuider", model=["1", 0], conditioning=["2", 0]),
        "noise": node("RandomNoise", noise_seed=1),
        "euler": node("KSamplerSelect", sampler_name="euler"),
    }
    prompt["4"] = node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["euler", 0],
        sigmas=["s", 0],
        latent_image=["3", 0],
    )
    assert sentence in refusal(server, prompt)


def test_a_size_that_is_no_multiple_of_16(server: Server) -> None:
    prompt = tiny_prompt()
    prompt["3"]["inputs"]["width"] = 72
    assert "width is 9 (72 pixels)" in (message := refusal(server, prompt))
    assert "multiple of 16 pixels, 64 or 80" in message


def test_a_latent_of_another_model(server: Server) -> None:
    """An encoded picture of Stable Diffusion has 4 channels and is not empty."""
    prompt = tiny_prompt(latent=["noisy", 0])
    prompt["3"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    prompt["noise"] = node("RandomNoise", noise_seed=1)
    prompt["sigmas"] = node("AccVideoSigmas", family="tiny")
    prompt["noisy"] = node("AddNoise", model=["1", 0], noise=["noise", 0], sigmas=["sigmas", 0], latent_image=["3", 0])
    assert "this model reads (batch, 16, frames, height, width)" in refusal(server, prompt)


def test_text_of_another_encoder(server: Server, weights: Path) -> None:
    state = load_file(weights_path("student", weights))
    for name in ("txt_in.input_embedder.weight", "txt_in.c_embedder.linear_1.weight"):
        state[name] = state[name].repeat(1, 2).contiguous()
    save_file(state, server.base / "models" / "diffusion_models" / "wide_text.safetensors")
    prompt = tiny_prompt(model=["loader", 0]) | {
        "loader": node("AccVideoStudentLoader", file="wide_text.safetensors", weight_dtype="default")
    }
    assert "positive conditioning is 256 wide but this model reads text of width 512" in refusal(server, prompt)


def test_frames_that_are_not_4n_plus_1(server: Server) -> None:
    prompt = tiny_prompt()
    prompt["few"] = node("ImageFromBatch", image=["5", 0], batch_index=0, length=16)
    prompt["again"] = node("VAEEncode", pixels=["few", 0], vae=["1", 2])
    prompt["save"] = node("SaveLatent", samples=["again", 0], filename_prefix="latents/few")
    assert "16 frames" in (message := refusal(server, prompt))
    assert "4n+1" in message


def test_a_prompt_without_a_known_word(server: Server) -> None:
    prompt = tiny_prompt()
    prompt["2"]["inputs"]["text"] = "zeppelins over Friedrichshafen"
    assert "CLIPTextEncode (node 2): no word of 'zeppelins over Friedrichshafen' is known" in refusal(server, prompt)


@pytest.mark.parametrize("kind", ["missing", "truncated", "of another model", "incomplete"])
def test_a_file_that_cannot_be_loaded(server: Server, weights: Path, kind: str) -> None:
    folder, source = server.base / "models" / "diffusion_models", weights_path("student", weights)
    name = f"bad {kind}.safetensors"
    if kind == "truncated":
        (folder / name).write_bytes(source.read_bytes()[:100_000])
    elif kind == "of another model":
        save_file(load_file(weights_path("vae", weights)), folder / name)
    elif kind == "incomplete":
        state = load_file(source)
        del state["double_blocks.0.img_mod.linear.bias"]
        save_file(state, folder / name)
    prompt = tiny_prompt(model=["loader", 0]) | {"loader": node("AccVideoStudentLoader", file=name, weight_dtype="default")}
    message = refusal(server, prompt)
    assert "AccVideoStudentLoader (node loader): " in message and name in message
    if kind == "missing":
        assert "put it into one of" in message and "diffusion_models" in message
    if kind == "incomplete":
        assert "double_blocks.0.img_mod.linear.bias" in message


def test_an_unknown_weight_dtype(server: Server, weights: Path) -> None:
    (server.base / "models" / "diffusion_models" / "tiny.safetensors").write_bytes(weights_path("student", weights).read_bytes())
    prompt = tiny_prompt(model=["loader", 0]) | {
        "loader": node("AccVideoStudentLoader", file="tiny.safetensors", weight_dtype="int4")
    }
    assert "int4" in refusal(server, prompt)


def test_a_model_that_is_not_a_flow(server: Server) -> None:
    """ModelSamplingDiscrete (eps) turns the model into one that AccVideo's schedule does not fit."""
    prompt = tiny_prompt(model=["eps", 0])
    prompt["eps"] = node("ModelSamplingDiscrete", model=["1", 0], sampling="eps", zsnr=False)
    assert "is not sampled along a shifted flow" in refusal(server, prompt)
