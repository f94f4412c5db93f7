"""`accvideo inspect` on LoRA files: what it finds and what it does not take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accvideo_core import cli
from accvideo_core.errors import InvalidValueError
from tests.core.test_lora_formats import QKV, pair, save


def test_inspect_reads_the_values_of_a_lora_when_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = pair(QKV)
    tensors[f"{QKV}.lora_up.weight"][7, :2] = torch.tensor([float("nan"), float("inf")])
    path = str(save(tmp_path, tensors))
    assert cli.main(["inspect", path]) == 0
    assert "nothing wrong found" in capsys.readouterr().out
    assert cli.main(["inspect", path, "--self-check"]) == 1
    assert f"1 tensors have NaN or infinite values: {QKV}.lora_up.weight (2 values)" in capsys.readouterr().out
    save_file(pair(QKV), path)
    assert cli.main(["inspect", path, "--self-check"]) == 0


def test_inspect_takes_no_choice_of_network_for_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"module": pair(QKV)}, tmp_path / "lora.pt")
    assert cli.main(["inspect", str(tmp_path / "lora.pt"), "--weights", "module"]) == InvalidValueError.exit_code
    assert "is a LoRA; --step and --weights" in capsys.readouterr().err
    assert cli.main(["inspect", str(save(tmp_path, pair(QKV))), "--weights", "ema"]) == 1
    assert "no 'ema'" in capsys.readouterr().err


def test_inspect_takes_a_peft_folder_by_its_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trainer leaves its optimizer's state there too."""
    save_file(pair(QKV), tmp_path / "adapter_model.safetensors")
    torch.save({"state": torch.zeros(2)}, tmp_path / "optimizer.pt")
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "adapter_model.safetensors" in capsys.readouterr().out
