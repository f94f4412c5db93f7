"""The loader's attention kernel in a real ComfyUI: seen to be called, exact in either order of text and image, masks honoured."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from accvideo_core.comfy_client import ComfyError
from tests.comfyui.server import Server, node, relative_error, tiny_prompt

TOLD_BY = "attention_worker.py"
BLOCKS, REFINER = 9, 2  # of the tiny student


def export(server: Server, weights: Path) -> str:
    """The bundled student as a file in ComfyUI's folder."""
    name = "tiny_attention.safetensors"
    (server.base / "models" / "diffusion_models" / name).write_bytes((weights / "student.safetensors").read_bytes())
    return name


@pytest.mark.parametrize("name", ["sdpa", "sdpa-cudnn", "flash2", "sage2"])
def test_a_model_gives_the_same_whatever_exact_arithmetic_attends(told: dict[str, Any], name: str) -> None:
    assert told["masks matter"] > 1e-3
    assert told[name]["plain"] < 1e-5 and told[name]["masked"] < 1e-5


def test_every_call_of_the_network_reaches_the_kernel(told: dict[str, Any]) -> None:
    for name in ("sdpa-cudnn", "flash2"):
        shapes = [shape for shape, _ in told[name]["given"]]
        assert sorted(shapes) == sorted([[1, 1, 7, 128]] * REFINER + [[1, 1, 87, 128]] * BLOCKS)
        assert told[name]["ran"] == {name: BLOCKS + REFINER} and told[name]["said"] == []


def test_a_mask_is_given_to_a_kernel_that_takes_one(told: dict[str, Any]) -> None:
    seen = told["sdpa-cudnn"]
    assert all(masked for _, masked in seen["given masked"]) and seen["ran masked"] == {"sdpa-cudnn": BLOCKS + REFINER}


def test_a_mask_sends_other_kernels_calls_back_with_the_reason_told_once(told: dict[str, Any]) -> None:
    seen = told["flash2"]
    assert seen["given masked"] == [] and seen["ran masked"] == {"ComfyUI's own": BLOCKS + REFINER}
    (said,) = seen["said masked"]
    assert "ComfyUI's own instead of flash2" in said and "takes no mask" in said


def test_lengths_that_a_kernel_does_not_take_stay_with_comfyui(told: dict[str, Any]) -> None:
    seen = told["sage2"]
    assert seen["ran"] == {"sage2": BLOCKS, "ComfyUI's own": REFINER}
    (said,) = seen["said"]
    assert "a multiple of 1000 keys or at least 50, not 7" in said


def test_auto_leaves_comfyuis_own_choice(told: dict[str, Any]) -> None:
    assert told["auto is the model itself"]
    ((name, count),) = told["auto ran"].items()
    assert name.startswith("attention_") and count == 0


def test_what_cannot_run_or_is_broken_is_refused_when_loading(told: dict[str, Any]) -> None:
    refused = told["refused"]
    assert refused["flash3"].startswith("KernelError: attention kernel flash3 failed its test on cpu in float32: ")
    assert refused["sage1"].startswith("InvalidValueError: attention kernel sage1 runs on NVIDIA GPUs, not on cpu")
    assert refused["magic"].startswith("InvalidValueError: unknown attention kernel 'magic'")


def test_every_form_of_call_is_heeded(told: dict[str, Any]) -> None:
    assert {name: value for name, value in told["forms"].items() if not (isinstance(value, float) and value < 1e-5)} == {}
    called = told["called"]
    assert {"flat", "split", "split both", "flat to split", "mask of 2", "mask of 3", "mask of 4", "lossy"} <= set(called)
    assert {name for name, count in called.items() if count != 1} == {"full precision"}, "only that one is not the kernel's"


class TestNode:
    def test_the_kernel_is_chosen_and_told(self, server: Server, weights: Path) -> None:
        """The same video as by ComfyUI's own attention, and what ran in the sampler's and the loader's output."""
        name = export(server, weights)
        latents = {}
        for kernel in ("auto", "sdpa"):
            loader = node("AccVideoStudentLoader", file=name, weight_dtype="default", attention=kernel)
            prompt = tiny_prompt(model=["loader", 0], seed=77) | {"loader": loader}
            (latents[kernel],) = server.latents(prompt, ["4", 0])
        assert relative_error(latents["sdpa"], latents["auto"]) < 0.02
        with urllib.request.urlopen(f"{server.url}/history?max_items=1") as answer:
            (run,) = json.load(answer).values()
        outputs = run["outputs"]
        assert outputs["4"]["accvideo_sampling"][0]["attention"] == {"sdpa": 5 * (BLOCKS + REFINER)}
        said = outputs["loader"]["text"][0]
        assert "attention: sdpa (exact)" in said and "flash3: no: runs on NVIDIA GPUs" in said

    def test_without_a_choice_it_is_as_before(self, server: Server, weights: Path) -> None:
        """Prompts written before there was one still run."""
        name = export(server, weights)
        loader = node("AccVideoStudentLoader", file=name, weight_dtype="default")
        (latent,) = server.latents(tiny_prompt(model=["loader", 0], seed=78) | {"loader": loader}, ["4", 0])
        assert latent.isfinite().all()

    def test_a_kernel_that_cannot_run_here_is_an_error_of_the_loader(self, server: Server, weights: Path) -> None:
        name = export(server, weights)
        loader = node("AccVideoStudentLoader", file=name, weight_dtype="default", attention="flash3")
        with pytest.raises(ComfyError, match="loader.*flash3 runs on NVIDIA GPUs, not on cpu; choose auto or sdpa"):
            server.run(tiny_prompt(model=["loader", 0]) | {"loader": loader})
