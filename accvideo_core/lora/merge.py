"""A checkpoint with LoRAs merged into it, written tensor by tensor.

For every tensor W the merged one is W + sum over LoRAs of strength * difference(W), summed in fp32 (`arithmetic.py`) and rounded
once to what it is stored as (`storage.py`). One thread reads ahead, one adds, one writes, so the disk sets the pace; memory is
that of a few tensors, not of the model.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch

from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.containers import input_files
from ..checkpoint.layouts import some
from ..checkpoint.quantised import QUANTISATION_METADATA
from ..checkpoint.safetensors_file import check_suffix, stream_safetensors
from ..checkpoint.shards import weight_files
from ..errors import InvalidValueError, LoraError
from ..files import check_output
from .adapters import LoraModule
from .blocks import Blocks, parse_blocks
from .formats import Lora, lora_files, read_lora
from .names import HUNYUAN_VIDEO, WAN
from .storage import Storage, Target
from .streaming import ahead, sha256_of

RECORD = "accvideo_merge"
"""The metadata key under which a merged file says what it was made of, as JSON."""

_USE = re.compile(
    r"(?P<path>.+?)(?::(?P<strength>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)?(?::(?P<blocks>[^:]*))?)?", re.DOTALL
)


@dataclass(frozen=True)
class LoraUse:
    """A LoRA file, how strongly it is applied, and where."""

    path: Path
    strength: float = 1.0
    blocks: Blocks = field(default_factory=Blocks)

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise InvalidValueError(f"the strength of {self.path} is {self.strength}; choose a number, 1 for the LoRA as it is")

    def factor(self, tensor: str) -> float:
        """What the LoRA's difference of an original tensor is multiplied by."""
        return self.strength * self.blocks.factor(tensor)


@dataclass(frozen=True)
class MergeReport:
    """What was merged: tensors of the base, those that changed, and for each LoRA the tensors applied and left out (name:
    why)."""

    path: Path
    tensors: int
    changed: int
    bytes: int
    applied: tuple[tuple[LoraUse, int], ...]
    left_out: Mapping[str, str]
    metadata: Mapping[str, str]


def parse_lora_use(text: str) -> LoraUse:
    """`path[:strength[:blocks]]`, as the command line has it. InvalidValueError for blocks that are not understood."""
    if Path(text).exists():
        return LoraUse(Path(text))
    found = _USE.fullmatch(text)
    assert found is not None or not text, text
    if found is None:
        raise InvalidValueError("an empty name of a LoRA; write path[:strength[:blocks]]")
    return LoraUse(Path(found["path"]), float(found["strength"] or 1), parse_blocks(found["blocks"] or ""))


