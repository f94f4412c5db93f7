"""`accvideo toy`: the paper's one-dimensional experiment (Fig. 2, appendix A) on data points that are no use to distillation.

The teacher's data are -3 and +3. Forward diffusion of another data set, -(3 - M/2) and 3 - M/2, makes points
(1 - sigma) x + sigma z, and those that lie on none of the teacher's denoising trajectories are useless: the student never meets
them when it samples. Two teachers: the exact velocity in closed form, and a small network trained as the paper says.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from ..distill import trajectory_loss
from ..errors import InvalidValueError
from ..files import atomic_path, check_writable
from ..sampling import Velocity, euler_flow
from ..schedule import flow_sigmas, key_indices
from ..tiny.clips import keyed_generator
from . import plots
from .metrics import Estimate, of_values

MODE = 3.0  # the data are -MODE and MODE
NEAR = 0.5  # an outcome further than this from both is on neither
PAPER = {0.0: 0.0078, 0.75: 0.0679, 1.5: 0.1743, 2.25: 0.2693, 3.0: 0.2906}  # mismatch: frequency printed in Fig. 2


@dataclass(frozen=True)
class ToyArgs:
    """How often forward diffusion makes points that the teacher never visits, and what students learn from them (1-D).
    Writes toy.png, toy.json and toy.md."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("out/toy")
    """Folder for the figure and the numbers."""
    mismatches: tuple[float, ...] = tuple(PAPER)
    """M: how much closer together than the teacher's the two data points lie; from 0 to below 6."""
    iterations: int = 10000
    """Of the teacher's training by flow matching."""
    student_iterations: int = 500
    """Of each distillation, from the trained network's weights."""
    batch: int = 2048
    """Samples an iteration."""
    lr: float = 1e-4
    """Learning rate of Adam."""
    student_lr: float = 1e-3
    """The students', which have fewer iterations."""
    width: int = 32
    """Channels of the network."""
    trajectories: int = 2048
    """Trajectories sampled from the teacher, and points of forward diffusion at each noise level."""
    steps: int = 50
    """The teacher's Euler steps."""
    keys: int = 5
    """The student's; they divide the teacher's."""
    shift: float = 1.0
    """Time shift of the schedule."""
    tolerance: float = 0.05
    """A point further than this from every trajectory at its noise level is useless."""
    repeats: int = 5
    """Independent draws of trajectories and points, for the interval of the frequencies."""
    seed: int = 0
    """Everything random follows from it."""
    json: bool = False
    """Print the numbers as JSON."""


class ToyNet(nn.Module):
    """Velocity (B, 1) at x (B, 1) and sigma (B,): a residual network with batch norm and an embedded time. On signals of length
    one a Conv1d is a Linear, so that is what it has."""

    frequencies: Tensor

    def __init__(self, width: int, blocks: int = 3) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, 4, 16)))
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.enter, self.leave = nn.Linear(1, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(width), nn.SiLU(), nn.Linear(width, width), nn.BatchNorm1d(width), nn.SiLU())
            for _ in range(blocks)
        )
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        angle = sigma[:, None] * self.frequencies
        time = self.time(torch.cat((angle.cos(), angle.sin()), 1))
        h = self.enter(x)
        for block, out in zip(self.blocks, self.out, strict=True):
            h = h + out(block(h + time))
        velocity: Tensor = self.leave(h)
        return velocity


def exact_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """The velocity of the flow from N(0, 1) to {-MODE, MODE} at x (B, 1), sigma (B,) above 0: (x - E[data | x]) / sigma, where
    the mean of the data is MODE * tanh(MODE (1 - sigma) x / sigma^2)."""
    sigma = sigma[:, None]
    return (x - MODE * torch.tanh(MODE * (1 - sigma) * x / sigma**2)) / sigma


def data(count: int, mismatch: float, generator: torch.Generator) -> Tensor:
    """(count, 1): -(MODE - mismatch / 2) and its opposite, equally often."""
    return (torch.randint(2, (count, 1), generator=generator) * 2.0 - 1) * (MODE - mismatch / 2)


def forward_diffusion(count: int, mismatch: float, sigma: float, generator: torch.Generator) -> Tensor:
    """(count, 1) points (1 - sigma) x + sigma z of that data."""
    return (1 - sigma) * data(count, mismatch, generator) + sigma * torch.randn(count, 1, generator=generator)


