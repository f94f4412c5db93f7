"""Every layout users have opens to the weights it was written from, exactly, and says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accvideo_core.checkpoint import WanConfig, expected_shapes, load_student, open_checkpoint
from accvideo_core.checkpoint.inspect import InspectArgs, run
from accvideo_core.checkpoint.layouts import HUNYUAN as HUNYUAN_LAYOUTS
from accvideo_core.checkpoint.layouts import to_diffusers
from accvideo_core.checkpoint.quantised import quantise_fp8
from accvideo_core.checkpoint.wan import WAN, WAN_DIFFUSERS
from accvideo_core.dit import DiTConfig
from accvideo_core.errors import CheckpointError, MissingExtraError
from tests.checkpoint_files import (
    HUNYUAN,
    HUNYUAN_WRITERS,
    WAN_I2V,
    WAN_T2V,
    WAN_WRITERS,
    Written,
    diffusers_folder,
    gguf,
    module_and_ema,
    pytorch,
    quantised_fp8,
    random_state,
    scaled_fp8,
    tencent_fp8,
)

needs = {"gguf": "gguf", "diffusers": "diffusers"}
CASES = [
    *((name, HUNYUAN, writer) for name, writer in HUNYUAN_WRITERS.items()),
    *((name, WAN_T2V, writer) for name, writer in WAN_WRITERS.items()),
    *((name, WAN_I2V, writer) for name, writer in WAN_WRITERS.items()),
]
KINDS = {HUNYUAN: "hunyuan", WAN_T2V: "wan t2v", WAN_I2V: "wan i2v"}
IDS = [f"{KINDS[config]}: {name}" for name, config, _ in CASES]


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def written(request, tmp_path_factory: pytest.TempPathFactory) -> Written:
    name, config, writer = request.param
    pytest.importorskip(needs.get(name.split()[0], "torch"))
    return writer(tmp_path_factory.mktemp("written"), random_state(config))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, f"{name}: {found[name].dtype} {tensor.dtype}"
        assert torch.equal(found[name].float(), tensor.float()), name


def error_of(path: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_opens_to_the_weights_it_was_written_from(written: Written) -> None:
    with open_checkpoint(written.path) as checkpoint:
        assert (checkpoint.layout, checkpoint.container) == (written.layout, written.container)
        assert checkpoint.quantisation == written.quantisation
        assert {key: checkpoint.shape(key) for key in checkpoint} == {key: tuple(t.shape) for key, t in written.state.items()}
        assert {key: checkpoint.dtype(key) for key in checkpoint} == {key: t.dtype for key, t in written.state.items()}
        assert_same(checkpoint.state_dict(), written.state)


def test_inspect_reads_it_and_finds_it_sound(written: Written, capsys) -> None:
    assert run(InspectArgs(written.path, self_check=True, json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layout"] == written.layout and report["quantisation"] == written.quantisation
    assert report["values"]["tensors_read"] == len(written.state) and report["problems"] == []


def test_the_host_may_read_by_stored_name_only_what_is_stored_as_it_is(written: Written) -> None:
    with open_checkpoint(written.path) as checkpoint:
        for key, stored in checkpoint.stored_names.items():
            assert torch.equal(checkpoint._file.read(stored).float(), written.state[key].float())


class TestFamilies:
    @pytest.mark.parametrize(("config", "family"), [(HUNYUAN, "tiny"), (WAN_T2V, "wan-t2v-14b"), (WAN_I2V, "wan-i2v-14b-480p")])
    def test_a_family_and_its_sizes(self, tmp_path, config, family):
        save_file(random_state(config), tmp_path / "f")
        with open_checkpoint(tmp_path / "f") as checkpoint:
            assert checkpoint.config == config and checkpoint.family == family

    @pytest.mark.parametrize("config", [WanConfig.t2v_14b(), WanConfig.i2v_14b()])
    def test_the_released_wan_models_have_the_tensors_of_diffusers_networks(self, config):
        diffusers = pytest.importorskip("diffusers")
        image = {} if config.image_dim is None else {"image_dim": 1280, "added_kv_proj_dim": 5120}
        with torch.device("meta"):
            network = diffusers.WanTransformer3DModel(in_channels=config.in_channels, **image)  # its defaults are the 14 B
        theirs = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        assert theirs == {WAN_DIFFUSERS.stored(name)[0]: shape for name, shape in expected_shapes(config).items()}

    def test_relatives_of_wan_are_refused_by_what_they_take(self, tmp_path):
        for config in (WanConfig(256, 2, 1, 512, 64, 36, 16), WanConfig(256, 2, 1, 512, 64, 48, 48)):
            save_file(random_state(config), tmp_path / "f")
            assert f"{config.in_channels} latent channels without image tokens" in error_of(tmp_path / "f")

    def test_wan_is_no_network_of_ours(self, tmp_path):
        save_file(random_state(WAN_T2V), tmp_path / "f")
        with pytest.raises(CheckpointError, match="runs in ComfyUI alone"):
            load_student(tmp_path / "f")

    def test_a_missing_wan_tensor_is_named(self, tmp_path):
        state = random_state(WAN_T2V)
        del state["blocks.0.cross_attn.norm_k.weight"]
        save_file(state | {"vace_patch_embedding.weight": torch.ones(1)}, tmp_path / "f")
        message = error_of(tmp_path / "f")
        assert "blocks.0.cross_attn.norm_k.weight" in message and "vace_patch_embedding.weight" in message


class TestPytorch:
    def test_which_of_two_networks_can_be_said_and_is_reported(self, tmp_path):
        state = random_state(HUNYUAN)
        path = module_and_ema(tmp_path, state).path
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.notes == ["the network under 'module' is used", "it also holds one under 'ema'"]
        with open_checkpoint(path, weights="ema") as checkpoint:
            key = checkpoint.keys()[0]
            assert torch.equal(checkpoint.read(key), state[key] + 1)
        assert "no weights called 'best'" in error_of(path, weights="best")

    def test_two_networks_no_rule_chooses_between_are_an_error(self, tmp_path):
        state = random_state(HUNYUAN)
        torch.save({"model": state, "ema": state}, tmp_path / "f.pt")
        assert "several networks (ema, model); say which one: --weights ema or --weights model" in error_of(tmp_path / "f.pt")

    def test_it_is_mapped_and_not_read_when_opened(self, tmp_path):
        path = pytorch("module")(tmp_path, random_state(HUNYUAN)).path
        raw = bytearray(path.read_bytes())
        with open_checkpoint(path) as checkpoint:
            before = checkpoint.read("final_layer.linear.weight")
            place = raw.find(before.numpy().tobytes())
            with open(path, "rb+") as file:
                file.seek(place)
                file.write(b"\0\0\0\0")
            assert checkpoint.read("final_layer.linear.weight")[0, 0] == 0 != before[0, 0]

    def test_a_trainer_s_other_things_do_not_matter(self, tmp_path):
        state = random_state(HUNYUAN)
        torch.save({"module": state, "optimizer": {"lr": 1.0, "state": [torch.ones(3)]}, "step": 5}, tmp_path / "f.pt")
        with open_checkpoint(tmp_path / "f.pt") as checkpoint:
            assert_same(checkpoint.state_dict(), state)


class TestTencent:
    def test_without_its_map_it_is_refused_and_the_map_is_asked_for(self, tmp_path):
        path = tencent_fp8(tmp_path, random_state(HUNYUAN)).path
        (tmp_path / "model_fp8_map.pt").unlink()
        assert "put model_fp8_map.pt" in error_of(path)

    def test_the_map_alone_is_named(self, tmp_path):
        tencent_fp8(tmp_path, random_state(HUNYUAN))
        assert "a map of fp8 scales" in error_of(tmp_path / "model_fp8_map.pt")

    def test_a_map_of_another_network_is_an_error(self, tmp_path):
        path = tencent_fp8(tmp_path, random_state(HUNYUAN)).path
        scales = torch.load(tmp_path / "model_fp8_map.pt", weights_only=True) | {"double_blocks.7.img_attn_qkv": torch.ones(1)}
        torch.save(scales, tmp_path / "model_fp8_map.pt")
        assert "1 modules the network lacks (double_blocks.7.img_attn_qkv)" in error_of(path)

    def test_a_map_that_lacks_a_module_is_an_error(self, tmp_path):
        path = tencent_fp8(tmp_path, random_state(HUNYUAN)).path
        scales = torch.load(tmp_path / "model_fp8_map.pt", weights_only=True)
        del scales["double_blocks.0.img_attn_proj"]
        torch.save(scales, tmp_path / "model_fp8_map.pt")
        assert "double_blocks.0.img_attn_proj" in error_of(path)


class TestScaled:
    def test_a_scale_without_its_weight_is_unexpected(self, tmp_path):
        state = random_state(HUNYUAN) | {"double_blocks.9.img_attn_qkv.scale_weight": torch.ones(())}
        save_file(state, tmp_path / "f")
        assert "1 unexpected (double_blocks.9.img_attn_qkv.scale_weight)" in error_of(tmp_path / "f")

    @pytest.mark.parametrize("settings", [{"format": "nvfp4"}, {"format": "int8_tensorwise"}, {}, [1]])
    def test_formats_that_cannot_be_restored_are_named(self, tmp_path, settings):
        state = random_state(HUNYUAN)
        state["img_in.proj.comfy_quant"] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
        save_file(state, tmp_path / "f")
        message = error_of(tmp_path / "f")
        assert "img_in.proj.weight" in message
        assert isinstance(settings, list) or not settings or settings["format"] in message

    def test_mxfp8_is_named_and_not_called_damaged(self, tmp_path):
        """Its scales are of a dtype that no other file has."""
        state, module = random_state(HUNYUAN), "double_blocks.0.img_mlp.fc1"
        weight = state[f"{module}.weight"] = state[f"{module}.weight"].to(torch.float8_e4m3fn)
        scales = torch.full((len(weight), weight.shape[1] // 32), 127, dtype=torch.uint8)
        state[f"{module}.weight_scale"] = scales.view(torch.float8_e8m0fnu)
        state[f"{module}.comfy_quant"] = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
        save_file(state, tmp_path / "f")
        message = error_of(tmp_path / "f")
        assert f"{module}.weight is quantised as 'mxfp8', which cannot be read; use a file in" in message
        assert "damaged" not in message

    def test_a_weight_that_is_not_what_its_settings_say(self, tmp_path):
        state = random_state(HUNYUAN)
        settings = json.dumps({"format": "float8_e4m3fn"}).encode()
        state["final_layer.linear.comfy_quant"] = torch.tensor(list(settings), dtype=torch.uint8)
        save_file(state, tmp_path / "f")
        assert "final_layer.linear.weight is said to be float8_e4m3fn but is stored as torch.float32" in error_of(tmp_path / "f")

    def test_a_scale_of_a_shape_that_fits_nothing(self, tmp_path):
        path = scaled_fp8(native=False)(tmp_path, random_state(HUNYUAN)).path
        from safetensors.torch import load_file

        tensors = load_file(path)
        tensors["final_layer.linear.scale_weight"] = torch.ones(3, 2)
        save_file(tensors, tmp_path / "f")
        with (
            open_checkpoint(tmp_path / "f") as checkpoint,
            pytest.raises(CheckpointError, match=r"final_layer.linear.weight.*\(3, 2\)"),
        ):
            checkpoint.read("final_layer.linear.weight")

    def test_what_comfyui_takes_untouched_is_given_untouched(self, tmp_path):
        written = quantised_fp8()(tmp_path, random_state(HUNYUAN))
        with open_checkpoint(written.path) as checkpoint:
            key = "double_blocks.0.img_attn_qkv.weight"
            scaled, stored = checkpoint.scaled(key), checkpoint.read_stored(key)
            assert scaled is not None and stored.dtype == torch.float8_e4m3fn and scaled.full_precision
            assert torch.equal(stored.float() * scaled.scale, checkpoint.read(key))
            assert checkpoint.scaled("img_in.proj.weight") is None

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    @pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-3, 1.0, 1e5, 3e38])
    def test_quantising_keeps_fp8_s_own_precision_at_any_size(self, dtype, size):
        values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * size
        stored, scale = quantise_fp8(values, dtype)
        restored = stored.double() * scale.double()
        step = 2**-4 if dtype == torch.float8_e4m3fn else 2**-3
        largest = values.double().abs().max()
        error = (restored - values.double()).abs()
        smallest = 2.0**-9 / 448 if dtype == torch.float8_e4m3fn else 2.0**-16 / 57344
        if size > 1e-37:  # below, float32 has no scale small enough for the whole range
            assert bool((error <= values.double().abs() * step * 1.001 + largest * smallest).all())
        assert torch.isfinite(stored.float()).all()

    def test_quantising_zeros_and_nan(self):
        stored, scale = quantise_fp8(torch.zeros(4, 4))
        assert scale == 1 and not stored.float().any()
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            quantise_fp8(torch.tensor([1.0, float("nan")]))


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        pytest.importorskip("diffusers")
        return diffusers_folder("1MB")(tmp_path, random_state(HUNYUAN)).path

    def index(self, folder: Path) -> Path:
        return next(folder.glob("*.index.json"))

    def change(self, folder: Path, change) -> None:
        content = json.loads(self.index(folder).read_text())
        change(content)
        self.index(folder).write_text(json.dumps(content))

    def test_the_index_itself_can_be_named(self, folder):
        with open_checkpoint(self.index(folder)) as checkpoint:
            assert checkpoint.layout == "diffusers"

    def test_a_shard_alone_says_so(self, folder):
        assert "one shard of several" in error_of(next(folder.glob("*-00002-of-*")))

    def test_a_missing_shard_is_named(self, folder):
        shard = next(folder.glob("*-00002-of-*"))
        shard.unlink()
        assert f"names {shard.name}, which is not beside it" in error_of(folder)

    def test_several_files_without_an_index_are_ambiguous(self, folder):
        self.index(folder).unlink()
        assert "several weight files and no index" in error_of(folder)

    def test_two_indices_are_ambiguous(self, folder):
        (folder / "model.fp16.safetensors.index.json").write_text(self.index(folder).read_text())
        assert "several indices" in error_of(folder)

    def test_an_index_that_disagrees_with_a_shard(self, folder):
        self.change(folder, lambda content: content["weight_map"].pop("proj_out.bias"))
        assert "disagree about 1 tensors (proj_out.bias)" in error_of(folder)

    @pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a\\b", "..", ""])
    def test_an_index_cannot_point_elsewhere(self, folder, name):
        self.change(folder, lambda content: content["weight_map"].update({"proj_out.bias": name}))
        assert "does not lie beside it" in error_of(folder)

    @pytest.mark.parametrize(
        "text", ["{}", "{", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{" * 9000, '{"weight_map": {}}']
    )
    def test_a_damaged_index(self, folder, text):
        self.index(folder).write_text(text)
        assert "no index of shards" in error_of(folder)

    def test_half_of_a_fused_tensor_is_missing_and_named(self, tmp_path):
        from tests.checkpoint_files import diffusers_model

        tensors = {name: t.contiguous() for name, t in diffusers_model(random_state(HUNYUAN)).state_dict().items()}
        del tensors["transformer_blocks.0.attn.to_k.weight"]
        save_file(tensors, tmp_path / "f")
        message = error_of(tmp_path / "f")
        assert "1 missing (double_blocks.0.img_attn_qkv.weight)" in message
        assert "transformer_blocks.0.attn.to_q.weight without its siblings" in message

    def test_parts_of_unequal_size_are_not_stacked(self, tmp_path):
        """q one row larger and k one smaller would give the right total and shift every row."""
        from tests.checkpoint_files import diffusers_model

        tensors = {name: t.contiguous() for name, t in diffusers_model(random_state(HUNYUAN)).state_dict().items()}
        stem = "single_transformer_blocks.0.attn.to_"
        tensors[f"{stem}q.weight"], tensors[f"{stem}k.weight"] = torch.ones(129, 128), torch.ones(127, 128)
        save_file(tensors, tmp_path / "f")
        assert "the parts of single_blocks.0.linear1.weight do not fit together" in error_of(tmp_path / "f")


class TestGGUF:
    def test_without_the_package_the_extra_is_named(self, tmp_path, monkeypatch):
        path = gguf("F16")(tmp_path, random_state(HUNYUAN)).path
        monkeypatch.setitem(__import__("sys").modules, "gguf", None)
        with pytest.raises(MissingExtraError, match=r"accvideo\[gguf\]"):
            open_checkpoint(path)

    @pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q5_0", "IQ3_S"])
    def test_the_kinds_without_a_python_writer_are_dequantised_as_the_package_does(self, tmp_path, kind):
        written = gguf(kind)(tmp_path, random_state(WAN_T2V))
        with open_checkpoint(written.path) as checkpoint:
            assert checkpoint.encodings[kind] > 0
            assert_same(checkpoint.state_dict(), written.state)

    def test_a_network_computes_in_bf16(self, tmp_path):
        written = gguf("Q8_0")(tmp_path, random_state(HUNYUAN))
        network = load_student(written.path)
        assert network.dtype == torch.bfloat16
        assert torch.equal(network.state_dict()["img_in.proj.weight"], written.state["img_in.proj.weight"].bfloat16())

    @pytest.mark.parametrize("keep", [3, 4, 8, 30, 200, 0.5, 0.99])
    def test_truncated(self, tmp_path, keep):
        path = gguf("Q8_0")(tmp_path, random_state(HUNYUAN)).path
        raw = path.read_bytes()
        path.write_bytes(raw[: keep if isinstance(keep, int) else int(len(raw) * keep)])
        error_of(path)

    @pytest.mark.parametrize("place", [8, 16])
    def test_a_count_that_is_absurd_ends_at_once(self, tmp_path, place):
        path = gguf("Q8_0")(tmp_path, random_state(HUNYUAN)).path
        raw = bytearray(path.read_bytes())
        raw[place : place + 8] = (2**60).to_bytes(8, "little")
        path.write_bytes(raw)
        assert "damaged" in error_of(path)


@pytest.mark.parametrize("config", [DiTConfig.hunyuan_video(), WanConfig.t2v_14b(), WanConfig.i2v_14b()])
def test_every_tensor_of_the_released_networks_has_one_place_in_every_layout(config):
    names = list(expected_shapes(config))
    for layout in WAN if isinstance(config, WanConfig) else HUNYUAN_LAYOUTS:
        stored = [(name, part) for name in names for part in layout.stored(name)]
        assert len({part for _, part in stored}) == len(stored)
        assert all(layout.original(part) == name for name, part in stored)
        for name in names:
            places = [layout.place(part) for part in layout.stored(name)]
            assert [place.index for place in places] == list(range(places[0].count))


def test_our_diffusers_names_and_rows_are_those_of_diffusers_own_conversion():
    """On the released sizes, which its code has built in, with every row one value long."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    thin = {
        name: torch.randn(shape[0], *[1] * (len(shape) - 1)) for name, shape in expected_shapes(DiTConfig.hunyuan_video()).items()
    }
    ours = to_diffusers(thin)
    theirs = single_file.convert_hunyuan_video_transformer_to_diffusers(dict(thin))
    assert_same(ours, theirs)
