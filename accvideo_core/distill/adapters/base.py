"""What the trainer and the capture know of a flow teacher: nothing but an adapter, one file for an architecture.

docs/adapters.md shows how to write one. Shapes: B batch, C channels, T latent frames, H W latent height and width, N image
tokens in order of (t, h, w), D width, L text length.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...checkpoint.fingerprint import fingerprint
from ...errors import CheckpointError, InvalidValueError, SynVidError
from ...schedule import get_preset
from ...synvid import Header
from ...synvid.capture import Texts


class Told(Protocol):
    """What a network is told besides the latent: made by `Adapter.conditioning`, read by `Adapter.velocity` alone."""

    def to(self, device: torch.device | str | None = None) -> Any:
        """The same on a device."""

    def rows(self, index: Any) -> Any:
        """The rows that a slice, a list or a tensor selects."""


@dataclass(frozen=True)
class Adapter(ABC):
    """An architecture as the method sees it. Stateless: the network is an argument, so teacher, student and EMA share one.

    family  the key in `schedule.PRESETS`
    """

    family: str

    # ---- what every architecture says for itself --------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def family_of(network: nn.Module) -> str | None:
        """The family of a network, None if it is of another architecture; told without importing an optional package."""

    @abstractmethod
    def velocity(self, network: nn.Module, latent: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """d latent / d sigma (B, C, T, H, W) at latent (B, C, T, H, W) in model space and noise levels sigma (B,), in the
        latent's dtype. One pass: classifier-free guidance is `synvid.capture.with_cfg`'s. Autograd flows through it."""

    @abstractmethod
    def features(self, network: nn.Module, latent: Tensor, sigma: Tensor, conditioning: Any, block: str) -> Tensor:
        """(B, N, D): the image tokens' hidden state after `block`, a name of `block_names`; no later block is computed.
        Autograd flows through it. InvalidValueError for a name that is none."""

    @abstractmethod
    def block_names(self, network: nn.Module) -> tuple[str, ...]:
        """The blocks in the order they run, as module paths: what is sharded, checkpointed and compiled one by one."""

    @abstractmethod
    def width(self, network: nn.Module) -> int:
        """D."""

    @abstractmethod
    def patch(self, network: nn.Module) -> tuple[int, int, int]:
        """Latent (frames, height, width) of a token."""

    @abstractmethod
    def conditioning(self, texts: Texts, guidance: float | None) -> Any:
        """A `Told` of a batch's texts and, in plain scale, its embedded guidance (None for a network without it).
        SynVidError for texts of another model."""

    @abstractmethod
    def check_text(self, network: nn.Module, text: Tensor, pooled: Tensor | None) -> None:
        """CheckpointError unless one prompt's text (L, D) and pooled vector (P,) have the sizes the network takes."""

    @abstractmethod
    def embeds_guidance(self, network: nn.Module) -> bool:
        """Whether the network is told a guidance scale."""

    @abstractmethod
    def load(self, path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
        """The network with the weights of a file in any layout `open_checkpoint` reads, in evaluation mode; `dtype` None takes
        the stored one. CheckpointError for what is damaged or of another model."""

    @abstractmethod
    def export(self, state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write a network's state dict as one safetensors in interchange names, all or nothing. CheckpointError if it is not a
        whole network, OutputError where the disk refuses."""

    @abstractmethod
    def original(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(interchange name, tensor) of a state dict; names that no network has are passed on as they are."""

    @abstractmethod
    def set_checkpointing(self, network: nn.Module, on: bool) -> None:
        """Recompute each block in the backward pass instead of keeping what is inside it."""

    # ---- what follows from it ---------------------------------------------------------------------------------------------

    def feature_blocks(self, network: nn.Module) -> tuple[str, str]:
        """(block for the clean key, block for the noisy keys): the one at two thirds of the depth and the last, as in the paper
        (the 40th and the 60th of HunyuanVideo: single_blocks.19 and .39)."""
        names = self.block_names(network)
        return names[-(-2 * len(names) // 3) - 1], names[-1]

    def grid(self, network: nn.Module, shape: Sequence[int]) -> tuple[int, int, int]:
        """Tokens (t, h, w) of a latent of shape (..., T, H, W); InvalidValueError where patches do not divide it."""
        patch, sizes = self.patch(network), tuple(shape[-3:])
        if any(n % p or not n for n, p in zip(sizes, patch, strict=True)):
            raise InvalidValueError(
                f"latent frames, height and width {sizes} must be multiples of {patch}: make the video's height and width "
                f"multiples of {8 * patch[1]}"
            )
        t, h, w = (n // p for n, p in zip(sizes, patch, strict=True))
        return t, h, w

    def guidance(self, network: nn.Module, asked: float | None = None) -> float | None:
        """The scale that `conditioning` takes for this network: the one asked for, or the family's; None if it embeds none, and
        InvalidValueError if one is asked for all the same, or is not finite."""
        if asked is not None and not math.isfinite(asked):
            raise InvalidValueError(f"guidance is {asked}; it must be a finite number")
        if self.embeds_guidance(network):
            return get_preset(self.family).guidance if asked is None else asked
        if asked is not None:
            raise InvalidValueError(
                f"guidance is {asked:g}, but this network embeds none; leave it out (cfg may be what you mean)"
            )
        return None

    def lora_targets(self, network: nn.Module) -> tuple[str, ...]:
        """Module paths of what a LoRA student adapts: every Linear of the blocks."""
        return tuple(
            f"{block}.{name}"
            for block in self.block_names(network)
            for name, module in network.get_submodule(block).named_modules()
            if isinstance(module, nn.Linear)
        )

    def fingerprint(self, network: nn.Module) -> str:
        """`checkpoint.fingerprint` of the network as it is loaded, under interchange names; before it is sharded."""
        return fingerprint(self.original(network.state_dict()))

    def check_header(self, header: Header, network: nn.Module, teacher: str | None = None) -> None:
        """SynVidError, naming what differs, unless trajectories of `header` can teach a student of this architecture.

        network  the teacher or the student
        teacher  fingerprint of the frozen teacher; None where none is at hand
        """
        embeds = self.embeds_guidance(network)
        faults = []
        if header.family != self.family:
            faults.append(f"they are of the family {header.family}, the network is of {self.family}")
        if teacher is not None and header.fingerprint != teacher:
            named = f"{header.teacher or 'a teacher'} ({header.fingerprint[:12]}...)"
            faults.append(f"they were made by {named}, the teacher at hand is {teacher[:12]}...")
        if (header.guidance is not None) != embeds:
            faults.append(f"their embedded guidance is {header.guidance}, but the network is told {'one' if embeds else 'none'}")
        if faults:
            raise SynVidError(
                f"the dataset's trajectories do not fit the network: {'; '.join(faults)}; choose the teacher they were captured "
                "with, in the dtype it had then, or capture with this one"
            )

    def check_block(self, network: nn.Module, block: str) -> None:
        """InvalidValueError, listing the blocks, unless there is one of that name."""
        names = self.block_names(network)
        if block not in names:
            raise InvalidValueError(f"no block named {block}; blocks are {names[0]} to {names[-1]}")

    def check_widths(self, found: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> None:
        """CheckpointError unless a prompt's (text, pooled) widths are those wanted; None is no pooled vector."""
        if found != wanted:
            told, taken = (f"{text} wide and pooled {pooled or 'not at all'}" for text, pooled in (found, wanted))
            raise CheckpointError(
                f"the text is {told}, but the network takes {taken}; encode the prompts with the text encoder the network was "
                "made for"
            )