@torch.no_grad()
def trajectories(velocity: Velocity, noise: Tensor, sigmas: Tensor) -> Tensor:
    """(steps + 1, B, 1): the states that the sampler passes, the noise first."""
    states = [noise]
    euler_flow(velocity, noise, sigmas, [lambda step: states.append(step.latent)])
    return torch.stack(states)


def distance_to_nearest(points: Tensor, others: Tensor) -> Tensor:
    """(N,) distance of each of the points (N, 1) to the nearest of the others (M, 1), M at least 2."""
    line, points = others.flatten().sort().values, points.flatten()
    above = torch.searchsorted(line, points).clamp(1, len(line) - 1)
    return torch.minimum((points - line[above - 1]).abs(), (points - line[above]).abs())


def useless_share(paths: Tensor, sigmas: Tensor, mismatch: float, tolerance: float, generator: torch.Generator) -> float:
    """Share of forward diffusion's points, as many at every sigma as there are trajectories (steps + 1, B, 1), that lie further
    than `tolerance` from all of them."""
    far = [
        distance_to_nearest(forward_diffusion(paths.shape[1], mismatch, float(sigma), generator), states) > tolerance
        for sigma, states in zip(sigmas, paths, strict=True)
    ]
    return float(torch.stack(far).float().mean())


def train(network: ToyNet, loss: Callable[[int], Tensor], iterations: int, lr: float, what: str, quiet: bool) -> ToyNet:
    """Adam on `loss(step)`; returns the network in evaluation mode."""
    optimizer = torch.optim.Adam(network.train().parameters(), lr=lr)
    for step in tqdm(range(iterations), what, disable=quiet, mininterval=2, leave=False):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    return network.eval()


def train_teacher(args: ToyArgs) -> ToyNet:
    """Flow matching: at (1 - sigma) x + sigma z the velocity z - x, sigma uniform."""
    torch.manual_seed(args.seed)
    network = ToyNet(args.width)

    def loss(step: int) -> Tensor:
        generator = keyed_generator(args.seed, "toy teacher", step)
        x, z = data(args.batch, 0.0, generator), torch.randn(args.batch, 1, generator=generator)
        sigma = torch.rand(args.batch, generator=generator)
        return (network(torch.lerp(x, z, sigma[:, None]), sigma) - (z - x)).square().mean()

    return train(network, loss, args.iterations, args.lr, "teacher", args.json)


@dataclass(frozen=True)
class Segments:
    """What a student learns from: B points at key k+1 and where the teacher goes from there, (keys, B, 1) each, k = 0 first."""

    noisier: Tensor
    cleaner: Tensor


def key_levels(args: ToyArgs) -> Tensor:
    """(keys + 1,) sigmas from 0, key 0, up to 1."""
    return flow_sigmas(args.steps, args.shift)[list(key_indices(args.steps, args.keys))].flip(0)


@torch.no_grad()
def segments(args: ToyArgs, velocity: Velocity, mismatch: float | None) -> Segments:
    """For each key: points of the teacher's own trajectories, or of forward diffusion of data so far off; and the teacher's own
    steps on from there."""
    sigmas, positions = flow_sigmas(args.steps, args.shift), key_indices(args.steps, args.keys)[::-1]
    generator = keyed_generator(args.seed, "segments", str(mismatch))
    own = trajectories(velocity, torch.randn(args.trajectories, 1, generator=generator), sigmas)
    noisier, cleaner = [], []
    for end, begin in zip(positions, positions[1:], strict=False):
        start = own[begin]
        if mismatch is not None:
            start = forward_diffusion(args.trajectories, mismatch, float(sigmas[begin]), generator)
        noisier.append(start)
        cleaner.append(euler_flow(velocity, start, sigmas[begin : end + 1]))
    return Segments(torch.stack(noisier), torch.stack(cleaner))


def distill(args: ToyArgs, network: ToyNet, segments: Segments, what: str) -> ToyNet:
    """A student from the trained network's weights, by the loss of Eq. 6; every key equally often."""
    student, levels = copy.deepcopy(network), key_levels(args)

    def loss(step: int) -> Tensor:
        generator = keyed_generator(args.seed, "toy student", step)
        key = torch.arange(args.batch) % args.keys
        row = torch.randint(args.trajectories, (args.batch,), generator=generator)
        noisier, cleaner = segments.noisier[key, row], segments.cleaner[key, row]
        return trajectory_loss(student(noisier, levels[key + 1]), noisier, cleaner, levels[key + 1], levels[key])

    return train(student, loss, args.student_iterations, args.student_lr, what, args.json)


