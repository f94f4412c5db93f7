"""The alphas a LoRA file says of itself as settings of PEFT's, where its tensors hold none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.containers import PEFT_FILES
from ..errors import LoraError


@dataclass(frozen=True)
class Alphas:
    """PEFT's own settings: alpha for all modules, or by pattern; rslora divides by the root of the rank.

    rank, ranks  given for LoKr alone, whose tensors show no rank where both matrices are whole: for all modules, by pattern
    """

    alpha: float
    alphas: Mapping[str, float]
    rslora: bool
    rank: float | None
    ranks: Mapping[str, float]
    where: str

    def scale(self, names: tuple[str, ...], rank: int | None) -> float:
        """Of a module under the names that PEFT may have seen, with the rank its tensors show."""
        divisor = rank or self.rank
        if divisor is None:
            return 1.0
        if rank is None:
            divisor = _chosen(self.ranks, names, divisor)
        return ratio(_chosen(self.alphas, names, self.alpha), divisor**0.5 if self.rslora else divisor, self.where)


def _chosen(patterns: Mapping[str, float], names: tuple[str, ...], default: float) -> float:
    """The value of the first pattern that fits. PEFT's rule: a regular expression for the name's end, from a dot on."""
    fits = (value for key, value in patterns.items() if any(re.fullmatch(rf"(.*\.)?({key})", name) for name in names))
    return next(fits, default)


def ratio(alpha: float, rank: float, where: str) -> float:
    """alpha / rank; LoraError where that is no number."""
    if not rank or not math.isfinite(alpha):
        raise LoraError(f"alpha {alpha} ({where}) for rank {rank:g} is no scale; the file is damaged")
    return alpha / rank


def read_alphas(metadata: Mapping[str, str], path: Path) -> Alphas | None:
    """From the first place that has any: diffusers' metadata, PEFT's file beside, finetrainers' metadata."""
    return next((found for where, text in _sources(metadata, path) if (found := _parse(where, text)) is not None), None)


def _sources(metadata: Mapping[str, str], path: Path) -> Iterator[tuple[str, str]]:
    """(where it stands, JSON)."""
    if (text := metadata.get("lora_adapter_metadata")) is not None:
        yield "its metadata lora_adapter_metadata", text
    beside = path.with_name("adapter_config.json")
    if path.name in PEFT_FILES and beside.is_file():
        try:
            yield str(beside), beside.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LoraError(f"cannot read {beside}: {error}") from error
    if (text := metadata.get("lora_config")) is not None:
        yield "its metadata lora_config", text


def _parse(where: str, text: str) -> Alphas | None:
    try:
        settings = json.loads(text)
        # diffusers packs one adapter per component: "transformer.r", "transformer.lora_alpha", ...
        packed = {key.removeprefix("transformer."): value for key, value in settings.items() if key.startswith("transformer.")}
        settings = packed or settings
        kind = str(settings.get("peft_type", "LORA")).upper()
        alpha = settings.get("alpha" if kind in ("LOHA", "LOKR") else "lora_alpha")
        if alpha is None:
            return None
        lokr = kind == "LOKR"
        ranks = _patterns(settings, "rank_pattern") if lokr else {}
        rank = float(settings["r"]) if lokr else None
        return Alphas(
            float(alpha), _patterns(settings, "alpha_pattern"), bool(settings.get("use_rslora", False)), rank, ranks, where
        )
    except KeyError as error:
        raise LoraError(f"{where} gives a LoKr's alpha without {error}; the file is damaged") from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, re.error) as error:
        raise LoraError(f"{where} is damaged ({' '.join(str(error).split())[:200]})") from error


def _patterns(settings: Mapping[str, Any], name: str) -> dict[str, float]:
    patterns = {str(key): float(value) for key, value in dict(settings.get(name) or {}).items()}
    for pattern in patterns:
        re.compile(pattern)
    return patterns
