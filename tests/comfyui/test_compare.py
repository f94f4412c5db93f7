"""AccVideoCompare and what nodes tell the front end, in a real ComfyUI."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from accvideo_core.comfy_client import ComfyError
from accvideo_core.media import read_mp4, upscale
from tests.comfyui.server import ROOT, Server, load_prompt, node, tiny_prompt


def compare_prompt(seed: int, **inputs: object) -> dict[str, Any]:
    """The shipped workflow, the teacher in 10 steps to be quick about it; inputs of its AccVideoCompare (node 9) replaced."""
    prompt = load_prompt(ROOT / "workflows" / "api" / "accvideo_tiny_compare.json")
    for sampler, steps in (("5", 5), ("6", 10)):
        prompt[sampler]["inputs"] |= {"seed": seed, "steps": steps}
    prompt["9"]["inputs"] |= inputs
    return prompt


def history(server: Server, prompt_id: str) -> dict[str, Any]:
    return server.ask(lambda comfy: comfy.history(prompt_id))["outputs"]


def test_the_videos_are_what_was_sampled_and_carry_the_workflow(server: Server) -> None:
    prompt = compare_prompt(31)
    result = server.run(prompt)
    said = result.texts["9"]
    assert re.fullmatch(r"teacher, 50 steps, [\d.]+ s", said[0])
    assert re.fullmatch(r"student, 5 steps, [\d.]+ s, [\d.]+ times (faster|slower)", said[1])  # which, is the machine's to say
    files = {it["role"]: it for it in history(server, result.prompt_id)["9"]["accvideo_compare"]}
    assert [files[role]["label"] for role in ("first", "second")] == said
    videos = {file.filename: read_mp4(server.path(file)) for file in result.files if file.filename.endswith(".mp4")}
    first, second, both = (videos[files[role]["filename"]] for role in ("first", "second", "both"))
    assert first.frames.shape == second.frames.shape == (17, 64, 64, 3) and first.fps == 8
    bar = both.frames.shape[1] - 256  # small clips are shown enlarged
    for clip, left in ((first, 0), (second, both.frames.shape[2] - 256)):
        beside = both.frames[:, bar:, left : left + 256].astype(int)
        assert np.abs(beside - upscale(clip.frames, 4)).mean() < 4  # both were compressed
    assert np.abs(first.frames.astype(int) - second.frames).mean() > 0
    (saved,) = [file for file in result.files if file.folder == "output"]
    for video in (first, read_mp4(server.path(saved))):
        carried = json.loads(video.metadata["prompt"])
        assert carried["9"]["class_type"] == "AccVideoCompare"


def test_labels_without_seconds_and_odd_sizes(server: Server) -> None:
    """Seconds of 0 are left out; pictures of odd size, which H.264 cannot hold, get one row and column more."""
    prompt = {
        "a": node("EmptyImage", width=33, height=21, batch_size=3, color=255),
        "b": node("EmptyImage", width=48, height=32, batch_size=2, color=0),
        "c": node("AccVideoCompare", first=["a", 0], second=["b", 0], first_label="", second_label="blue ", second_seconds=0.0),
    }
    result = server.run(prompt)
    assert result.texts["c"] == ["", "blue"]
    shapes = sorted(read_mp4(server.path(file)).frames.shape for file in result.files)
    assert shapes[:2] == [(2, 32, 48, 3), (3, 22, 34, 3)] and shapes[2][0] == 3


@pytest.mark.parametrize(
    ("seconds", "label"), [((100.0, 250.0), "student, 5 steps, 250 s, 2.5 times slower"), ((0.0, 0.5), "student, 5 steps, 0.5 s")]
)
def test_the_second_label_compares_only_what_is_known(server: Server, seconds: tuple[float, float], label: str) -> None:
    picture = node("EmptyImage", width=16, height=16, batch_size=1, color=0)
    compare = node("AccVideoCompare", first=["a", 0], second=["a", 0], first_seconds=seconds[0], second_seconds=seconds[1])
    assert server.run({"a": picture, "c": compare}).texts["c"][1] == label


def test_a_mask_is_no_video(server: Server) -> None:
    prompt = {
        "a": node("SolidMask", value=1.0, width=16, height=16),
        "b": node("EmptyImage", width=16, height=16, batch_size=1, color=0),
        "c": node("AccVideoCompare", first=["a", 0], second=["b", 0]),
    }
    with pytest.raises(ComfyError, match="first"):
        server.run(prompt)


def test_the_sampler_tells_its_steps_and_seconds(server: Server) -> None:
    prompt = tiny_prompt(seed=8123)
    (told,) = history(server, server.run(prompt).prompt_id)["4"]["accvideo_sampling"]
    assert told["steps"] == told["calls"] == 5 and told["teacher_steps"] == told["teacher_calls"] == 50
    assert 0 < told["seconds"] < 60
    prompt = tiny_prompt(seed=8123, negative=["2", 0], cfg=2.0)
    (told,) = history(server, server.run(prompt).prompt_id)["4"]["accvideo_sampling"]
    assert told["steps"] == 5 and told["calls"] == 10
