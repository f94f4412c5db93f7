"""What can be chosen about a distillation. The paper's values where it gives any; docs/method.md says why for the others."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from ..errors import InvalidValueError, TrainingError
from .discriminator import Heads, Kind
from .losses import GAN_LOSSES

Gan = Literal["softplus", "hinge"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run follows from these, the dataset and the weights alone."""

    iterations: int = 1200
    """Iterations of Algorithm 1 in all; each goes through every key once."""
    batch: int = 32
    """Trajectories an update, of all processes together."""
    micro_batch: int | None = None
    """Trajectories that a process computes at a time, accumulating gradients; default: its whole share of the batch."""
    seed: int = 0
    """Everything random follows from it, the step and the sample."""

    trajectory_weight: float = 1.0
    """Weight of the trajectory loss; 0 leaves it out."""
    adversarial_weight: float = 0.1
    """Weight of the adversarial loss, the paper's lambda; 0 leaves it out, with the heads and all that only they need."""
    on_policy_weight: float = 0.0
    """Weight of the trajectory loss from where the student itself arrives, the teacher going on from there; 0 leaves it out."""
    on_policy_keys: tuple[int, ...] | None = None
    """The keys, 0 the clean one, whose segments have that loss; default: all."""
    on_policy_steps: int = 3
    """Steps in which the teacher goes on over a segment, at most as many as it took there when its trajectories were captured."""
    head_warmup: int = 0
    """Iterations at the beginning in which the heads alone learn and the student stands still."""
    target: Literal["velocity", "x0"] = "velocity"
    """What the trajectory loss regresses: the segment's velocity (Eq. 6), or the trajectory's clean end."""
    gan_loss: Gan = "softplus"
    """softplus is non-saturating."""
    heads: Heads = "per-key"
    """A head for every key, or one for all."""
    head_keys: tuple[int, ...] | None = None
    """The keys that have a head, 0 the clean one; default: all. Some may see nothing (docs/training.md)."""
    head: Kind = "2d"
    """Heads that see each frame alone, or also its neighbours."""
    head_channels: int = 256
    """Channels inside a head."""
    head_depth: int = 2
    """3 x 3 convolutions of a head."""
    clean_block: str | None = None
    """Block whose features the clean key's head sees; default: at two thirds of the depth."""
    noisy_block: str | None = None
    """Block whose features the noisy keys' heads see; default: the last."""
    rejected_share: float = 0.25
    """Where trajectories were judged: so much of what the heads are to call fake are rejected ones, the rest is the student's.
    With 1 they learn from the verdicts alone."""
    r1_weight: float = 0.0
    """Weight of the approximate R1 penalty of the heads; 0 leaves it out."""
    r1_sigma: float = 0.01
    """Deviation of the noise that the penalty adds to real latents."""
    queue_length: int = 1
    """Entries a queue holds before one is popped; with 1 all goes on at once."""
    keep_queues: bool = True
    """Whether a run goes on with its checkpoint's queues, or with empty ones."""

    lr: float = 5e-6
    """Peak learning rate of the student."""
    head_lr: float = 1e-4
    """Peak learning rate of the heads."""
    warmup: int = 20
    """Iterations until the peak."""
    decay: Literal["constant", "cosine"] = "constant"
    """What the learning rates do after it: stay, or fall to 0 at the last iteration."""
    beta1: float = 0.9
    """AdamW's, of the student; the heads have 0."""
    beta2: float = 0.999
    """AdamW's, of both."""
    weight_decay: float = 0.0
    """AdamW's, of both."""
    clip: float = 1.0
    """Largest norm of a gradient, of student and heads each."""
    ema: float = 0.95
    """Decay of the weights' average over iterations, which is what is validated and exported; 0 keeps none."""
    lora: int | None = None
    """Rank of a LoRA student; default: all weights are trained."""

    precision: Precision = "auto"
    """What is computed in, with float32 masters; auto is bfloat16 where the device multiplies it faster."""
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the exported student is stored in; a LoRA is float32."""
    checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile each block."""

    validate_every: int = 50
    """Iterations between validations on the held-out trajectories."""
    best: str = "validation/rolled/key_0"
    """The validation figure, the smaller the better, by which the best student is kept."""
    save_every: int = 50
    """Iterations between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept."""
    patience: int = 100
    """Iterations in a row after which saturated logits, or a head that always wins, are reported."""

    def __post_init__(self) -> None:
        if fault := self._fault():
            raise InvalidValueError(fault)

    def _fault(self) -> str:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not (value >= least and math.isfinite(value)):
                return f"{name} is {value}; it must be at least {least}"
        for name in ("lr", "head_lr", "clip", "r1_sigma"):
            if not 0 < getattr(self, name) < math.inf:
                return f"{name} is {getattr(self, name)}; it must be a finite number above 0"
        for name in ("ema", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                return f"{name} is {getattr(self, name)}; it must be at least 0 and below 1"
        if not 0 <= self.rejected_share <= 1:
            return f"rejected_share is {self.rejected_share}; it must be from 0 to 1"
        for name in ("head_keys", "on_policy_keys"):
            keys = getattr(self, name)
            if keys is not None and (not keys or min(keys) < 0):
                return f"{name} are {keys}; name keys from 0, the clean one, on, or leave it out for all"
        if self.trajectory_weight == self.adversarial_weight == self.on_policy_weight == 0:
            return "trajectory_weight, adversarial_weight and on_policy_weight are all 0, so nothing is learned; set one of them"
        idle = [name for name in ("head_keys", "head_warmup", "r1_weight") if getattr(self, name)]
        if idle and not self.adversarial_weight:
            return f"{idle[0]} is {getattr(self, idle[0])}, and with an adversarial_weight of 0 there are no heads; leave it out"
        if self.head_warmup >= self.iterations:
            return f"head_warmup is {self.head_warmup} of {self.iterations} iterations, so the student learns nothing; lower it"
        if self.on_policy_keys is not None and not self.on_policy_weight:
            return f"on_policy_keys are {self.on_policy_keys}, and on_policy_weight is 0; set it, or leave the keys out"
        if self.target == "x0" and self.trajectory_weight and self.on_policy_weight:
            return "target is 'x0', but the on-policy loss regresses a segment's velocity; set one of the weights to 0"
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                return f"{name} is {getattr(self, name)!r}; choose {' or '.join(map(repr, choices))}"
        return ""

    def learning_rate_share(self, iteration: int, start: int = 0) -> float:
        """Of the peak, for an iteration counted from 0, of what learns from iteration `start` on: linear warm-up, then as `decay`
        says."""
        iteration -= start
        rising = max(0.0, min(1.0, (iteration + 1) / max(1, self.warmup)))
        if self.decay == "constant" or iteration < self.warmup:
            return rising
        done = (iteration - self.warmup) / max(1, self.iterations - start - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


_LEAST = {
    "iterations": 1,
    "batch": 1,
    "micro_batch": 1,
    "trajectory_weight": 0,
    "adversarial_weight": 0,
    "on_policy_weight": 0,
    "on_policy_steps": 1,
    "r1_weight": 0,
    "head_warmup": 0,
    "queue_length": 1,
    "warmup": 0,
    "weight_decay": 0,
    "lora": 1,
    "validate_every": 1,
    "save_every": 1,
    "keep": 1,
    "patience": 1,
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    name: get_args(hint)
    for name, hint in get_type_hints(TrainConfig).items()
    if get_args(hint) and type(None) not in get_args(hint)
}
assert tuple(GAN_LOSSES) == get_args(Gan)

# What may differ when a run goes on: how long, how fast, how a step is computed, what is kept; not what is learned.
_HOW = frozenset(("iterations", "lr", "head_lr", "r1_weight", "micro_batch", "precision", "checkpointing", "compile"))
_KEPT = frozenset(("keep_queues", "export_dtype", "validate_every", "best", "save_every", "keep", "patience"))
FREE = _HOW | _KEPT


def check_same_run(path: Path, told: dict[str, Any]) -> None:
    """Whether a run of which `told` is to be written down, {"config": fields, "source": data}, goes on from the one at `path`.

    InvalidValueError, naming every difference and both values, if it is another; TrainingError if the file cannot be read.
    Fields that its version did not have yet have their defaults.
    """
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        earlier["config"] = asdict(TrainConfig()) | earlier["config"]
        changed = [text for part in told for text in _differences(earlier[part], told[part])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{str(path)!r} cannot be read ({error}); restore it, or choose another folder") from error
    if changed:
        cure = "choose another folder"
        if any(text.startswith(("samples ", "digest ")) for text in changed):
            cure += (
                ", or give it the samples it began with: --held-out as it was, what is damaged captured again (accvideo inspect "
                "DATASET --verify --withdraw, then accvideo capture)"
            )
        raise InvalidValueError(f"{str(path.parent)!r} holds another run ({'; '.join(changed)}); {cure}")


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Fields in which a run that goes on must agree and does not, with both values."""
    names = [name for name in {**earlier, **now} if name not in FREE]
    return [f"{name} {earlier.get(name)}, now {now.get(name)}" for name in names if earlier.get(name) != now.get(name)]
