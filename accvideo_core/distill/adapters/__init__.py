"""The architectures that can be captured and distilled, as a table: a third one is a file beside these two and a line below."""

from __future__ import annotations

import os
from types import MappingProxyType

from torch import nn

from ...checkpoint import Checkpoint, open_checkpoint
from ...errors import InvalidValueError
from ...synvid.capture import Texts
from .base import Adapter, Told
from .hunyuan import HunyuanAdapter
from .wan import WanAdapter

ADAPTERS: MappingProxyType[str, type[Adapter]] = MappingProxyType(
    {"hunyuan-t2v": HunyuanAdapter, "tiny": HunyuanAdapter, "wan-t2v-14b": WanAdapter}
)
"""{family: its adapter}; the families are those of `schedule.PRESETS`."""


def adapter_for(what: str | Checkpoint | os.PathLike[str] | nn.Module) -> Adapter:
    """The adapter of a family (by name), of a checkpoint (open, or its path as a Path), or of a network.

    Raises InvalidValueError, listing what there is, for what has none; CheckpointError for a file that cannot be read.
    """
    if isinstance(what, nn.Module):
        known = (kind.family_of(what) for kind in ADAPTERS.values())
        family = next((found for found in known if found), type(what).__name__)
    elif isinstance(what, str):
        family = what
    elif isinstance(what, Checkpoint):
        family = what.family
    else:
        with open_checkpoint(os.fspath(what)) as checkpoint:
            family = checkpoint.family
    if family not in ADAPTERS:
        raise InvalidValueError(
            f"there is no adapter for {family}, which can be neither captured here nor distilled; there are adapters for "
            f"{', '.join(ADAPTERS)} (docs/adapters.md shows how to write one)"
        )
    return ADAPTERS[family](family)


__all__ = ["ADAPTERS", "Adapter", "HunyuanAdapter", "Texts", "Told", "WanAdapter", "adapter_for"]
