"""What a merged checkpoint is stored as: fp8 by chance keeps what a LoRA adds, scaled fp8 reads back, a base's form is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accvideo_core.checkpoint import open_checkpoint
from accvideo_core.dit import DiTConfig
from accvideo_core.errors import InvalidValueError, LoraError
from accvideo_core.lora import LoraUse, merge_lora
from accvideo_core.lora.storage import DTYPES, round_by_chance
from tests.lora_files import LoraFile, write
from tests.networks import random_weights

FP8 = torch.float8_e4m3fn
SMALL = DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=2, text_dim=24, pooled_dim=20)


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, Path, dict[str, Tensor], LoraFile]:
    state = {name: value.bfloat16() for name, value in random_weights(SMALL).items()}
    save_file(state, tmp_path / "base.safetensors")
    file = write("ComfyUI / KJ extraction", state, trained=r"single_blocks\.")
    return tmp_path / "base.safetensors", file.save(tmp_path / "lora.safetensors"), state, file


def test_rounding_by_chance_takes_one_of_the_two_neighbours_and_keeps_the_mean() -> None:
    every = torch.arange(256).to(torch.uint8).view(FP8).float()
    grid = every[every.isfinite()].unique()
    values = torch.cat([torch.linspace(-470, 470, 901), torch.linspace(-0.02, 0.02, 901), torch.logspace(-12, 2, 301), grid])
    draws = torch.stack([round_by_chance(values, FP8, f"{i}").float() for i in range(400)]).double()
    clamped = values.clamp(-448, 448)
    place = torch.searchsorted(grid, clamped)
    above = grid[place.clamp_max(len(grid) - 1)]
    below = torch.where(above == clamped, above, grid[(place - 1).clamp_min(0)])
    assert bool(((draws == above) | (draws == below)).all())
    error = (draws.mean(0) - clamped).abs()
    assert bool((error <= 4 * 0.5 * (above - below) / 400**0.5 + 1e-12).all()), "mean within 4 standard errors"
    assert torch.equal(draws[0, -len(grid) :], grid.double()), "what fp8 holds stays"
    assert torch.equal(round_by_chance(values, FP8, "a").float(), round_by_chance(values, FP8, "a").float())
    assert not torch.equal(round_by_chance(values, FP8, "a").float(), round_by_chance(values, FP8, "b").float())


def test_fp8_is_for_the_weights_of_linears(tmp_path: Path, base: tuple[Path, Path, dict[str, Tensor], LoraFile]) -> None:
    path, lora, state, file = base
    got = load_file(merge_lora(path, [lora], tmp_path / "out.safetensors", dtype=DTYPES["fp8_e4m3fn"]).path)
    for name, value in state.items():
        linear = value.ndim == 2 and name.endswith("weight")
        assert got[name].dtype == (FP8 if linear else torch.bfloat16)
        if linear and name not in file.changes:
            assert torch.equal(got[name].float(), value.to(FP8).float()), "unchanged: to nearest"


def test_a_small_lora_is_not_swallowed_by_a_base_that_is_fp8_already(
    tmp_path: Path, base: tuple[Path, Path, dict[str, Tensor], LoraFile]
) -> None:
    """At strength 0.02 most of what is added is less than half a step: to nearest little would be left of it."""
    _, lora, state, file = base
    fp8 = {name: value.to(FP8) for name, value in state.items()}
    save_file(fp8, tmp_path / "fp8.safetensors")
    got = load_file(merge_lora(tmp_path / "fp8.safetensors", [LoraUse(lora, 0.02)], tmp_path / "out.safetensors").path)
    before = {name: value.double() for name, value in fp8.items()}
    want = file.merged({name: value.float() for name, value in fp8.items()}, 0.02)
    matrices = [name for name in file.changes if state[name].ndim == 2]
    assert matrices
    for name in matrices:
        added = want[name] - before[name]

        def share(values: Tensor, name: str = name, added: Tensor = added) -> float:
            return float(((values.double() - before[name]) * added).sum() / added.square().sum())

        assert abs(share(got[name]) - 1) < 0.15, name
        assert share(want[name].to(FP8)) < 0.5, "the measure sees it"


@pytest.mark.parametrize("again", [False, True])
def test_scaled_fp8_reads_back_to_its_rounding_and_is_kept(
    tmp_path: Path, base: tuple[Path, Path, dict[str, Tensor], LoraFile], again: bool
) -> None:
    path, lora, state, file = base
    out = merge_lora(path, [lora], tmp_path / "scaled.safetensors", dtype=DTYPES["scaled_fp8"]).path
    want = file.merged(state)
    if again:
        with open_checkpoint(out) as once:
            before = once.state_dict()
            stored = {key: once.read_stored(key) for key in once}
        second = write("diffusers", state, seed=1, trained=r"double_blocks\.0\.img")
        lora = second.save(tmp_path / "second.safetensors")
        out = merge_lora(out, [lora], tmp_path / "twice.safetensors").path
        want = second.merged(before)
    with open_checkpoint(out) as merged:
        assert merged.quantisation == "comfyui scaled fp8"
        for key in merged:
            linear = len(merged.shape(key)) == 2 and key.endswith("weight")
            assert merged.is_quantised(key) == linear
            limit = 0.05 if linear else 5e-3
            assert float((merged.read(key).double() - want[key]).norm()) <= limit * float(want[key].norm()), key
            if again and key not in second.changes:
                assert torch.equal(merged.read_stored(key).view(torch.uint8), stored[key].view(torch.uint8)), "untouched bytes"


def test_a_plain_fp8_base_stays_plain_fp8(tmp_path: Path, base: tuple[Path, Path, dict[str, Tensor], LoraFile]) -> None:
    _, lora, state, file = base
    fp8 = {name: value.to(FP8) for name, value in state.items()}
    save_file(fp8, tmp_path / "fp8.safetensors")
    got = load_file(merge_lora(tmp_path / "fp8.safetensors", [lora], tmp_path / "out.safetensors").path)
    want = file.merged({name: value.float() for name, value in fp8.items()})
    for name, value in got.items():
        assert value.dtype == FP8
        if name in file.changes:
            assert float((value.double() - want[name]).norm()) <= 0.06 * float(want[name].norm())
        else:
            assert torch.equal(value.view(torch.uint8), fp8[name].view(torch.uint8))


def test_what_cannot_be_stored_is_an_error_before_or_at_the_value(
    tmp_path: Path, base: tuple[Path, Path, dict[str, Tensor], LoraFile]
) -> None:
    _, lora, state, _ = base
    large = dict(state)
    large["single_blocks.0.linear2.weight"] = state["single_blocks.0.linear2.weight"] * 1e6
    large["txt_in.c_embedder.linear_1.weight"] = state["txt_in.c_embedder.linear_1.weight"] * 1e7
    save_file(large, tmp_path / "large.safetensors")
    with pytest.raises(LoraError, match="fp16 cannot hold"):
        merge_lora(tmp_path / "large.safetensors", [lora], tmp_path / "out.safetensors", dtype=torch.float16)
    nan = {name: value.clone() for name, value in state.items()}
    nan["single_blocks.1.linear1.weight"][5, 5] = float("nan")
    save_file(nan, tmp_path / "nan.safetensors")
    with pytest.raises(LoraError, match=r"single_blocks.1.linear1.weight.*NaN"):
        merge_lora(tmp_path / "nan.safetensors", [lora], tmp_path / "out.safetensors")
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "q8.gguf", "hyvid")
    for name, value in state.items():
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            data = gguf.quants.quantize(value.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        elif value.ndim > 4:
            writer.add_tensor(name, value.float().numpy().reshape(len(value), -1))
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(value.shape))
        else:
            writer.add_tensor(name, value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidValueError, match=r"gguf.*choose a dtype"):
        merge_lora(tmp_path / "q8.gguf", [lora], tmp_path / "out.safetensors")
    merged = load_file(merge_lora(tmp_path / "q8.gguf", [lora], tmp_path / "out.safetensors", dtype=torch.bfloat16).path)
    assert merged.keys() == state.keys()
