"""What a LoRA file can say about one weight, and the difference it makes: the arithmetic of LoRA, LoHa, LoKr and DoRA.

For a weight W (out, in), convolutions flattened to (out, in * kernel), the difference at strength 1 is

    low-rank     scale * B A                                 LoRA (Hu et al. 2021); with a core for convolutions (LoCon)
    loha         scale * (B1 A1) o (B2 A2)                   Hadamard product (FedPara, as LyCORIS has it)
    lokr         scale * W1 (x) W2                           Kronecker product (LyCORIS)
    difference   scale * the difference itself (a full one, or a bias beside a pair)
    replacement  the new value - W

and with a magnitude m (DoRA, Liu et al. 2024) m * (W + D) / |W + D| - W, the norm over the inputs of each row, or over the
rows of each input where m is stored so. A strength multiplies the whole difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from ..checkpoint.quantised import all_finite
from ..checkpoint.shards import Container
from ..errors import LoraError

MAGNITUDES = ("magnitude", "row_magnitude")
LOW_RANK, LOHA, LOKR, DIFFERENCE, REPLACEMENT = "low-rank", "loha", "lokr", "difference", "replacement"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the open file, read when it is needed."""

    file: Container
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.tensors[self.key].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.file.tensors[self.key].dtype

    def read(self) -> torch.Tensor:
        """In its stored dtype. LoraError for values that are not finite: they would spoil every weight they touch."""
        tensor = self.file.read(self.key)
        if not all_finite(tensor):
            raise LoraError(f"{self.file.path}: {self.key} has values that are NaN or infinite; the file is damaged")
        return tensor


