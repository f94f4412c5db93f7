"""What adapters say of HunyuanVideo and of Wan, and a Wan teacher captured with classifier-free guidance and distilled.

Wan's network is diffusers' own, so what is tested of it is what the adapter does around it: conventions of timestep and text,
features by ending early, names on disk. It is 128 wide with one head, the least that Wan's files are recognised with.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from accvideo_core import cli
from accvideo_core.checkpoint import open_checkpoint
from accvideo_core.distill.adapters import ADAPTERS, adapter_for
from accvideo_core.distill.on_policy import Continuation
from accvideo_core.dit import DiTConfig, HunyuanVideoDiT
from accvideo_core.errors import CheckpointError, InvalidValueError, SynVidError
from accvideo_core.lora import merge_lora, read_lora
from accvideo_core.sampling import make_noise
from accvideo_core.schedule import PRESETS, flow_sigmas
from accvideo_core.synvid import Header, SynVidDataset, SynVidReader, SynVidStore
from accvideo_core.synvid.capture import PaddedTexts, capture, pad_texts, with_cfg
from accvideo_core.synvid.merge import merge_synvid
from accvideo_core.synvid.plan import NEGATIVES, Plan
from accvideo_core.synvid.texts import text_file
from tests.networks import random_weights, wan_network

OURS = DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=2, text_dim=16, pooled_dim=24)
SHAPE = (16, 2, 4, 6)  # a grid of 2 x 2 x 3 tokens
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def our_network():
    network = HunyuanVideoDiT(OURS, device="meta")
    network.load_state_dict(random_weights(OURS), assign=True)
    return network.eval().requires_grad_(False)


NETWORKS = {"wan": wan_network, "hunyuan": our_network}


@pytest.fixture(params=NETWORKS)
def teacher(request):
    """(adapter, network, (latent, sigma, conditioning)) of both architectures, prompts of 3 and of 5 tokens."""
    network = NETWORKS[request.param]()
    adapter = adapter_for(network)
    generator = torch.Generator().manual_seed(1)
    pooled = torch.randn(24, generator=generator) if request.param == "hunyuan" else None
    texts = pad_texts([(torch.randn(n, 16, generator=generator), pooled) for n in (3, 5)])
    latent = torch.randn(2, *SHAPE, generator=generator)
    return adapter, network, (latent, torch.tensor([0.9, 0.4]), adapter.conditioning(texts, adapter.guidance(network)))


# ---- what holds of every architecture ---------------------------------------------------------------------------------


def ran(network, names, call):
    """(result of the call, names of the blocks that ran in it)."""
    seen = []
    hooks = [network.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name)) for name in names]
    try:
        return call(), seen
    finally:
        for hook in hooks:
            hook.remove()


def test_features_are_the_hidden_state_after_a_block_and_no_later_block_runs(teacher):
    adapter, network, (latent, sigma, told) = teacher
    names, kept = adapter.block_names(network), {}

    def keep(module, given, out):
        image = out[0] if isinstance(out, tuple) else out
        kept[module] = image[:, :12]  # single-stream blocks hold text tokens, too, after the image's

    hooks = [network.get_submodule(name).register_forward_hook(keep) for name in names]
    before = adapter.velocity(network, latent, sigma, told)
    for hook in hooks:
        hook.remove()
    expected = {name: kept[network.get_submodule(name)] for name in names}
    for i, name in enumerate(names):
        found, seen = ran(network, names, lambda name=name: adapter.features(network, latent, sigma, told, name))
        assert torch.equal(found, expected[name]) and seen == list(names[: i + 1])
        assert found.shape == (2, 12, adapter.width(network)) and adapter.grid(network, latent.shape) == (2, 2, 3)
    assert torch.equal(adapter.velocity(network, latent, sigma, told), before)
    with pytest.raises(InvalidValueError, match=r"no block named blocks\.7"):
        adapter.features(network, latent, sigma, told, "blocks.7")


def test_the_paper_takes_features_at_two_thirds_of_the_depth_and_at_the_end():
    with torch.device("meta"):
        released, wan = HunyuanVideoDiT(DiTConfig.hunyuan_video()), wan_network(num_layers=40)
    assert adapter_for(released).feature_blocks(released) == ("single_blocks.19", "single_blocks.39")
    assert adapter_for(wan).feature_blocks(wan) == ("blocks.26", "blocks.39")


def test_tokens_lie_as_the_grid_says(teacher):
    """A patch of the latent shows most in its own token."""
    adapter, network, (latent, sigma, told) = teacher
    block, (_, rows, columns) = adapter.block_names(network)[0], adapter.grid(network, latent.shape)
    plain = adapter.features(network, latent, sigma, told, block)
    for t, h, w in ((0, 0, 1), (1, 1, 2), (1, 0, 0)):
        changed = latent.clone()
        changed[:, :, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2] += 3
        difference = (adapter.features(network, changed, sigma, told, block) - plain).norm(dim=-1)
        assert difference.argmax(1).tolist() == [(t * rows + h) * columns + w] * 2


def test_gradients_flow_through_features_and_checkpointing_changes_none(teacher):
    adapter, network, (latent, sigma, told) = teacher
    block = adapter.feature_blocks(network)[0]

    def gradient(latent):
        latent = latent.clone().requires_grad_()
        adapter.features(network, latent, sigma, told, block).square().mean().backward()
        return latent.grad

    plain = gradient(latent)
    adapter.set_checkpointing(network, True)
    torch.testing.assert_close(gradient(latent), plain)
    adapter.set_checkpointing(network, False)
    assert all(parameter.grad is None for parameter in network.parameters())

    step = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    network.double()
    exact = (latent.double(), sigma.double(), told)

    def loss(latent):
        return adapter.features(network, latent, sigma, told, block).square().mean()

    around = (loss(exact[0] + 1e-3 * step) - loss(exact[0] - 1e-3 * step)) / 2e-3
    torch.testing.assert_close((gradient(exact[0]) * step).sum(), around, rtol=1e-2, atol=1e-6)


def test_rows_of_a_batch_do_not_see_each_other_nor_the_padding(teacher):
    adapter, network, (latent, sigma, told) = teacher
    whole = adapter.velocity(network, latent, sigma, told)
    for row in (0, 1):
        at = slice(row, row + 1)
        alone = adapter.velocity(network, latent[at], sigma[at], told.rows(at).to("cpu"))
        torch.testing.assert_close(alone, whole[at], **TOLERANCE)
    assert not torch.allclose(whole[0], whole[1])


def test_a_lora_student_adapts_every_linear_of_the_blocks(teacher):
    adapter, network, _ = teacher
    targets = adapter.lora_targets(network)
    outside = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and name not in targets]
    assert targets and all(isinstance(network.get_submodule(name), nn.Linear) for name in targets)
    assert not any("double_blocks" in name or "single_blocks" in name or name.startswith("blocks.") for name in outside)


def test_a_network_survives_its_file_under_interchange_names(teacher, tmp_path):
    adapter, network, inputs = teacher
    file = tmp_path / "student.safetensors"
    adapter.export(network.state_dict(), file, {"step": "3"})
    with open_checkpoint(file) as checkpoint:
        assert (checkpoint.family, checkpoint.layout, checkpoint.metadata["step"]) == (adapter.family, "original", "3")
        assert adapter_for(checkpoint) == adapter_for(file) == adapter_for(network) == adapter
    again = adapter.load(file)
    state, found = network.state_dict(), again.state_dict()
    assert state.keys() == found.keys() and all(torch.equal(found[name], tensor) for name, tensor in state.items())
    torch.testing.assert_close(adapter.velocity(again, *inputs), adapter.velocity(network, *inputs))  # threads round by turns
    assert adapter.fingerprint(again) == adapter.fingerprint(network)
    del state[next(name for name in state if "blocks.0." in name)]
    with pytest.raises(CheckpointError, match="1 missing"):
        adapter.export(state, tmp_path / "other.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"family": "wan-i2v-14b-480p"}, "of the family wan-i2v-14b-480p, the network is of"),
        ({"fingerprint": "1" * 64}, r"made by big one \(111111111111...\), the teacher at hand is "),
        ({"guidance": "other"}, "embedded guidance is .*, but the network is told (one|none)"),
    ],
)
def test_trajectories_of_another_teacher_are_refused_by_name(teacher, change, said):
    adapter, network, _ = teacher
    own = adapter.fingerprint(network)
    header = Header.of(adapter.family, own, 4, 2, guidance=adapter.guidance(network), teacher="big one")
    adapter.check_header(header, network, own)
    if change == {"guidance": "other"}:
        change = {"guidance": None if adapter.embeds_guidance(network) else 6.0}
    with pytest.raises(SynVidError, match=said):
        adapter.check_header(replace(header, **change), network, own)


def test_texts_of_another_encoder_are_refused(teacher):
    adapter, network, _ = teacher
    pooled = {"wan": None, "hunyuan": torch.zeros(24)}["wan" if adapter.family == "wan-t2v-14b" else "hunyuan"]
    adapter.check_text(network, torch.zeros(4, 16), pooled)
    for text, vector in ((torch.zeros(4, 17), pooled), (torch.zeros(4, 16), torch.zeros(3))):
        with pytest.raises(CheckpointError, match="wide and pooled .*, but the network takes 16 wide and pooled"):
            adapter.check_text(network, text, vector)


def test_sizes_that_make_no_whole_patch_are_refused(teacher):
    adapter, network, (latent, sigma, told) = teacher
    for odd in (latent[..., :3, :], latent[..., :5]):
        with pytest.raises(InvalidValueError, match="must be multiples of"):
            adapter.velocity(network, odd, sigma, told)
        with pytest.raises(InvalidValueError, match="must be multiples of"):
            adapter.grid(network, odd.shape)
    with pytest.raises(InvalidValueError, match=r"must be \(B, 16, T, H, W\)"):
        adapter.velocity(network, latent[:, :4], sigma, told)


def test_an_architecture_without_an_adapter_is_named(tmp_path):
    assert set(ADAPTERS) <= set(PRESETS) and [adapter_for(family).family for family in ADAPTERS] == list(ADAPTERS)
    for unknown, name in (("wan-i2v-14b-480p", "wan-i2v-14b-480p"), (nn.Linear(1, 1), "Linear")):
        with pytest.raises(InvalidValueError, match=f"no adapter for {name}.*adapters for hunyuan-t2v, tiny, wan-t2v-14b"):
            adapter_for(unknown)
    wan = adapter_for("wan-t2v-14b")
    file = tmp_path / "ours.safetensors"
    adapter_for("tiny").export(random_weights(OURS), file)
    with pytest.raises(CheckpointError, match="is of the family tiny, not wan-t2v-14b"):
        wan.load(file)


# ---- Wan's own conventions ---------------------------------------------------------------------------------------------


def test_wan_is_told_a_thousand_sigmas_and_512_tokens():
    network, adapter = wan_network(), adapter_for("wan-t2v-14b")
    latent, sigma = torch.randn(2, *SHAPE), torch.tensor([0.9, 0.4])
    text = torch.zeros(2, 512, 16)
    text[0, :3], text[1, :5] = torch.randn(3, 16), torch.randn(5, 16)
    expected = network(latent, torch.tensor([900.0, 400.0]), text, return_dict=False)[0]
    mask = torch.arange(5)[None] < torch.tensor([3, 5])[:, None]
    dirty = torch.where(mask[..., None], text[:, :5], torch.nan)
    told = adapter.conditioning(PaddedTexts(dirty, mask, None), None)
    assert torch.equal(told.text, text) and torch.equal(adapter.velocity(network, latent, sigma, told), expected)
    cut = network(latent, torch.tensor([900.0, 400.0]), text[:, :5], return_dict=False)[0]
    assert not torch.allclose(cut, expected, atol=1e-3)  # the zeros are attended to


@pytest.mark.parametrize(
    ("texts", "guidance", "error", "said"),
    [
        (PaddedTexts(torch.zeros(1, 513, 16), None, None), None, SynVidError, "513 tokens and no pooled"),
        (PaddedTexts(torch.zeros(1, 5, 16), None, torch.zeros(1, 4)), None, SynVidError, "5 tokens and a pooled"),
        (PaddedTexts(torch.zeros(1, 5, 16), None, None), 6.0, InvalidValueError, "guidance is 6.0, but Wan embeds none"),
    ],
)
def test_what_wan_cannot_be_told(texts, guidance, error, said):
    with pytest.raises(error, match=said):
        adapter_for("wan-t2v-14b").conditioning(texts, guidance)
    with pytest.raises(InvalidValueError, match="guidance is 6, but this network embeds none"):
        adapter_for("wan-t2v-14b").guidance(wan_network(num_layers=1), 6.0)


def test_wan_is_loaded_as_diffusers_loads_it(tmp_path):
    """From its folder or from one file, in bfloat16, where some tensors stay in float32."""
    from diffusers import WanTransformer3DModel

    network, adapter = wan_network(), adapter_for("wan-t2v-14b")
    network.save_pretrained(tmp_path / "folder")
    adapter.export(network.state_dict(), tmp_path / "one.safetensors")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert {"blocks.0.self_attn.q.weight", "blocks.2.modulation", "head.head.bias"} <= set(file.keys())
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "folder", torch_dtype=torch.bfloat16, local_files_only=True)
    told = adapter.conditioning(PaddedTexts(torch.randn(1, 4, 16), None, None), None)
    inputs = torch.randn(1, *SHAPE), torch.tensor([0.7]), told
    for source in ("folder", "one.safetensors"):
        ours = adapter.load(tmp_path / source, dtype=torch.bfloat16)
        assert {name: t.dtype for name, t in ours.state_dict().items()} == {n: t.dtype for n, t in theirs.state_dict().items()}
        assert torch.equal(adapter.velocity(ours, *inputs), adapter.velocity(theirs, *inputs))
        assert not any(t.is_meta for t in [*ours.parameters(), *ours.buffers()])


# ---- capture with classifier-free guidance -----------------------------------------------------------------------------

NEGATIVE, SCALE = "blurred, 静态", 5.0


@pytest.fixture(scope="module")
def wan_files(tmp_path_factory):
    """(folder with wan.safetensors and a plan of 6 samples and a negative prompt, network)."""
    folder, network = tmp_path_factory.mktemp("wan"), wan_network(num_layers=2)
    adapter_for(network).export(network.state_dict(), folder / "wan.safetensors")
    plan, generator = Plan(folder / "plan", create=True), torch.Generator().manual_seed(3)
    for seed in range(6):
        plan.add(f"prompt {seed}", torch.randn(2 + seed, 16, generator=generator), None, seed, SHAPE, f"s{seed}")
    plan.add_negative(NEGATIVE, torch.randn(3, 16, generator=generator), None)
    return folder, network


def words(folder, *more):
    command = ["capture", "--teacher", str(folder / "wan.safetensors"), "--plan", str(folder / "plan"), "--device", "cpu"]
    return [*command, "--steps", "4", "--keys", "2", "--batch", "3", "--latents", "float32", "--json", *more]


@pytest.fixture(scope="module")
def captured(wan_files):
    """The dataset that `accvideo capture` makes of it."""
    out = wan_files[0] / "dataset"
    assert cli.main(words(wan_files[0], "--out", str(out))) == 0
    return out


def test_a_wan_trajectory_is_an_independent_solve_with_two_passes_a_step(wan_files, captured):
    folder, network = wan_files
    store, plan = SynVidStore(captured), Plan(folder / "plan")
    header = store.header
    assert (header.family, header.cfg, header.negative, header.guidance) == ("wan-t2v-14b", SCALE, NEGATIVE, None)
    assert header.shift == 5 and header.fingerprint == adapter_for(network).fingerprint(network)
    assert store.verify() == [] and sorted(store.samples()) == [f"s{seed}" for seed in range(6)]

    def padded(name):
        text = torch.zeros(1, 512, 16)
        encoded, pooled = store.text(name)  # the negative prompt's, too, is in the dataset
        text[0, : len(encoded)] = encoded
        assert pooled is None
        return text

    levels, negative = flow_sigmas(4, 5.0), padded(header.negative_text)
    for name, item in plan.items.items():
        latent, path = make_noise((1, *SHAPE), [item.seed]), []
        with torch.inference_mode():
            for high, low in zip(levels, levels[1:], strict=False):
                yes, no = (network(latent, 1000 * high[None], text)[0] for text in (padded(item.text), negative))
                latent = latent + (low - high) * (no + SCALE * (yes - no))
                path.append(latent[0])
        for key, position in ((0, 3), (1, 1)):
            torch.testing.assert_close(store.read(name, key), path[position], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--cfg", "3"], 1, "cfg: 5.0 there, 3.0 here"),
        (["--shift", "7"], 1, "shift: 5.0 there, 7.0 here"),
        (["--cfg", "1"], 1, "cfg: 5.0 there, 1.0 here; negative: 'blurred"),
        (["--negative", "ugly"], 2, "needs a negative prompt, but the plan has 1, 0 of them 'ugly'; encode one"),
        (["--cfg", "1", "--negative", NEGATIVE], 2, "cfg is 1, which uses none"),
        (["--guidance", "6"], 2, "this network embeds none"),
        (["--teacher", "tiny"], 1, "text is 16 wide|family: 'wan-t2v-14b' there, 'tiny' here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_capture_in_another_way_is_refused_and_changes_nothing(wan_files, captured, capsys, more, code, said):
    before = {path: path.read_bytes() for path in captured.rglob("*") if path.is_file()}
    assert cli.main(words(wan_files[0], "--out", str(captured), *more)) == code
    assert re.search(said, capsys.readouterr().err)
    assert {path: path.read_bytes() for path in captured.rglob("*") if path.is_file()} == before


def test_another_teacher_is_refused(wan_files, captured, tmp_path, capsys):
    other = wan_network(seed=5, num_layers=2)
    adapter_for(other).export(other.state_dict(), tmp_path / "wan.safetensors")
    command = words(wan_files[0], "--out", str(captured), "--teacher", str(tmp_path / "wan.safetensors"))
    assert cli.main(command) == 1
    assert "made in another way (fingerprint: " in capsys.readouterr().err


def test_a_dataset_takes_its_negative_prompt_along(captured, tmp_path):
    assert merge_synvid([captured], tmp_path / "merged").damages == ()
    merged = SynVidReader(tmp_path / "merged")
    assert merged.verify() == []
    (tmp_path / "merged" / text_file(merged.header.negative_text)).unlink()
    (damage,) = merged.verify()
    assert damage.id == "" and "cannot be read" in damage.what
    assert merge_synvid([tmp_path / "merged"], tmp_path / "again").damages == (damage,)


def test_guidance_by_two_passes_is_for_every_architecture(tmp_path):
    """The same code, with HunyuanVideo's conditioning; scale 1 is the positive pass alone."""
    network = our_network()
    adapter, pooled = adapter_for(network), torch.zeros(24)
    texts = [(torch.full((2, 16), value), pooled) for value in (1.0, -1.0)]
    tolds = [adapter.conditioning(pad_texts([text]), 6.0) for text in texts]
    yes, no = (lambda x, s, told=told: network(x, s, told) for told in tolds)
    x, sigma = torch.randn(1, *SHAPE), torch.tensor([0.5])
    torch.testing.assert_close(with_cfg(yes, no, 1.0)(x, sigma), yes(x, sigma), **TOLERANCE)
    expected = 3 * yes(x, sigma) - 2 * no(x, sigma)
    torch.testing.assert_close(with_cfg(yes, no, 3.0)(x, sigma), expected, **TOLERANCE)

    plan = Plan(tmp_path / "plan", create=True)
    item = plan.add("a", *texts[0], 0, SHAPE)
    header = Header.of("tiny", "0" * 64, 1, 1, cfg=3.0, negative="b")
    store = SynVidStore(tmp_path / "dataset", replace(header, dtype="float32"))
    with pytest.raises(InvalidValueError, match="cfg is 3 and no encoded negative prompt"):
        capture(network, plan, [item], store)
    assert capture(network, plan, [item], store, negative=texts[1]) == []
    noise, one = make_noise((1, *SHAPE), [0]), torch.ones(1)
    torch.testing.assert_close(store.read(item.id, 0), (noise - with_cfg(yes, no, 3.0)(noise, one))[0], **TOLERANCE)


