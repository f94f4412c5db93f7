"""Capturing in a real ComfyUI: the same trajectories as without it, in datasets that either writes and reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from accvideo_core.checkpoint.fingerprint import fingerprint
from accvideo_core.comfy_client import Result
from accvideo_core.media import read_mp4
from accvideo_core.synvid import Header, SynVidReader, SynVidStore, sample_id
from accvideo_core.synvid.capture import capture
from accvideo_core.synvid.plan import Plan, prompt_seed
from accvideo_core.tiny import load_tiny
from tests.comfyui.prompts import CAPTURE_STEPS, PROMPT, capturing
from tests.comfyui.server import Server, node, relative_error
from tests.comfyui.test_sampling import small_wan

SHAPE = (16, 5, 8, 8)


def folder(server: Server, dataset: str) -> Path:
    return server.base / "output" / "synvid" / dataset


def sheet_of(server: Server, result: Result) -> np.ndarray:
    (file,) = (file for file in result.files if file.kind == "images")
    return np.asarray(Image.open(server.path(file)))


@pytest.fixture
def headless(weights: Path, tmp_path: Path):
    """Captures seeds of PROMPT into a dataset with the library alone."""
    network, encoder, _ = load_tiny("teacher", folder=weights)
    text, pooled, _ = encoder.encode([PROMPT])
    header = Header.of("tiny", fingerprint(network.state_dict().items()), CAPTURE_STEPS)

    def go(dataset: Path, *seeds: int) -> SynVidStore:
        plan, store = Plan(tmp_path / "plan", create=True), SynVidStore(dataset, header)
        items = [plan.add(PROMPT, text[0].detach(), pooled[0].detach(), seed, SHAPE) for seed in seeds]
        assert capture(network, plan, items, store) == []
        return store

    return go


def test_comfyui_and_the_library_capture_the_same_into_datasets_of_one_header(server: Server, headless, tmp_path: Path) -> None:
    name = sample_id(PROMPT, 3, SHAPE)
    server.run(capturing("parity"))
    ours = headless(tmp_path / "ours", 3)
    theirs = SynVidReader(folder(server, "parity"))
    theirs.header.check(ours.header)  # among others the fingerprint of the teacher
    assert list(theirs.samples()) == [name] == list(ours.samples())
    assert theirs.verify() == []
    errors = [relative_error(theirs.read(name, key), ours.read(name, key)) for key in range(6)]
    assert max(errors) <= 1e-3 and errors[5] == 0, errors
    for theirs_text, ours_text in zip(theirs.text(theirs.sample(name).text), ours.text(ours.sample(name).text), strict=True):
        assert theirs_text is not None and ours_text is not None
        assert relative_error(theirs_text, ours_text) <= 1e-5
    # Each goes on with the dataset of the other, and ComfyUI shows what the library captured.
    headless(folder(server, "parity"), 4)
    inspect = node("AccVideoSynVidInspect", dataset="parity", sample=sample_id(PROMPT, 4, SHAPE))
    shown = server.run({"inspect": inspect, "save": node("SaveImage", images=["inspect", 0], filename_prefix="sheet")})
    assert f"sample {sample_id(PROMPT, 4, SHAPE)}: {PROMPT!r}, seed 4, latent 16x5x8x8" in shown.texts["inspect"][0]
    assert "2 trajectories of 1 prompts, family tiny, 5 steps, 5 keys" in shown.texts["inspect"][0]
    server.run(capturing("parity", {"seed": 5}))
    assert {sample.seed for sample in theirs.samples().values()} == {3, 4, 5} and theirs.verify() == []


def test_a_batch_is_captured_once_whatever_is_queued_again(server: Server) -> None:
    """Rows are seeds 3 and 4; a second run, and a batch that overlaps, add only what is not there. Frames become MP4s."""
    prompt = capturing("batch", frames=["frames", 0], fps=8.0) | {
        "frames": node("VAEDecode", samples=["sampler", 0], vae=["models", 2])
    }
    prompt["size"]["inputs"]["batch_size"] = 2
    assert "2 trajectories written, 0 were there already; it has 2 now" in server.run(prompt).texts["writer"][0]
    assert "0 trajectories written, 2 were there already; it has 2 now" in server.run(prompt).texts["writer"][0]
    prompt["sampler"]["inputs"]["seed"] = 4
    assert "1 trajectories written, 1 were there already; it has 3 now" in server.run(prompt).texts["writer"][0]
    reader = SynVidReader(folder(server, "batch"))
    samples = {sample.seed: sample for sample in reader.samples().values()}
    assert set(samples) == {3, 4, 5} and reader.verify() == []
    assert len(list((folder(server, "batch") / "manifest").iterdir())) == 1
    for sample in samples.values():
        assert sample.video is not None
        assert read_mp4(folder(server, "batch") / sample.video).frames.shape == (17, 64, 64, 3)
    server.run(capturing("alone", {"seed": 4}))
    alone = SynVidReader(folder(server, "alone")).read(samples[4].id, 0)
    assert relative_error(reader.read(samples[4], 0), alone) <= 1e-3


def test_a_wan_teacher_with_guidance_and_a_negative(server: Server) -> None:
    """The clean end is that of ComfyUI's own Euler sampler with the same cfg; the header says how it was made."""
    small_wan(server.base / "models" / "diffusion_models" / "wan_teacher.safetensors")
    text = {"wan": node("UNETLoader", unet_name="wan_teacher.safetensors", weight_dtype="default")}
    text |= {"positive": node("AccVideoTestText", width=4096), "negative": node("AccVideoTestText", width=4096, seed=1)}
    sampler = dict(model=["wan", 0], positive=["positive", 0], negative=["negative", 0], family="wan-t2v-14b", cfg=5.0)
    prompt = capturing("wan", sampler | {"negative_prompt": "ugly"}, dtype="float32", store_noise=True) | text
    prompt |= {
        "shifted": node("ModelSamplingSD3", model=["wan", 0], shift=5.0),
        "native": node(
            "KSampler",
            **dict(model=["shifted", 0], positive=["positive", 0], negative=["negative", 0], latent_image=["size", 0]),
            **dict(seed=3, steps=CAPTURE_STEPS, cfg=5.0, sampler_name="euler", scheduler="simple", denoise=1.0),
        ),
    }
    del prompt["text"], prompt["models"]
    ours, native = server.latents(prompt, ["sampler", 0], ["native", 0])
    assert relative_error(ours, native) <= 1e-4
    reader = SynVidReader(folder(server, "wan"))
    header = reader.header
    assert (header.cfg, header.negative, header.guidance, header.shift, header.segments) == (5.0, "ugly", None, 5.0, 5)
    assert len(header.sigmas) == CAPTURE_STEPS + 1 and reader.verify() == []
    (sample,) = reader.samples().values()
    assert reader.text(sample.text)[1] is None, "Wan has no pooled text"


