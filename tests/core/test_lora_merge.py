"""A merge is base + sum(strength * difference), in every format, held against float64 and against the tools' own merges."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import accvideo_core.lora.merge as merge_module
from accvideo_core import cli
from accvideo_core.checkpoint import open_checkpoint, save_original
from accvideo_core.checkpoint.wan import WanConfig, wan_shapes
from accvideo_core.dit import DiTConfig
from accvideo_core.errors import AccVideoError, InvalidValueError, LoraError, OutputError
from accvideo_core.lora import LoraUse, merge_lora, parse_blocks, parse_lora_use, read_lora
from accvideo_core.lora.arithmetic import add_differences
from tests.lora_files import FORMATS, WAN_FORMATS, write
from tests.networks import random_weights

SMALL = DiTConfig(hidden_size=128, num_heads=1, depth_double=2, depth_single=2, text_dim=24, pooled_dim=20)
SMALL_WAN = WanConfig(128, 1, 2, 256, 64, 36, 16, image_dim=80)
ROOT = Path(__file__).resolve().parents[2]


def wan_state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in wan_shapes(SMALL_WAN).items()}


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    return {"hunyuan-video": dict(random_weights(SMALL)), "wan": wan_state()}


@pytest.fixture
def base(tmp_path: Path, states: dict[str, dict[str, Tensor]]) -> Path:
    save_original(tmp_path / "base.safetensors", states["hunyuan-video"], {"made_by": "a test"})
    return tmp_path / "base.safetensors"


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest relative L2 error of any tensor; every tensor must be there."""
    assert got.keys() == want.keys()
    return max(float((got[name].double() - want[name]).norm() / want[name].norm()) for name in want)


CASES = [("hunyuan-video", name) for name in FORMATS] + [("wan", name) for name in WAN_FORMATS]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_format_merges_to_the_float64_result_on_all_modules(
    tmp_path: Path, states: dict[str, dict[str, Tensor]], family: str, name: str
) -> None:
    """Fused from split, the swapped final layer, differences of norms and biases: every matrix of the network is trained."""
    state = states[family]
    file = write(name, state)
    lora = file.save(tmp_path / "lora.safetensors")
    save_file(state, tmp_path / "base.safetensors")
    report = merge_lora(tmp_path / "base.safetensors", [LoraUse(lora, 0.7)], tmp_path / "out.safetensors")
    got, want = load_file(tmp_path / "out.safetensors"), file.merged(state, 0.7)
    matrices = {tensor for tensor, value in state.items() if value.ndim == 2 and tensor.endswith("weight")}
    assert matrices <= set(file.changes), "the file must touch every matrix for this to mean anything"
    assert report.changed == len(file.changes) and not report.left_out
    assert worst(got, want) < 3e-7
    for tensor in file.changes:
        difference = want[tensor] - state[tensor].double()
        assert float((got[tensor].double() - want[tensor]).norm() / difference.norm()) < 1e-5, tensor
    for tensor in set(state) - set(file.changes):
        assert torch.equal(got[tensor], state[tensor])


def test_several_loras_with_strengths_and_blocks_add_up(tmp_path: Path, base: Path, states: dict[str, dict[str, Tensor]]) -> None:
    state = states["hunyuan-video"]
    files = [write(name, state, seed) for seed, name in enumerate(("diffusers", "musubi / kohya", "kohya DoRA"))]
    uses = [
        LoraUse(files[0].save(tmp_path / "a.safetensors"), 1.5, parse_blocks("double.0,single=0.5")),
        LoraUse(files[1].save(tmp_path / "b.safetensors"), -0.25),
        LoraUse(files[2].save(tmp_path / "c.safetensors"), 0.5, parse_blocks("other")),
    ]
    merge_lora(base, uses, tmp_path / "out.safetensors")

    def first(tensor: str) -> float:
        return 1.5 if tensor.startswith("double_blocks.0.") else 0.75 if tensor.startswith("single_blocks.") else 0.0

    def third(tensor: str) -> float:
        return 0.0 if tensor.startswith(("double_blocks.", "single_blocks.")) else 0.5

    merged = [files[0].merged(state, first), files[1].merged(state, -0.25), files[2].merged(state, third)]
    want = {name: sum(m[name] - state[name].double() for m in merged) + state[name].double() for name in state}
    assert worst(load_file(tmp_path / "out.safetensors"), want) < 3e-7