def test_negative_prompts_are_part_of_a_plan(wan_files, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red ball\n", encoding="utf-8")
    command = ["encode", str(tmp_path / "p.txt"), "-o", str(tmp_path / "plan"), "--device", "cpu", "--json", "--negative"]
    for prompt in ("a blue box", "a blue box", "a shape"):
        assert cli.main([*command, prompt]) == 0
    plan = Plan(tmp_path / "plan")
    assert list(plan.negatives) == ["a blue box", "a shape"] and len(plan.items) == 1
    assert plan.text(plan.negatives["a blue box"])[0].shape[1] == 256
    (tmp_path / "plan" / NEGATIVES).write_text(json.dumps({"a": "../x"}), encoding="utf-8")
    with pytest.raises(SynVidError, match=r"negatives\.json \(it must be an object of prompts and hashes\); delete it"):
        Plan(tmp_path / "plan")


# ---- distillation of what was captured ---------------------------------------------------------------------------------


def distil(captured, teacher, out, *more):
    command = ["distill", "--dataset", str(captured), "--teacher", str(teacher), "--out", str(out), "--device", "cpu", "--json"]
    return cli.main([*command, "--held-out", "2", "--batch", "2", "--no-tensorboard", *more])


def trajectory_error(file, captured):
    """Eq. 6 over all segments of the dataset, of the network in the file in one pass, without classifier-free guidance."""
    adapter, dataset = adapter_for(file), SynVidDataset(captured)
    network, errors = adapter.load(file), []
    for key in (1, 0):
        batch = dataset.collate([dataset[sample, key] for sample in range(len(dataset))])
        with torch.no_grad():
            velocity = adapter.velocity(network, batch.noisy, batch.sigma_noisy, adapter.conditioning(batch, None))
        errors.append((velocity - batch.velocity).square().mean())
    return float(sum(errors))


def test_a_wan_student_is_distilled_by_the_full_method(wan_files, captured, tmp_path, capsys):
    """20 iterations of Algorithm 1 through the adapter alone: the guidance of two passes goes into one."""
    teacher, out = wan_files[0] / "wan.safetensors", tmp_path / "run"
    before = teacher.read_bytes()
    training = [
        "--any-schedule",
        "--iterations",
        "20",
        "--lr",
        "2e-3",
        "--warmup",
        "2",
        "--ema",
        "0.5",
        "--head-channels",
        "8",
        "--checkpointing",
    ]
    assert distil(captured, teacher, out, *training) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["iterations"] == 20
    with open_checkpoint(out / "student.safetensors") as student:
        assert student.family == "wan-t2v-14b" and student.metadata["iteration"] == "20"
        assert student.metadata["teacher"] == SynVidStore(captured).header.fingerprint
    ours, theirs = (trajectory_error(file, captured) for file in (out / "student.safetensors", teacher))
    print(f"trajectory error {theirs:.3f} -> {ours:.3f}")
    assert ours < 0.7 * theirs and teacher.read_bytes() == before


def test_a_wan_teacher_goes_on_as_it_was_captured(wan_files, captured):
    """On-policy distillation: with the negative prompt from the dataset, two passes a step."""
    dataset, adapter = SynVidDataset(captured), adapter_for(wan_files[1])
    going_on = Continuation.of(adapter, dataset.reader, 2)
    for key in (1, 0):
        batch = dataset.collate([dataset[sample, key] for sample in range(len(dataset))])
        with torch.no_grad():
            made = going_on(wan_files[1], batch.noisy, key, adapter.conditioning(batch, None))
        torch.testing.assert_close(made, batch.clean, rtol=1e-3, atol=1e-4)


def test_a_wan_lora_student_is_a_lora_of_wan(wan_files, captured, tmp_path):
    teacher, out = wan_files[0] / "wan.safetensors", tmp_path / "run"
    training = ["--any-schedule", "--iterations", "2", "--adversarial-weight", "0", "--lr", "0.01", "--lora", "2"]
    training += ["--on-policy-weight", "1", "--on-policy-steps", "2"]  # the teacher goes on with two passes a step
    assert distil(captured, teacher, out, *training) == 0
    with read_lora(out / "student.safetensors") as lora:
        assert {"blocks.1.self_attn.q.weight", "blocks.0.cross_attn.o.weight", "blocks.1.ffn.2.weight"} <= set(lora.modules)
        assert len(lora.modules) == 2 * 10
    merge_lora(teacher, [out / "student.safetensors"], tmp_path / "merged.safetensors")
    assert trajectory_error(tmp_path / "merged.safetensors", captured) < trajectory_error(teacher, captured)


def test_trajectories_of_another_teacher_are_not_distilled(wan_files, captured, tmp_path, capsys):
    other = wan_network(seed=5, num_layers=2)
    adapter_for(other).export(other.state_dict(), tmp_path / "other.safetensors")
    for teacher, said in ((tmp_path / "other.safetensors", "the teacher at hand is"), ("tiny", "of the family wan-t2v-14b, the")):
        assert distil(captured, teacher, tmp_path / "run", "--any-schedule") == 1
        assert said in capsys.readouterr().err
    assert distil(captured, wan_files[0] / "wan.safetensors", tmp_path / "run") == 1
    assert "say --any-schedule" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
