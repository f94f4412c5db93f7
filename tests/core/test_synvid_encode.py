"""Prompt files, plans, and HunyuanVideo's text encoders and VAE outside ComfyUI, held against diffusers' pipeline."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from accvideo_core import cli
from accvideo_core.checkpoint import save_original
from accvideo_core.distill.adapters import adapter_for
from accvideo_core.dit import Conditioning, DiTConfig
from accvideo_core.errors import AccVideoWarning, CheckpointError, PromptError, SynVidError
from accvideo_core.headless import generate
from accvideo_core.sampling import make_noise
from accvideo_core.synvid import SynVidStore, sample_id
from accvideo_core.synvid.plan import Plan, prompt_seed
from accvideo_core.synvid.prompts import Prompt, read_prompts
from accvideo_core.synvid.text_encoders import TEMPLATE, HunyuanText, WanText
from accvideo_core.synvid.video_vae import HunyuanVAE
from tests.hunyuan_files import LLAMA, make_text_encoders, make_vae, randomise
from tests.networks import error, random_weights

SHAPE = (16, 2, 2, 4)
PROMPTS = ("a cat (red:1.3) walks, then sits", "", "user asks\n\nfor the user's cat")


# ---- prompt files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "\ufeffa cat\r\n\r\n  a dog \n# not a comment", [Prompt("a cat"), Prompt("a dog"), Prompt("# not a comment")]),
        ("a.csv", 'id,prompt,seed\none,"a cat, ""big""\nand red",7\n,a dog,\n', [
            Prompt('a cat, "big"\nand red', "one", 7), Prompt("a dog")]),
        ("a.JSONL", '{"prompt": "a cat", "seed": 18446744073709551615, "video": "x.mp4"}\n\n{"prompt": ""}\n', [
            Prompt("a cat", None, 2**64 - 1)]),
    ],
)  # fmt: skip
def test_prompt_files(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read_prompts(path) == expected


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.md", b"a cat", r"must end in \.txt, \.csv, \.jsonl"),
        ("a.txt", b" \n", "has no prompts"),
        ("a.txt", b"\xff\xfe\x00", "give UTF-8"),
        ("a.csv", b"text\na cat\n", "no column named prompt"),
        ("a.csv", b"prompt,seed\na cat,-1\n", "line 2.*seed '-1'"),
        ("a.csv", b'prompt\n"a cat\n', "cannot read"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2 is no JSON"),
        ("a.jsonl", b'"a cat"\n', "line 1 must be an object"),
        ("a.jsonl", b'{"prompt": 5}\n', "line 1: the prompt must be text, not 5"),
        ("a.jsonl", b'{"prompt": "a cat \\ud83d"}\n', r"line 1: the prompt has half a letter, '\\ud83d'"),
        ("a.jsonl", b'{"prompt": "a", "seed": 1.5}\n', "line 1: the seed 1.5"),
        ("a.jsonl", b'{"prompt": "a", "id": "../x"}\n', "line 1: the id '../x'"),
        ("a.jsonl", b'{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', "id 'x' in line 1 and in line 2"),
    ],
)
def test_bad_prompt_files_are_named_by_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=said):
        read_prompts(tmp_path / name)
    with pytest.raises(PromptError, match="missing"):
        read_prompts(tmp_path / "missing.txt")


def test_a_repeated_prompt_is_left_out_by_line(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\na dog\na cat\n")
    with pytest.warns(AccVideoWarning, match="repeats prompts in lines 3"):
        assert [prompt.text for prompt in read_prompts(tmp_path / "a.txt")] == ["a cat", "a dog"]


# ---- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_read_as_it_was_written_and_mends_a_torn_line(tmp_path):
    text, pooled = torch.randn(3, 4).half(), torch.randn(5).half()
    plan = Plan(tmp_path / "plan", create=True)
    first = plan.add("ein Ball – rot", text, pooled, 2**64 - 1, SHAPE)
    assert first.id == sample_id("ein Ball – rot", 2**64 - 1, SHAPE)
    file = tmp_path / "plan" / "plan.jsonl"
    with open(file, "ab") as torn:
        torn.write(b'{"id": "b", "prom')
    again = Plan(tmp_path / "plan")
    assert again.items == {first.id: first}
    second = again.add("b", text[:1], None, 0, SHAPE, "b")
    third = Plan(tmp_path / "plan")
    assert list(third.items.values()) == [first, second] and third.text(second.text)[1] is None
    for stored, given in zip(third.text(first.text), (text, pooled), strict=True):
        assert torch.equal(stored, given) and stored.dtype == given.dtype
    with pytest.raises(SynVidError, match="has a sample 'b' already"):
        third.add("c", text, pooled, 0, SHAPE, "b")
    file.write_bytes(file.read_bytes().replace(b'"seed": 0', b'"seed": -4'))
    with pytest.raises(SynVidError, match="line 2 is no sample of a plan.*seed -4"):
        Plan(tmp_path / "plan")
    with pytest.raises(SynVidError, match="holds no plan.*accvideo encode"):
        Plan(tmp_path / "none")


def test_a_seed_hangs_on_its_prompt_alone():
    seeds = {prompt_seed(prompt, run, copy) for prompt in ("a", "b") for run in (0, 1) for copy in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**53 for seed in seeds)
    assert prompt_seed("a red ball") == 2065895325111724  # in datasets by now


# ---- the released models' classes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text encoders and VAE as diffusers lays them out."""
    path = make_text_encoders(tmp_path_factory.mktemp("hunyuan"))
    make_vae(path / "vae")
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return HunyuanText.load(folder, dtype=torch.float32)


