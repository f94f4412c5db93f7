"""Capturing a teacher's trajectories (paper, Eq. 5 and its key timesteps): an observer keeps the key latents while it samples.

Sampling never waits on the disk: latents leave the device on a stream of their own, files are written by another thread.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..devices import synchronize
from ..dit import Conditioning
from ..errors import InvalidValueError, SynVidError
from ..sampling import Step, Velocity, euler_flow, make_noise
from ..schedule import key_indices
from .folder import Folder
from .manifest import Sample, SampleInfo, check_same, union
from .plan import Plan, PlanItem
from .reader import SynVidReader
from .store import SynVidStore
from .texts import names_there

WAITING = 2  # batches that may wait for the disk; then sampling does, too, instead of filling the memory
MAX_FAULTS = 10  # samples that may fail before a capture gives up
PATIENCE = timedelta(days=365)  # of the first process to be done, for the last

Network = Callable[[Tensor, Tensor, Any], Tensor]
Encoding = tuple[Tensor, Tensor | None]
"""A prompt's text (L, D) at its valid length and its pooled vector (P,), or None for a model without it."""


class Texts(Protocol):
    """Encoded prompts of a batch, as `pad_texts` and `dataset.Batch` have them: text (B, L, D) filled up with zeros, mask (B, L)
    bool with the valid tokens first, or None where all are, pooled (B, P) or None."""

    @property
    def text(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor | None: ...
    @property
    def pooled(self) -> Tensor | None: ...


class PaddedTexts(NamedTuple):
    """`Texts` of their own, without a batch's latents."""

    text: Tensor
    mask: Tensor | None
    pooled: Tensor | None


Condition = Callable[[Texts, float | None], Any]
"""(texts, guidance in plain scale) -> what the network is told, which has `.to(device)`."""


class KeyLatents:
    """An observer that keeps key 0 .. m-1 of one batch's trajectory. Make a new one for every sampling.

    steps     n of the schedule
    segments  m, which divides n; m = n keeps every latent
    """

    def __init__(self, steps: int, segments: int) -> None:
        positions = key_indices(steps, segments)[1:]  # position 0 is the noise, which the caller has
        self._steps = steps
        self._key_at = {position: segments - 1 - i for i, position in enumerate(positions)}
        self._kept: dict[int, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copies: list[torch.cuda.Event] = []

    def __call__(self, step: Step) -> None:
        if step.total != self._steps:
            raise InvalidValueError(f"a trajectory of {self._steps} steps is to be kept, but {step.total} are sampled")
        key = self._key_at.get(step.index + 1)
        if key is not None:
            self._kept[key] = self._to_host(step.latent.detach())

    def latents(self) -> list[Tensor]:
        """Key 0 (clean) .. key m-1, each (B, C, T, H, W) float32 on the CPU. SynVidError unless the sampling ran to its end."""
        if len(self._kept) != len(self._key_at):
            raise SynVidError(f"the sampling ended early: {len(self._kept)} of {len(self._key_at)} key latents are there")
        for copy in self._copies:
            copy.synchronize()
        return [self._kept[key] for key in range(len(self._kept))]

    def _to_host(self, latent: Tensor) -> Tensor:
        if latent.device.type != "cuda":
            return latent.to("cpu", torch.float32, copy=True)
        stream = self._stream = self._stream or torch.cuda.Stream(latent.device)
        host = torch.empty(latent.shape, dtype=torch.float32, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(latent.device))
        with torch.cuda.stream(stream):
            host.copy_(latent, non_blocking=True)
            self._copies.append(stream.record_event())
        latent.record_stream(stream)
        return host


def capture(
    network: Network,
    plan: Plan,
    items: Sequence[PlanItem],
    store: SynVidStore,
    batch: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
    condition: Condition | None = None,
    negative: Encoding | None = None,
) -> list[str]:
    """Sample the items with the store's schedule, guidance and cfg and commit them, a file for every batch.

    network    (latent (B, C, T, H, W) float32, sigma (B,), conditioning) -> velocity, on `device`
    batch      samples at a time; those of one batch have one shape
    progress   called with the number of samples just committed
    condition  makes the conditioning of a batch's texts; by default HunyuanVideo's
    negative   encoding of the header's negative prompt, for a cfg other than 1; it is stored in the dataset, too
    Returns what was wrong with the samples that had to be left out, a sentence each that names one: NaN, or beyond float16, or
    an encoding that cannot be read. What other processes capture into the dataset meanwhile is not captured again.
    Raises SynVidError once there are more than 10 of those, OutputError where the disk refuses; what was committed stays.
    """
    if batch < 1:
        raise InvalidValueError(f"batch is {batch}; it must be at least 1")
    if (store.header.cfg != 1) != (negative is not None):
        raise InvalidValueError(
            f"cfg is {store.header.cfg:g} and {'no' if negative is None else 'an'} encoded negative prompt is given; a cfg other "
            "than 1 needs one, and cfg 1 none"
        )
    device = torch.device(device)
    condition = condition or conditioning_of
    if negative is not None:
        store.put_text(*negative)
    faults: list[str] = []
    pending: deque[tuple[int, Future[list[str]]]] = deque()

    def settle(limit: int) -> None:
        while len(pending) > limit:
            count, written = pending.popleft()
            found = written.result()
            faults.extend(found)
            if progress is not None:
                progress(count - len(found))
        if len(faults) > MAX_FAULTS:
            raise SynVidError(f"{len(faults)} trajectories could not be stored, so the capture gives up; {'; '.join(faults)}")

    order, others, alone = list(reversed(items)), _Others(store), True
    with ThreadPoolExecutor(1, "synvid-writer") as writer:  # leaving waits for what is being written
        for coming in batches((order.pop() for _ in items), batch):
            if others.are_at_work() and alone:
                alone = False  # from here on in an order of its own, so that they do not go side by side
                order.sort(key=lambda item: hashlib.sha256(f"{store.writer} {item.id}".encode()).digest())
            group, texts = _readable(plan, others.leave(coming), faults)
            if not group:
                settle(WAITING)
                continue
            keys, noise, seconds = trajectory(network, condition, store, texts, negative, group, device)
            settle(WAITING - 1)
            pending.append((len(group), writer.submit(_write, store, keys, noise, group, texts, seconds / len(group))))
        settle(0)
    return faults


class _Others:
    """Other processes that capture into the same dataset meanwhile, without knowing of this one."""

    def __init__(self, store: SynVidStore) -> None:
        self._reader = SynVidReader(store.path)  # one of its own: the store is the writing thread's
        self._own = f"manifest/{store.writer}.jsonl"
        self._sizes = self._others()
        self._before = self._samples()
        self._now = self._before

    def are_at_work(self) -> bool:
        """Whether they have committed anything since this was last asked."""
        sizes, before = self._others(), self._sizes
        if sizes == before:
            return False
        self._sizes, self._now = sizes, self._samples()
        return True

    def leave(self, items: Sequence[PlanItem]) -> list[PlanItem]:
        """Those that they have not captured since the beginning."""
        return [item for item in items if self._now.get(item.id) in (None, self._before.get(item.id))]

    def _others(self) -> dict[str, int]:
        return {name: size for name, size in self._reader.sizes("manifest").items() if name != self._own}

    def _samples(self) -> dict[str, Sample]:
        return union(self._reader.entries()[0])


def _readable(plan: Plan, items: Sequence[PlanItem], faults: list[str]) -> tuple[list[PlanItem], list[Encoding]]:
    """The items whose encodings can be read, with these; what is wrong with the others goes to `faults`."""
    found: list[tuple[PlanItem, Encoding]] = []
    for item in items:
        try:
            found.append((item, plan.text(item.text)))
        except SynVidError as error:
            faults.append(f"sample {item.id}: {error}")
    return [item for item, _ in found], [text for _, text in found]


@torch.inference_mode()
def trajectory(
    network: Network,
    condition: Condition,
    store: SynVidStore,
    texts: Sequence[Encoding],
    negative: Encoding | None,
    items: Sequence[PlanItem],
    device: torch.device,
) -> tuple[list[Tensor], Tensor, float]:
    """(key 0 .. m-1, noise, seconds) of one batch."""
    header = store.header

    def velocity_for(texts: Sequence[Encoding]) -> Velocity:
        told = condition(pad_texts(texts), header.guidance).to(device)
        return lambda latent, sigma: network(latent, sigma, told)

    velocity = velocity_for(texts)
    if negative is not None:
        velocity = with_cfg(velocity, velocity_for([negative] * len(texts)), header.cfg)
    noise = make_noise((len(items), *items[0].shape), [item.seed for item in items])
    keys = KeyLatents(len(header.sigmas) - 1, header.segments)
    start = time.perf_counter()
    euler_flow(velocity, noise.to(device), torch.tensor(header.sigmas), [keys])
    synchronize(device)
    return keys.latents(), noise, time.perf_counter() - start


def with_cfg(positive: Velocity, negative: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance (arXiv 2207.12598): negative + scale * (positive - negative), in float32, a pass for each."""

    def velocity(latent: Tensor, sigma: Tensor) -> Tensor:
        unguided = negative(latent, sigma).float()
        return unguided + scale * (positive(latent, sigma).float() - unguided)

    return velocity


def pad_texts(texts: Sequence[Encoding]) -> PaddedTexts:
    """A batch of encoded prompts. SynVidError for those of different text encoders."""
    rows, pooled = [text for text, _ in texts], [vector for _, vector in texts if vector is not None]
    if len({(text.shape[1], None if vector is None else len(vector)) for text, vector in texts}) > 1:
        raise SynVidError("prompts of the plan were encoded by different text encoders; make a plan for each")
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return PaddedTexts(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        None if bool(mask.all()) else mask,
        torch.stack(pooled) if pooled else None,
    )


def conditioning_of(texts: Texts, guidance: float | None) -> Conditioning:
    """HunyuanVideo's conditioning of a batch; guidance in plain scale. SynVidError for texts without the pooled vector."""
    if texts.pooled is None:
        raise SynVidError("a prompt of the plan has no pooled vector, which the network needs; encode it for this model")
    scale = None if guidance is None else torch.full((len(texts.text),), guidance, device=texts.text.device)
    return Conditioning(texts.text, texts.pooled, scale, texts.mask)


def stack_texts(texts: Sequence[Encoding], guidance: float | None) -> Conditioning:
    """HunyuanVideo's conditioning of a batch from each prompt's encoding, shorter texts padded and masked."""
    return conditioning_of(pad_texts(texts), guidance)


def batches(items: Iterable[PlanItem], size: int) -> Iterator[list[PlanItem]]:
    """At most `size` items at a time, each batch of one shape, in order within a shape."""
    waiting: dict[tuple[int, ...], list[PlanItem]] = {}
    for item in items:
        group = waiting.setdefault(item.shape, [])
        group.append(item)
        if len(group) == size:
            yield waiting.pop(item.shape)
    yield from waiting.values()


def my_share(plan: Plan, store: SynVidStore) -> list[PlanItem]:
    """What this process is to capture of what the dataset lacks: every size-th sample, of the `size` processes torchrun started.

    The first process looks at the dataset and tells the others, so that all divide the same list, whoever comes late. SynVidError
    for an id that the dataset has for another sample.
    """
    ids = list(plan.items)
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if rank == 0:
        _check_same_samples(plan, store)
    if size == 1:
        return [plan.items[name] for name in store.missing(ids)]
    wanted = torch.zeros(len(ids), dtype=torch.bool)
    dist.init_process_group("gloo", timeout=PATIENCE)
    if rank == 0:
        missing = set(store.missing(ids))
        wanted = torch.tensor([name in missing for name in ids])
    dist.broadcast(wanted, 0)
    return [plan.items[ids[i]] for i in wanted.nonzero().flatten().tolist()[rank::size]]


def _check_same_samples(plan: Plan, store: SynVidStore) -> None:
    for name, sample in store.samples().items():
        if item := plan.items.get(name):
            check_same(name, sample.origin, item.origin, store.path)


def restore_texts(plan: Plan, store: SynVidStore) -> int:
    """Put encodings that the dataset has lost, and the plan has, there again; how many. SynVidError if the plan's are damaged."""
    there = names_there(store.folder)
    lost = {sample.text for sample in store.samples().values()} - there
    for name in (found := lost & names_there(Folder(plan.path))):
        store.put_text(*plan.text(name))
    return len(found)


def leave_together() -> None:
    """Wait until the other processes are done, too: torchrun ends them all as soon as one ends and reports a fault."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _write(
    store: SynVidStore,
    keys: Sequence[Tensor],
    noise: Tensor,
    items: Sequence[PlanItem],
    texts: Sequence[Encoding],
    seconds: float,
) -> list[str]:
    """Commit a batch; where it is refused, each sample alone, so that one takes no other with it. Returns the faults."""
    try:
        for text in texts:
            store.put_text(*text)
        store.commit(keys, [SampleInfo(item.id, item.prompt, item.text, item.seed, seconds) for item in items], noise)
        return []
    except SynVidError as error:
        if len(items) == 1:
            return [str(error)]
    alone = [slice(i, i + 1) for i in range(len(items))]
    return [
        fault for row in alone for fault in _write(store, [key[row] for key in keys], noise[row], items[row], texts[row], seconds)
    ]
