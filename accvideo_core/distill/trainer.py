"""Distillation: one loop in the order of the paper's Algorithm 1 (AccVideo, arXiv 2503.19462).

The trainer knows the network through an adapter, data through a source, the machine through a world; each can be another.
Shapes: B batch (this process's rows), C channels, T latent frames, H W latent height and width, N tokens, D width; key k of m.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..checkpoint.students import student_metadata
from ..devices import autocast_dtype, synchronize
from ..errors import InvalidValueError, TrainingError
from ..files import atomic_path
from ..synvid import Batch
from . import state
from .adapters import Adapter, Told
from .config import TrainConfig, check_same_run
from .discriminator import Discriminator
from .health import Health, check_finite
from .lora_student import add_lora, export_lora, share_base
from .losses import GAN_LOSSES, approximate_r1, euler_step, trajectory_loss, weighted_mean, x0_loss
from .memory import explained
from .on_policy import Continuation
from .parallel import Ema, World
from .rollout import Entry, Queues, keyed_noise
from .source import Judged, Source
from .validation import parts, validate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_KINDS = 64
"""Kinds of calls a compiled block is kept for: student and teacher, first block and later, with gradients and without, texts of
one length and of any. Beyond its limit, by default 8, torch computes without the compiler."""
Observer = Callable[[int, Mapping[str, float]], None]
"""Called with (iterations done, scalars) after every iteration, in the first process."""
Show = Callable[[int, Tensor, Tensor], None]
"""Called with (iterations done, student's clean latents, teacher's) (B, C, T, H, W) at every validation, there too."""


class Shown(NamedTuple):
    """Trajectories' latents (B, C, T, H, W) at a key, what the network is told of them, and how much each counts, (B,)."""

    latents: Tensor
    told: Told
    weights: Tensor


