"""HunyuanVideo's text encoders and VAE in folders laid out as the released ones, of the very same classes, small and random.

The tokenizers split as the real ones do (Llama 3's pattern, CLIP's) but know bytes alone, so a prompt has more tokens; the
special tokens have their real numbers, by which ComfyUI finds the template's end.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eot_id|>": 128009,
    "<pad>": 128258,
}
LLAMA = {"vocab_size": 128320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
LLAMA |= {"num_key_value_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
CLIP = {"vocab_size": 49408, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VAE_WIDTHS = (32, 32, 64, 64)


def make_text_encoders(folder: Path) -> Path:
    """`folder` with text_encoder, tokenizer, text_encoder_2 and tokenizer_2, as diffusers lays them out."""
    llama = LlamaModel(LlamaConfig(**LLAMA, rope_theta=500000.0, bos_token_id=128000, eos_token_id=128001))
    clip = CLIPTextModel(CLIPTextConfig(**CLIP, hidden_act="quick_gelu", projection_dim=32, eos_token_id=49407))
    for seed, (model, name) in enumerate(((llama, "text_encoder"), (clip, "text_encoder_2"))):
        randomise(model, seed)
        model.save_pretrained(folder / name)
    llama_tokenizer().save_pretrained(folder / "tokenizer")
    file = folder / "tokenizer" / "tokenizer.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    written["model"]["merges"] = [" ".join(pair) for pair in written["model"]["merges"]]  # as the released file has them
    file.write_text(json.dumps(written), encoding="utf-8")
    save_clip_tokenizer(folder / "tokenizer_2")
    return folder


def make_vae(folder: Path) -> Path:
    """A VAE of the released one's 4 x 8 x 8 compression and 16 channels, with few channels inside."""
    vae = AutoencoderKLHunyuanVideo(block_out_channels=VAE_WIDTHS)
    randomise(vae, 2)
    vae.save_pretrained(folder)
    return folder


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """No tensor trivial: norms around 1, biases everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(0.1 * value + ("norm" in name and name.endswith("weight")))
        else:
            parameter.copy_(value if "embed" in name else value * parameter[0].numel() ** -0.5)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    taken = {882, 271}
    letters = sorted(ByteLevel.alphabet())
    numbers = [n for n in range(300) if n not in taken][: len(letters)]
    vocabulary = dict(zip(letters, numbers, strict=True)) | SPECIAL
    vocabulary |= {"ĊĊ": 271, "ĊĊĊĊ": 502, "us": 500, "use": 501, "user": 882}
    merges = [("Ċ", "Ċ"), ("ĊĊ", "ĊĊ"), ("u", "s"), ("us", "e"), ("use", "r")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", pad_token="<pad>"
    )


def save_clip_tokenizer(folder: Path) -> None:
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>"}
    config |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
