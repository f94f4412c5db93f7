"""`accvideo convert`: exact where nothing is rounded, rounded once where it is, and nothing half written."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accvideo_core.checkpoint import holds_lora, open_checkpoint
from accvideo_core.checkpoint.convert import convert
from accvideo_core.cli import main
from accvideo_core.errors import AccVideoError, CheckpointError, InvalidValueError, OutputError
from tests.checkpoint_files import (
    HUNYUAN,
    HUNYUAN_WRITERS,
    WAN_I2V,
    WAN_T2V,
    is_linear,
    module_and_ema,
    plain_fp8,
    random_state,
    scaled_fp8,
    tencent_fp8,
    to_comfyui,
)

CONFIGS = {"hunyuan": HUNYUAN, "wan t2v": WAN_T2V, "wan i2v": WAN_I2V}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def read(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.state_dict()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float()), name


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(random_state(HUNYUAN), tmp_path / "source.safetensors", {"recipe": "a test"})
    return tmp_path / "source.safetensors"


class TestRoundTrips:
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_through_every_layout_and_back_is_exact(self, tmp_path, config, dtype):
        state = random_state(config, dtype=dtype)
        save_file(state, tmp_path / "a")
        convert(tmp_path / "a", tmp_path / "b", "comfyui")
        convert(tmp_path / "b", tmp_path / "c", "diffusers", shard_bytes=600_000)
        convert(tmp_path / "c", tmp_path / "d", "original")
        with open_checkpoint(tmp_path / "b") as b, open_checkpoint(tmp_path / "c") as c, open_checkpoint(tmp_path / "d") as d:
            assert b.layout == ("comfyui-native" if config == HUNYUAN else "original")
            assert c.layout == "diffusers" and "shards" in c.container and d.layout == "original"
            for checkpoint in (b, c, d):
                assert_same(checkpoint.state_dict(), state)
        assert load_file(tmp_path / "a").keys() == load_file(tmp_path / "d").keys()

    @pytest.mark.parametrize("name", [n for n in HUNYUAN_WRITERS if "diffusers" not in n])
    def test_every_layout_users_have_becomes_bf16_by_one_rounding(self, tmp_path, name):
        pytest.importorskip("gguf")
        written = HUNYUAN_WRITERS[name](tmp_path, random_state(HUNYUAN))
        convert(written.path, tmp_path / "out", "comfyui", "bf16")
        assert_same(read(tmp_path / "out"), {key: tensor.bfloat16() for key, tensor in written.state.items()})

    def test_diffusers_itself_loads_the_folder(self, tmp_path, source):
        diffusers = pytest.importorskip("diffusers")
        from tests.checkpoint_files import diffusers_model

        for config, kind in ((HUNYUAN, "HunyuanVideo"), (WAN_T2V, "Wan"), (WAN_I2V, "Wan")):
            state = random_state(config)
            save_file(state, tmp_path / "s")
            convert(tmp_path / "s", tmp_path / "folder", "diffusers", shard_bytes=900_000, overwrite=True)
            loaded, told = getattr(diffusers, f"{kind}Transformer3DModel").from_pretrained(
                tmp_path / "folder", output_loading_info=True
            )
            assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            expected = diffusers_model(state)
            assert_same(loaded.state_dict(), expected.state_dict())
            ours, theirs = (
                {k: list(v) if isinstance(v, tuple) else v for k, v in network.config.items() if k[0] != "_"}
                for network in (loaded, expected)
            )
            assert ours == theirs

    def test_comfyui_names_are_those_every_version_reads(self, tmp_path, source):
        """ComfyUI 0.3.64 knows the qk-norms' weight as `scale` alone; later versions rename it."""
        convert(source, tmp_path / "out", "comfyui")
        assert load_file(tmp_path / "out").keys() == {to_comfyui(name, "scale") for name in random_state(HUNYUAN)}