class Trainer:
    """One run. In a sharded world every process makes one, with the same weights.

    student    what is trained: the teacher's weights, or those to go on from; a LoRA student is made of it here
    teacher    frozen, a network of its own, whose features the heads see and which goes on from where the student arrives;
               None where adversarial_weight and on_policy_weight are 0
    source     training data, this process's rows of every draw; config.batch is that of all processes
    folder     for config.json, checkpoints and exported students; None keeps nothing. A run found there goes on
    held_out   a source whose draw 0 is validated on, if any
    judged     what the heads are shown instead of the source's own trajectories, where some of these were rejected
    going_on   how the teacher does that, where on_policy_weight is not 0
    observers  see the scalars of every iteration, `show` what the student makes of held-out noise
    metadata   to be told in exported files, besides configuration and iteration; "base", the fingerprint of what a LoRA belongs
               on, also tells this run from another's
    """

    def __init__(
        self,
        config: TrainConfig,
        adapter: Adapter,
        student: nn.Module,
        teacher: nn.Module | None,
        source: Source,
        world: World | None = None,
        folder: Path | None = None,
        held_out: Source | None = None,
        judged: Judged | None = None,
        going_on: Continuation | None = None,
        observers: Sequence[Observer] = (),
        show: Show | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.adapter, self.source, self.held_out, self.folder = config, adapter, source, held_out, folder
        self.judged, self.going_on, self.world = judged, going_on, (world := world or World.start())
        self.observers, self.show, self.metadata = observers, show, metadata or {}
        self.rows = world.rows(config.batch)
        self.micro = min(config.micro_batch or len(self.rows), len(self.rows))
        self.sigmas = torch.tensor(source.sigmas, device=world.device)
        self.segments = len(source.sigmas) - 1
        self.compute = DTYPES.get(config.precision, autocast_dtype(world.device))
        self.scalars: defaultdict[str, Tensor | float] = defaultdict(float)
        self.best: float | None = None
        self.health = Health(config.patience)

        figures = [f"validation/{what}/key_{key}" for what in ("rolled", "trajectory") for key in range(self.segments)]
        if held_out is not None and config.best not in figures:
            raise InvalidValueError(f"best is {config.best!r}; choose one of {', '.join(figures)}")

        student.requires_grad_(True).train()
        if config.lora is not None:
            add_lora(student, adapter.lora_targets(student), config.lora, config.seed)
            if teacher is not None and world.size == 1:
                share_base(student, teacher)  # shards cannot be shared
        self.student = self._prepared(student, torch.float32)
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = self._optimizer(self.trained, config.lr, config.beta1)
        self.ema = Ema(self.student, config.ema)
        self.queues = Queues(self.segments, config.queue_length)
        self.head_of: dict[int, int] = {}
        self.on_policy: tuple[int, ...] = ()
        self.teacher: nn.Module | None = None
        if not config.adversarial_weight and not config.on_policy_weight:
            return  # nothing that needs the teacher
        if teacher is None or teacher is student:
            raise InvalidValueError(
                "the adversarial and the on-policy loss need a teacher of its own beside the student; load its weights twice"
            )
        if config.on_policy_weight:
            if going_on is None:
                raise InvalidValueError("on_policy_weight is set and nothing says how the teacher goes on; give going_on")
            self.on_policy = self._keys("on_policy_keys")
        if config.adversarial_weight:
            self._add_heads(teacher)
        self.teacher = self._prepared(teacher.requires_grad_(False).eval(), None)

    def _keys(self, name: str) -> tuple[int, ...]:
        """The keys that a field of the configuration names, or all, rising. InvalidValueError for one that is none."""
        keys = getattr(self.config, name)
        if keys is not None and max(keys) >= self.segments:
            raise InvalidValueError(f"{name} are {keys}; the trajectories' keys that can have one are 0 to {self.segments - 1}")
        return tuple(sorted(set(range(self.segments) if keys is None else keys)))

    def _prepared(self, network: nn.Module, master: torch.dtype | None) -> nn.Module:
        """Checkpointing, compilation, sharding, in this order, block by block."""
        blocks = self.adapter.block_names(network)
        self.adapter.set_checkpointing(network, self.config.checkpointing)
        if self.config.compile:
            limits = torch._dynamo.config
            limits.cache_size_limit = max(limits.cache_size_limit, _KINDS)
            for name in blocks:
                network.get_submodule(name).compile()
        self.world.split_sequence(network)
        return self.world.shard(network, blocks, master, self.compute)

    def _add_heads(self, teacher: nn.Module) -> None:
        c = self.config
        clean, noisy = self.adapter.feature_blocks(teacher)
        self.feature_blocks = [c.clean_block or clean] + [c.noisy_block or noisy] * (self.segments - 1)
        for block in self.feature_blocks:
            self.adapter.check_block(teacher, block)
        self.head_of = {key: place for place, key in enumerate(self._keys("head_keys"))}
        width, count = self.adapter.width(teacher), len(self.head_of)
        heads = Discriminator(width, count, c.heads, c.head, c.head_channels, c.head_depth, seed=c.seed)
        self.heads = self.world.shard(heads, [f"heads.{i}" for i in range(len(heads.heads))])
        self.head_optimizer = self._optimizer(list(self.heads.parameters()), c.head_lr, 0.0)

    def _optimizer(self, parameters: list[nn.Parameter], lr: float, beta1: float) -> AdamW:
        """AdamW with the states it would make at the first step, so that a checkpoint has them all from the beginning: a head
        may wait for its first step until the queues are filled."""
        optimizer = AdamW(parameters, lr, (beta1, self.config.beta2), weight_decay=self.config.weight_decay)
        for p in parameters:
            optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return optimizer

    # ---- Algorithm 1 ------------------------------------------------------------------------------------------------------

    def iteration(self, iteration: int) -> None:
        """Every key once, from the noisiest segment to the cleanest."""
        self._set_learning_rates(iteration)
        for key in reversed(range(self.segments)):
            draw = iteration * self.segments + self.segments - 1 - key
            batch = self._batch(self.source, draw, key)
            if self.config.trajectory_weight and iteration >= self.config.head_warmup:
                self.update_by_trajectory(iteration, draw, key, batch)
            if self.teacher is not None:
                if key == self.segments - 1:
                    noise = keyed_noise(batch.clean, self.config.seed, "noise", draw, self.rows.start)
                    self.queues.push(self.segments, Entry(draw, noise))
                entry = self.queues.pop(key + 1)
                if entry is not None:
                    self.roll_on(iteration, key, entry)
        self.ema.update(self.student)

    def roll_on(self, iteration: int, key: int, entry: Entry) -> None:
        """What is learned from a queue's entry at key + 1, and where the student takes it."""
        asked, last = self._shown(self.source, entry.draw, key), min(*self.on_policy, *self.head_of, self.segments)
        if key in self.on_policy and iteration >= self.config.head_warmup:
            self.update_on_policy(iteration, key, entry, asked.told)
        if key in self.head_of:
            made = self.update_by_heads(iteration, key, entry, asked)
        elif key > last:
            made = self.step_on(key, entry, asked.told)
        else:
            return
        if key > last:
            self.queues.push(key, made)

    def update_by_trajectory(self, iteration: int, draw: int, key: int, batch: Batch) -> None:
        """One step of the student on Eq. 6 (or on what takes its place)."""
        told = self.adapter.conditioning(batch, self.source.guidance)
        x0 = self._batch(self.source, draw, 0).clean if self.config.target == "x0" else None
        for at, share in self._micro_batches():
            noisy, clean = batch.noisy[at], batch.clean[at]
            high, low = self._levels(key + 1, noisy), self._levels(key, noisy)
            v = self.velocity(noisy, high, told.rows(at))
            loss = trajectory_loss(v, noisy, clean, high, low) if x0 is None else x0_loss(v, noisy, x0[at], high)
            (self.config.trajectory_weight * share * loss).backward()
            self._see(f"trajectory/key_{key}", loss, share)
        self._step(self.optimizer, self.trained, "trajectory", iteration, key)

    def update_on_policy(self, iteration: int, key: int, entry: Entry, told: Told) -> None:
        """One step of the student on Eq. 6 from where it arrives itself: towards what the teacher makes of that."""
        assert self.teacher is not None and self.going_on is not None
        for at, share in self._micro_batches():
            latent, text = entry.latent[at], told.rows(at)
            high, low = self._levels(key + 1, latent), self._levels(key, latent)
            with torch.no_grad(), self.world.precision(self.compute):
                due = self.going_on(self.teacher, latent, key, text)
            loss = trajectory_loss(self.velocity(latent, high, text), latent, due, high, low)
            (self.config.on_policy_weight * share * loss).backward()
            self._see(f"on_policy/key_{key}", loss, share)
        self._step(self.optimizer, self.trained, "on_policy", iteration, key)

    def update_by_heads(self, iteration: int, key: int, entry: Entry, asked: Shown) -> Entry:
        """One step of the student on what it makes of a queue's entry, and one of the key's head (Eqs. 7 and 8), which holds it
        against what was `asked`, the entry's own draw, unless trajectories were judged.

        The entry has no gradient: the student answers for this one Euler step alone. Head and student see the same latents,
        so their gradients are computed together; the student's step is taken first, and none while the heads warm up. Returns
        the student's latents at `key`.
        """
        felt = iteration >= self.config.head_warmup
        real, rejected = asked, None
        if self.judged is not None:
            real = self._shown(self.judged.accepted, entry.draw, key)
            rejected = None if self.judged.rejected is None else self._shown(self.judged.rejected, entry.draw, key)
        gan, weight, made = GAN_LOSSES[self.config.gan_loss], self.config.adversarial_weight, []
        for at, share in self._micro_batches():
            text = asked.told.rows(at)
            self.heads.requires_grad_(False)
            with torch.set_grad_enabled(felt):
                fake = self.stepped(entry.latent[at], key, text)
                fake_features = self.features(fake, key, text)
                loss = gan.student(self.logits(fake_features, key, fake)).mean()
            if felt:
                (weight * share * loss).backward()
            self.heads.requires_grad_(True)
            self._see(f"adversarial/student/key_{key}", loss, share)
            made.append(fake.detach())
            fake_logits = self.logits(fake_features.detach(), key, fake)
            self._backward_head(iteration, key, real, rejected, fake_logits, at, share)
        if felt:
            self._step(self.optimizer, self.trained, "adversarial", iteration, key)
        self._step(self.head_optimizer, list(self.heads.parameters()), "heads", iteration, key)
        return Entry(entry.draw, torch.cat(made))

    @torch.no_grad()
    def step_on(self, key: int, entry: Entry, told: Told) -> Entry:
        """A queue's entry one student step further, to a key without a head."""
        made = [self.stepped(entry.latent[at], key, told.rows(at)) for at, _ in self._micro_batches()]
        return Entry(entry.draw, torch.cat(made))

    def _backward_head(
        self, iteration: int, key: int, real: Shown, rejected: Shown | None, fake_logits: Tensor, at: slice, share: float
    ) -> None:
        """The head's loss on these rows: real ones, what the student made, and rejected ones if there are any."""
        c, gan = self.config, GAN_LOSSES[self.config.gan_loss]
        real_logits = self._judge(real, key, at)
        fakes = gan.fake(fake_logits).mean()
        if rejected is not None:
            logits = self._judge(rejected, key, at)
            fakes = torch.lerp(fakes, weighted_mean(gan.fake(logits), rejected.weights[at]), c.rejected_share)
            self._see(f"logits/rejected/key_{key}", logits.mean(), share)
        loss = weighted_mean(gan.real(real_logits), real.weights[at]) + fakes
        if c.r1_weight:
            step = iteration * self.segments + key
            noise = keyed_noise(real.latents[at], c.seed, "r1", step, self.rows.start + at.start)
            loss = loss + c.r1_weight * approximate_r1(real_logits, self._judge(real, key, at, c.r1_sigma * noise))
        (c.adversarial_weight * share * loss).backward()
        self._see(f"adversarial/heads/key_{key}", loss, share)
        self._see(f"logits/real/key_{key}", real_logits.mean(), share)
        self._see(f"logits/fake/key_{key}", fake_logits.mean(), share)
        right = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
        self._see(f"heads/right/key_{key}", right, share)

    def _batch(self, source: Source, draw: int, key: int) -> Batch:
        """A source's, on the device. TrainingError if processes that share each sample's tokens have read different samples: who
        cannot read one takes another instead, and tokens of two videos would be attended as one."""
        batch = source.batch(draw, key)
        if not self.world.agree(batch.ids):
            raise TrainingError(
                f"the processes that share each sample's tokens read different samples, this one {', '.join(batch.ids)}: not all "
                "of them could read one that a warning above names. Go on from the last checkpoint when all can"
            )
        return batch.to(self.world.device)

    def _shown(self, source: Source, draw: int, key: int) -> Shown:
        """Key latents of a source's draw."""
        batch = self._batch(source, draw, key)
        weights = [1.0 if self.judged is None else self.judged.weights.get(name, 1.0) for name in batch.ids]
        told = self.adapter.conditioning(batch, self.source.guidance)
        return Shown(batch.clean, told, torch.tensor(weights, device=self.world.device))

    def _judge(self, shown: Shown, key: int, at: slice, disturbance: Tensor | float = 0.0) -> Tensor:
        """A head's logits (B, t, h, w) of these rows, through which no gradient goes to the latents."""
        latents = shown.latents[at] + disturbance
        with torch.no_grad():
            features = self.features(latents, key, shown.told.rows(at))
        return self.logits(features, key, latents)

    def logits(self, features: Tensor, key: int, latents: Tensor) -> Tensor:
        """(B, t, h, w): what the key's head says of the features (B, N, D) of latents of that shape."""
        assert self.teacher is not None
        judged: Tensor = self.heads(features, self.head_of[key], self.adapter.grid(self.teacher, latents.shape))
        return judged

    def stepped(self, latent: Tensor, key: int, conditioning: Any) -> Tensor:
        """Latents at key + 1, one Euler step of the student's further, at `key`."""
        high, low = self._levels(key + 1, latent), self._levels(key, latent)
        return euler_step(latent, self.velocity(latent, high, conditioning), high, low)

    def velocity(self, latent: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """The student's, (B, C, T, H, W) float32."""
        with self.world.precision(self.compute):
            return self.adapter.velocity(self.student, latent, sigma, conditioning).float()

    def features(self, latent: Tensor, key: int, conditioning: Any) -> Tensor:
        """(B, N, D): what the frozen teacher sees in latents at a key. Autograd flows through to the latents."""
        assert self.teacher is not None
        block, sigma = self.feature_blocks[key], self._levels(key, latent)
        with self.world.precision(self.compute):
            return self.adapter.features(self.teacher, latent, sigma, conditioning, block)

    def _step(self, optimizer: Optimizer, parameters: list[nn.Parameter], what: str, iteration: int, key: int) -> None:
        norm = self.world.clip(parameters, self.config.clip)
        check_finite(norm, what, iteration, key)
        optimizer.step()
        optimizer.zero_grad()
        self.scalars[f"gradient/{what}/key_{key}"] = norm

    def _micro_batches(self) -> list[tuple[slice, float]]:
        """(rows, share of this process's batch) of every pass."""
        count = len(self.rows)
        return [(at, (at.stop - at.start) / count) for at in parts(count, self.micro)]

    def _levels(self, key: int, latent: Tensor) -> Tensor:
        return self.sigmas[key].expand(len(latent))

    def _see(self, name: str, value: Tensor, share: float) -> None:
        self.scalars[name] += share * value.detach()

    def _set_learning_rates(self, iteration: int) -> None:
        c = self.config
        self.optimizer.param_groups[0]["lr"] = c.lr * c.learning_rate_share(iteration, c.head_warmup)
        if self.head_of:
            self.head_optimizer.param_groups[0]["lr"] = c.head_lr * c.learning_rate_share(iteration)

    # ---- the run around it ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until `iterations`, from the folder's newest checkpoint if it has one; then export the averaged student.

        Raises TrainingError where the training broke or memory does not suffice, InvalidValueError for a folder with another
        run, OutputError where the disk refuses. Checkpoints stay whole.
        """
        with explained(self.config, self.world):
            for iteration in range(self.resume(), self.config.iterations):
                start, done, last = time.perf_counter(), iteration + 1, iteration + 1 == self.config.iterations
                self.scalars.clear()
                self.iteration(iteration)
                scalars = self._report(done, start)
                if self.held_out is not None and (done % self.config.validate_every == 0 or last):
                    scalars |= self.validate(done)
                if self.world.is_main:
                    for observe in self.observers:
                        observe(done, scalars)
                if done % self.config.save_every == 0 or last:
                    self.save(done)
        if self.folder is not None:
            self.export(self.folder / "student.safetensors", self.config.iterations)

    def _report(self, done: int, start: float) -> dict[str, float]:
        """What is known of an iteration that began at `start`, the mean over all processes."""
        device = self.world.device
        scalars = self.world.mean(self.scalars)
        synchronize(device)
        seconds = time.perf_counter() - start
        for key in range(self.segments):
            ours, theirs = (scalars.get(f"gradient/{what}/key_{key}") for what in ("trajectory", "adversarial"))
            if ours and theirs is not None:
                scalars[f"gradient/ratio/key_{key}"] = theirs / ours
        scalars["lr"] = self.optimizer.param_groups[0]["lr"]
        scalars["speed/seconds"] = seconds
        scalars["speed/trajectories"] = self.segments * self.config.batch / seconds
        if device.type == "cuda":
            scalars["memory/peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        if self.world.is_main:
            self.health.look(done, scalars)
        return scalars

    def validate(self, done: int) -> dict[str, float]:
        """The averaged student on the held-out trajectories; the best so far by `config.best` is exported."""
        assert self.held_out is not None
        held_out = self.held_out
        with self.ema.swapped(self.student):
            figures, ours, theirs = validate(
                self.velocity,
                lambda batch: self.adapter.conditioning(batch, held_out.guidance),
                lambda key: self._batch(held_out, 0, key),
                torch.tensor(held_out.sigmas, device=self.world.device),
                self.micro,
            )
        scalars = self.world.mean(figures)
        if self.show is not None and self.world.is_main:
            self.show(done, ours, theirs)
        if self.best is None or scalars[self.config.best] < self.best:
            self.best = scalars[self.config.best]
            if self.folder is not None:
                self.export(self.folder / "best.safetensors", done)
        return scalars

    # ---- what is kept -----------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds, sharded as it is in memory."""
        kept: dict[str, Any] = {
            "student": {name: p.detach() for name, p in self.student.named_parameters() if p.requires_grad},
            "ema": self.ema,
            "optimizer": state.OptimizerState(self.student, self.optimizer),
        }
        if self.head_of:
            kept |= {"heads": self.heads, "head_optimizer": state.OptimizerState(self.heads, self.head_optimizer)}
        return kept

    def save(self, done: int) -> None:
        """A checkpoint after so many iterations."""
        if self.folder is None:
            return
        queues = {"queues": self.queues.state(self.world.gather_rows)}
        extra = {"best": self.best, "best_by": self.config.best, "health": self.health.state()}
        state.save(self.folder / "checkpoints", done, self.parts() | queues, extra, self.config.keep)

    def told_source(self) -> dict[str, Any]:
        """What tells this run's data, and what its LoRA belongs on, from another's."""
        base = {"base": self.metadata["base"]} if "base" in self.metadata else {}
        return self.source.state() | base | ({} if self.judged is None else {"verdicts": self.judged.digest})

    def resume(self) -> int:
        """Iterations done: those of the folder's newest checkpoint, now restored, or 0. InvalidValueError, before anything is
        written, if the folder is of a run with another configuration or other data, or of one that has done more."""
        if self.folder is None:
            return 0
        path, newest = self.folder / "config.json", state.newest(self.folder / "checkpoints")
        told = json.loads(json.dumps({"config": asdict(self.config), "source": self.told_source()}))
        if path.exists():
            check_same_run(path, told)
        elif newest is not None:
            raise TrainingError(f"{str(self.folder)!r} has checkpoints but no config.json; choose another folder")
        done = 0 if newest is None else state.step_of(newest)
        if done > self.config.iterations:
            raise InvalidValueError(
                f"{str(self.folder)!r} has done {done} iterations and iterations is {self.config.iterations}; set it to {done} "
                "or more, or choose another folder"
            )
        self.world.barrier()  # all have read it before one writes it
        if self.world.is_main:
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        if newest is None:
            return 0
        extra = state.load(newest, self.parts())
        self.best = extra["best"] if extra.get("best_by") == self.config.best else None  # figures of two kinds cannot be compared
        self.health.restore(extra["health"])
        if self.config.keep_queues:
            self.queues.restore(state.read(newest, "queues"), self.rows, self.world.device)
        return done

    def export(self, path: Path, done: int) -> None:
        """The averaged student as one safetensors in interchange names; of a LoRA student the LoRA alone."""
        with self.ema.swapped(self.student):
            weights = self.world.full_state(self.student, trainable=self.config.lora is not None)
        if self.world.is_main:
            told = {"iteration": str(done), "config": json.dumps(asdict(self.config)), "source": json.dumps(self.told_source())}
            told |= student_metadata(self.segments)
            if self.config.lora is None:
                dtype = DTYPES[self.config.export_dtype]
                self.adapter.export({n: w.to(dtype) for n, w in weights.items()}, path, {**self.metadata, **told})
            else:
                export_lora(self.adapter, weights, path, {**self.metadata, **told})
        self.world.barrier()