def by_diffusers(encoder, prompt):
    """(text at its valid length, pooled) as diffusers' pipeline computes them."""
    from diffusers import HunyuanVideoPipeline as Pipeline

    parts = SimpleNamespace(
        _execution_device="cpu",
        tokenizer=encoder._llama_tokenizer,
        text_encoder=encoder._llama,
        tokenizer_2=encoder._clip_tokenizer,
        text_encoder_2=encoder._clip,
    )
    crop = len(encoder._llama_tokenizer(TEMPLATE[0])["input_ids"])  # 95 with the released tokenizer
    with torch.no_grad():
        text, mask = Pipeline._get_llama_prompt_embeds(parts, prompt, {"template": "{}".join(TEMPLATE), "crop_start": crop})
        return text[0][mask[0].bool()], Pipeline._get_clip_prompt_embeds(parts, prompt)[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_encoders_are_diffusers(encoder, prompt):
    text, pooled = encoder.encode(prompt)
    their_text, their_pooled = by_diffusers(encoder, prompt)
    assert error(text, their_text) < 1e-5 and error(pooled, their_pooled) < 1e-5
    assert error(encoder.encode("another")[1], pooled) > 1e-2


def test_a_long_prompt_is_cut_at_256_tokens_and_says_what_is_lost(encoder):
    with pytest.warns(AccVideoWarning, match="longer than 256 tokens; left out: '.*the end'"):
        text, pooled = encoder.encode("a word " * 60 + "and the end")
    their_text, their_pooled = by_diffusers(encoder, "a word " * 60 + "and the end")
    assert text.shape == (256, LLAMA["hidden_size"]) and error(text, their_text) < 1e-5 and error(pooled, their_pooled) < 1e-5


def test_a_prompt_that_melts_into_the_template_is_refused(encoder):
    with pytest.raises(PromptError, match="melts into the template"):
        encoder.encode("\n\na cat")


def test_tencents_layout_and_the_whole_llava_give_the_same(folder, encoder, tmp_path):
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    for part, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        for source in (part, tokenizer):
            shutil.copytree(folder / source, tmp_path / part, dirs_exist_ok=True)
    assert torch.equal(HunyuanText.load(tmp_path, dtype=torch.float32).encode("a cat")[0], encoder.encode("a cat")[0])
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=28)
    config = LlavaConfig(vision_config=vision, text_config=encoder._llama.config, image_token_index=128257)
    llava = LlavaForConditionalGeneration(config)
    randomise(llava, 9)
    llava.model.language_model.load_state_dict(encoder._llama.state_dict())
    llava.save_pretrained(tmp_path / "text_encoder")
    assert torch.equal(HunyuanText.load(tmp_path, dtype=torch.float32).encode("a cat")[0], encoder.encode("a cat")[0])


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    """UMT5 as diffusers lays Wan's out, small and random; its tokenizer knows letters alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    path = tmp_path_factory.mktemp("wan")
    letters = [(piece, -1.0) for piece in ("<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127)), "静", "态")]
    splitter = Tokenizer(models.Unigram(letters, unk_id=2))
    splitter.pre_tokenizer, splitter.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    splitter.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(path / "tokenizer")
    model = UMT5EncoderModel(UMT5Config(vocab_size=len(letters), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2))
    randomise(model, 3)
    model.save_pretrained(path / "text_encoder")
    return path


@pytest.mark.parametrize(
    "prompt", ["a cat sits", "", "it\u2019s &amp;lt;b&gt; \n two,\uff0c 静态", "long " * 200 + "and the end"]
)
def test_wans_text_encoder_is_diffusers(wan_folder, prompt):
    """Cut, cleaned and at its valid length; the rest of diffusers' 512 tokens is zeros."""
    from diffusers import WanPipeline

    encoder = WanText.load(wan_folder, dtype=torch.float32)
    parts = SimpleNamespace(_execution_device="cpu", tokenizer=encoder._tokenizer, text_encoder=encoder._model)
    theirs = WanPipeline._get_t5_prompt_embeds(parts, prompt, max_sequence_length=512)[0].detach()
    cut = pytest.warns(AccVideoWarning, match="than 512 tokens; left out: .*the end") if len(prompt) > 512 else nullcontext()
    with cut:
        text, pooled = encoder.encode(prompt)
    assert pooled is None and error(text, theirs[: len(text)]) < 1e-5 and not theirs[len(text) :].any()


