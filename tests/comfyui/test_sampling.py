"""AccVideoSampler in a real ComfyUI: the same numbers as ComfyUI's own samplers and as the library, and the same manners."""

from __future__ import annotations

import asyncio
import io
import json
import math
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from accvideo_core import cli
from accvideo_core.comfy_client import ComfyClient, ComfyError, ComfyInterrupted, Progress
from accvideo_core.tiny import LATENT_SCALE, Which, load_tiny
from accvideo_core.tiny.pipeline import TinyPipeline
from tests.comfyui.server import Server, node, relative_error, tiny_prompt

PROMPT = tiny_prompt()["2"]["inputs"]["text"]
FAINT = 1e-5  # relative L2 between two samplers in the same process that differ by rounding


def with_ksampler(prompt: dict, **inputs: object) -> dict:
    """The prompt with a native KSampler (euler, simple) as node "native", on what node 4 samples."""
    ours = prompt["4"]["inputs"]
    settings = dict(
        model=ours["model"],
        positive=ours["positive"],
        negative=ours.get("negative", ours["positive"]),
        latent_image=ours["latent"],
        seed=ours["seed"],
        steps=5,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    return prompt | {"native": node("KSampler", **settings | inputs)}


def both(server: Server, prompt: dict) -> tuple[torch.Tensor, torch.Tensor]:
    ours, native = server.latents(prompt, ["4", 0], ["native", 0])
    return ours, native


def generate(weights: Path, seed: int, which: Which = "student") -> torch.Tensor:
    """VAE latent of the library's own run of PROMPT (what `accvideo generate` does), no ComfyUI involved."""
    pipeline = TinyPipeline(*load_tiny(which, folder=weights), which)
    return pipeline.generate([PROMPT], [seed]).latents / LATENT_SCALE


def test_the_api_workflow_runs_to_an_mp4(server: Server) -> None:
    result = server.run(tiny_prompt())
    (file,) = result.files
    with av.open(str(server.path(file))) as video:
        assert video.streams.video[0].average_rate == 8
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    assert frames.shape == (17, 64, 64, 3)
    assert frames.std() > 5


def test_latents_of_the_sample_command_are_loaded_and_decoded(
    server: Server, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCVIDEO_TINY_WEIGHTS", str(weights))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT, "seed": 4, "id": "sampled"}) + "\n", encoding="utf-8")
    assert cli.main(["encode", str(tmp_path / "prompts.jsonl"), "-o", str(tmp_path / "plan"), "--device", "cpu"]) == 0
    assert cli.main(["sample", str(tmp_path / "plan"), "-o", str(server.base / "input"), "--device", "cpu"]) == 0
    prompt = tiny_prompt() | {"4": node("LoadLatent", latent="sampled.latent")}
    assert len(server.run(prompt).files) == 1
    (loaded,) = server.latents(prompt, ["4", 0])
    assert relative_error(loaded, generate(weights, 4)) < FAINT


def test_each_step_reports_progress_and_a_preview(server: Server) -> None:
    steps: list[Progress] = []
    previews: list[bytes] = []
    server.run(tiny_prompt(seed=77), on_progress=lambda p: p.node == "4" and steps.append(p), on_preview=previews.append)
    assert [(step.value, step.total) for step in steps] == [(i, 5) for i in range(1, 6)]
    assert len(previews) == 5
    assert all(Image.open(io.BytesIO(picture)).size[0] >= 8 for picture in previews)


def test_custom_sampling_with_our_sigmas_is_the_sampler(server: Server) -> None:
    prompt = tiny_prompt() | {
        "sigmas": node("AccVideoSigmas", family="tiny", steps=5, shift=7.0),
        "guided": node("FluxGuidance", conditioning=["2", 0], guidance=6.0),
        "guider": node("BasicGuider", model=["1", 0], conditioning=["guided", 0]),
        "noise": node("RandomNoise", noise_seed=1),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "native": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["euler", 0],
            sigmas=["sigmas", 0],
            latent_image=["3", 0],
        ),
    }
    ours, native = both(server, prompt)
    assert relative_error(ours, native) < FAINT


@pytest.mark.parametrize(("which", "steps"), [("student", 5), ("teacher", 50)])
def test_the_library_generates_the_same_latent(server: Server, weights: Path, which: Which, steps: int) -> None:
    prompt = tiny_prompt(seed=5, steps=steps)
    prompt["1"]["inputs"]["which"] = which
    (latent,) = server.latents(prompt, ["4", 0])
    assert relative_error(generate(weights, 5, which), latent) < 1e-3
    assert relative_error(generate(weights, 6, which), latent) > 0.1


def test_what_is_left_out_comes_from_the_family(server: Server) -> None:
    (explicit,) = server.latents(tiny_prompt(), ["4", 0])
    (implicit,) = server.latents(tiny_prompt(steps=None, shift=None, guidance=None, cfg=None, denoise=None), ["4", 0])
    assert torch.equal(explicit, implicit)


def test_the_models_own_schedule_is_the_familys(server: Server) -> None:
    ours, native = both(server, with_ksampler(tiny_prompt()))
    assert relative_error(ours, native) < FAINT


def test_another_shift_is_the_native_shift_node(server: Server) -> None:
    prompt = with_ksampler(tiny_prompt(shift=3.0), model=["shifted", 0])
    prompt["shifted"] = node("ModelSamplingSD3", model=["1", 0], shift=3.0)
    ours, native = both(server, prompt)
    assert relative_error(ours, native) < FAINT


def test_the_shift_also_moves_what_is_given_in_percent(server: Server) -> None:
    """Half of the way lies at sigma 0.75 with shift 3 and at 0.875 with 7: the step at 0.82 tells which was used."""
    prompt = tiny_prompt(shift=3.0, positive=["both", 0])
    prompt["late"] = node("CLIPTextEncode", clip=["1", 1], text="a blue square moving down")
    prompt["first"] = node("ConditioningSetTimestepRange", conditioning=["2", 0], start=0.0, end=0.5)
    prompt["last"] = node("ConditioningSetTimestepRange", conditioning=["late", 0], start=0.5, end=1.0)
    prompt["both"] = node("ConditioningCombine", conditioning_1=["first", 0], conditioning_2=["last", 0])
    prompt["shifted"] = node("ModelSamplingSD3", model=["1", 0], shift=3.0)
    ours, native = both(server, with_ksampler(prompt, model=["shifted", 0]))
    assert relative_error(ours, native) < FAINT


def test_guidance_is_the_native_guidance_node(server: Server) -> None:
    prompt = with_ksampler(tiny_prompt(guidance=2.0), positive=["guided", 0])
    prompt["guided"] = node("FluxGuidance", conditioning=["2", 0], guidance=2.0)
    ours, native = both(server, prompt)
    assert relative_error(ours, native) < FAINT
    (plain,) = server.latents(tiny_prompt(), ["4", 0])
    assert relative_error(ours, plain) > 1e-3


def test_cfg_and_negative_are_passed_through(server: Server) -> None:
    prompt = tiny_prompt(negative=["no", 0], cfg=3.0)
    prompt["no"] = node("CLIPTextEncode", clip=["1", 1], text="a blue square")
    ours, native = both(server, with_ksampler(prompt, cfg=3.0))
    assert relative_error(ours, native) < FAINT
    (plain,) = server.latents(tiny_prompt(), ["4", 0])
    assert relative_error(ours, plain) > 1e-2


def test_a_batch_gets_the_noise_of_native_samplers(server: Server) -> None:
    prompt = tiny_prompt()
    prompt["3"]["inputs"]["batch_size"] = 2
    ours, native = both(server, with_ksampler(prompt))
    assert ours.shape[0] == 2
    assert relative_error(ours, native) < FAINT
    assert relative_error(ours[:1], ours[1:]) > 0.1


def test_a_row_taken_from_a_batch_keeps_its_noise(server: Server) -> None:
    """LatentFromBatch sets batch_index; native samplers then draw that row's noise."""
    prompt = tiny_prompt()
    prompt["3"]["inputs"]["batch_size"] = 3
    (whole,) = server.latents(prompt, ["4", 0])
    prompt["row"] = node("LatentFromBatch", samples=["3", 0], batch_index=2, length=1)
    prompt["4"]["inputs"]["latent"] = ["row", 0]
    ours, native = both(server, with_ksampler(prompt))
    assert relative_error(ours, native) < FAINT
    assert relative_error(ours, whole[2:]) < 1e-4


@pytest.mark.parametrize("denoise", [0.5, 0.25])  # schedules ComfyUI's table of 1000 levels holds exactly
def test_denoise_below_one_is_the_native_denoise(server: Server, denoise: float) -> None:
    prompt = tiny_prompt(latent=["start", 0], denoise=denoise, seed=9)
    prompt["start"] = node("AccVideoSampler", **tiny_prompt()["4"]["inputs"])
    ours, native = both(server, with_ksampler(prompt, denoise=denoise))
    assert relative_error(ours, native) < FAINT


def test_denoise_zero_keeps_the_latent(server: Server) -> None:
    prompt = tiny_prompt(latent=["start", 0], denoise=0.0)
    prompt["start"] = node("AccVideoSampler", **tiny_prompt()["4"]["inputs"])
    kept, start = server.latents(prompt, ["4", 0], ["start", 0])
    assert torch.equal(kept, start)


def test_a_noise_mask_is_obeyed_as_natively(server: Server) -> None:
    prompt = tiny_prompt(latent=["masked", 0], seed=9)
    prompt["start"] = node("AccVideoSampler", **tiny_prompt()["4"]["inputs"])
    prompt["zero"] = node("SolidMask", value=0.0, width=64, height=64)
    prompt["one"] = node("SolidMask", value=1.0, width=32, height=64)
    prompt["half"] = node("MaskComposite", destination=["zero", 0], source=["one", 0], x=0, y=0, operation="add")
    prompt["masked"] = node("SetLatentNoiseMask", samples=["start", 0], mask=["half", 0])
    ours, native, start = server.latents(with_ksampler(prompt), ["4", 0], ["native", 0], ["start", 0])
    assert relative_error(ours, native) < FAINT
    assert relative_error(ours[..., 4:], start[..., 4:]) < 1e-4, "outside the mask nothing changes"
    assert relative_error(ours[..., :4], start[..., :4]) > 0.1


def small_wan(path: Path, width: int = 128) -> None:
    """Random weights of a Wan 2.1 text-to-video network with one head and one block, under the names it is released with."""
    attention = {f"{part}.{name}": (width, width) for part in ("self_attn", "cross_attn") for name in "qkvo"}
    block = attention | {"ffn.0": (2 * width, width), "ffn.2": (width, 2 * width)}
    linear = {f"blocks.0.{name}": shape for name, shape in block.items()} | {
        "patch_embedding": (width, 16, 1, 2, 2),
        "text_embedding.0": (width, 4096),
        "text_embedding.2": (width, width),
        "time_embedding.0": (width, 256),
        "time_embedding.2": (width, width),
        "time_projection.1": (6 * width, width),
        "head.head": (64, width),
    }
    generator = torch.Generator().manual_seed(0)
    state = {"blocks.0.norm3.weight": torch.ones(width), "blocks.0.norm3.bias": torch.zeros(width)}
    state |= {f"blocks.0.{part}.norm_{name}.weight": torch.ones(width) for part in ("self_attn", "cross_attn") for name in "qk"}
    state |= {"blocks.0.modulation": torch.zeros(1, 6, width), "head.modulation": torch.zeros(1, 2, width)}
    for name, shape in linear.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5
        state[f"{name}.bias"] = torch.zeros(shape[0])
    save_file(state, path)


def test_a_wan_model_is_sampled_with_comfyuis_unipc(server: Server) -> None:
    small_wan(server.base / "models" / "diffusion_models" / "wan.safetensors")
    prompt = tiny_prompt(model=["wan", 0], positive=["text", 0], family="wan-t2v-14b", steps=None, shift=None, guidance=None) | {
        "wan": node("UNETLoader", unet_name="wan.safetensors", weight_dtype="default"),
        "text": node("AccVideoTestText", width=4096),
        "sigmas": node("AccVideoSigmas", family="wan-t2v-14b"),
        "guider": node("BasicGuider", model=["wan", 0], conditioning=["text", 0]),
        "noise": node("RandomNoise", noise_seed=1),
        "unipc": node("KSamplerSelect", sampler_name="uni_pc_bh2"),
        "native": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["unipc", 0],
            sigmas=["sigmas", 0],
            latent_image=["3", 0],
        ),
    }
    ours, native = both(server, prompt)
    assert relative_error(ours, native) < FAINT
    prompt["4"]["inputs"]["positive"] = ["2", 0]
    with pytest.raises(ComfyError, match="positive conditioning is 256 wide but this model reads text of width 4096"):
        server.latents(prompt, ["4", 0])


