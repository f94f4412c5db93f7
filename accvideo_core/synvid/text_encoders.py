"""The released models' text encoders outside ComfyUI, through transformers.

HunyuanVideo has two, LLaVA-Llama-3-8B for the tokens and CLIP-L for the pooled vector, as its official code runs them
(arXiv 2412.03603): the prompt inside a template that asks for a description of the video, the template's own tokens cropped,
the third hidden state from the end, at most 256 tokens. Wan 2.1 has UMT5-XXL (arXiv 2503.20314), at most 512 tokens.

Prompts are encoded one at a time, so that what is stored of a prompt never depends on its neighbours.
"""

from __future__ import annotations

import html
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import AccVideoWarning, CheckpointError, MissingExtraError, PromptError

TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|eot_id|>",
)
LAYER = -3  # of the hidden states, of which the last is the output and the first the embedding
MAX_TOKENS, CLIP_TOKENS, WAN_TOKENS = 256, 77, 512
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# model_type in config.json -> transformers' class of the file, and where in it the part is that we run
_MODELS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "language model": {"llama": ("LlamaModel", ""), "llava": ("LlavaModel", "language_model")},
    "CLIP": {"clip_text_model": ("CLIPTextModel", ""), "clip": ("CLIPTextModel", "")},
    "text encoder": {"umt5": ("UMT5EncoderModel", "")},
}


