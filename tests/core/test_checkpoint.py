"""Weight files: any supported naming opens to the same tensors, and nothing that does not fit passes quietly."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from accvideo_core.checkpoint import (
    SafetensorsFile,
    expected_shapes,
    infer_config,
    load_student,
    open_checkpoint,
    save_original,
    write_safetensors,
)
from accvideo_core.checkpoint.layouts import COMFYUI_NATIVE, HUNYUAN, ORIGINAL
from accvideo_core.dit import Conditioning, DiTConfig, HunyuanVideoDiT
from accvideo_core.errors import AccVideoError, CheckpointError, OutputError
from tests.checkpoint_files import HUNYUAN as HUNYUAN_CONFIG
from tests.checkpoint_files import HUNYUAN_WRITERS, PREFIXES, random_state, to_comfyui

SMALL = DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=2, text_dim=24, pooled_dim=20)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_state(SMALL)


@pytest.fixture
def file(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_original(tmp_path / "model.safetensors", state, {"made_by": "a test"})
    return tmp_path / "model.safetensors"


def assert_same(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def error_of(path: Path) -> str:
    """The message of the one-line CheckpointError that opening `path` raises; it names the path."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


class TestLayouts:
    @pytest.mark.parametrize("prefix", PREFIXES)
    @pytest.mark.parametrize("naming", ["original", "native-weight", "native-scale"])
    def test_every_naming_and_prefix_opens_to_the_same_tensors(self, tmp_path, state, naming, prefix):
        leaf = naming.partition("-")[2] or "weight"
        rename = (lambda n: n) if naming == "original" else (lambda n: to_comfyui(n, leaf))
        path = tmp_path / "file.bin"  # a name that says nothing
        save_file({prefix + rename(name): tensor for name, tensor in state.items()}, path, {"a": "b"})
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.layout == ("original" if naming == "original" else "comfyui-native")
            assert checkpoint.prefix == prefix
            assert checkpoint.config == SMALL and checkpoint.family == "tiny"
            assert dict(checkpoint.dtypes) == {torch.float32: len(state)} and checkpoint.metadata["a"] == "b"
            assert_same(checkpoint.state_dict(), state)

    def test_every_tensor_of_the_full_network_has_one_name_in_each_layout(self):
        names = list(expected_shapes(DiTConfig.hunyuan_video()))
        assert [ORIGINAL.original(name) for name in names] == names
        native = [to_comfyui(name) for name in names]
        assert [COMFYUI_NATIVE.original(name) for name in native] == names
        assert len(set(native)) == len(names)

    def test_names_beside_the_table_are_not_guessed(self):
        right = "double_blocks.0.img_mod.linear.weight"
        wrong = [right.replace("0", "x"), right + ".x", "x." + right, "img_in.proj", "img_in.proj.scale_weight"]
        assert all(layout.original(name) is None for layout in HUNYUAN for name in wrong)

    def test_the_same_tensor_under_two_names_is_an_error(self, tmp_path, state):
        native = {to_comfyui(name): tensor for name, tensor in state.items()}
        twice = "single_blocks.0.norm.query_norm.scale"
        save_file(native | {twice: torch.ones(128)}, tmp_path / "f")
        message = error_of(tmp_path / "f")
        assert twice in message and "single_blocks.0.norm.query_norm.weight" in message

    def test_two_copies_of_the_network_are_an_error(self, tmp_path, state):
        save_file(state | {f"model.{name}": tensor.clone() for name, tensor in state.items()}, tmp_path / "f")
        assert f"{len(state)} unexpected" in error_of(tmp_path / "f")