class TestDtypes:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_tensor_is_rounded_once(self, tmp_path, source, dtype):
        convert(source, tmp_path / "out", "original", dtype)
        assert_same(read(tmp_path / "out"), {key: t.to(DTYPES[dtype]) for key, t in random_state(HUNYUAN).items()})

    def test_plain_fp8_casts_linears_alone(self, tmp_path, source):
        convert(source, tmp_path / "out", "comfyui", "fp8_e4m3fn")
        state = random_state(HUNYUAN)
        assert_same(read(tmp_path / "out"), {k: t.to(torch.float8_e4m3fn) if is_linear(k, t) else t for k, t in state.items()})
        with open_checkpoint(tmp_path / "out") as checkpoint:
            assert checkpoint.quantisation == "plain fp8"

    @pytest.mark.parametrize("layout", ["original", "comfyui"])
    def test_scaled_fp8_is_fp8_s_precision_of_each_tensor(self, tmp_path, source, layout):
        convert(source, tmp_path / "out", layout, "scaled_fp8")
        state, found = random_state(HUNYUAN), read(tmp_path / "out")
        stored = load_file(tmp_path / "out")
        assert stored["scaled_fp8"].numel() == 2 and stored["scaled_fp8"].dtype == torch.float8_e4m3fn
        for name, tensor in state.items():
            if is_linear(name, tensor):
                assert 1e-3 < float((found[name] - tensor).norm() / tensor.norm()) < 0.03
            else:
                assert torch.equal(found[name], tensor)
        with open_checkpoint(tmp_path / "out") as checkpoint:
            assert checkpoint.quantisation == "comfyui scaled fp8"
            assert float(checkpoint.read_stored("final_layer.linear.weight").float().abs().max()) == 448

    @pytest.mark.parametrize("writer", [scaled_fp8(inputs=True), tencent_fp8])
    def test_scaled_fp8_stays_the_same_bytes_in_another_layout(self, tmp_path, writer):
        written = writer(tmp_path, random_state(HUNYUAN))
        convert(written.path, tmp_path / "out", "comfyui")
        assert_same(read(tmp_path / "out"), written.state)
        with open_checkpoint(written.path) as a, open_checkpoint(tmp_path / "out") as b:
            key = "single_blocks.1.linear1.weight"
            assert torch.equal(a.read_stored(key).view(torch.uint8), b.read_stored(key).view(torch.uint8))
            assert torch.equal(a.scaled(key).scale.reshape(()), b.scaled(key).scale)

    def test_what_cannot_be_kept_is_refused(self, tmp_path):
        pytest.importorskip("gguf")
        for name, layout in (("gguf Q8_0", "original"), ("scaled fp8 native", "diffusers"), ("scaled fp8 by rows", "comfyui")):
            path = HUNYUAN_WRITERS[name](tmp_path, random_state(HUNYUAN)).path
            with pytest.raises(InvalidValueError, match="choose a --dtype"):
                convert(path, tmp_path / "out", layout)
        with pytest.raises(InvalidValueError, match="diffusers has no scaled fp8"):
            convert(path, tmp_path / "out", "diffusers", "scaled_fp8")

    @pytest.mark.parametrize(("dtype", "value"), [("fp16", 70_000.0), ("fp8_e4m3fn", 500.0)])
    def test_values_a_dtype_cannot_hold_are_an_error_naming_them(self, tmp_path, dtype, value):
        state = random_state(HUNYUAN)
        state["final_layer.linear.weight"][0, 0] = value
        save_file(state, tmp_path / "a")
        with pytest.raises(CheckpointError, match=rf"final_layer.linear.weight reaches {value:g}"):
            convert(tmp_path / "a", tmp_path / "out", "original", dtype)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]

    @pytest.mark.parametrize("dtype", ["stored", "bf16", "fp8_e4m3fn", "scaled_fp8"])
    def test_nan_is_an_error_naming_the_tensor(self, tmp_path, dtype):
        state = random_state(HUNYUAN)
        state["final_layer.linear.weight"][0, 0] = float("nan")
        save_file(state, tmp_path / "a")
        with pytest.raises(CheckpointError, match=r"final_layer.linear.weight.*(NaN|finite)"):
            convert(tmp_path / "a", tmp_path / "out", "original", dtype)

    def test_plain_fp8_becomes_bf16_exactly(self, tmp_path):
        written = plain_fp8(tmp_path, random_state(HUNYUAN))
        convert(written.path, tmp_path / "out", "original", "bf16")
        assert_same(read(tmp_path / "out"), {key: t.bfloat16() for key, t in written.state.items()})

    def test_metadata_and_the_other_network_of_a_pt(self, tmp_path, source):
        convert(source, tmp_path / "a")
        path = module_and_ema(tmp_path, random_state(HUNYUAN)).path
        report = convert(path, tmp_path / "b", weights="ema")
        with open_checkpoint(tmp_path / "a") as a, open_checkpoint(tmp_path / "b") as b:
            assert a.metadata["recipe"] == "a test"
            assert torch.equal(b.read("img_in.proj.bias"), random_state(HUNYUAN)["img_in.proj.bias"] + 1)
        assert "it also holds one under 'module'" in report.notes


