"""Which blocks of the network a LoRA is applied to, and how strongly, from a line a user can write.

`double.0-9, single=0.5, other=0` is a list of places, each with a factor for the LoRA's strength (1 if none is given): a kind
of block, one block or a range of them, or `other` for what lies outside the blocks. What is not named is left out; `all`,
or nothing, is everything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import InvalidValueError

_KINDS = {"double": "double_blocks", "single": "single_blocks", "blocks": "blocks", "other": "other"}
_PLACE = re.compile(r"(?P<kind>[a-z_]+)(?:\.(?P<first>\d{1,6})(?:-(?P<last>\d{1,6}))?)?(?:\s*=\s*(?P<factor>[^\s=]+))?")
_HOW = "write for example double.0-9,single=0.5,other=0; kinds are double and single (HunyuanVideo), blocks (Wan), other, all"


@dataclass(frozen=True)
class Blocks:
    """places: (kind, first, last, factor); empty for everything at factor 1. text: the line it was read from."""

    places: tuple[tuple[str, int, float, float], ...] = ()
    text: str = "all"

    def factor(self, tensor: str) -> float:
        """What to multiply the strength by for an original tensor name; 0 outside of the places."""
        if not self.places:
            return 1.0
        found = re.match(r"(\w*blocks)\.(\d+)\.", tensor)
        kind, number = (found[1], int(found[2])) if found else ("other", 0)
        return next((factor for k, first, last, factor in self.places if k == kind and first <= number <= last), 0.0)

    def unused(self, tensors: Iterable[str]) -> list[str]:
        """Places, as text, in which none of these tensors lies: a range beyond the network, a kind of another model."""
        names = list(tensors)
        found = []
        for place in self.places:
            alone = Blocks(((*place[:3], 1.0),))
            if not any(alone.factor(name) for name in names):
                found.append(_as_text(place))
        return found


def parse_blocks(text: str) -> Blocks:
    """Read a line of places. Raises InvalidValueError naming the part that is not understood, or named twice."""
    line = " ".join(text.split())
    if line in ("", "all"):
        return Blocks()
    places: list[tuple[str, int, float, float]] = []
    for item in line.split(","):
        found = _PLACE.fullmatch(item.strip())
        kind = found and (_KINDS.get(found["kind"]) or next((k for k in _KINDS.values() if k == found["kind"]), None))
        if found is None or kind is None:
            raise InvalidValueError(f"blocks {text!r}: {item.strip()!r} is no place; {_HOW}")
        if kind == "other" and found["first"]:
            raise InvalidValueError(
                f"blocks {text!r}: {item.strip()!r} has a number, but what is outside the blocks has none; {_HOW}"
            )
        first = int(found["first"] or 0)
        last = float(found["last"] or found["first"] or math.inf)
        try:
            factor = float(found["factor"] or 1)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor) or last < first:
            raise InvalidValueError(f"blocks {text!r}: {item.strip()!r} has no sensible factor or range; {_HOW}")
        for other, start, end, _ in places:
            if other == kind and first <= end and start <= last:
                raise InvalidValueError(
                    f"blocks {text!r}: {item.strip()!r} names blocks that an earlier part names already; {_HOW}"
                )
        places.append((kind, first, last, factor))
    return Blocks(tuple(places), line)


def _as_text(place: tuple[str, int, float, float]) -> str:
    kind, first, last, _ = place
    if last == math.inf and first == 0:
        return kind
    return f"{kind}.{first}" + ("" if last == first else f"-{last:g}")