class TestConfig:
    @pytest.mark.parametrize(
        "config",
        [
            SMALL,
            DiTConfig.tiny(),
            DiTConfig.hunyuan_video(),
            DiTConfig(hidden_size=384, num_heads=3, depth_double=2, depth_single=0, text_dim=8, guidance_embed=False),
            DiTConfig(hidden_size=128, num_heads=1, depth_double=0, depth_single=3, text_dim=8, refiner_depth=1),
            DiTConfig(hidden_size=256, num_heads=2, depth_double=12, depth_single=11, text_dim=8, in_channels=33, out_channels=4),
        ],
    )
    def test_a_config_is_read_back_from_its_own_shapes(self, config):
        assert infer_config(expected_shapes(config)) == config

    def test_tensors_serve_as_well_as_shapes(self, state):
        assert infer_config(state) == SMALL

    @pytest.mark.parametrize("name", ["img_in.proj.weight", "vector_in.in_layer.weight", "final_layer.linear.weight"])
    def test_a_size_that_cannot_be_told_is_an_error_naming_the_tensor(self, state, name):
        with pytest.raises(CheckpointError, match=name):
            infer_config({k: v for k, v in state.items() if k != name})

    def test_a_width_that_is_no_multiple_of_the_head_is_an_error(self, state):
        with pytest.raises(CheckpointError, match="heads 96 wide"):
            infer_config(state | {"double_blocks.0.img_attn_q_norm.weight": torch.ones(96)})

    def test_an_absurd_block_number_is_an_error_not_a_long_wait(self, state):
        with pytest.raises(CheckpointError, match="999999999"):
            infer_config(state | {"single_blocks.999999999.linear1.weight": torch.ones(1, 1)})

    def test_image_to_video_relatives_are_refused(self, tmp_path):
        config = DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=1, text_dim=8, in_channels=33)
        save_original(tmp_path / "f", random_state(config))
        assert "33 latent channels" in error_of(tmp_path / "f")

    def test_the_family_follows_the_text_width(self, tmp_path):
        config = DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=1, text_dim=4096)
        save_original(tmp_path / "f", random_state(config))
        with open_checkpoint(tmp_path / "f") as checkpoint:
            assert checkpoint.family == "hunyuan-t2v"


class TestStrict:
    def test_what_does_not_fit_is_listed_by_name(self, tmp_path, state):
        broken = dict(state)
        del broken["single_blocks.0.linear2.bias"]
        broken["final_layer.extra.weight"] = torch.ones(1)
        broken["single_blocks.1.linear1.bias"] = torch.ones(3)
        save_file(broken, tmp_path / "f")
        message = error_of(tmp_path / "f")
        assert "1 missing (single_blocks.0.linear2.bias)" in message
        assert "1 unexpected (final_layer.extra.weight)" in message
        assert "1 of the wrong shape (single_blocks.1.linear1.bias is 3 and should be 896)" in message

    def test_ten_names_and_a_count(self, tmp_path, state):
        save_file(state | {f"extra.{i:02d}": torch.ones(1) for i in range(25)}, tmp_path / "f")
        message = error_of(tmp_path / "f")
        assert "25 unexpected" in message and "extra.09, and 15 more" in message and "extra.10" not in message

    def test_a_block_missing_in_the_middle_is_missing_not_a_shallower_network(self, tmp_path, state):
        save_file({name: t for name, t in state.items() if not name.startswith("single_blocks.0.")}, tmp_path / "f")
        assert "single_blocks.0.linear1.weight" in error_of(tmp_path / "f")

    def test_lenient_opening_reports_instead(self, tmp_path, state):
        save_file(state | {"extra": torch.ones(1)}, tmp_path / "f")
        with open_checkpoint(tmp_path / "f", strict=False) as checkpoint:
            assert checkpoint.differences.unexpected == ("extra",)
            assert "extra" not in list(checkpoint)

    def test_an_unknown_key_is_an_error(self, file):
        with open_checkpoint(file) as checkpoint, pytest.raises(CheckpointError, match="no tensor nothing"):
            checkpoint.read("nothing.weight")