def test_one_step_of_a_wan_model_is_an_euler_step(server: Server) -> None:
    """A UniPC of order 1 is; ComfyUI's own hands back the noise. Also where the step is the end of a longer schedule."""
    small_wan(server.base / "models" / "diffusion_models" / "wan.safetensors")
    for denoise in (1.0, 0.5):
        given = dict(family="wan-t2v-14b", steps=1, shift=5.0, guidance=None, denoise=denoise)
        prompt = tiny_prompt(model=["wan", 0], positive=["text", 0], **given) | {
            "wan": node("UNETLoader", unet_name="wan.safetensors", weight_dtype="default"),
            "shifted": node("ModelSamplingSD3", model=["wan", 0], shift=5.0),
            "text": node("AccVideoTestText", width=4096),
            "native": node(
                "KSampler",
                **dict(model=["shifted", 0], positive=["text", 0], negative=["text", 0], latent_image=["3", 0], denoise=denoise),
                **dict(seed=1, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple"),
            ),
        }
        ours, native = both(server, prompt)
        assert relative_error(ours, native) < FAINT


def test_a_family_that_is_not_the_models_is_said(server: Server) -> None:
    server.latents(tiny_prompt(family="wan-t2v-14b"), ["4", 0])
    assert "family wan-t2v-14b is chosen for a HunyuanVideo model" in server.console()


@pytest.mark.parametrize("sampler", ["AccVideoSampler", "SamplerCustomAdvanced"])
def test_an_interrupt_is_obeyed_before_a_second_network_call(server: Server, sampler: str, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    prompt = tiny_prompt(model=["watch", 0], seed=int(time.time()))
    prompt["watch"] = node("AccVideoTestWatch", model=["1", 0], log=str(calls), seconds=1.5)
    if sampler == "SamplerCustomAdvanced":
        prompt["sigmas"] = node("AccVideoSigmas", family="tiny")
        prompt["guider"] = node("BasicGuider", model=["watch", 0], conditioning=["2", 0])
        prompt["noise"] = node("RandomNoise", noise_seed=int(time.time()))
        prompt["euler"] = node("KSamplerSelect", sampler_name="euler")
        prompt["4"] = node(
            sampler, noise=["noise", 0], guider=["guider", 0], sampler=["euler", 0], sigmas=["sigmas", 0], latent_image=["3", 0]
        )

    async def interrupt_the_first_call() -> float:
        async with ComfyClient(server.url) as comfy:
            run = asyncio.create_task(comfy.run(prompt))
            while not calls.exists() and not run.done():
                await asyncio.sleep(0.02)
            begin = time.monotonic()
            await comfy.interrupt()
            with pytest.raises(ComfyInterrupted, match="node 4"):
                await run
            return time.monotonic() - begin

    seconds = asyncio.run(interrupt_the_first_call())
    assert len(calls.read_text().splitlines()) == 1
    assert seconds < 4
    assert len(server.run(tiny_prompt(seed=3)).files) == 1, "the next prompt runs"