class TextEncoder(Protocol):
    """What turns a prompt into what the network is told."""

    def encode(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        """(text (L, D) of valid tokens alone, pooled (P,) or None for a model without it), on the CPU."""


class HunyuanText:
    """`HunyuanText.load(folder).encode(prompt)`: text (L, 4096), L <= 256, and pooled (768,), in the encoders' dtype."""

    def __init__(self, llama: Any, llama_tokenizer: Any, clip: Any, clip_tokenizer: Any) -> None:
        self._llama, self._llama_tokenizer = llama, llama_tokenizer
        self._clip, self._clip_tokenizer = clip, clip_tokenizer
        self._before = llama_tokenizer(TEMPLATE[0])["input_ids"]

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16) -> HunyuanText:
        """Both encoders from one folder: `text_encoder` and `text_encoder_2` with their tokenizers in them, as Tencent's
        script lays them out, or in `tokenizer` and `tokenizer_2`, as diffusers does. Never loads from the network.

        Raises MissingExtraError without transformers, CheckpointError for a folder or weights that are not whole.
        """
        folder, hub = Path(folder), _transformers()
        places = {}
        for part in ("text_encoder", "text_encoder_2"):
            beside = folder / part.replace("text_encoder", "tokenizer")
            places[part] = beside if beside.is_dir() else folder / part
        # By its file alone: the class a Llama 3 tokenizer's folder names splits words its own way in some versions.
        fast, clip_tokenizer = hub.PreTrainedTokenizerFast, hub.CLIPTokenizer
        return cls(
            _load_model(hub, folder / "text_encoder", "language model").to(device, dtype).eval(),
            _attempt(places["text_encoder"], lambda path: fast.from_pretrained(path, local_files_only=True)),
            _load_model(hub, folder / "text_encoder_2", "CLIP").to(device, dtype).eval(),
            _attempt(places["text_encoder_2"], lambda path: clip_tokenizer.from_pretrained(path, local_files_only=True)),
        )

    @torch.no_grad()
    def encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        """As `TextEncoder`. A prompt of more than 256 tokens is cut, with an AccVideoWarning that says what is left out; CLIP
        sees the first 77 of its own, as everywhere. "" is the empty prompt. The text is taken as it stands: parentheses are
        no weights.

        Raises PromptError for a prompt that the tokenizer joins with the template before it (one that begins with line breaks).
        """
        ids = self._llama_tokenizer(prompt.join(TEMPLATE))["input_ids"]
        crop = len(self._before)
        if ids[:crop] != self._before:
            raise PromptError(f"the prompt {prompt[:40]!r} melts into the template before it; strip its line breaks")
        if len(ids) - crop > MAX_TOKENS:
            _warn_of_cut(prompt, MAX_TOKENS, self._llama_tokenizer.decode(ids[crop + MAX_TOKENS :], skip_special_tokens=True))
        tokens = torch.tensor([ids[: crop + MAX_TOKENS]], device=self._llama.device)
        states = self._llama(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
        words = self._clip_tokenizer(
            prompt, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        pooled = self._clip(input_ids=words.to(self._clip.device)).pooler_output
        return states[LAYER][0, crop:].cpu(), pooled[0].cpu()


class WanText:
    """`WanText.load(folder).encode(prompt)`: text (L, 4096), L <= 512, in the encoder's dtype, and no pooled vector."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> WanText:
        """From a folder with `text_encoder` and `tokenizer`, as diffusers lays it out; float16 is too narrow for this model.
        Raises as `HunyuanText.load` does."""
        folder, hub = Path(folder), _transformers()
        return cls(
            _load_model(hub, folder / "text_encoder", "text encoder").to(device, dtype).eval(),
            _attempt(folder / "tokenizer", lambda path: hub.PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)),
        )

    @torch.no_grad()
    def encode(self, prompt: str) -> tuple[Tensor, None]:
        """As `TextEncoder`. Broken characters, HTML entities and white space are cleaned up first, as Wan's own code does. A
        prompt of more than 512 tokens is cut, with an AccVideoWarning that says what is left out; "" is the empty prompt."""
        words = " ".join(html.unescape(html.unescape(_ftfy().fix_text(prompt))).split())
        ids = self._tokenizer(words)["input_ids"]
        if len(ids) > WAN_TOKENS:
            _warn_of_cut(prompt, WAN_TOKENS, self._tokenizer.decode(ids[WAN_TOKENS - 1 :], skip_special_tokens=True))
            ids = [*ids[: WAN_TOKENS - 1], ids[-1]]
        states = self._model(input_ids=torch.tensor([ids], device=self._model.device)).last_hidden_state
        return states[0].cpu(), None


def kind_of(folder: str | Path) -> str | None:
    """`model_type` of the model in a folder, as its config.json says; CheckpointError if that cannot be read."""
    config = Path(folder) / "config.json"
    try:
        found: str | None = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"cannot read {str(config)!r} ({error}); give the folder that holds text_encoder/config.json"
        ) from error
    return found


def _warn_of_cut(prompt: str, limit: int, left_out: str) -> None:
    message = f"the prompt {prompt[:40]!r}... is longer than {limit} tokens; left out: {left_out.strip()!r}"
    warnings.warn(message, AccVideoWarning, stacklevel=3)


def _load_model(hub: ModuleType, folder: Path, part: str) -> Any:
    """The part's model, every weight of which must come from the folder."""
    kind, known = kind_of(folder), _MODELS[part]
    if kind is None or kind not in known:
        raise CheckpointError(f"{str(folder)!r} holds a {kind!r} model; as the {part} it must be {' or '.join(known)}")
    name, inner = known[kind]
    model, said = _attempt(
        folder,
        lambda path: getattr(hub, name).from_pretrained(path, local_files_only=True, dtype="auto", output_loading_info=True),
    )
    if absent := sorted([*said["missing_keys"], *map(str, said["mismatched_keys"])]):
        raise CheckpointError(
            f"{str(folder)!r} lacks {len(absent)} tensors of a {name}, {absent[0]} the first; the download may be cut off"
        )
    return getattr(model, inner) if inner else model


def _attempt(folder: Path, load: Any) -> Any:
    try:
        return load(folder)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise CheckpointError(f"cannot load {str(folder)!r}: {' '.join(str(error).split())}; download it again") from error


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("the released text encoders need", "transformers", "text") from error
    return transformers


def _ftfy() -> ModuleType:
    try:
        import ftfy
    except ImportError as error:
        raise MissingExtraError("Wan's text encoder needs", "ftfy", "text") from error
    return ftfy