def test_a_teacher_is_known_by_its_weights_and_patches(server: Server) -> None:
    """The teacher with a LoRA is another one, as it is with another strength of it."""
    layer = "transformer.double_blocks.0.img_mlp.fc1"
    factors = {f"{layer}.lora_A.weight": torch.ones(1, 128), f"{layer}.lora_B.weight": torch.ones(512, 1)}
    save_file(factors, server.base / "models" / "loras" / "synvid.safetensors")
    server.run(capturing("teacher"))
    prints = set()
    for strength in (1.0, 0.5):
        prompt = capturing(f"lora_{strength}", {"model": ["apply", 0]})
        prompt["stack"] = node("AccVideoLoraStack", lora="synvid.safetensors", strength=strength, blocks="all")
        prompt["apply"] = node("AccVideoLoraApply", model=["models", 0], stack=["stack", 0])
        server.run(prompt)
        prints.add(SynVidReader(folder(server, f"lora_{strength}")).header.fingerprint)
    server.run(capturing("again", {"seed": 10}))  # the same weights, which have been patched and restored meanwhile
    teacher = SynVidReader(folder(server, "teacher")).header.fingerprint
    assert SynVidReader(folder(server, "again")).header.fingerprint == teacher and len(prints | {teacher}) == 3


@pytest.mark.parametrize(
    ("sampler", "writer", "sentence"),
    [
        ({"keys": 3}, {}, "3 key segments do not divide 5 steps"),
        ({"cfg": 5.0}, {}, "cfg is 5 but no negative is connected"),
        ({"family": "wan-t2v-14b", "cfg": 1.0}, {}, "family wan-t2v-14b is chosen for a HunyuanVideo model"),
        ({"family": "nobody"}, {}, "unknown model family 'nobody'"),
        ({"positive": ["two", 0]}, {}, "the positive conditioning has 2 parts; a trajectory has one prompt"),
        ({"cfg": 5.0, "negative": ["two", 0]}, {}, "the negative conditioning has 2 parts"),
        ({"positive": ["timed", 0]}, {}, "carries end_percent, start_percent, which a SynVid dataset does not hold"),
        ({"latent": ["masked", 0]}, {}, "the latent has a noise mask"),
        ({}, {"dataset": "/tmp/elsewhere"}, "'/tmp/elsewhere' is in none of"),
        ({}, {"frames": ["picture", 0]}, "1 frames for 2 trajectories"),
    ],
)
def test_what_cannot_be_captured(server: Server, sampler: dict, writer: dict, sentence: str) -> None:
    prompt = capturing("refused", sampler, **writer) | {
        "two": node("ConditioningCombine", conditioning_1=["text", 0], conditioning_2=["text", 0]),
        "timed": node("ConditioningSetTimestepRange", conditioning=["text", 0], start=0.1, end=0.9),
        "mask": node("SolidMask", value=1.0, width=64, height=64),
        "masked": node("SetLatentNoiseMask", samples=["size", 0], mask=["mask", 0]),
        "picture": node("EmptyImage", width=64, height=64, batch_size=1, color=0),
    }
    if "frames" in writer:
        prompt["size"]["inputs"]["batch_size"] = 2
    assert sentence in server.refusal(prompt)
    assert not folder(server, "refused").exists() or not SynVidReader(folder(server, "refused")).samples()


