"""What every trajectory of a SynVid dataset has in common: `synvid.json`, written once and compared ever after.

The format is described in docs/synvid-format.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch

from ..errors import SynVidError
from ..schedule import flow_sigmas, key_indices

VERSION = 1
DTYPES: MappingProxyType[str, torch.dtype] = MappingProxyType({"float16": torch.float16, "float32": torch.float32})
LATENT_SPACES: MappingProxyType[str, str] = MappingProxyType(
    {
        "hunyuan-t2v": "HunyuanVideo VAE * 0.476986",
        "tiny": "tiny VAE * 0.476986",
        "wan-t2v-14b": "Wan 2.1 VAE, each channel less its mean, over its deviation",
        "wan-i2v-14b-480p": "Wan 2.1 VAE, each channel less its mean, over its deviation",
    }
)
"""Model space of each family: what the stored latents are."""

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""{version: its header's fields -> those of the next}; a version without a way to the present one is refused by name."""


def _told(default: Any = None) -> Any:
    """A field that is told and never compared: the same teacher may come from another file, under another torch."""
    return field(default=default, metadata={"compared": False})


@dataclass(frozen=True)
class Header:
    """How the trajectories were made. Fields marked "told" are informative; `check` compares all others.

    family         of the teacher, a key of `schedule.PRESETS`
    fingerprint    of its weights as loaded (`checkpoint.fingerprint`)
    sigmas         (n + 1) noise levels in sampling order, 1 to 0
    keys           positions of the m + 1 key points in `sigmas`, 0 = noise first, n = clean last
    shift          of the schedule; None where it is not a shifted straight line
    guidance       embedded guidance in plain scale; None for a network without it
    cfg, negative  classifier-free guidance (1 = none) and its negative prompt
    dtype          of the stored latents: float16 or float32
    store_noise    whether the noise lies beside the key latents; otherwise it is made again from the seed
    latent_space   what a latent is; the family's own by default
    teacher        told: the teacher's name
    file_sha256    told: hash of its file, where known
    negative_text  told: text hash of the negative prompt, where it is stored
    torch_version  told: version that made the dataset
    """

    family: str
    fingerprint: str
    sigmas: tuple[float, ...]
    keys: tuple[int, ...]
    shift: float | None
    guidance: float | None
    cfg: float = 1.0
    negative: str | None = None
    dtype: str = "float16"
    store_noise: bool = False
    latent_space: str = ""
    teacher: str = _told("")
    file_sha256: str | None = _told()
    negative_text: str | None = _told()
    torch_version: str = _told(torch.__version__)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(float(s) for s in self.sigmas))
        object.__setattr__(self, "keys", tuple(int(k) for k in self.keys))
        if not self.latent_space:
            object.__setattr__(self, "latent_space", LATENT_SPACES.get(self.family, self.family))
        if fault := self._fault():
            raise SynVidError(f"a SynVid header with {fault}")

    def _fault(self) -> str:
        steps = len(self.sigmas) - 1
        numbers = [self.cfg, *(x for x in (self.shift, self.guidance) if x is not None)]
        if steps < 1 or not all(0 <= b < a <= 1 for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            return f"sigmas {self.sigmas}; they must fall from 1 to 0"
        if len(self.keys) < 2 or self.keys != tuple(sorted(set(self.keys))) or (self.keys[0], self.keys[-1]) != (0, steps):
            return f"key positions {self.keys}; they must rise from 0, the noise, to {steps}, the clean end"
        if self.dtype not in DTYPES:
            return f"dtype {self.dtype!r}; latents are stored as {' or '.join(DTYPES)} (bfloat16 is too coarse for velocities)"
        if not all(map(math.isfinite, numbers)):
            return f"cfg {self.cfg}, shift {self.shift}, guidance {self.guidance}; they must be finite"
        if self.cfg != 1 and self.negative is None:
            return f"cfg {self.cfg} and no negative prompt; give it, as '' if it is empty"
        return ""

    @classmethod
    def of(
        cls,
        family: str,
        fingerprint: str,
        steps: int = 50,
        segments: int = 5,
        shift: float = 7.0,
        guidance: float | None = 6.0,
        **others: Any,
    ) -> Header:
        """Header of the method's own schedule: `steps` shifted Euler steps, every (steps/segments)-th kept. `others` by name."""
        sigmas = tuple(flow_sigmas(steps, shift).tolist())
        return cls(family, fingerprint, sigmas, key_indices(steps, segments), float(shift), guidance, **others)

    @property
    def segments(self) -> int:
        """m: key latents that are stored, key 0 the clean one; key m is the noise."""
        return len(self.keys) - 1

    @property
    def key_sigmas(self) -> tuple[float, ...]:
        """Sigma of key 0 .. m: from 0, clean, up to 1, noise."""
        return tuple(self.sigmas[position] for position in reversed(self.keys))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def check(self, other: Header) -> None:
        """Raise SynVidError, naming every field that differs and both its values, unless the two describe one dataset."""
        names = [item.name for item in fields(self) if item.metadata.get("compared", True)]
        differing = [name for name in names if getattr(self, name) != getattr(other, name)]
        if differing:
            both = ((name, _short(getattr(self, name)), _short(getattr(other, name))) for name in differing)
            shown = "; ".join(f"{name}: {there} there, {here} here" for name, there, here in both)
            raise SynVidError(f"the dataset was made in another way ({shown}); capture into a new folder, or as it was made")

    def to_json(self) -> str:
        """The text of synvid.json."""
        return json.dumps({"format": "synvid", "version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Header:
        """From the text of synvid.json; `where` is named in errors. Raises SynVidError for what is damaged, of another version
        that cannot be read, or has fields nobody knows."""
        try:
            found = json.loads(text)
            if not isinstance(found, dict) or found.pop("format", None) != "synvid":
                raise ValueError("it is no SynVid header")
            version = found.pop("version")
            found = _migrate(found, version, where)
            known = {item.name for item in fields(cls)}
            if unknown := sorted(set(found) - known):
                raise ValueError(f"unknown fields {', '.join(unknown)}")
            return cls(**found)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise SynVidError(f"{where} cannot be read ({error}); restore it from a copy") from error
        except SynVidError as error:
            raise SynVidError(f"{where}: {error}") from error


def _migrate(found: dict[str, Any], version: Any, where: str) -> dict[str, Any]:
    if type(version) is not int or version > VERSION:
        raise SynVidError(f"format version {version} is newer than version {VERSION}, which this accvideo reads; update accvideo")
    while version < VERSION:
        if version not in MIGRATIONS:
            raise SynVidError(f"format version {version} cannot be read any more; this accvideo reads version {VERSION}")
        found, version = MIGRATIONS[version](found), version + 1
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"
