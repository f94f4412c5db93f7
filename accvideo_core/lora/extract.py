"""The difference of two checkpoints as a LoRA.

Both are read tensor by tensor as fp32 (quantised ones restored). A matrix becomes its best pair of factors (`factor.py`), what
is no matrix a difference. Nothing is clamped: clamping the factors at a quantile, as is done elsewhere, costs 10 % to 68 % of
the difference. What the LoRA misses is measured on the factors as they are stored and reported, module by module.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from ..checkpoint import Checkpoint, open_checkpoint, write_safetensors
from ..checkpoint.containers import input_files
from ..checkpoint.layouts import some
from ..checkpoint.safetensors_file import check_suffix
from ..errors import InvalidValueError, LoraError
from ..files import check_output
from .blocks import Blocks
from .factor import factor
from .names import HUNYUAN_VIDEO, WAN
from .streaming import ahead
from .writing import KEY_FORMATS, Change

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class ModuleResult:
    """How one tensor went: rank (None for a whole difference), norm of the difference relative to the base's, and the share
    of the difference (relative Frobenius norm) that the LoRA misses."""

    tensor: str
    rank: int | None
    difference: float
    residual: float


@dataclass(frozen=True)
class ExtractReport:
    """modules in the file's order; unchanged: tensors that are equal; left_out: tensors the key format has no place for.

    residual  relative Frobenius norm of all that the LoRA misses, over all tensors that differ
    """

    path: Path
    modules: tuple[ModuleResult, ...]
    unchanged: int
    left_out: tuple[str, ...]
    residual: float
    bytes: int


def extract_lora(
    tuned: str | Path,
    base: str | Path,
    out: str | Path,
    rank: int = 32,
    *,
    energy: float | None = None,
    key_format: str = "comfyui",
    dtype: torch.dtype = torch.float16,
    blocks: Blocks | None = None,
    weights: str | None = None,
    base_weights: str | None = None,
    lossy: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractReport:
    """Write the LoRA that turns `base` into `tuned`, both in any layout, to `out`.

    rank          of every pair, or the largest if `energy` is given
    energy        in (0, 1]: as many ranks as hold this share of a difference's squared norm
    key_format    comfyui (loads everywhere in ComfyUI), kohya, peft (diffusers)
    dtype         of what is stored
    blocks        only these (None for all); factors other than 0 count as 1
    weights       which network of a `tuned` that holds several, as for `open_checkpoint`
    base_weights  the same of `base`
    lossy         leave out differences that the key format has no place for, instead of refusing
    Raises CheckpointError, LoraError or InvalidValueError for inputs that do not belong together or do not differ.
    """
    tuned, base, out = Path(tuned), Path(base), Path(out)
    check_suffix(out)
    if rank < 1:
        raise InvalidValueError(f"rank {rank} is impossible; choose 1 or more, 32 for most")
    if energy is not None and not 0 < energy <= 1:
        raise InvalidValueError(f"energy {energy} is no share; choose a number above 0 and at most 1, 0.98 for most")
    if key_format not in KEY_FORMATS:
        raise InvalidValueError(f"unknown key format {key_format!r}; known: {', '.join(KEY_FORMATS)}")
    inputs = [*input_files(tuned), *input_files(base)]
    check_output(out, inputs, overwrite)
    with ExitStack() as stack:
        ours = stack.enter_context(open_checkpoint(tuned, weights=weights))
        theirs = stack.enter_context(open_checkpoint(base, weights=base_weights))
        keys = _common(ours, theirs, blocks)
        family = WAN if ours.family.startswith(WAN) else HUNYUAN_VIDEO
        # Small tensors first: a difference that the format has no place for is then known before the long work.
        keys.sort(key=lambda key: len(ours.shape(key)) == 2)
        sizes = {key: ours.nbytes(key) + theirs.nbytes(key) for key in keys}
        work = _Extraction(rank, energy, dtype, key_format, lossy, {key: ours.shape(key) for key in keys})
        differences = stack.enter_context(closing(ahead(_differences(ours, theirs, keys))))
        for done, (key, difference, norm) in zip(accumulate(sizes.values()), differences, strict=True):
            if difference is not None:
                work.add(key, difference, norm)
            if progress is not None:
                progress(done, sum(sizes.values()))
        order = [key for key in ours.keys() if key in work.changes]  # noqa: SIM118
    if not work.results:
        raise LoraError(
            f"{tuned} and {base} are equal{' in these blocks' if blocks else ''}; choose a model and what it was tuned from"
        )
    tensors, metadata = KEY_FORMATS[key_format].write({key: work.changes[key] for key in order}, family)
    size = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    check_output(out, inputs, overwrite, size)
    settings = {"tuned": tuned.name, "base": base.name, "rank": rank, "energy": energy, "residual": work.residual}
    write_safetensors(out, tensors, {"format": "pt", "accvideo_extract": json.dumps(settings), **metadata})
    unchanged = len(keys) - len(work.results)
    return ExtractReport(out, tuple(work.results), unchanged, tuple(work.left_out), work.residual, size)


class _Extraction:
    """The differences found so far: `changes` to write, `results` to report, `left_out` for want of a place."""

    def __init__(
        self,
        rank: int,
        energy: float | None,
        dtype: torch.dtype,
        key_format: str,
        lossy: bool,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._rank, self._energy, self._dtype, self._lossy, self._shapes = rank, energy, dtype, lossy, shapes
        self._format, self._only_pairs = key_format, KEY_FORMATS[key_format].only_pairs
        self.changes: dict[str, Change] = {}
        self.results: list[ModuleResult] = []
        self.left_out: list[str] = []
        self._missed = self._whole = 0.0

    @property
    def residual(self) -> float:
        """Of all differences together, in the relative Frobenius norm."""
        return (self._missed / self._whole) ** 0.5

    def add(self, key: str, difference: torch.Tensor, norm: float) -> None:
        """One difference (fp32, used up) of a tensor whose base has that norm."""
        size = missing = float(difference.double().norm())
        rank = None
        if self._has_place(key):
            self.changes[key], missing = self._change(key, difference)
            rank = len(pair[0]) if (pair := self.changes[key].pair) else None
            if self._only_pairs and key.endswith(".bias"):
                # PEFT has a bias only beside a pair: one of zeros, until the weight turns out to have changed.
                weight = key.removesuffix("bias") + "weight"
                rows, *inputs = self._shapes[weight]
                zeros = (
                    torch.zeros(1, *inputs, dtype=self._dtype),
                    torch.zeros(rows, 1, *[1] * len(inputs[1:]), dtype=self._dtype),
                )
                self.changes.setdefault(weight, Change(weight, pair=zeros))
        elif self._lossy:
            self.left_out.append(key)
        else:
            raise LoraError(
                f"the {self._format} format has no place for the difference of {key}, which is no layer with a matrix; choose "
                "another format, or allow it to be left out"
            )
        self.results.append(ModuleResult(key, rank, size / norm if norm else math.inf, missing / size))
        self._missed, self._whole = self._missed + missing**2, self._whole + size**2

    def _has_place(self, key: str) -> bool:
        """Whether the format can hold a difference: one of pairs alone holds layers with a matrix, and their biases."""
        module, _, leaf = key.rpartition(".")
        weight = self._shapes.get(f"{module}.weight", ())
        return not self._only_pairs or (leaf in ("weight", "bias") and len(weight) >= 2)

    def _change(self, key: str, difference: torch.Tensor) -> tuple[Change, float]:
        """How one difference is written, and the norm of what that misses, with the values as they are stored."""
        rows, columns = len(difference), difference[0].numel()
        # A pair larger than the matrix would be worse than the matrix in every way.
        smaller = difference.ndim == 2 and min(self._rank, rows, columns) * (rows + columns) < rows * columns
        if smaller or (self._only_pairs and key.endswith(".weight")):
            factors = factor(difference.reshape(rows, columns), self._rank, self._energy)
            down, up = self._stored(key, factors.down), self._stored(key, factors.up)
            missing = (difference.reshape(rows, columns) - up.float() @ down.float()).double().norm()
            shape = difference.shape  # a convolution's pair is a convolution and one of 1 x 1
            pair = down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *[1] * (len(shape) - 2))
            return Change(key, pair=pair), float(missing)
        stored = self._stored(key, difference)
        return Change(key, difference=stored), float((difference - stored.float()).double().norm())

    def _stored(self, key: str, values: torch.Tensor) -> torch.Tensor:
        stored = values.to(self._dtype)
        if not bool(torch.isfinite(stored).all()):
            raise LoraError(f"the difference of {key} is too large for {self._dtype}; choose bf16 or fp32")
        return stored.contiguous()


def _common(ours: Checkpoint, theirs: Checkpoint, blocks: Blocks | None) -> list[str]:
    """The tensors to compare. CheckpointErrors name what only one of the two has, or has in another shape."""
    a, b = set(ours.keys()), set(theirs.keys())
    if a != b:
        raise LoraError(
            f"{ours.path} and {theirs.path} are of different networks: {len(a ^ b)} tensors are in one alone "
            f"({some(sorted(a ^ b), 3)}); choose a model and what it was tuned from"
        )
    if other := [key for key in ours.keys() if ours.shape(key) != theirs.shape(key)]:  # noqa: SIM118
        raise LoraError(
            f"{ours.path} and {theirs.path} have tensors of different shapes ({some(other, 3)}); "
            "choose a model and what it was tuned from"
        )
    if blocks is not None and (unused := blocks.unused(ours.keys())):
        raise InvalidValueError(f"blocks {blocks.text!r}: {ours.path} has nothing at {', '.join(unused)}; leave that out")
    return [key for key in ours.keys() if blocks is None or blocks.factor(key) != 0]  # noqa: SIM118


def _differences(ours: Checkpoint, theirs: Checkpoint, keys: list[str]) -> Iterator[tuple[str, torch.Tensor | None, float]]:
    """(name, fp32 difference or None where equal, norm of the base's tensor)."""
    for key in keys:
        difference, base = ours.read(key).float(), theirs.read(key).float()
        norm = float(base.norm())
        difference -= base
        del base
        if not bool(torch.isfinite(difference).all()):
            raise LoraError(
                f"{key} has values that are NaN or infinite in {ours.path} or {theirs.path}; check with `accvideo inspect`"
            )
        yield key, difference if bool(difference.any()) else None, norm
