"""Whether a file tells that it is a student's: by its own metadata, its name, or the LoRA that was merged into it."""

from __future__ import annotations

import json

import pytest

from accvideo_core.checkpoint import Student, find_student, student_metadata


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("hunyuan_video_accvid_5_steps_fp8_e4m3fn.safetensors", 5),
        ("accvideo-t2v-5-steps/diffusion_pytorch_model.pt", 5),
        ("hunyuan_video_accvid_t2v-5-steps_Q4_K_S.gguf", 5),
        ("Wan21_AccVid_I2V_480P_14B_lora_rank32_fp16.safetensors", None),
        ("sub\\AccVideo_10steps.safetensors", 10),
        ("accvid_0steps.safetensors", None),
    ],
)
def test_released_names_tell(name: str, steps: int | None) -> None:
    assert find_student(name, {}) == Student(steps)


@pytest.mark.parametrize(
    "name",
    [
        "hunyuan_video_720_cfgdistill_fp8.safetensors",
        "accvideo/merged.safetensors",
        "AccVideo/lora_8_steps.safetensors",
        "",
        "fast_6_steps.pt",
    ],
)
def test_other_names_do_not(name: str) -> None:
    """Our nodes write into a folder `accvideo`, whatever they write."""
    assert find_student(name, {}) is None


def test_metadata_goes_before_the_name_and_a_merge_names_its_lora() -> None:
    assert find_student("accvid_8_steps.safetensors", student_metadata(5)) == Student(5)
    loras = {"base": {"file": "teacher.safetensors"}, "loras": [{"file": "hyvideo_accvid_5_steps_lora.safetensors"}]}
    assert find_student("merged.safetensors", {"accvideo_merge": json.dumps(loras)}) == Student(5)


@pytest.mark.parametrize("text", ["", "5", "[]", '{"steps": 0}', '{"steps": "many"}', "{}", '{"steps": null}'])
def test_damaged_metadata_tells_nothing(text: str) -> None:
    assert find_student("model.safetensors", {"accvideo_student": text}) is None
