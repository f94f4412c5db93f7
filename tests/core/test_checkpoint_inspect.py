"""`accvideo inspect` says what a file is and finds what was planted in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accvideo_core.checkpoint import expected_shapes, save_original, write_safetensors
from accvideo_core.checkpoint.inspect import InspectArgs, run
from accvideo_core.dit import DiTConfig
from accvideo_core.errors import CheckpointError, InvalidValueError
from accvideo_core.tiny import weights_folder
from tests.networks import random_weights

SMALL = DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=2, text_dim=24, pooled_dim=20)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_original(tmp_path / "model.safetensors", random_weights(SMALL), {"recipe": "a test"})
    return tmp_path / "model.safetensors"


def inspect(capsys, file: Path, **options) -> tuple[int, dict]:
    code = run(InspectArgs(file, json=True, **options))
    report = json.loads(capsys.readouterr().out)
    assert code == (1 if report["problems"] else 0)
    return code, report


def write(file: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite the small network with tensors replaced, added or (None) removed."""
    state = random_weights(SMALL) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)


class TestHeader:
    def test_what_the_file_is(self, capsys, file):
        code, report = inspect(capsys, file)
        assert code == 0 and report["problems"] == []
        assert report["layout"] == "original" and report["family"] == "tiny" and report["metadata"] == {"recipe": "a test"}
        assert report["config"]["hidden_size"] == 128 and report["config"]["depth_single"] == 2
        assert report["dtypes"] == {"float32": len(random_weights(SMALL))}
        assert report["parameters"] == sum(t.numel() for t in random_weights(SMALL).values())
        assert report["schedule"]["sigmas"] == pytest.approx([1, 0.96552, 0.91304, 0.82353, 0.63636, 0], abs=1e-5)
        assert "values" not in report and "step" not in report

    def test_as_text_for_people(self, capsys, file):
        assert run(InspectArgs(file, self_check=True)) == 0
        text = capsys.readouterr().out
        for part in ("original", "tiny", "width 128, 1 heads", "recipe: a test", "5 steps, shift 7", "nothing wrong found"):
            assert part in text

    def test_what_does_not_fit_is_reported_not_raised(self, capsys, file):
        write(file, single_blocks__0__linear2__bias=None, extra__weight=torch.ones(1), final_layer__linear__bias=torch.ones(3))
        code, report = inspect(capsys, file, step=True)
        assert code == 1
        assert report["missing"] == ["single_blocks.0.linear2.bias"] and report["unexpected"] == ["extra.weight"]
        assert report["misshapen"] == ["final_layer.linear.bias is 3 and should be 64"]
        assert "step" not in report and any("--step was not run" in problem for problem in report["problems"])

    def test_what_cannot_be_read_is_one_line(self, tmp_path):
        with pytest.raises(CheckpointError, match="no file"):
            run(InspectArgs(tmp_path / "nothing"))