def test_a_wan_plan_has_its_negative_prompt(wan_folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat\n", encoding="utf-8")
    command = ["encode", str(tmp_path / "p.txt"), "-o", str(tmp_path / "plan"), "--text-encoder", str(wan_folder)]
    assert cli.main([*command, "--negative", "静态", "--device", "cpu"]) == 0
    plan, encoder = Plan(tmp_path / "plan"), WanText.load(wan_folder, dtype=torch.float32)
    (item,) = plan.items.values()
    assert item.shape == (16, 21, 60, 104)
    for prompt, name in (("a cat", item.text), ("静态", plan.negatives["静态"])):
        text, pooled = plan.text(name)
        assert torch.equal(text, encoder.encode(prompt)[0]) and pooled is None


def test_folders_that_are_not_whole_are_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="text_encoder/config.json"):
        HunyuanText.load(tmp_path)
    with pytest.raises(CheckpointError, match="VAE"):
        HunyuanVAE.load(tmp_path)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "text_encoder_2" / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("final_layer_norm.weight"))
    del state[name]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 tensors of a CLIPTextModel.*final_layer_norm.weight"):
        HunyuanText.load(tmp_path)
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "qwen2"}))
    with pytest.raises(CheckpointError, match="holds a 'qwen2' model.*llama or llava"):
        HunyuanText.load(tmp_path)


def test_vae_decodes_model_space_in_tiles_or_whole(folder):
    latent = make_noise((1, 16, 2, 2, 3), [3])[0]
    whole, tiled = (HunyuanVAE.load(folder, dtype=torch.float32, tiled=tiled) for tiled in (False, True))
    with torch.no_grad():
        theirs = whole._vae.decode(latent[None] / 0.476986).sample[0].clamp(-1, 1)
    frames = whole.decode(latent)
    assert frames.shape == (5, 16, 24, 3) and frames.dtype == np.uint8
    assert np.abs(frames - (theirs.permute(1, 2, 3, 0).numpy() + 1) * 127.5).max() <= 0.51
    assert np.array_equal(tiled.decode(latent), frames)  # smaller than a tile
    assert tiled._vae.use_tiling and tiled._vae.use_framewise_decoding
    assert not whole._vae.use_tiling and not whole._vae.use_framewise_decoding