# fp16 has 8 times bf16's steps, so the same fp32 sum lies 8 times as often across a rounding boundary.
@pytest.mark.parametrize(("stored", "limit"), [(torch.bfloat16, 1e-4), (torch.float16, 8e-4)])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float16, torch.float32])
def test_a_16_bit_merge_is_the_float64_result_rounded_once(
    tmp_path: Path, stored: torch.dtype, limit: float, factors: torch.dtype
) -> None:
    """Casting fp16 or fp32 factors to bf16 would mis-round about 12 % of the values, adding in bf16 about 4 %."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(1000, 768, generator=generator) * 0.03).to(stored)
    up = torch.randn(1000, 32, generator=generator).to(factors)
    down = (torch.randn(32, 768, generator=generator) * 0.002).to(factors)
    stem = "diffusion_model.single_blocks.0.linear2"
    save_file({f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}, tmp_path / "lora.safetensors")
    want = (weight.double() + 0.8 * up.double() @ down.double()).to(stored)
    with read_lora(tmp_path / "lora.safetensors") as lora:
        got = add_differences(weight.clone(), [(0.8, lora.modules["single_blocks.0.linear2.weight"])], stored)
    wrong = float((got != want).double().mean())
    assert got.dtype == stored and wrong <= limit
    naive = weight + (0.8 * up.to(stored) @ down.to(stored)).to(stored)
    assert float((naive != want).double().mean()) > 10 * limit, "the measure sees rounding"


def test_the_merged_file_is_the_network_and_says_what_it_was_made_of(
    tmp_path: Path, base: Path, states: dict[str, dict[str, Tensor]]
) -> None:
    lora = write("diffusers", states["hunyuan-video"]).save(tmp_path / "style.safetensors")
    report = merge_lora(base, [LoraUse(lora, 0.5, parse_blocks("double"))], tmp_path / "out.safetensors")
    with open_checkpoint(report.path) as merged:
        said = json.loads(merged.metadata["accvideo_merge"])
        assert merged.metadata["made_by"] == "a test" and merged.layout == "original"
    assert said["base"] == {"file": "base.safetensors", "sha256": hashlib.sha256(base.read_bytes()).hexdigest()}
    assert said["loras"] == [
        {
            "file": "style.safetensors",
            "sha256": hashlib.sha256(lora.read_bytes()).hexdigest(),
            "strength": 0.5,
            "blocks": "double",
        }
    ]
    assert report.metadata["accvideo_merge"] == json.dumps(said)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_kept_or_chosen(tmp_path: Path, states: dict[str, dict[str, Tensor]], dtype: torch.dtype) -> None:
    state = {name: value.to(torch.bfloat16) for name, value in states["hunyuan-video"].items()}
    state["img_in.proj.weight"] = state["img_in.proj.weight"].float()
    save_original(tmp_path / "base.safetensors", state)
    file = write("diffusion-pipe", state)
    lora = file.save(tmp_path / "lora.safetensors")
    kept = merge_lora(tmp_path / "base.safetensors", [lora], tmp_path / "kept.safetensors")
    chosen = merge_lora(tmp_path / "base.safetensors", [lora], tmp_path / "chosen.safetensors", dtype=dtype)
    want = file.merged(state)
    for name, value in load_file(kept.path).items():
        assert value.dtype == state[name].dtype
        assert float((value != want[name].to(value.dtype)).double().mean()) < 1e-2
    for name, value in load_file(chosen.path).items():
        assert value.dtype == dtype
        assert float((value.double() - want[name]).norm() / want[name].norm()) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_progress_counts_the_bytes_of_the_base_in_the_callers_thread(
    tmp_path: Path, base: Path, states: dict[str, dict[str, Tensor]]
) -> None:
    lora = write("diffusers", states["hunyuan-video"]).save(tmp_path / "lora.safetensors")
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        seen.append((done, total))

    merge_lora(base, [lora], tmp_path / "out.safetensors", progress=progress)
    total = sum(value.numel() * 4 for value in states["hunyuan-video"].values())
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted({done for done, _ in seen})


# ---- what must not happen ------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def refused(folder: Path, call: Callable[[], object], kind: type[AccVideoError], *words: str) -> None:
    """`call` raises `kind` with these words, and leaves the folder as it was."""
    before = files_of(folder)
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert files_of(folder) == before
    assert not any(thread.name.startswith("accvideo") for thread in threading.enumerate())


@pytest.fixture
def lora(tmp_path: Path, states: dict[str, dict[str, Tensor]]) -> Path:
    return write("diffusers", states["hunyuan-video"]).save(tmp_path / "lora.safetensors")


def test_the_output_may_be_no_input_and_nothing_is_overwritten_unasked(tmp_path: Path, base: Path, lora: Path) -> None:
    (tmp_path / "link.safetensors").hardlink_to(base)
    for out in (base, lora, tmp_path / "link.safetensors"):
        refused(tmp_path, lambda out=out: merge_lora(base, [lora], out, overwrite=True), OutputError, "one of the inputs")
    (tmp_path / "old.safetensors").write_bytes(b"precious")
    refused(tmp_path, lambda: merge_lora(base, [lora], tmp_path / "old.safetensors"), OutputError, "exists")
    merge_lora(base, [lora], tmp_path / "old.safetensors", overwrite=True)
    assert len(load_file(tmp_path / "old.safetensors")) > 1


def test_no_space_is_told_before_the_work(tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accvideo_core.files.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(merge_module, "_merge_all", None)
    refused(tmp_path, lambda: merge_lora(base, [lora], tmp_path / "out.safetensors"), OutputError, "are free", "GB")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file size limits")
def test_a_disk_that_fills_up_on_the_way_leaves_nothing(tmp_path: Path, base: Path, lora: Path) -> None:
    """Every write beyond the first megabyte fails, as on a full disk."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))\n"
        "from accvideo_core.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    before = files_of(tmp_path)
    arguments = ["merge-lora", str(base), "-l", str(lora), "-o", str(tmp_path / "out.safetensors")]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1 and "cannot write" in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert files_of(tmp_path) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, base: Path, lora: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(tmp_path, lambda: merge_lora(base, [lora], tmp_path / "locked" / "out.safetensors"), OutputError, "may write")