class TestRefused:
    def test_missing_file(self, tmp_path):
        assert "no file" in error_of(tmp_path / "nothing.safetensors")

    def test_empty_file(self, tmp_path):
        (tmp_path / "f").touch()
        assert "is empty" in error_of(tmp_path / "f")

    def test_a_folder_without_weights(self, tmp_path):
        assert "without weights" in error_of(tmp_path)

    @pytest.mark.parametrize(
        ("head", "what"),
        [
            (b"GGUF\x03\0\0\0" + b"\0" * 30, "no tensors"),
            (b"<!DOCTYPE html><html>", "web page"),
            (b"version https://git-lfs.", "LFS"),
        ],
    )
    def test_other_containers_are_named(self, tmp_path, head, what):
        (tmp_path / "f.safetensors").write_bytes(head)
        assert what in error_of(tmp_path / "f.safetensors")

    @pytest.mark.parametrize(
        ("extra", "what"),
        [
            ("single_blocks.0.linear1.weight.absmax", "bitsandbytes"),
            ("byt5_in.fc1.weight", "HunyuanVideo 1.5"),
        ],
    )
    def test_layouts_that_cannot_be_read_are_named(self, tmp_path, state, extra, what):
        save_file(state | {extra: torch.ones(2)}, tmp_path / "f")
        message = error_of(tmp_path / "f")
        assert what in message and extra in message

    @pytest.mark.parametrize(
        ("name", "what"),
        [
            ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion"),
            ("double_blocks.0.img_attn.qkv.weight", "Flux"),
            ("transformer_blocks.0.attn1.to_q.weight", "LTX"),
            ("decoder.conv_in.conv.weight", "VAE"),
            ("text_model.embeddings.token_embedding.weight", "text encoder"),
            ("transformer.single_blocks.0.linear1.lora_A.weight", "LoRA"),
            ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "LoRA"),
            ("something.else", "something.else"),
        ],
    )
    def test_other_models_are_named(self, tmp_path, name, what):
        save_file({name: torch.ones(2, 2)}, tmp_path / "f")
        assert what in error_of(tmp_path / "f")

    def test_a_prefix_that_is_not_known_is_named(self, tmp_path, state):
        save_file({f"my.own.{name}": tensor for name, tensor in state.items()}, tmp_path / "f")
        assert "'my.own.'" in error_of(tmp_path / "f")

    def test_integer_weights_are_a_quantised_layout(self, tmp_path, state):
        save_file(state | {"img_in.proj.bias": torch.ones(128, dtype=torch.int8)}, tmp_path / "f")
        assert "img_in.proj.bias" in error_of(tmp_path / "f")

    def test_no_tensors(self, tmp_path):
        save_file({}, tmp_path / "f")
        assert "no tensors" in error_of(tmp_path / "f")


class TestDamaged:
    @pytest.mark.parametrize("keep", [1, 7, 8, 100, 0.5, 0.999])
    def test_truncated_at_any_place(self, file, keep):
        whole = file.read_bytes()
        file.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
        message = error_of(file)
        assert "truncated" in message or "not a safetensors file" in message

    def test_bytes_after_the_end(self, file):
        file.write_bytes(file.read_bytes() + b"\0\0\0")
        assert "3 bytes after" in error_of(file)

    @pytest.mark.parametrize(
        "header",
        [
            b"{}x",
            b"[]",
            b'{"a": 1}',
            b'{"a": {"dtype": "F32", "shape": [1]}}',
            b'{"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
            b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}',
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[1],"data_offsets":[3,4]}}',
            b'{"a": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}}',
            b'{"__metadata__": {"a": 1}}',
            b"[" * 5000,
            b'{"\xff": 1}',
        ],
    )
    def test_headers_that_make_no_sense(self, tmp_path, header):
        (tmp_path / "f").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
        assert "damaged" in error_of(tmp_path / "f")

    @settings(max_examples=150, deadline=None)
    @given(place=st.integers(0, 10**6), value=st.integers(0, 255))
    def test_a_changed_byte_is_an_error_or_another_value_but_never_a_crash(self, tmp_path_factory, place, value):
        path = tmp_path_factory.mktemp("flip") / "f"
        save_file({"txt_in.individual_token_refiner.x": torch.ones(2)}, path)
        raw = bytearray(path.read_bytes())
        raw[place % len(raw)] = value
        path.write_bytes(raw)
        with pytest.raises(AccVideoError):
            open_checkpoint(path)

    @pytest.mark.parametrize("mapped", [False, True])
    def test_a_file_cut_off_while_open_is_an_error(self, file, mapped):
        with open_checkpoint(file) as checkpoint:
            last = checkpoint.keys()[-1]
            with open(file, "rb+") as handle:
                handle.truncate(file.stat().st_size - 1)
            with pytest.raises(CheckpointError, match=f"ended .*{last}.* is it still being written"):
                checkpoint.read(last, mapped)

    def test_large_tensors_are_read_in_parts(self, tmp_path, monkeypatch):
        """By threads, whole and in place; a part that the file has no longer is an error like any other."""
        monkeypatch.setattr("accvideo_core.checkpoint.safetensors_file._CHUNK", 1000)
        save_file({"a": torch.ones(3), "large": torch.arange(50_001)}, tmp_path / "f")
        file = SafetensorsFile(tmp_path / "f")
        assert torch.equal(file.read("large"), torch.arange(50_001)) and torch.equal(file.read("a"), torch.ones(3))
        os.truncate(tmp_path / "f", (tmp_path / "f").stat().st_size - 200_000)
        with pytest.raises(CheckpointError, match=r"ended .*large.* is it still being written"):
            file.read("large")
        file.close()

    def test_the_file_is_closed_after_an_error(self, tmp_path, state):
        import psutil

        save_file(state | {"extra": torch.ones(1)}, tmp_path / "f")
        error_of(tmp_path / "f")
        assert str(tmp_path / "f") not in [f.path for f in psutil.Process().open_files()]