class TestOutput:
    @pytest.mark.parametrize("layout", ["original", "diffusers"])
    def test_an_output_that_exists_is_kept_unless_told(self, tmp_path, source, layout):
        convert(source, tmp_path / "out", layout)
        with pytest.raises(OutputError, match="exists"):
            convert(source, tmp_path / "out", layout)
        convert(source, tmp_path / "out", layout, "bf16", overwrite=True)
        assert_same(read(tmp_path / "out"), {key: t.bfloat16() for key, t in random_state(HUNYUAN).items()})
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source.safetensors"]

    def test_the_input_is_never_the_output(self, tmp_path, source):
        before = source.read_bytes()
        os.link(source, tmp_path / "link")
        for out in (source, tmp_path / "link"):
            with pytest.raises(OutputError, match="one of the inputs"):
                convert(source, out, overwrite=True)
        assert source.read_bytes() == before

    @pytest.mark.parametrize("where", ["file", "deep", "link to it", "link in it", "shards", "pipeline", "map"])
    def test_a_folder_that_holds_an_input_is_refused(self, tmp_path, source, where):
        """It is replaced as a whole, so the input would go with it."""
        if os.name == "nt" and where in ("link to it", "link in it", "map"):
            pytest.skip("Windows lets few users make links")
        models = tmp_path / "models"
        models.mkdir()
        given, out = models / "dit.safetensors", models
        if where == "file":
            os.rename(source, given)
        elif where == "deep":
            (models / "deep").mkdir()
            os.rename(source, models / "deep" / "a")
            given = Path(os.path.relpath(models / "deep" / "a"))
        elif where == "link to it":
            os.rename(source, models / "blob")
            given = tmp_path / "link"
            given.symlink_to(models / "blob")
        elif where == "link in it":
            given.symlink_to(source)
        elif where == "shards":
            convert(source, models, "diffusers", shard_bytes=600_000, overwrite=True)
            given = models / "diffusion_pytorch_model.safetensors.index.json"
        elif where == "pipeline":
            given, out = models, models / "transformer"
            convert(source, out, "diffusers")
            (models / "model_index.json").write_text("{}")
        else:
            given = tencent_fp8(tmp_path, random_state(HUNYUAN)).path
            os.rename(given.with_name(given.stem + "_map.pt"), models / "map")
            given.with_name(given.stem + "_map.pt").symlink_to(models / "map")
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(OutputError, match=r"the input .* lies in the output .*; choose another folder|one of the inputs"):
            convert(given, out, "diffusers", "bf16", overwrite=True)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_a_folder_that_holds_anything_else_is_refused_and_named(self, tmp_path, source):
        out = tmp_path / "models"
        convert(source, out, "diffusers", shard_bytes=600_000)
        assert len(list(out.iterdir())) > 3
        convert(source, out, "diffusers", "bf16", overwrite=True)  # in fewer files: the others go, being this writer's
        assert {path.name for path in out.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
        for other in ("README.md", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors.bak"):
            (out / other).write_bytes(b"mine")
        (out / "loras").mkdir()
        before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
        done = []
        told = r"also holds README.md, .*fp16.safetensors, .*\.bak, loras, which would be lost.*move that elsewhere"
        with pytest.raises(OutputError, match=told):
            convert(source, out, "diffusers", overwrite=True, progress=lambda *told: done.append(told))
        assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before and not done

    def test_what_comes_into_the_folder_meanwhile_is_kept(self, tmp_path, source):
        out = tmp_path / "out"

        def save(done: int, total: int) -> None:
            out.mkdir(exist_ok=True)
            (out / "mine.txt").write_text("mine")

        with pytest.raises(OutputError, match=r"cannot write .*out"):  # it was not there when the work began
            convert(source, out, "diffusers", progress=save)
        assert [path.name for path in out.iterdir()] == ["mine.txt"]
        (out / "mine.txt").unlink()
        convert(source, out, "diffusers", overwrite=True)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(OutputError, match=r"also holds mine.txt"):
            convert(source, out, "diffusers", "bf16", overwrite=True, progress=save)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before | {"mine.txt": b"mine"}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source.safetensors"]

    def test_one_file_of_a_source_is_never_the_output(self, tmp_path, source):
        convert(source, tmp_path / "folder", "diffusers", shard_bytes=600_000)
        scaled = tencent_fp8(tmp_path, random_state(HUNYUAN)).path
        for given, out in (
            (tmp_path / "folder", sorted((tmp_path / "folder").glob("*.safetensors"))[0]),
            (scaled, scaled.with_name(scaled.stem + "_map.pt")),
        ):
            before = out.read_bytes()
            with pytest.raises(OutputError, match="one of the inputs"):
                convert(given, out, dtype="bf16", overwrite=True)
            assert out.read_bytes() == before

    def test_a_folder_without_a_name_of_its_own(self, tmp_path, source, monkeypatch):
        (tmp_path / "inside").mkdir()
        monkeypatch.chdir(tmp_path / "inside")
        with pytest.raises(OutputError, match=r"'\.' has no name of its own"):
            convert(source, ".", "diffusers", overwrite=True)

    @pytest.mark.skipif(os.name == "nt", reason="Windows cannot flush a folder")
    def test_everything_in_a_folder_is_flushed_before_it_has_its_name(self, tmp_path, source, monkeypatch):
        out, order = tmp_path / "out", []
        fsync, replace = os.fsync, os.replace

        def note_fsync(handle: int) -> None:
            order.append(os.fstat(handle).st_ino)
            fsync(handle)

        def note_replace(a: Path, b: Path) -> None:
            replace(a, b)
            order.extend(["named"] if b == out else [])

        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(os, "replace", note_replace)
        convert(source, out, "diffusers", shard_bytes=600_000)
        named = order.index("named")
        lacking = [path.name for path in (out, *out.iterdir()) if path.stat().st_ino not in order[:named]]
        assert not lacking and order[named + 1 :] == [tmp_path.stat().st_ino]

    def test_a_folder_is_no_file(self, tmp_path, source):
        (tmp_path / "folder").mkdir()
        with pytest.raises(OutputError, match="is a folder"):
            convert(source, tmp_path / "folder", overwrite=True)

    def test_a_disk_too_small_is_found_before_the_work(self, tmp_path, source, monkeypatch):
        import shutil

        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(OutputError, match=r"only 0.00 GB are free"):
            convert(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("layout", ["original", "diffusers"])
    def test_interrupted_anywhere_nothing_is_left(self, tmp_path, source, layout):
        for stop in (1, 20, 50):
            calls = itertools.count(-stop)

            def progress(done: int, total: int, calls=calls) -> None:
                if next(calls) == 0:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                convert(source, tmp_path / "out", layout, shard_bytes=500_000, progress=progress)
            assert [p.name for p in tmp_path.iterdir()] == ["source.safetensors"]

    @pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
    def test_killed_it_leaves_no_file_that_looks_whole(self, tmp_path, source):
        code = (
            "import os, signal, sys\nfrom accvideo_core.checkpoint.convert import convert\n"
            "def die(done, total):\n    if done > total / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
            "convert(sys.argv[1], sys.argv[2], sys.argv[3], shard_bytes=500_000, progress=die)\n"
        )
        before = source.read_bytes()
        for layout in ("original", "diffusers"):
            out = tmp_path / layout
            run = subprocess.run([sys.executable, "-c", code, str(source), str(out), layout])
            assert run.returncode == -9 and not out.exists() and source.read_bytes() == before
        for left in tmp_path.iterdir():
            assert left == source or left.suffix == ".tmp"


class TestCommand:
    def test_it_says_what_it_wrote(self, tmp_path, source, capsys):
        assert main(["convert", str(source), str(tmp_path / "out"), "--dtype", "bf16", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["tensors"] == len(random_state(HUNYUAN)) and report["files"] == 1
        assert main(["convert", str(source), str(tmp_path / "folder"), "--layout", "diffusers"]) == 0
        assert "1 file(s)" in capsys.readouterr().out

    def test_failures_are_one_line_and_a_code(self, tmp_path, source, capsys):
        assert main(["convert", str(source), str(source), "--overwrite"]) == 1
        assert main(["convert", str(tmp_path / "none"), str(tmp_path / "out")]) == 1
        assert main(["convert", str(source), str(tmp_path / "out"), "--dtype", "int8"]) == 2
        assert "one of the inputs" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["out.pt", "out.pth", "out.BIN", "out.ckpt", "out.gguf"])
    def test_a_file_named_as_another_kind_is_refused(self, tmp_path, source, name):
        with pytest.raises(OutputError, match=rf"{name}.*safetensors is what is written; name it out\.safetensors"):
            convert(source, tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]
        convert(source, tmp_path / name, "diffusers")  # a folder may have any name

    @pytest.mark.parametrize("size", ["nan", "inf", "0", "-1", "1e-12"])
    def test_shards_of_no_size(self, tmp_path, source, capsys, size):
        arguments = ["convert", str(source), str(tmp_path / "out"), "--layout", "diffusers", f"--shard-gb={size}"]
        assert main(arguments) == InvalidValueError.exit_code
        assert f"--shard-gb {size} is no size" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_inspect_knows_a_lora(self, tmp_path, source, capsys):
        save_file(
            {
                "diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": torch.ones(2, 128),
                "diffusion_model.double_blocks.0.img_attn_qkv.lora_B.weight": torch.ones(384, 2),
            },
            tmp_path / "lora.safetensors",
        )
        assert holds_lora(tmp_path / "lora.safetensors") and not holds_lora(source)
        assert main(["inspect", str(tmp_path / "lora.safetensors"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kind"] == "lora"
        assert main(["inspect", str(tmp_path / "lora.safetensors")]) == 0
        assert "lora" in capsys.readouterr().out
        assert main(["inspect", str(tmp_path / "lora.safetensors"), "--step"]) == 2
        assert main(["inspect", str(source)]) == 0

    def test_errors_are_ours(self, tmp_path):
        (tmp_path / "f").write_bytes(b"\0" * 100)
        with pytest.raises(AccVideoError):
            convert(tmp_path / "f", tmp_path / "out")