def test_an_output_that_is_no_file_is_refused(tmp_path: Path, base: Path, lora: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(tmp_path, lambda: merge_lora(base, [lora], tmp_path / "folder", overwrite=True), OutputError, "folder")
    refused(tmp_path, lambda: merge_lora(base, [lora], base / "out.safetensors"), OutputError, "not a folder")


def test_an_interrupt_ends_the_threads_and_leaves_nothing(tmp_path: Path, base: Path, lora: Path) -> None:
    before = files_of(tmp_path)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_lora(base, [lora], tmp_path / "out.safetensors", progress=stop)
    assert files_of(tmp_path) == before
    assert not any(thread.name.startswith("accvideo") for thread in threading.enumerate())


def test_killed_on_the_way_there_is_no_output_that_looks_whole(tmp_path: Path, base: Path, lora: Path) -> None:
    """SIGKILL while tensors are being written: no `out`, inputs untouched, and a second run succeeds beside what is left."""
    before = files_of(tmp_path)
    code = (
        "import sys, time\n"
        "import accvideo_core.lora.merge as m\n"
        "def slow(done, total):\n"
        "    print(done, flush=True)\n"
        "    time.sleep(0.05)\n"
        "m.merge_lora(sys.argv[1], [sys.argv[2]], sys.argv[3], progress=slow)\n"
    )
    out = tmp_path / "out.safetensors"
    process = subprocess.Popen([sys.executable, "-c", code, str(base), str(lora), str(out)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = files_of(tmp_path)
    assert not out.exists() and {name: left[name] for name in before} == before
    assert all(name.endswith(".tmp") for name in set(left) - set(before)), "what is left does not look like a model"
    merge_lora(base, [lora], out)
    assert len(load_file(out)) == len(load_file(base))


def test_a_base_that_ends_early_or_holds_nothing_known_is_refused(tmp_path: Path, base: Path, lora: Path) -> None:
    cut, out = tmp_path / "cut.safetensors", tmp_path / "out.safetensors"
    cut.write_bytes(base.read_bytes()[:-100])
    refused(tmp_path, lambda: merge_lora(cut, [lora], out), AccVideoError, "truncated")
    refused(tmp_path, lambda: merge_lora(lora, [lora], out), AccVideoError, "LoRA")
    refused(tmp_path, lambda: merge_lora(base, [base], out), LoraError, "no LoRA")
    refused(tmp_path, lambda: merge_lora(base, [], out), InvalidValueError, "no LoRA")


def test_a_lora_of_another_size_family_or_depth_is_refused_by_name(
    tmp_path: Path, base: Path, states: dict[str, dict[str, Tensor]]
) -> None:
    out = tmp_path / "out.safetensors"
    wider = write("diffusers", random_weights(DiTConfig(256, 2, 2, 2, 24, 20))).save(tmp_path / "wide.safetensors")
    refused(tmp_path, lambda: merge_lora(base, [wider], out), LoraError, "another model", "256")
    deeper = write("diffusers", random_weights(DiTConfig(128, 1, 3, 2, 24, 20))).save(tmp_path / "deep.safetensors")
    refused(tmp_path, lambda: merge_lora(base, [deeper], out), LoraError, "double_blocks.2", "allow unmatched")
    report = merge_lora(base, [deeper], out, allow_unmatched=True)
    assert any("double_blocks.2" in key for key in report.left_out) and "has no such tensor" in str(report.left_out)
    out.unlink()
    wan = write("diffusers", states["wan"]).save(tmp_path / "wan.safetensors")
    refused(tmp_path, lambda: merge_lora(base, [wan], out), LoraError, "for wan")
    blocks = parse_blocks("double.2-9")
    refused(tmp_path, lambda: merge_lora(base, [LoraUse(wider, 1, blocks)], out), AccVideoError)
    narrow = write("diffusers", states["hunyuan-video"]).save(tmp_path / "ok.safetensors")
    refused(
        tmp_path, lambda: merge_lora(base, [LoraUse(narrow, 1, blocks)], out), InvalidValueError, "nothing at double_blocks.2-9"
    )


def test_what_has_another_shape_is_left_out_by_blocks_or_by_allowing_it(
    tmp_path: Path, states: dict[str, dict[str, Tensor]]
) -> None:
    """A text-to-video LoRA of Wan has a patch embedding for 16 channels, image-to-video takes 36."""
    state, out = states["wan"], tmp_path / "out.safetensors"
    save_file(state, tmp_path / "i2v.safetensors")
    stem, embedding = "diffusion_model.blocks.0.self_attn.q", "patch_embedding.weight"
    tensors = {f"{stem}.lora_down.weight": torch.randn(4, 128), f"{stem}.lora_up.weight": torch.randn(128, 4)}
    alone = {"diffusion_model.patch_embedding.diff": torch.randn(128, 16, 1, 2, 2)}
    lora, useless = tmp_path / "t2v.safetensors", tmp_path / "useless.safetensors"
    save_file(tensors | alone, lora)
    save_file(alone, useless)

    def merge(use: Path | LoraUse, **options: bool) -> merge_module.MergeReport:
        return merge_lora(tmp_path / "i2v.safetensors", [use], out, **options)

    refused(tmp_path, lambda: merge(lora), LoraError, "128 x 64", "128 x 144", "t2v.safetensors:1:BLOCKS", "--allow-unmatched")
    refused(tmp_path, lambda: merge(useless, allow_unmatched=True), LoraError, "nothing of it fits", "128 x 64", "128 x 144")
    by_blocks = merge(LoraUse(lora, 1, parse_blocks("blocks")))
    assert by_blocks.changed == 1 and "strength is 0" in by_blocks.left_out[f"t2v.safetensors: {embedding}"]
    allowed = merge(lora, allow_unmatched=True, overwrite=True)
    assert allowed.changed == 1 and allowed.applied[0][1] == 1
    assert "128 x 64" in (why := allowed.left_out[f"t2v.safetensors: {embedding}"]) and "128 x 144" in why
    merged = load_file(out)
    assert [name for name in state if not torch.equal(merged[name], state[name])] == ["blocks.0.self_attn.q.weight"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_nothing_in_a_peft_folder_that_is_read_is_the_output(
    tmp_path: Path, base: Path, states: dict[str, dict[str, Tensor]], name: str
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    write("PEFT", states["hunyuan-video"]).save(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    refused(folder, lambda: merge_lora(base, [folder], folder / name, overwrite=True), OutputError, "one of the inputs")


@pytest.mark.parametrize("name", ["out.pt", "out.PTH", "out.bin", "out.ckpt", "out.gguf"])
def test_an_output_named_as_another_kind_of_file_is_refused(tmp_path: Path, base: Path, lora: Path, name: str) -> None:
    refused(tmp_path, lambda: merge_lora(base, [lora], tmp_path / name), OutputError, "safetensors is what is written", name)


def test_nan_factors_are_refused_even_late(tmp_path: Path, base: Path, lora: Path) -> None:
    tensors = load_file(lora)
    key = next(key for key in reversed(tensors) if "lora_B" in key)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    refused(tmp_path, lambda: merge_lora(base, [tmp_path / "nan.safetensors"], tmp_path / "o.safetensors"), LoraError, "NaN", key)


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "strength", "blocks"),
    [
        ("a.safetensors", "a.safetensors", 1.0, "all"),
        ("a.safetensors:0.8", "a.safetensors", 0.8, "all"),
        ("a.safetensors:-1:double.0-9,single=0.5", "a.safetensors", -1.0, "double.0-9,single=0.5"),
        ("a.safetensors::single", "a.safetensors", 1.0, "single"),
        (r"C:\loras\a.safetensors:.5", r"C:\loras\a.safetensors", 0.5, "all"),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0, "all"),
    ],
)
def test_a_lora_on_the_command_line(text: str, path: str, strength: float, blocks: str) -> None:
    use = parse_lora_use(text)
    assert (use.path, use.strength, use.blocks.text) == (Path(path), strength, blocks)


@pytest.mark.parametrize(
    "text", ["double.9-0", "triple", "double,double.3", "single=x", "other.3", "single=nan", "double.0,,single"]
)
def test_blocks_that_are_not_understood(text: str) -> None:
    with pytest.raises(InvalidValueError, match="double.0-9,single=0.5"):
        parse_blocks(text)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number(strength: float) -> None:
    with pytest.raises(InvalidValueError, match="strength"):
        LoraUse(Path("a"), strength)


def test_the_command_merges_and_reports(
    tmp_path: Path, base: Path, lora: Path, capsys: pytest.CaptureFixture[str], states: dict[str, dict[str, Tensor]]
) -> None:
    out = tmp_path / "out.safetensors"
    arguments = ["merge-lora", str(base), "-l", f"{lora}:0.5", "-l", f"{lora}:-0.5:single", "-o", str(out), "--dtype", "bf16"]
    assert cli.main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(out) and said["tensors"] == len(states["hunyuan-video"])
    assert cli.main(arguments) == 1 and "exists" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0
    text = capsys.readouterr().out
    assert "lora.safetensors" in text and str(out) in text and "strength -0.5" in text
    merged = load_file(out)
    linear = "single_blocks.0.linear1.weight"
    same = (merged[linear] == states["hunyuan-video"][linear].bfloat16()).double().mean()
    assert float(same) > 0.999, "the two cancel in the single blocks, to fp32's rounding"


def test_time_is_given_while_it_works(tmp_path: Path, base: Path, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert cli.main(["merge-lora", str(base), "-l", str(lora), "-o", str(tmp_path / "o.safetensors")]) == 0
    assert "merge" in capsys.readouterr().err and time.monotonic() - began < 60


def test_a_base_in_shards_is_hashed_whole_and_protected(tmp_path: Path, base: Path, lora: Path) -> None:
    state = load_file(base)
    names = sorted(state)
    folder = tmp_path / "model"
    folder.mkdir()
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in shards.items():
        save_file({name: state[name] for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "notes.txt").write_text("no weights")
    report = merge_lora(folder, [lora], tmp_path / "sharded.safetensors")
    whole = b"".join((folder / file).read_bytes() for file in ("model.safetensors.index.json", *shards))
    assert json.loads(report.metadata["accvideo_merge"])["base"]["sha256"] == hashlib.sha256(whole).hexdigest()
    merge_lora(base, [lora], tmp_path / "single.safetensors")
    one, other = load_file(tmp_path / "sharded.safetensors"), load_file(tmp_path / "single.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(OutputError, match="one of the inputs"):
        merge_lora(folder, [lora], folder / "b.safetensors", overwrite=True)