def test_what_is_read_has_memory_of_its_own(file, state):
    with open_checkpoint(file) as checkpoint:
        found = checkpoint.state_dict()
    assert_same(found, state)
    key = "final_layer.linear.weight"
    assert torch.equal(found[key].mul_(2), 2 * state[key]), "it is memory of its own, also when the file is closed"


class TestMapped:
    @pytest.mark.parametrize(
        "name", ["original 'net.'", "pt module", "pt legacy", "diffusers shards", "plain fp8", "tencent fp8", "gguf F16"]
    )
    def test_every_tensor_is_what_reading_gives_and_outlives_the_file(self, tmp_path, name):
        pytest.importorskip({"diffusers": "diffusers", "gguf": "gguf"}.get(name.split()[0], "torch"))
        written = HUNYUAN_WRITERS[name](tmp_path, random_state(HUNYUAN_CONFIG))
        with open_checkpoint(written.path) as checkpoint:
            mapped = checkpoint.state_dict(mapped=True)
        assert mapped.keys() == written.state.keys()
        for key, tensor in written.state.items():
            assert mapped[key].dtype == tensor.dtype and torch.equal(mapped[key].float(), tensor.float()), key

    def test_it_lies_over_the_file_which_writing_to_it_does_not_change(self, file):
        before, key = file.read_bytes(), "final_layer.linear.weight"
        with open_checkpoint(file) as checkpoint:
            one, two = checkpoint.read(key, mapped=True), checkpoint.read(key, mapped=True)
            assert one.data_ptr() == two.data_ptr() != checkpoint.read(key).data_ptr()
            one.zero_()
            assert not two.any() and checkpoint.read(key).any()
        assert file.read_bytes() == before

    def test_values_that_lie_askew_are_read_instead(self, file, state):
        raw = bytearray(file.read_bytes())
        length = int.from_bytes(raw[:8], "little")
        raw[:8], raw[8 + length : 8 + length] = (length + 1).to_bytes(8, "little"), b" "
        file.write_bytes(raw)
        with open_checkpoint(file) as checkpoint:
            assert_same(checkpoint.state_dict(mapped=True), state)


