"""What `nodes/bridge` makes of a MODEL, a CONDITIONING and folders, in every ComfyUI: told by bridge_worker.py."""

from __future__ import annotations

from typing import Any

import pytest

TOLD_BY = "bridge_worker.py"


def test_capture_refuses_a_teacher_that_other_nodes_have_altered(told: dict[str, Any]) -> None:
    """By the name of what they have put on it, whatever way they took."""
    named = {
        "EasyCache": "wrapper easycache",
        "post cfg": "sampler_post_cfg_function (main)",
        "pre cfg": "sampler_pre_cfg_function (main)",
        "cfg": "sampler_cfg_function (main)",
        "calc cond batch": "sampler_calc_cond_batch_function (main)",
        "function wrapper": "model_function_wrapper (main)",
        "nameless wrapper": "wrapper predict_noise (main)",
        "wrapper in the options": "wrapper far",
        "patch": "patch attn1_patch (main)",
        "replacement": "patch dit (print)",
        "transformer option": "option rope_options",
        "model option": "context_handler",
        "injection": "injection bypass_lora",
        "weight wrapper": "weight function diffusion_model.double_blocks.0.img_mlp.0.weight (main)",
        "object": "replaced diffusion_model.forward",
    }
    assert set(told["altering"]) == set(named)
    for what, name in named.items():
        assert told["altering"][what] is not None, what
        assert f"the model carries {name}" in told["altering"][what], what
        assert "connect the teacher" in told["altering"][what]
    assert told["refused capture"] == told["altering"]["EasyCache"]


def test_capture_takes_a_teacher_with_what_changes_nothing(told: dict[str, Any]) -> None:
    assert told["harmless"] == dict.fromkeys(told["harmless"]) and len(told["harmless"]) > 5
    assert told["captured twice"] is None


def test_a_conditioning_that_is_a_batch_is_called_one(told: dict[str, Any]) -> None:
    assert "the positive conditioning is a batch of 2 texts; a trajectory has one prompt" in told["batch of texts"]


def test_a_lora_fits_weights_that_are_packed(told: dict[str, Any]) -> None:
    if told["nvfp4"] is None:
        pytest.skip("this ComfyUI has no nvfp4")
    assert told["nvfp4"] == {"shape": [512, 128], "refused": None, "patches": 1}


def test_a_student_is_known_by_the_name_that_is_chosen(told: dict[str, Any]) -> None:
    """Not by the folder that ComfyUI's list begins in."""
    assert told["noted"] == {"hunyuan_video_720.safetensors": None, "accvid_5_steps/model.safetensors": ["student", 5]}


def test_linked_folders_are_listed_once(told: dict[str, Any]) -> None:
    assert [name for name in told["models"] if name.endswith(".gguf")] == ["linked/b.gguf"]
    assert told["inputs"] == ["linked/c.txt", "what? 12:30.txt"]


def test_every_input_file_that_is_listed_is_found_and_none_outside(told: dict[str, Any]) -> None:
    paths = told["input paths"]
    assert [paths[name] for name in told["inputs"]] == [None] * len(told["inputs"])
    assert paths["nothing.txt"] is not None and "no file 'nothing.txt' in ComfyUI's input folder" in paths["nothing.txt"]
    beside = {name: sentence for name, sentence in paths.items() if name not in (*told["inputs"], "nothing.txt")}
    assert len(beside) == 5
    for name, sentence in beside.items():
        assert sentence is not None and repr(name) in sentence, name


def test_a_new_file_has_a_name_that_comfyui_finds_it_by(told: dict[str, Any]) -> None:
    """Else a loader linked to it would load a file of that name in another folder."""
    assert (told["outputs"]["kept"], told["outputs"]["new"]) == (None, None)
    message = told["outputs"]["hunyuan_video_720"]
    assert message is not None and "accvideo_models/hunyuan_video_720.safetensors, too, and ComfyUI finds only one" in message


def test_a_choice_that_is_null_is_a_file_that_is_not_there(told: dict[str, Any]) -> None:
    folders = ("diffusion_models folders", "loras folders", "input folder")
    for sentence, folder in zip(told["null"], folders, strict=True):
        assert sentence is not None and "no file" in sentence and f"ComfyUI's {folder}" in sentence


def test_patches_take_a_round_for_each_strength_and_keep_their_order(told: dict[str, Any]) -> None:
    assert len(told["rounds of two"]) == 2
    assert told["mixed"] == told["mixed wanted"]