def test_released_models_end_to_end_without_comfyui(folder, encoder, tmp_path, capsys, monkeypatch):
    """encode, capture, decode and generate with the released models' classes, against the same computed by hand."""
    config = DiTConfig(128, 1, 1, 1, text_dim=LLAMA["hidden_size"], pooled_dim=32)
    teacher = tmp_path / "teacher.safetensors"
    save_original(teacher, random_weights(config))
    # The family is told by the text's width alone, which in a released model is 4096.
    monkeypatch.setattr("accvideo_core.checkpoint.reader.family_of", lambda config: "hunyuan-t2v")
    (tmp_path / "prompts.txt").write_text("a cat sits\n")
    size = ["--frames", "5", "--height", "16", "--width", "32"]
    plan, dataset, videos = (str(tmp_path / name) for name in ("plan", "dataset", "videos"))
    for words in (
        ["encode", str(tmp_path / "prompts.txt"), "-o", plan, "--text-encoder", str(folder), *size],
        ["capture", "--teacher", str(teacher), "--plan", plan, "-o", dataset, "--steps", "2", "--keys", "2"],
        ["decode", dataset, "-o", videos, "--vae", str(folder)],
    ):
        assert cli.main([*words, "--json", "--device", "cpu"]) == 0, capsys.readouterr().err
    store = SynVidStore(dataset)
    (sample,) = store.samples().values()
    text, pooled = encoder.encode("a cat sits")
    assert torch.equal(store.text(sample.text)[0], text) and sample.shape == SHAPE
    network = generate.load_network(adapter_for("hunyuan-t2v"), teacher, torch.device("cpu"))
    conditioning = Conditioning(text[None], pooled[None], torch.tensor([6.0]))
    latent, sigmas = store.noise(sample.id)[None], store.header.sigmas
    for j in range(2):
        latent = latent + (sigmas[j + 1] - sigmas[j]) * network(latent, torch.tensor([sigmas[j]]), conditioning)
    assert torch.equal(store.read(sample.id, 0), latent[0].half())
    assert (tmp_path / "videos" / f"{sample.id}.mp4").is_file()

    written = []
    monkeypatch.setattr(generate, "write_mp4", lambda path, frames, fps, metadata: written.append((frames, fps)))
    words = ["generate", "a cat sits", "--student", str(teacher), "--text-encoder", str(folder), "--vae", str(folder), *size]
    words += ["--steps", "2", "--seed", str(sample.seed), "--device", "cpu", "--out", str(tmp_path / "a.mp4")]
    assert cli.main(words) == 0
    expected = HunyuanVAE.load(folder, dtype=torch.float32).decode(latent[0])
    assert np.array_equal(written[0][0], expected) and written[0][1] == 24
    capsys.readouterr()
    assert cli.main(["generate", "a cat", "--student", str(teacher), "--out", str(tmp_path / "a.mp4")]) == 2
    assert "--text-encoder and --vae of the tiny world cannot work with --student" in capsys.readouterr().err


def test_a_plan_grows_and_a_prompt_that_cannot_be_encoded_is_named(tmp_path, capsys):
    (tmp_path / "p.csv").write_text("prompt,seed\na red ball,5\nxyzzy,\na shape,\n")
    words = ["encode", str(tmp_path / "p.csv"), "-o", str(tmp_path / "plan"), "--device", "cpu", "--json", "--seeds", "2"]
    assert cli.main(words) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["added"] == 3 and "left out: no word of 'xyzzy'" in said.err
    items = list(Plan(tmp_path / "plan").items.values())
    assert [item.seed for item in items] == [5, prompt_seed("a shape"), prompt_seed("a shape", 0, 1)]
    assert len({item.text for item in items}) == 2 and items[0].shape == (16, 5, 8, 8)
    (tmp_path / "p.csv").write_text("prompt,seed\na shape,\na blue box,\na red ball,5\n")
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["added"] == 2 and list(Plan(tmp_path / "plan").items.values())[:3] == items