def test_a_sheet_shows_the_decoded_keys_from_noise_to_clean(server: Server) -> None:
    """The last row of stills, key 0, is the video that the VAE decodes; without a VAE it is not."""
    sheets = []
    for vae in ({"vae": ["models", 2]}, {}):
        prompt = capturing("sheet") | {
            "inspect": node("AccVideoSynVidInspect", dataset=["writer", 0], sample=["writer", 2], **vae),
            "save": node("SaveImage", images=["inspect", 0], filename_prefix="sheet"),
        }
        sheets.append(sheet_of(server, server.run(prompt)))
    reds = [((sheet[..., 0] > 150) & (sheet[..., 1] < 90) & (sheet[..., 2] < 90)).sum() for sheet in sheets]
    assert sheets[0].shape == sheets[1].shape and reds[0] > 500, "a red circle"
    assert not np.array_equal(sheets[0], sheets[1])


def test_prompts_of_a_file_one_after_another(server: Server) -> None:
    (server.base / "input" / "three.csv").write_text(f"prompt,seed\n{PROMPT},17\n\na blue square,\n")

    def shown(index: int, slot: int) -> str:
        prompt = {"prompts": node("AccVideoPrompts", file="three.csv", index=index)}
        return server.run(prompt | {"show": node("PreviewAny", source=["prompts", slot])}).texts["show"][0]

    assert [shown(0, slot) for slot in range(3)] == [PROMPT, "2", "17"]
    assert [shown(1, slot) for slot in (0, 2)] == ["a blue square", str(prompt_seed("a blue square"))]


def test_a_plan_of_native_text_is_the_librarys(server: Server, weights: Path) -> None:
    (server.base / "input" / "plan.txt").write_text(f"{PROMPT}\na blue square\nzeppelins over Friedrichshafen\n")
    settings = dict(file="plan.txt", width=64, height=64, length=17, seeds=2, seed=0, name="a_plan")
    prompt = {"models": node("AccVideoTinyModels", which="teacher")}
    prompt["plan"] = node("AccVideoPlanWriter", clip=["models", 1], **settings)
    report = server.run(prompt).texts["plan"][0]
    assert "4 samples, 4 of them new, latents 16x5x8x8" in report and "left out: no word of 'zeppelins" in report
    assert "4 samples, 0 of them new" in server.run(prompt).texts["plan"][0]
    plan = Plan(folder(server, "a_plan"))
    assert [(item.prompt, item.seed) for item in plan.items.values()] == [
        (text, prompt_seed(text, 0, copy)) for text in (PROMPT, "a blue square") for copy in (0, 1)
    ]
    assert all(name == sample_id(item.prompt, item.seed, item.shape) for name, item in plan.items.items())
    _, encoder, _ = load_tiny("teacher", folder=weights)
    for item in plan.items.values():
        own, own_pooled, _ = encoder.encode([item.prompt])
        text, pooled = plan.text(item.text)
        assert pooled is not None and torch.allclose(text, own[0]) and torch.allclose(pooled, own_pooled[0])
