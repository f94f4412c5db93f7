"""What a merged checkpoint is stored as: fp8 by chance keeps what a LoRA adds, scaled fp8 reads back, a base's form is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accvideo_core.checkpoint import open_checkpoint
from accvideo_core.dit import DiTConfig
from accvideo_core.errors import AccVideoError, InvalidValueError, LoraError
from accvideo_core.lora import LoraUse, merge_lora
from accvideo_core.lora.storage import DTYPES, round_by_chance
from tests.checkpoint_files import HUNYUAN, HUNYUAN_WRITERS, random_state
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


@pytest.mark.parametrize(
    "name", ["plain fp8", "tencent fp8", "scaled fp8 native", "scaled fp8 prefixed", "scaled fp8 blocks only", "quantised fp8"]
)
def test_a_base_in_fp8_is_kept_so_and_its_untouched_tensors_to_the_byte(tmp_path: Path, name: str) -> None:
    """Every weight has the dtype it had, what changed is rounded to it once, and the file is as large as the base's."""
    written = HUNYUAN_WRITERS[name](tmp_path, random_state(HUNYUAN))
    file = write(
        "ComfyUI / KJ extraction", {key: t.float() for key, t in written.state.items()}, trained=r"single_blocks\.0|t_emb"
    )
    lora = file.save(tmp_path / "lora.safetensors")
    out = merge_lora(written.path, [lora], tmp_path / "out.safetensors").path
    want = file.merged({key: t.float() for key, t in written.state.items()})
    with open_checkpoint(written.path) as before, open_checkpoint(out) as after:
        assert after.quantisation == ("plain fp8" if name == "plain fp8" else "comfyui scaled fp8")
        assert sum(after.nbytes(key) for key in after) == sum(before.nbytes(key) for key in before)
        for key in before:
            assert after.stored_dtype(key) == before.stored_dtype(key) and after.is_quantised(key) == before.is_quantised(key)
            if key in file.changes:
                limit = 0.06 if before.stored_dtype(key) == FP8 else 4e-3
                assert float((after.read(key).double() - want[key]).norm()) <= limit * float(want[key].norm()), key
            else:
                assert torch.equal(after.read_stored(key).view(torch.uint8), before.read_stored(key).view(torch.uint8)), key
                assert torch.equal(after.read(key).float(), before.read(key).float()), key


@pytest.mark.parametrize("name", ["scaled fp8 by rows", "scaled fp8 by blocks", "quantised fp8 e5m2", "gguf Q8_0"])
def test_a_quantisation_that_cannot_be_kept_is_refused_and_can_be_replaced(tmp_path: Path, name: str) -> None:
    """Requantising with one scale would round every weight, e5m2 as e4m3 would be another dtype: neither goes unsaid."""
    written = HUNYUAN_WRITERS[name](tmp_path, random_state(HUNYUAN))
    state = {key: t.float() for key, t in written.state.items()}
    file = write("diffusion-pipe", state, trained=r"single_blocks\.0")
    lora = file.save(tmp_path / "lora.safetensors")
    with pytest.raises(InvalidValueError, match="choose a dtype"):
        merge_lora(written.path, [lora], tmp_path / "out.safetensors")
    want = file.merged(state)
    for dtype, limit in ((torch.bfloat16, 4e-3), (DTYPES["scaled_fp8"], 0.04)):
        with open_checkpoint(merge_lora(written.path, [lora], tmp_path / f"{limit}.safetensors", dtype=dtype).path) as merged:
            assert all(float((merged.read(key).double() - want[key]).norm()) <= limit * float(want[key].norm()) for key in merged)


@pytest.mark.parametrize(
    ("dtype", "value", "place"),
    [
        ("fp16", 1e5, "changed"),
        ("fp16", 1e5, "untouched"),
        ("fp8_e4m3fn", 500.0, "changed"),
        ("fp8_e4m3fn", 500.0, "untouched"),
        ("keep", float("nan"), "changed"),
        ("keep", float("nan"), "untouched"),
        ("bf16", float("inf"), "untouched"),
        ("scaled_fp8", float("nan"), "untouched"),
    ],
)
def test_a_value_that_cannot_be_stored_is_an_error_naming_the_tensor(
    tmp_path: Path, base: tuple[Path, Path, dict[str, Tensor], LoraFile], dtype: str, value: float, place: str
) -> None:
    _, lora, state, _ = base
    key = "single_blocks.1.linear1.weight" if place == "changed" else "double_blocks.0.img_mlp.fc1.weight"
    state = {name: tensor.clone() for name, tensor in state.items()}
    state[key][5, 5] = value
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(AccVideoError, match=rf"{key}.*({dtype} cannot hold|NaN|finite)"):
        merge_lora(tmp_path / "broken.safetensors", [lora], tmp_path / "out.safetensors", dtype=DTYPES[dtype])
    assert not (tmp_path / "out.safetensors").exists()


def test_a_sum_that_the_bases_own_fp16_cannot_hold_is_an_error(
    tmp_path: Path, base: tuple[Path, Path, dict[str, Tensor], LoraFile]
) -> None:
    _, lora, state, _ = base
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "fp16.safetensors")
    with pytest.raises(LoraError, match="fp16 cannot hold"):
        merge_lora(tmp_path / "fp16.safetensors", [LoraUse(lora, 1e7)], tmp_path / "out.safetensors")