@dataclass(frozen=True)
class LoraPart:
    """One module of a LoRA file: what it changes of one original tensor, and how.

    source   the module (or key) as the file names it
    form     one of the five above
    tensors  {role: stored tensor}; the roles are those of `formats.SUFFIXES`
    scale    what the product is multiplied by: alpha / rank
    rows     (start, length) of the original tensor's rows that it changes; None for all of them
    swapped  its rows are stored with their two halves exchanged
    """

    source: str
    form: str
    tensors: Mapping[str, StoredTensor]
    scale: float = 1.0
    rows: tuple[int, int] | None = None
    swapped: bool = False

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) it changes; a vector of n values is (n, 1). LoraError for factors that do not fit each other."""
        shape = self._shape()
        if 0 in shape:
            raise LoraError(f"{self.source} changes no value at all ({shape[0]} x {shape[1]}); the file is damaged")
        return shape

    def _shape(self) -> tuple[int, int]:
        shapes = {role: tensor.shape for role, tensor in self.tensors.items() if role not in MAGNITUDES}
        try:
            if self.form == LOW_RANK:
                (out, rank), (inner, columns) = _matrix(shapes["up"]), _matrix(shapes["down"])
                if "mid" in shapes:
                    first, second, *kernel = shapes["mid"]
                    _same(rank, first)
                    _same(inner, second)
                    return out, columns * prod(kernel)
                _same(rank, inner)
                return out, columns
            if self.form == LOHA:
                out, columns = self._hada(shapes, 1)
                _same((out, columns), self._hada(shapes, 2))
                return out, columns
            if self.form == LOKR:
                (a, b), (c, d) = self._kron(shapes, 1), self._kron(shapes, 2)
                return a * c, b * d
            shape = shapes["value"]
            return (shape[0], prod(shape[1:])) if shape else (1, 1)
        except (ValueError, IndexError) as error:
            seen = ", ".join(f"{tensor.key} {list(tensor.shape)}" for tensor in self.tensors.values())
            raise LoraError(f"{self.source}: its tensors do not fit each other ({seen}); the file is damaged") from error

    @staticmethod
    def _hada(shapes: Mapping[str, tuple[int, ...]], i: int) -> tuple[int, int]:
        return _product(shapes[f"hada_w{i}_a"], shapes[f"hada_w{i}_b"], shapes.get(f"hada_t{i}"))

    @staticmethod
    def _kron(shapes: Mapping[str, tuple[int, ...]], i: int) -> tuple[int, int]:
        if (whole := shapes.get(f"lokr_w{i}")) is not None:
            _same(i == 1 and len(whole) > 2, False)
            return _matrix(whole)
        return _product(shapes[f"lokr_w{i}_a"], shapes[f"lokr_w{i}_b"], shapes.get("lokr_t2") if i == 2 else None)

    @property
    def rank(self) -> int | None:
        """Rank of a low-rank pair, None for the other forms."""
        return _matrix(self.tensors["down"].shape)[0] if self.form == LOW_RANK else None

    @property
    def needs_weight(self) -> bool:
        """Whether the difference depends on the weight it is applied to."""
        return self.form == REPLACEMENT or self.has_magnitude

    @property
    def has_magnitude(self) -> bool:
        """Whether it is a DoRA."""
        return any(role in self.tensors for role in MAGNITUDES)

    def magnitude_by_row(self) -> bool:
        """Whether DoRA's magnitudes are one per row (else one per input channel). LoraError where their number is neither."""
        name = self._magnitude_role
        stored, (out, columns) = self.tensors[name], self.shape
        count = prod(stored.shape)
        # PEFT stores one per row in whatever shape; LyCORIS and OneTrainer (out, 1, ..) or (1, in channels, ..).
        by_row = count == out and (name == "row_magnitude" or stored.shape[:1] == (out,))
        channels = self.tensors["down"].shape[1] if self.form == LOW_RANK else count
        if not by_row and (stored.shape[:2] != (1, count) or count != channels or columns % max(count, 1)):
            raise LoraError(
                f"{stored.key} {list(stored.shape)} fits no weight of {out} rows and {columns} columns; the file is damaged"
            )
        return by_row

    @property
    def _magnitude_role(self) -> str:
        return next(role for role in MAGNITUDES if role in self.tensors)

    def _magnitude(self) -> tuple[torch.Tensor, bool]:
        """DoRA's magnitudes in fp32, flat, and `magnitude_by_row`."""
        by_row = self.magnitude_by_row()
        value = self.tensors[self._magnitude_role].read().float().flatten()
        return (self._in_order(value) if by_row else value), by_row

    def low_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A (rank, columns), B (rows, rank)) of a low-rank pair, the swap undone, without the scale. Stored dtype; fp32
        where a core had to be multiplied in."""
        up = self.tensors["up"].read().flatten(1)
        down = self.tensors["down"].read()
        if "mid" in self.tensors:
            mid = self.tensors["mid"].read().float()
            down = torch.einsum("mn...,nj->mj...", mid, down.float().flatten(1))
        return down.flatten(1), self._in_order(up)

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The difference at strength 1: fp32 (rows, columns), or fp64 for an fp64 weight.

        weight  what it is applied to, already cut to `rows`; only needed where `needs_weight`
        """
        dtype = torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32
        product = self._product(dtype)
        if not self.needs_weight:
            return product
        if weight is None:
            raise LoraError(f"{self.source}: its difference depends on the weight it is applied to, which was not given")
        weight = weight.to(dtype).reshape(self.shape)
        if self.form == REPLACEMENT:
            return product - weight
        magnitude, by_row = self._magnitude()
        composed = weight + product
        # (1, rows, all its values) or (rows, channels, values of a channel): the norm is over everything but the middle.
        grouped = composed[None] if by_row else composed.view(len(composed), len(magnitude), -1)
        norm = grouped.norm(dim=(0, 2), keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        return (grouped * (magnitude.to(dtype)[:, None] / norm)).reshape(self.shape) - weight

    def _product(self, dtype: torch.dtype) -> torch.Tensor:
        if self.form == LOW_RANK:
            down, up = self.low_rank()
            return (up.to(dtype) @ down.to(dtype)).mul_(self.scale)
        read = {role: tensor.read().to(dtype) for role, tensor in self.tensors.items() if role not in MAGNITUDES}
        if self.form == LOHA:
            product = _hada(read, 1).mul_(_hada(read, 2)).mul_(self.scale)
        elif self.form == LOKR:
            left, right = _kron(read, 1), _kron(read, 2)
            product = torch.kron(left.reshape(*left.shape[:2], *[1] * (right.ndim - 2)), right).mul_(self.scale)
        else:
            product = read["value"].mul_(self.scale)
        return self._in_order(product.reshape(self.shape))

    def _in_order(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.swapped:
            return rows
        if len(rows) % 2:
            raise LoraError(f"{self.source} has {len(rows)} rows; scale and shift are two equal halves, the file is damaged")
        return torch.cat(rows.chunk(2)[::-1])


@dataclass(frozen=True)
class LoraModule:
    """Everything a LoRA does to one original tensor. Parts add up, each from the weight as it was before the LoRA.

    tensor  the original tensor's name: `<module>.weight`, `<module>.bias`, or a parameter's own
    """

    tensor: str
    parts: tuple[LoraPart, ...]

    @property
    def module(self) -> str:
        """The original module."""
        return self.tensor.rpartition(".")[0] if self.tensor.endswith((".weight", ".bias")) else self.tensor

    @property
    def needs_weight(self) -> bool:
        return any(part.needs_weight for part in self.parts)

    @property
    def is_low_rank(self) -> bool:
        """Whether `stacked` can give it as one pair."""
        return all(part.form == LOW_RANK and not part.needs_weight for part in self.parts)

    def check(self, shape: Sequence[int]) -> None:
        """LoraError if it does not fit a tensor of that shape."""
        rows, columns = shape[0] if shape else 1, prod(shape[1:])
        for part in self.parts:
            start, length = part.rows or (0, rows)
            if part.shape != (length, columns) or start + length > rows:
                where = f"rows {start} to {start + part.shape[0]} of " if part.rows else ""
                raise LoraError(
                    f"{part.source} changes {part.shape[0]} x {part.shape[1]} values but {where}{self.tensor} is "
                    f"{rows} x {columns}: the LoRA is of another model"
                )

    def misfit(self, shape: Sequence[int]) -> str:
        """Why it cannot change a tensor of that shape, with both shapes; empty if it can."""
        try:
            self.check(shape)
        except LoraError as error:
            return str(error)
        return ""

    def delta(self, shape: Sequence[int], weight: torch.Tensor | None = None) -> torch.Tensor:
        """The difference at strength 1 for a tensor of that shape: fp32, or fp64 for an fp64 weight.

        weight  the tensor it is applied to, only needed where `needs_weight`
        Raises LoraError if it does not fit the shape.
        """
        self.check(shape)
        rows = shape[0] if shape else 1
        flat = None if weight is None else weight.reshape(rows, -1)
        dtype = torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32
        total = torch.zeros(rows, prod(shape[1:]), dtype=dtype)
        for part in self.parts:
            start, length = part.rows or (0, rows)
            total[start : start + length] += part.delta(None if flat is None else flat[start : start + length])
        return total.reshape(*shape)

    def stacked(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(A (rank, columns), B (rows, rank), scale) of all parts as one exact pair; only for `is_low_rank`.

        Parts that share A, as a split fused LoRA does, share its rank; others stack block by block, so the rank is the
        sum of the ranks of the distinct A. Factors keep their stored dtype unless parts differ in scale (then fp32).
        """
        scales = {part.scale for part in self.parts}
        groups: list[tuple[torch.Tensor, list[tuple[LoraPart, torch.Tensor]]]] = []
        for part in self.parts:
            down, up = part.low_rank()
            if len(scales) > 1:
                up = up.float() * part.scale
            start, length = part.rows or (0, rows)
            for shared, members in groups:
                free = all(a.rows is not None and _apart(a.rows, (start, length)) for a, _ in members)
                if free and shared.dtype == down.dtype and torch.equal(shared, down):
                    members.append((part, up))
                    break
            else:
                groups.append((down, [(part, up)]))
        dtype = groups[0][0].dtype
        for down, members in groups:
            for tensor in (down, *(up for _, up in members)):
                dtype = dtype if dtype == tensor.dtype else torch.float32
        total = torch.zeros(rows, sum(len(down) for down, _ in groups), dtype=dtype)
        column = 0
        for down, members in groups:
            for part, up in members:
                start, length = part.rows or (0, rows)
                total[start : start + length, column : column + len(down)] = up.to(dtype)
            column += len(down)
        scale = scales.pop() if len(scales) == 1 else 1.0
        return torch.cat([down.to(dtype) for down, _ in groups]), total, scale


def _hada(read: Mapping[str, torch.Tensor], i: int) -> torch.Tensor:
    left, right, core = read[f"hada_w{i}_a"], read[f"hada_w{i}_b"], read.get(f"hada_t{i}")
    if core is None:
        return left.flatten(1) @ right.flatten(1)
    return torch.einsum("ij...,jr,ip->pr...", core, right.flatten(1), left.flatten(1)).flatten(1)


def _kron(read: Mapping[str, torch.Tensor], i: int) -> torch.Tensor:
    if (whole := read.get(f"lokr_w{i}")) is not None:
        return whole
    left, right = read[f"lokr_w{i}_a"], read[f"lokr_w{i}_b"]
    core = read.get("lokr_t2") if i == 2 else None
    if core is None:
        return left.flatten(1) @ right.flatten(1)
    return torch.einsum("ij...,jr,ip->pr...", core, right.flatten(1), left.flatten(1))


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) < 2:
        raise ValueError(f"{shape} is not a matrix")
    return shape[0], prod(shape[1:])


def _product(a: tuple[int, ...], b: tuple[int, ...], core: tuple[int, ...] | None) -> tuple[int, int]:
    """Rows and columns of the product of two factors, with a core between them or none."""
    (left, rank), (inner, columns) = _matrix(a), _matrix(b)
    if core is None:
        _same(rank, inner)
        return left, columns
    # LyCORIS stores the left factor of a core transposed: (rank, out).
    _same((left, inner), tuple(core[:2]))
    return rank, columns * prod(core[2:])


def _same(a: object, b: object) -> None:
    if a != b:
        raise ValueError(f"{a} is not {b}")


def _apart(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] + a[1] <= b[0] or b[0] + b[1] <= a[0]