def merge_lora(
    base: str | Path,
    loras: Sequence[LoraUse | str | Path],
    out: str | Path,
    *,
    dtype: Storage | torch.dtype | None = None,
    weights: str | None = None,
    overwrite: bool = False,
    allow_unmatched: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write `base` with `loras` merged into it to `out`, under original names as safetensors; all or nothing.

    loras            files, each with strength and blocks; several add up, each from the base's own weights
    dtype            what is stored (`storage.DTYPES` has them by name); None keeps each tensor's dtype or quantisation
    overwrite        replace an `out` that exists
    allow_unmatched  leave out what a LoRA holds for modules that the base lacks, has in another shape, or nobody knows (named
                     in the report)
    weights          which network of a base that holds several, as for `open_checkpoint`
    progress         called with (bytes read, bytes in all); an exception it raises ends the merge and leaves nothing behind
    Raises LoraError for LoRAs that do not fit, CheckpointError for the base, OutputError for the output, each before anything
    long begins where it can be known.
    """
    base, out = Path(base), Path(out)
    check_suffix(out)
    uses = [use if isinstance(use, LoraUse) else LoraUse(Path(use)) for use in loras]
    if not uses:
        raise InvalidValueError("there is no LoRA to merge; name at least one")
    inputs = [*input_files(base), *(file for use in uses for file in lora_files(use.path))]
    check_output(out, inputs, overwrite)
    storage = Storage(dtype) if isinstance(dtype, torch.dtype) else dtype
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(base, weights=weights))
        opened = [(use, stack.enter_context(read_lora(use.path, allow_unmatched))) for use in uses]
        plan, applied, left_out = _plan(checkpoint, opened, allow_unmatched)
        target = Target(checkpoint, storage)
        entries = target.entries()
        size = sum(math.prod(shape) * kind.itemsize for kind, shape in entries.values())
        check_output(out, inputs, overwrite, size)
        hashes = stack.enter_context(ThreadPoolExecutor(1, "accvideo-hash"))
        stopped = threading.Event()
        stack.callback(stopped.set)
        base_hash = hashes.submit(sha256_of, weight_files(base), stopped)
        record = _Record(base, weights, opened)
        metadata = {key: value for key, value in checkpoint.metadata.items() if key != QUANTISATION_METADATA}
        metadata[RECORD] = record.text("0" * 64)
        read = stack.enter_context(closing(ahead(_read_all(checkpoint))))
        merged = stack.enter_context(closing(ahead(_merge_all(read, plan, target))))
        tensors = chain(target.marker(), _reporting(merged, checkpoint, progress))
        stream_safetensors(out, entries, tensors, metadata, late=lambda: {RECORD: record.text(base_hash.result())})
        metadata[RECORD] = record.text(base_hash.result())
    return MergeReport(out, len(checkpoint.keys()), len(plan), size, tuple(applied), left_out, metadata)


def _plan(
    checkpoint: Checkpoint, opened: Sequence[tuple[LoraUse, Lora]], allow_unmatched: bool
) -> tuple[dict[str, list[tuple[float, LoraModule]]], list[tuple[LoraUse, int]], dict[str, str]]:
    """({tensor: what is added to it}, tensors applied of each LoRA, {what is left out: why}); everything checked by shape."""
    family = WAN if checkpoint.family.startswith(WAN) else HUNYUAN_VIDEO
    keys = set(checkpoint.keys())
    plan: dict[str, list[tuple[float, LoraModule]]] = {}
    applied: list[tuple[LoraUse, int]] = []
    left_out: dict[str, str] = {}
    for use, lora in opened:
        if lora.family != family:
            raise LoraError(f"{use.path} is for {lora.family} but {checkpoint.path} is a {family} model; choose a LoRA for it")
        wanted = {name: (use.factor(name), module) for name, module in lora.modules.items() if use.factor(name) != 0}
        missing = [name for name in wanted if name not in keys]
        if missing and not allow_unmatched:
            raise LoraError(
                f"{use.path} changes {len(missing)} tensors that {checkpoint.path} does not have ({some(missing)}); it is for a "
                "larger model, or allow unmatched keys to leave them out"
            )
        if unused := use.blocks.unused(checkpoint.keys()):
            raise InvalidValueError(
                f"blocks {use.blocks.text!r}: {checkpoint.path} has nothing at {', '.join(unused)}; leave that out"
            )
        left_out |= {f"{use.path.name}: {name}": "the base has no such tensor" for name in missing}
        left_out |= {f"{use.path.name}: {key}": "not understood" for key in lora.unmatched}
        left_out |= {f"{use.path.name}: {key}": reason for key, reason in lora.ignored.items()}
        there = {name: entry for name, entry in wanted.items() if name in keys}
        misfits = {name: why for name, (_, module) in there.items() if (why := module.misfit(checkpoint.shape(name)))}
        fitting = {name: entry for name, entry in there.items() if name not in misfits}
        if misfits and not (allow_unmatched and fitting):
            raise LoraError(_do_not_fit(use, misfits, bool(fitting)))
        left_out |= {f"{use.path.name}: {name}": reason for name, reason in misfits.items()}
        left_out |= {f"{use.path.name}: {name}": "its strength is 0 there" for name in lora.modules if name not in wanted}
        for name, entry in fitting.items():
            plan.setdefault(name, []).append(entry)
        applied.append((use, len(fitting)))
    return plan, applied, left_out


def _do_not_fit(use: LoraUse, misfits: Mapping[str, str], others_fit: bool) -> str:
    first = next(iter(misfits.values()))
    if not others_fit:
        return f"{use.path}: nothing of it fits: {first}"
    return (
        f"{use.path}: {len(misfits)} of its tensors do not fit ({some(list(misfits))}): {first}; to merge the rest all the same, "
        f"name its blocks ({use.path.name}:{use.strength:g}:BLOCKS) or allow unmatched keys (--allow-unmatched)"
    )


def _read_all(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for key in checkpoint:
        yield key, checkpoint.read(key)


Encoded = tuple[str, list[tuple[str, torch.Tensor]]]


def _merge_all(
    tensors: Iterable[tuple[str, torch.Tensor]], plan: Mapping[str, Sequence[tuple[float, LoraModule]]], target: Target
) -> Iterator[Encoded]:
    """(tensor of the base, what is stored of it)."""
    for key, weight in tensors:
        yield key, target.encode(key, weight, plan.get(key, ()))


def _reporting(
    merged: Iterable[Encoded], checkpoint: Checkpoint, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """What is stored, telling `progress` in the caller's own thread how much of the base is done."""
    total, done = sum(checkpoint.nbytes(key) for key in checkpoint), 0
    for key, stored in merged:
        yield from stored
        done += checkpoint.nbytes(key)
        if progress is not None:
            progress(done, total)


class _Record:
    """What the merged file says of its making."""

    def __init__(self, base: Path, weights: str | None, opened: Sequence[tuple[LoraUse, Lora]]) -> None:
        self._base = {"file": base.name} | ({} if weights is None else {"weights": weights})
        self._loras = [
            {"file": use.path.name, "sha256": sha256_of([lora.path]), "strength": use.strength, "blocks": use.blocks.text}
            for use, lora in opened
        ]

    def text(self, base_hash: str) -> str:
        return json.dumps({"base": {**self._base, "sha256": base_hash}, "loras": self._loras})
