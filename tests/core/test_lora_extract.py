"""An extracted LoRA is the best one of its rank, in every key format, and gives the tuned model back."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accvideo_core import cli
from accvideo_core.checkpoint import open_checkpoint
from accvideo_core.checkpoint.convert import convert
from accvideo_core.dit import DiTConfig
from accvideo_core.errors import AccVideoError, InvalidValueError, LoraError
from accvideo_core.lora import extract_lora, merge_lora, parse_blocks, read_lora
from accvideo_core.lora.factor import factor
from tests.core.test_lora_merge import files_of, wan_state
from tests.lora_files import write
from tests.networks import random_weights

SMALL = DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=2, text_dim=24, pooled_dim=20)


def spectrum_matrix(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these singular values and random directions."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    left, _ = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64))
    return ((left * values) @ right.T).float()


SPECTRA = {
    "flat": torch.ones(256).double(),
    "slow decay": torch.arange(1, 257).double() ** -0.5,
    "fast decay": 0.9 ** torch.arange(256).double(),
    "low rank and noise": torch.cat([torch.full((8,), 10.0), torch.full((248,), 0.1)]).double(),
}


@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256), (256, 256)], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 16, 64, 256])
@pytest.mark.parametrize("name", SPECTRA)
def test_factors_are_within_half_a_percent_of_the_optimum(shape: tuple[int, int], rank: int, name: str) -> None:
    """Both ways: randomized at rank 1, 8 and 16, Gram above. The optimum is what the full SVD's values leave out."""
    values = SPECTRA[name]
    matrix = spectrum_matrix(*shape, values)
    found = factor(matrix, rank)
    missed = float((matrix.double() - found.up.double() @ found.down.double()).norm())
    optimum = float(values[rank:].square().sum().sqrt())
    total = float(values.norm())
    assert missed <= 1.005 * optimum + 2e-6 * total
    assert found.residual == pytest.approx(missed / total, rel=1e-3, abs=1e-5)


def test_the_two_ways_agree_and_split_the_values_evenly() -> None:
    matrix = spectrum_matrix(512, 768, 0.8 ** torch.arange(512).double())
    randomized, exact = factor(matrix, 8), factor(matrix, 512)
    assert randomized.rank == 8 and exact.rank > 8
    assert torch.allclose(randomized.values, exact.values[:8], rtol=1e-4)
    for found in (randomized, exact):
        assert torch.allclose(found.up.norm(dim=0)[:8], found.down.norm(dim=1)[:8], rtol=1e-4)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.6, 2), (0.95, 3), (0.96, 4), (1.0, 4)])
