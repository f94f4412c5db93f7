"""The tiny world's text encoder: words -> token states and a pooled vector, trained together with the teacher."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from ..dit import Conditioning, attention
from ..errors import AccVideoWarning, PromptError
from .clips import CLASSES
from .prompts import MEANING, NOUNS, VOCABULARY, contradictions, split_words

MAX_TOKENS = 32
TEXT_DIM, POOLED_DIM = 256, 768
BEGIN = 0  # first token of every prompt
_TOKEN = {word: i + 1 for i, word in enumerate(VOCABULARY)}


def tokenize(prompt: str) -> list[int]:
    """Token numbers of a prompt, the begin token first; "" is the fully open prompt, the begin token alone.

    Words outside the vocabulary and words past MAX_TOKENS are dropped, and two names for one attribute contradict each
    other; an AccVideoWarning names them. Raises PromptError when no word of a prompt says anything about a clip.
    """
    words = split_words(prompt)
    for kind, names in contradictions(words).items():
        message = f"{prompt!r} names more than one {kind} ({', '.join(names)}), and a clip has one; the result is a guess"
        warnings.warn(message, AccVideoWarning, stacklevel=2)
    unknown = [w for w in words if w not in _TOKEN]
    if prompt.strip() and not any(w in MEANING or w in NOUNS for w in words):
        known = "; ".join(f"{kind}: {', '.join(classes)}" for kind, classes in CLASSES.items())
        raise PromptError(
            f"no word of {prompt!r} is known to the tiny world, which draws {known}; "
            "try 'a red ball moving left on a black background'"
        )
    if unknown:
        warnings.warn(
            f"the tiny world does not know {', '.join(repr(w) for w in dict.fromkeys(unknown))} in {prompt!r}; left out",
            AccVideoWarning,
            stacklevel=2,
        )
    kept = [w for w in words if w in _TOKEN]
    if cut := kept[MAX_TOKENS - 1 :]:
        message = f"the prompt is longer than {MAX_TOKENS - 1} words; left out: {' '.join(cut)}"
        warnings.warn(message, AccVideoWarning, stacklevel=2)
    return [BEGIN, *(_TOKEN[w] for w in kept[: MAX_TOKENS - 1])]


class TinyTextEncoder(nn.Module):
    """One Transformer layer over word embeddings. B prompts, L tokens."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(len(VOCABULARY) + 1, TEXT_DIM)
        self.position = nn.Parameter(torch.zeros(MAX_TOKENS, TEXT_DIM))
        self.norm1 = nn.LayerNorm(TEXT_DIM)
        self.qkv = nn.Linear(TEXT_DIM, 3 * TEXT_DIM)
        self.attn_out = nn.Linear(TEXT_DIM, TEXT_DIM)
        self.norm2 = nn.LayerNorm(TEXT_DIM)
        self.fc1 = nn.Linear(TEXT_DIM, 2 * TEXT_DIM)
        self.fc2 = nn.Linear(2 * TEXT_DIM, TEXT_DIM)
        self.norm_out = nn.LayerNorm(TEXT_DIM)
        self.pool = nn.Linear(TEXT_DIM, POOLED_DIM)
        nn.init.normal_(self.position, std=0.5)

    def tokenize(self, prompt: str) -> list[int]:
        return tokenize(prompt)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens (B, L) long, mask (B, L) bool with valid tokens first, or None -> text (B, L, 256), pooled (B, 768)."""
        lengths = None if mask is None else tuple(mask.sum(1).tolist())
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.attn_out(attention(q, k, v, lengths))
        x = x + self.fc2(gelu(self.fc1(self.norm2(x))))
        x = self.norm_out(x)
        if mask is None:
            return x, self.pool(x.mean(1))
        weight = mask[..., None].to(x.dtype)
        return x * weight, self.pool((x * weight).sum(1) / weight.sum(1))

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """(text (B, L, 256), pooled (B, 768), mask (B, L) bool or None when all prompts have one length)."""
        return self.encode_tokens([tokenize(p) for p in prompts])

    def condition(self, prompts: Sequence[str], guidance: Tensor) -> Conditioning:
        """Conditioning of the network for B prompts; guidance (B,) in plain scale."""
        text, pooled, mask = self.encode(prompts)
        return Conditioning(text, pooled, guidance.to(text.device), mask)

    def encode_tokens(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `encode`, from the rows of token numbers that `tokenize` gives."""
        device = self.embedding.weight.device
        longest = max(len(r) for r in rows)
        tokens = torch.tensor([[*r, *[BEGIN] * (longest - len(r))] for r in rows], device=device)
        mask = None
        if any(len(r) < longest for r in rows):
            lengths = torch.tensor([len(r) for r in rows], device=device)
            mask = torch.arange(longest, device=device)[None] < lengths[:, None]
        return *self(tokens, mask), mask