class TestValues:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_one_value_that_is_not_finite(self, capsys, file, value, dtype):
        planted = torch.ones(64, 128, dtype=dtype)
        planted[63, 127] = value
        write(file, final_layer__linear__weight=planted)
        _, report = inspect(capsys, file, self_check=True)
        assert report["values"]["not_finite"] == ["final_layer.linear.weight (1 of 8192 values)"]
        assert len(report["problems"]) == 1

    def test_fp8_is_read_too(self, capsys, file):
        planted = torch.ones(64, 128).to(torch.float8_e4m3fn)
        planted.view(torch.uint8)[0, 0] = 0x7F  # NaN
        write(file, final_layer__linear__weight=planted)
        _, report = inspect(capsys, file, self_check=True)
        assert report["dtypes"]["float8_e4m3fn"] == 1 and len(report["values"]["not_finite"]) == 1

    def test_zero_weights_are_a_problem_and_zero_biases_a_note(self, capsys, file):
        write(file, single_blocks__0__linear1__weight=torch.zeros(896, 128), single_blocks__0__linear1__bias=torch.zeros(896))
        code, report = inspect(capsys, file, self_check=True)
        assert code == 1 and report["values"]["zero_weights"] == ["single_blocks.0.linear1.weight"]
        assert report["values"]["zero_biases"] == ["single_blocks.0.linear1.bias"]

    def test_without_self_check_no_value_is_read(self, capsys, file):
        write(file, final_layer__linear__weight=torch.full((64, 128), float("nan")))
        assert inspect(capsys, file)[0] == 0

    @pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux tells it")
    def test_memory_stays_near_one_tensor(self, tmp_path):
        """A file of 300 MB whose largest tensor has 29 MB: the peak beyond what a small file takes stays far under the file."""
        wide = DiTConfig(hidden_size=1024, num_heads=8, depth_double=2, depth_single=2, text_dim=64)
        save_original(tmp_path / "small", random_weights(SMALL))
        save_original(tmp_path / "wide", {name: torch.full(shape, 0.01) for name, shape in expected_shapes(wide).items()})
        assert (tmp_path / "wide").stat().st_size > 300e6
        code = (
            "import sys\nfrom accvideo_core.checkpoint.inspect import *\nfor name in sys.argv[1:]:\n"
            "    run(InspectArgs(Path(name), self_check=True))\n"
            "    print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "small"), str(tmp_path / "wide")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # Not getrusage's peak: a process inherits that from the one that started it.
        small, large = (int(line.split()[1]) * 1024 for line in said.splitlines() if line.startswith("VmHWM"))
        assert large - small < 120e6


class TestStep:
    def test_statistics_of_one_step(self, capsys, file):
        _, report = inspect(capsys, file, step=True)
        step = report["step"]
        assert step["finite"] and step["std"] > 0 and abs(step["likeness_to_noise"]) < 0.3
        assert "does not follow the noise" in report["problems"][0]  # random weights

    @pytest.mark.parametrize("part", ["student", "teacher"])
    def test_trained_networks_pass(self, capsys, part):
        code, report = inspect(capsys, weights_folder() / f"{part}.safetensors", step=True, self_check=True)
        assert code == 0 and report["step"]["likeness_to_noise"] > 0.5

    def test_a_network_that_returns_its_input_follows_the_noise(self, capsys, file):
        """Patches straight in and straight out: the smallest network that does what a trained one does at sigma 1."""
        state = {name: torch.zeros_like(t) for name, t in random_weights(SMALL).items()}
        eye = torch.eye(64)
        state["img_in.proj.weight"][:64] = eye.view(64, 16, 1, 2, 2)
        state["img_in.proj.weight"][64:] = -eye.view(64, 16, 1, 2, 2)  # so that the final norm's mean is 0
        state["final_layer.linear.weight"][:, :64] = eye
        save_original(file, state)
        code, report = inspect(capsys, file, step=True, dtype="fp32")
        assert code == 0 and report["step"]["likeness_to_noise"] > 0.9

    def test_weights_that_overflow_are_reported(self, capsys, file):
        write(file, final_layer__linear__weight=torch.full((64, 128), float("inf")))
        code, report = inspect(capsys, file, step=True)
        assert code == 1 and not report["step"]["finite"] and report["step"]["mean"] is None

    @pytest.mark.parametrize("dtype", ["bf16", "fp32"])
    def test_it_computes_in_the_dtype_asked_for(self, capsys, file, dtype):
        _, report = inspect(capsys, file, step=True, dtype=dtype)
        assert report["step"]["dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[dtype]

    def test_a_device_that_is_not_there(self, file):
        with pytest.raises(InvalidValueError, match="use cpu or auto"):
            run(InspectArgs(file, step=True, device="nonsense"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs sparse files")
def test_a_full_size_header_is_told_apart_without_its_weights(capsys, tmp_path):
    """The released model's layout with its first values only: a sparse file of 25.6 GB that takes no room."""
    from accvideo_core.checkpoint import expected_shapes

    offset, header = 0, {}
    for name, shape in expected_shapes(DiTConfig.hunyuan_video()).items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(tmp_path / "f", "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + offset)
    code, report = inspect(capsys, tmp_path / "f")
    assert code == 0 and report["family"] == "hunyuan-t2v" and report["parameters"] == 12_821_012_544
    assert report["bytes"] > 25e9


def test_the_writer_used_here_and_the_plain_one_agree(tmp_path):
    write_safetensors(tmp_path / "a", random_weights(SMALL))
    save_original(tmp_path / "b", random_weights(SMALL))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