def test_energy_chooses_the_rank(energy: float, rank: int) -> None:
    """Squared values 50, 30, 15, 5 of 100."""
    values = torch.tensor([50.0, 30.0, 15.0, 5.0]).double().sqrt()
    assert factor(spectrum_matrix(96, 64, values), 64, energy - 1e-4).rank == rank
    assert factor(spectrum_matrix(96, 64, values), 3, energy - 1e-4).rank == min(rank, 3)


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, dict[str, Tensor]]:
    """A base, and the base with a LoRA of rank 4 and differences of every norm and bias in it."""
    state = dict(random_weights(SMALL))
    tuned = {name: value.float() for name, value in write("ComfyUI / KJ extraction", state).merged(state).items()}
    save_file(state, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", tuned


@pytest.mark.parametrize("key_format", ["comfyui", "kohya"])
def test_extracted_and_merged_again_it_is_the_tuned_model(
    tmp_path: Path, pair: tuple[Path, Path, dict[str, Tensor]], key_format: str
) -> None:
    tuned, base, state = pair
    lora = tmp_path / "lora.safetensors"
    report = extract_lora(tuned, base, lora, 4, key_format=key_format, dtype=torch.float32)
    assert report.residual < 1e-5 and report.unchanged == 0 and not report.left_out
    assert len(report.modules) == len(state)
    merged = merge_lora(base, [lora], tmp_path / "out.safetensors")
    assert merged.changed == len(state)
    for name, value in load_file(merged.path).items():
        assert float((value - state[name]).norm()) <= 1e-5 * float(state[name].norm()), name
    with read_lora(lora) as opened:
        assert {part.scale for module in opened.modules.values() for part in module.parts} == {1.0}
        # What shares its name in every naming shows no format; blocks do.
        assert opened.format == {"comfyui": "comfyui", "kohya": "musubi-kohya"}[key_format]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_residual_reported_is_of_the_file_as_stored(
    tmp_path: Path, pair: tuple[Path, Path, dict[str, Tensor]], dtype: torch.dtype
) -> None:
    tuned, base, state = pair
    lora = tmp_path / "lora.safetensors"
    report = extract_lora(tuned, base, lora, 2, dtype=dtype)
    merge_lora(base, [lora], tmp_path / "out.safetensors")
    merged, before = load_file(tmp_path / "out.safetensors"), load_file(base)
    missed = {name: float((merged[name].double() - state[name].double()).norm()) for name in state}
    whole = {name: float((state[name].double() - before[name].double()).norm()) for name in state}
    for module in report.modules:
        got = missed[module.tensor] / whole[module.tensor]
        assert module.residual == pytest.approx(got, rel=1e-2, abs=1e-5), module.tensor
        assert module.difference == pytest.approx(whole[module.tensor] / float(before[module.tensor].norm()), rel=1e-4)
    total = sum(m**2 for m in missed.values()) ** 0.5 / sum(w**2 for w in whole.values()) ** 0.5
    assert report.residual == pytest.approx(total, rel=1e-3)
    assert 0.1 < report.residual < 0.9, "rank 2 of 4 misses something"
    assert all(value.dtype == dtype for name, value in load_file(lora).items() if not name.endswith("alpha"))


def test_unchanged_tensors_and_other_blocks_are_left_alone(tmp_path: Path, pair: tuple[Path, Path, dict[str, Tensor]]) -> None:
    _, base, state = pair
    before = load_file(base)
    half = {name: state[name] if name.startswith(("single_blocks.0", "double_blocks")) else before[name] for name in state}
    save_file(half, tmp_path / "half.safetensors")
    report = extract_lora(tmp_path / "half.safetensors", base, tmp_path / "a.safetensors", 4)
    assert {module.tensor for module in report.modules} == {name for name in state if not torch.equal(half[name], before[name])}
    assert report.unchanged == len(state) - len(report.modules)
    blocks = parse_blocks("double")
    only = extract_lora(tmp_path / "half.safetensors", base, tmp_path / "b.safetensors", 4, blocks=blocks)
    assert {module.tensor for module in only.modules} == {name for name in state if name.startswith("double_blocks")}
    with pytest.raises(LoraError, match="equal in these blocks"):
        extract_lora(tmp_path / "half.safetensors", base, tmp_path / "c.safetensors", blocks=parse_blocks("single.1"))


def test_quantised_and_renamed_sides_are_restored_first(tmp_path: Path, pair: tuple[Path, Path, dict[str, Tensor]]) -> None:
    """A base in ComfyUI's scaled fp8 under its native names: the difference is to the values it stands for."""
    from accvideo_core.checkpoint.layouts import COMFYUI_NATIVE

    tuned, base, state = pair
    stored, restored = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for name, value in load_file(base).items():
        (native,) = COMFYUI_NATIVE.stored(name)
        stored[native], restored[name] = value, value
        if name.endswith("linear1.weight"):
            scale = value.abs().max() / 448
            stored[native] = (value / scale).to(torch.float8_e4m3fn)
            stored[native.removesuffix("weight") + "scale_weight"] = scale.reshape(())
            restored[name] = stored[native].float() * scale
    save_file(stored, tmp_path / "fp8.safetensors")
    report = extract_lora(tuned, tmp_path / "fp8.safetensors", tmp_path / "a.safetensors", 128, dtype=torch.float32)
    save_file(restored, tmp_path / "restored.safetensors")
    merge_lora(tmp_path / "restored.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors")
    assert report.residual < 1e-4
    for name, value in load_file(tmp_path / "out.safetensors").items():
        assert float((value - state[name]).norm()) <= 1e-5 * float(state[name].norm()), name


def test_wan_with_its_modulations(tmp_path: Path) -> None:
    state = wan_state()
    tuned = {name: value.float() for name, value in write("ComfyUI / KJ extraction", state).merged(state).items()}
    save_file(state, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    report = extract_lora(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", tmp_path / "l.safetensors", 4)
    assert "diffusion_model.blocks.1.diff_m" in load_file(report.path)
    merge_lora(tmp_path / "base.safetensors", [report.path], tmp_path / "out.safetensors")
    for name, value in load_file(tmp_path / "out.safetensors").items():
        assert float((value - tuned[name]).norm()) <= 1e-3 * float(tuned[name].norm()), name


# ---- what must not happen ------------------------------------------------------------------------------------------


def test_inputs_that_do_not_belong_together_or_do_not_differ(tmp_path: Path, pair: tuple[Path, Path, dict[str, Tensor]]) -> None:
    tuned, base, state = pair
    out = tmp_path / "out.safetensors"
    other = tmp_path / "other.safetensors"
    save_file(random_weights(DiTConfig(128, 1, 2, 2, 24, 20)), other)
    save_file(wan_state(), tmp_path / "wan.safetensors")
    folder, inside = tmp_path / "folder", tmp_path / "folder/diffusion_pytorch_model.safetensors"
    convert(base, folder, "diffusers")
    broken = {name: value.clone() for name, value in state.items()}
    broken["single_blocks.0.linear2.weight"][3, 3] = float("nan")
    save_file(broken, tmp_path / "nan.safetensors")
    before = files_of(tmp_path)
    for words, call in {
        "equal": lambda: extract_lora(base, base, out),
        "double_blocks.1": lambda: extract_lora(tuned, other, out),
        "different networks": lambda: extract_lora(tuned, tmp_path / "wan.safetensors", out),
        "NaN": lambda: extract_lora(tmp_path / "nan.safetensors", base, out),
        "no layer": lambda: extract_lora(tuned, base, out, key_format="peft"),
        "rank 0": lambda: extract_lora(tuned, base, out, 0),
        "energy 98": lambda: extract_lora(tuned, base, out, energy=98),
        "unknown key format": lambda: extract_lora(tuned, base, out, key_format="a1111"),
        "safetensors is what is written": lambda: extract_lora(tuned, base, tmp_path / "out.ckpt"),
        "one of the inputs": lambda: extract_lora(tuned, base, base, overwrite=True),
        "is one of the inputs": lambda: extract_lora(tuned, folder, inside, overwrite=True),
        "exists": lambda: extract_lora(tuned, base, other),
        "nothing at double_blocks.5": lambda: extract_lora(tuned, base, out, blocks=parse_blocks("double.5")),
    }.items():
        with pytest.raises(AccVideoError, match=words):
            call()
    assert files_of(tmp_path) == before
    assert not any(thread.name.startswith("accvideo") for thread in threading.enumerate())


def test_what_pefts_format_has_no_place_for_is_named(tmp_path: Path, pair: tuple[Path, Path, dict[str, Tensor]]) -> None:
    tuned, base, state = pair
    report = extract_lora(tuned, base, tmp_path / "lora.safetensors", 4, key_format="peft", lossy=True)
    modules = {name.removesuffix("weight") for name, value in state.items() if value.ndim == 1 and name.endswith("weight")}
    norms = {name for name in state if name.rpartition(".")[0] + "." in modules}
    assert set(report.left_out) == norms and len(norms) > 5
    missed = {module.tensor: module.residual for module in report.modules}
    assert all(missed[name] == 1.0 for name in norms)


def test_values_too_large_for_fp16_are_an_error_and_not_infinities(
    tmp_path: Path, pair: tuple[Path, Path, dict[str, Tensor]]
) -> None:
    _, base, state = pair
    save_file({name: value * 1e7 for name, value in state.items()}, tmp_path / "huge.safetensors")
    with pytest.raises(LoraError, match="too large"):
        extract_lora(tmp_path / "huge.safetensors", base, tmp_path / "lora.safetensors")
    assert extract_lora(tmp_path / "huge.safetensors", base, tmp_path / "lora.safetensors", dtype=torch.bfloat16).modules


def test_sides_of_several_networks(
    tmp_path: Path, pair: tuple[Path, Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, base, state = pair
    both = tmp_path / "both.pt"
    torch.save({"model": load_file(base), "ema": state}, both)
    extract_lora(tuned, base, tmp_path / "a.safetensors", 4)
    arguments = ["extract-lora", str(both), str(both), "-r", "4", "-o", str(tmp_path / "b.safetensors")]
    assert cli.main(arguments) == 1 and "--weights" in capsys.readouterr().err
    assert cli.main([*arguments, "--weights", "ema", "--base-weights", "model"]) == 0
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_merging_into_one_of_several_networks(
    tmp_path: Path, pair: tuple[Path, Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names what to write, and that works."""
    state, two, out = load_file(pair[1]), tmp_path / "two.pt", tmp_path / "out.safetensors"
    lora = write("diffusers", state).save(tmp_path / "lora.safetensors")
    torch.save({"model": state, "ema": {name: value * 2 for name, value in state.items()}}, two)
    arguments = ["merge-lora", str(two), "-l", f"{lora}:0.5:double.0", "-o", str(out)]
    assert cli.main(arguments) == 1
    assert "--weights ema or --weights model" in capsys.readouterr().err
    for name, times in (("model", 1), ("ema", 2)):
        assert cli.main([*arguments, "--weights", name, "--overwrite"]) == 0
        assert torch.equal(load_file(out)["img_in.proj.weight"], times * state["img_in.proj.weight"])
        with open_checkpoint(out) as merged:
            assert json.loads(merged.metadata["accvideo_merge"])["base"]["weights"] == name
    assert cli.main(["inspect", str(two), "--weights", "ema"]) == 0


def test_the_command_extracts_and_reports(
    tmp_path: Path, pair: tuple[Path, Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, base, state = pair
    out = tmp_path / "lora.safetensors"
    arguments = ["extract-lora", str(tuned), str(base), "-r", "8", "-o", str(out)]
    assert cli.main([*arguments, "--energy", "0.5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(out) and len(said["modules"]) == len(state)
    assert {module["rank"] for module in said["modules"]} <= {None, 1, 2, 3}
    assert cli.main(arguments) == 1 and "exists" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert "misses" in capsys.readouterr().out
    assert cli.main([*arguments, "--overwrite", "--energy", "2"]) == InvalidValueError.exit_code