def outcome(made: Tensor, wanted: Tensor) -> dict[str, float]:
    """What (N, 1) samples are worth: 1-Wasserstein distance to the teacher's, and the share on neither data point."""
    return {
        "wasserstein": float((made.flatten().sort().values - wanted.flatten().sort().values).abs().mean()),
        "off": float(((made.abs() - MODE).abs() > NEAR).float().mean()),
    }


def study(args: ToyArgs) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the numbers, what the figure needs besides)."""
    network = train_teacher(args)
    sigmas = flow_sigmas(args.steps, args.shift)
    numbers: dict[str, Any] = {"arguments": {k: v for k, v in asdict(args).items() if k not in ("out", "json")}, "teachers": {}}
    drawn: dict[str, Any] = {"sigmas": sigmas, "paths": {}, "samples": {}}
    noise = torch.randn(args.trajectories, 1, generator=keyed_generator(args.seed, "toy noise"))
    teachers: dict[str, Velocity] = {"closed form": exact_velocity, "trained": network}
    for name, velocity in teachers.items():
        paths = [
            trajectories(velocity, torch.randn(args.trajectories, 1, generator=keyed_generator(args.seed, "paths", i)), sigmas)
            for i in range(args.repeats)
        ]
        useless = {}
        for mismatch in args.mismatches:
            shares = [
                useless_share(own, sigmas, mismatch, args.tolerance, keyed_generator(args.seed, "points", i, str(mismatch)))
                for i, own in enumerate(paths)
            ]
            useless[mismatch] = asdict(of_values(shares))
        wanted = trajectories(velocity, noise, sigmas)[-1]
        few = flow_sigmas(args.keys, args.shift)
        samples = {"teacher": wanted, "teacher, few steps": trajectories(velocity, noise, few)[-1]}
        for start in (None, *args.mismatches):
            label = "trajectories" if start is None else f"forward diffusion, M = {start:g}"
            student = distill(args, network, segments(args, velocity, start), f"{name}, {label}")
            samples[label] = trajectories(student, noise, few)[-1]
        outcomes = {label: outcome(made, wanted) for label, made in samples.items()}
        numbers["teachers"][name] = {"useless": useless, "outcomes": outcomes}
        drawn["paths"][name], drawn["samples"][name] = paths[0], samples
    return numbers, drawn


def as_markdown(args: ToyArgs, numbers: dict[str, Any]) -> str:
    """The tables of the study."""
    lines = ["| Useless data points at mismatch M | " + " | ".join(f"{m:g}" for m in args.mismatches) + " |"]
    lines.append("|---" * (len(args.mismatches) + 1) + "|")
    lines.append("| paper, Fig. 2 | " + " | ".join(f"{PAPER[m]:.2%}" if m in PAPER else "-" for m in args.mismatches) + " |")
    for name, found in numbers["teachers"].items():
        lines.append(f"| {name} teacher | " + " | ".join(_share(Estimate(**v)) for v in found["useless"].values()) + " |")
    lines += ["", f"| {args.keys} steps, from | " + " | ".join(f"{n}: distance | off" for n in numbers["teachers"]) + " |"]
    lines.append("|---" * (2 * len(numbers["teachers"]) + 1) + "|")
    for label in next(iter(numbers["teachers"].values()))["outcomes"]:
        found = [teacher["outcomes"][label] for teacher in numbers["teachers"].values()]
        lines.append(f"| {label} | " + " | ".join(f"{o['wasserstein']:.3f} | {o['off']:.1%}" for o in found) + " |")
    return "\n".join(lines) + "\n"


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.2%} ± {estimate.high - estimate.value:.2%}"


def draw(path: Path, args: ToyArgs, numbers: dict[str, Any], drawn: dict[str, Any]) -> None:
    """Above, the trained teacher's trajectories with forward diffusion's points for each mismatch; below, how many of those are
    useless, and what students make of them."""
    count = len(args.mismatches)
    figure = plots.new_figure(max(12.0, 3.2 * count), 7.5)
    grid = figure.add_gridspec(2, 3 * count)
    sigmas, paths = drawn["sigmas"], drawn["paths"]["trained"]
    for column, mismatch in enumerate(args.mismatches):
        axes = figure.add_subplot(grid[0, 3 * column : 3 * column + 3])
        useless = numbers["teachers"]["trained"]["useless"][mismatch]["value"]
        paper = f" (paper {PAPER[mismatch]:.1%})" if mismatch in PAPER else ""
        plots.bare(axes, f"M = {mismatch:g}\n{useless:.1%} useless{paper}", "sigma", "x" if column == 0 else "")
        axes.plot(sigmas, paths[:, :60, 0], color=plots.SKY, linewidth=0.5, alpha=0.6)
        generator = keyed_generator(args.seed, "drawn", str(mismatch))
        for sigma, states in zip(sigmas[1:], paths[1:], strict=True):
            points = forward_diffusion(40, mismatch, float(sigma), generator)
            far = distance_to_nearest(points, states) > args.tolerance
            for chosen, colour in ((~far, plots.GREY), (far, plots.VERMILION)):
                axes.plot(sigma.expand(int(chosen.sum())), points[chosen], ".", color=colour, markersize=2)
        axes.set(xlim=(1, 0), ylim=(-4.2, 4.2))
    third = count
    axes = plots.bare(figure.add_subplot(grid[1, :third]), "useless data points", "mismatch M", "share")
    known = [m for m in args.mismatches if m in PAPER]
    axes.plot(known, [PAPER[m] for m in known], "s--", color=plots.GREY, label="paper, Fig. 2")
    for (name, found), colour in zip(numbers["teachers"].items(), (plots.BLUE, plots.ORANGE), strict=True):
        axes.plot(args.mismatches, [v["value"] for v in found["useless"].values()], "o-", color=colour, label=f"{name} teacher")
    axes.legend(frameon=False)
    axes = plots.bare(
        figure.add_subplot(grid[1, third : 2 * third]),
        f"{args.keys}-step students, closed form (line) and trained (dashed) teacher",
        "mismatch M",
        "distance to the teacher's samples",
    )
    for found, style in zip(numbers["teachers"].values(), ("-", "--"), strict=True):
        distances = {label: value["wasserstein"] for label, value in found["outcomes"].items()}
        named = (lambda text: text) if style == "-" else (lambda text: None)  # each colour once in the legend
        for label, colour in (("trajectories", plots.GREEN), ("teacher, few steps", plots.GREY)):
            axes.axhline(distances[label], color=colour, linestyle=style, label=named(label))
        forward = [distances[f"forward diffusion, M = {m:g}"] for m in args.mismatches]
        axes.plot(args.mismatches, forward, "o" + style, color=plots.VERMILION, label=named("forward diffusion"))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes = plots.bare(figure.add_subplot(grid[1, 2 * third :]), "their samples, trained teacher", "x", "density")
    last = f"forward diffusion, M = {args.mismatches[-1]:g}"
    for label, colour in (("teacher", plots.BLUE), ("trajectories", plots.GREEN), (last, plots.VERMILION)):
        samples = drawn["samples"]["trained"][label].flatten().numpy()
        axes.hist(samples, bins=120, range=(-5, 5), density=True, histtype="step", color=colour, label=label)
    axes.legend(frameon=False)
    plots.save(figure, path)


def run(args: ToyArgs) -> int:
    """Run the study, write figure, numbers and tables, and print the tables."""
    _check(args)
    figure, numbers_file, tables = (args.out / name for name in ("toy.png", "toy.json", "toy.md"))
    plots.new_figure(1, 1)
    for path in (figure, numbers_file, tables):
        check_writable(path)
    numbers, drawn = study(args)
    draw(figure, args, numbers, drawn)
    text, markdown = json.dumps(numbers, indent=1), as_markdown(args, numbers)
    for path, content in ((numbers_file, text + "\n"), (tables, markdown)):
        with atomic_path(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(text if args.json else f"{markdown}\n{figure}")
    return 0


def _check(args: ToyArgs) -> None:
    least = {"iterations": 1, "student_iterations": 1, "batch": 2, "width": 1, "trajectories": 2, "repeats": 2}
    for name, smallest in least.items():
        if getattr(args, name) < smallest:
            raise InvalidValueError(f"{name} is {getattr(args, name)}; it must be at least {smallest}")
    if not args.mismatches or not all(0 <= m < 2 * MODE for m in args.mismatches):
        raise InvalidValueError(f"mismatches are {args.mismatches}; give some from 0 to below {2 * MODE:g}")
    for name in ("tolerance", "lr", "student_lr"):
        if not getattr(args, name) > 0:
            raise InvalidValueError(f"{name} is {getattr(args, name)}; it must be above 0")
    key_levels(args)