class TestWriting:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
    def test_the_format_s_own_reader_reads_what_we_write(self, tmp_path, dtype):
        tensors = {"a": torch.randn(3, 5).to(dtype), "scalar": torch.tensor(2.0), "none": torch.zeros(0, 4), "ü": torch.ones(2)}
        write_safetensors(tmp_path / "f", tensors | {"strided": torch.arange(12.0).view(3, 4).t()}, {"key": "wert ü"})
        found = load_file(tmp_path / "f")
        assert found["a"].dtype == dtype and torch.equal(found["a"].float(), tensors["a"].float())
        assert torch.equal(found["scalar"], tensors["scalar"]) and found["none"].shape == (0, 4)
        assert torch.equal(found["strided"], torch.arange(12.0).view(3, 4).t())
        header = (tmp_path / "f").read_bytes()
        assert json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])["__metadata__"] == {"key": "wert ü"}

    def test_it_is_byte_for_byte_the_format_s_own_writer(self, tmp_path, state):
        save_original(tmp_path / "ours", state)
        save_file(state, tmp_path / "theirs")
        ours, theirs = (tmp_path / "ours").read_bytes(), (tmp_path / "theirs").read_bytes()
        assert ours == theirs

    def test_an_incomplete_network_is_not_written(self, tmp_path, state):
        with pytest.raises(CheckpointError, match=r"1 missing \(single_blocks.0.linear1.bias\)"):
            save_original(tmp_path / "f", {k: v for k, v in state.items() if k != "single_blocks.0.linear1.bias"})
        assert list(tmp_path.iterdir()) == []

    def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(self, file, state):
        class Broken(dict):
            def __getitem__(self, name):
                if name == "vector_in.out_layer.weight":
                    raise KeyboardInterrupt
                return super().__getitem__(name)

        before = file.read_bytes()
        with pytest.raises(KeyboardInterrupt):
            write_safetensors(file, Broken(state))
        assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]

    def test_a_place_that_cannot_be_written_is_an_error_naming_it(self, tmp_path, state):
        with pytest.raises(OutputError, match="folder"):
            save_original(tmp_path, state)

    def test_a_dtype_without_a_name_is_an_error(self, tmp_path):
        with pytest.raises(OutputError, match="complex64"):
            write_safetensors(tmp_path / "f", {"a": torch.zeros(1, dtype=torch.complex64)})
        assert list(tmp_path.iterdir()) == []


class TestLoadStudent:
    def run(self, network: HunyuanVideoDiT, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        g = torch.Generator().manual_seed(1)
        conditioning = Conditioning(torch.randn(1, 3, 24, generator=g), torch.randn(1, 20, generator=g), torch.tensor([6.0]))
        with torch.no_grad():
            return network(torch.randn(1, 16, 1, 4, 4, generator=g), torch.tensor([0.7]), conditioning)

    def test_it_is_the_network_with_those_weights(self, file, state):
        network = load_student(file)
        assert not network.training and all(p.requires_grad for p in network.parameters())
        assert not any(t.is_meta for t in (*network.parameters(), *network.buffers()))
        plain = HunyuanVideoDiT(SMALL)
        plain.load_state_dict(state)
        assert torch.equal(self.run(network), self.run(plain))

    @pytest.mark.parametrize(
        "mapped", [False, pytest.param(True, marks=pytest.mark.skipif(os.name == "nt", reason="refused there"))]
    )
    def test_the_file_may_be_replaced_while_the_network_lives(self, file, state, mapped):
        network = load_student(file, mapped=mapped)
        before = self.run(network)
        save_original(file, random_state(SMALL, seed=5))
        assert torch.equal(self.run(network), before)

    @pytest.mark.parametrize(
        ("stored", "asked", "computes"),
        [
            (torch.float32, None, torch.float32),
            (torch.bfloat16, None, torch.bfloat16),
            (torch.bfloat16, torch.float32, torch.float32),
            (torch.float8_e4m3fn, None, torch.bfloat16),
        ],
    )
    def test_dtypes(self, tmp_path, stored, asked, computes):
        state = random_state(SMALL, dtype=stored)
        save_original(tmp_path / "f", state)
        network = load_student(tmp_path / "f", dtype=asked)
        assert {p.dtype for p in network.parameters()} == {computes}
        assert all(torch.equal(t, state[name].to(computes)) for name, t in network.state_dict().items())

    def test_mixed_dtypes_become_the_widest(self, tmp_path, state):
        mixed = {name: t.bfloat16() if t.ndim > 1 else t for name, t in state.items()}
        save_original(tmp_path / "f", mixed)
        assert load_student(tmp_path / "f").dtype == torch.float32
