"""Many processes train what one does: sharded, with their tokens shared, and when another number of them goes on.

The processes of a real world are started once; what they found is in files, which the tests read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from accvideo_core.distill import state
from accvideo_core.distill.adapters import HunyuanAdapter, adapter_for
from accvideo_core.distill.config import TrainConfig
from accvideo_core.distill.lora_student import add_lora, lora_pairs
from accvideo_core.distill.on_policy import Continuation
from accvideo_core.distill.parallel import Ema, World
from accvideo_core.distill.source import Judged
from accvideo_core.distill.trainer import Trainer
from accvideo_core.dit import DiTConfig, HunyuanVideoDiT
from accvideo_core.errors import AccVideoError, InvalidValueError
from accvideo_core.sampling import make_noise
from accvideo_core.synvid import Batch
from tests.gloo import Ranks, in_processes
from tests.networks import LIMIT, error, random_inputs, random_weights, wan_network

CONFIG = DiTConfig(
    hidden_size=32,
    num_heads=4,
    depth_double=1,
    depth_single=2,
    text_dim=8,
    pooled_dim=6,
    in_channels=4,
    out_channels=4,
    rope_dims=(2, 2, 4),
    refiner_depth=1,
)
BLOCKS = ("double_blocks.0", "single_blocks.0", "single_blocks.1")
BATCH = 4

# (batch, T, H, W) and valid text tokens: image tokens that divide among 4, that leave one over, that leave processes empty
SEQUENCES = {
    "12 tokens": ((2, 2, 4, 6), None),
    "9 tokens": ((1, 3, 2, 6), None),
    "9 tokens, padded text": ((2, 3, 2, 6), (2, 5)),
    "2 tokens": ((1, 1, 2, 4), None),
}
CASES = [
    *((size, name, "plain") for size in (2, 4) for name in SEQUENCES),
    *((2, "9 tokens, padded text", manner) for manner in ("checkpointed", "compiled")),
]


def network() -> HunyuanVideoDiT:
    made = HunyuanVideoDiT(CONFIG, device="meta")
    made.load_state_dict({name: tensor.clone() for name, tensor in random_weights(CONFIG).items()}, assign=True)
    return made


class MadeUp:
    """Trajectories of noise, a global row's own; two segments, nine tokens a sample."""

    sigmas = (0.0, 0.6, 1.0)
    guidance: float | None = 6.0
    latent, text, pooled = (4, 3, 2, 6), (5, 8), (6,)

    def __init__(self, rows: range, first: int = 0) -> None:
        self.rows, self.first = rows, first

    def batch(self, step: int, key: int) -> Batch:
        def drawn(what: int, *shape: int) -> Tensor:
            return make_noise((len(self.rows), *shape), [self.first + 1000 * what + 10 * step + row for row in self.rows])

        keys = [drawn(k, *self.latent) for k in range(3)]
        low, high = (torch.full((len(self.rows),), self.sigmas[k]) for k in (key, key + 1))
        names = tuple(map(str, self.rows))
        pooled = drawn(4, *self.pooled) if self.pooled else None
        return Batch(names, (key,) * len(names), keys[key], keys[key + 1], low, high, drawn(3, *self.text), None, pooled)

    def state(self) -> dict[str, Any]:
        return {}


class MadeUpForWan(MadeUp):
    guidance = None
    latent, text, pooled = (16, 1, 4, 6), (5, 16), ()


class Small(HunyuanAdapter):
    """Of networks whose heads are narrower than a file's may be, so that four of them are quick."""

    def export(self, state: Any, path: Any, metadata: Any = None) -> None:
        save_file(dict(state), path)


def train(world: World, folder: Path, iterations: int) -> None:
    """Run or go on with a run of the full method and the on-policy loss, up to six steps of the student an iteration; checkpoints
    after two iterations and at the end."""
    config = TrainConfig(
        iterations=iterations,
        batch=BATCH,
        lr=3e-5,  # six times the recipe's; AdamW makes whole steps of gradients that are nothing but rounding
        warmup=0,
        ema=0.5,
        head_channels=16,
        head_depth=1,
        on_policy_weight=1.0,
        queue_length=2,
        precision="float32",
        save_every=2,
        keep=9,
    )
    rows = world.rows(BATCH)
    judged = Judged(MadeUp(rows, 10_000), MadeUp(rows, 20_000), {str(row): 0.5 + row for row in range(BATCH)}, "-")
    adapter, data = Small("tiny"), MadeUp(rows)
    going_on = Continuation(adapter, {0: (0.6, 0.3, 0.0), 1: (1.0, 0.6)}, data.guidance)
    Trainer(config, adapter, network(), network(), data, world, folder, judged=judged, going_on=going_on).run()


# ---- what the processes do --------------------------------------------------------------------------------------------


def job(ranks: Ranks, folder: Path) -> None:
    with ranks.world(2) as world:
        if world is not None:
            train(world, folder / "two", 4)
            mixed_precision(world, folder)
            train_wan(world, folder)
            lora(world, folder / "lora.safetensors")
    with ranks.world(4) as world:
        assert world is not None
        train(world, folder / "four", 2)
        train(world, folder / "one to four", 4)
    for size in (2, 4):
        with ranks.world(size, sequence=size) as world:
            if world is not None:
                share_tokens(world, folder / f"sequence-{size}.json")
    with ranks.world(4, sequence=2) as world:
        assert world is not None
        train(world, folder / "two by two", 2)
        write(world, folder / "refusal.json", refusal(world))


def write(world: World, path: Path, found: Any) -> None:
    if world.is_main:
        path.write_text(json.dumps(found), encoding="utf-8")


def outcome(run: HunyuanVideoDiT, inputs: tuple, average: bool) -> dict[str, Tensor]:
    """Velocity, features and the gradient of a loss on both, for the weights and for the latent."""
    latent = inputs[0].clone().requires_grad_()
    velocity, features = run(latent, *inputs[1:], features=BLOCKS)
    (velocity.square().mean() + sum(f.sin().mean() for f in features.values())).backward()
    gradients = {"latent": latent.grad, **{name: p.grad for name, p in run.named_parameters()}}
    for gradient in gradients.values():
        if average:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    found = {"velocity": velocity.detach(), **{f"feature {name}": f.detach() for name, f in features.items()}}
    return found | {f"gradient {name}": gradient for name, gradient in gradients.items()}


def share_tokens(world: World, path: Path) -> None:
    """The largest relative error of anything in `outcome`, for every case of this size."""
    found = {}
    for _, name, manner in (case for case in CASES if case[0] == world.size):
        inputs = random_inputs(CONFIG, *SEQUENCES[name])
        expected = outcome(network(), inputs, average=False)
        shared = network()
        world.split_sequence(shared)
        shared.checkpointing = manner == "checkpointed"
        if manner == "compiled":
            for block in BLOCKS:
                shared.get_submodule(block).compile(fullgraph=True, backend="aot_eager")
        got = outcome(shared, inputs, average=True)
        found[f"{name}, {manner}"] = max(error(got[what], expected[what]) for what in expected if expected[what].any())
    write(world, path, found)


def mixed_precision(world: World, folder: Path) -> None:
    inputs = random_inputs(CONFIG, (1, 2, 4, 6))
    expected = network().to(torch.bfloat16)(*inputs).detach()
    half = world.shard(network(), BLOCKS, torch.float32, torch.bfloat16)
    velocity = half(*inputs)
    velocity.square().mean().backward()
    with World().precision(torch.bfloat16):
        alone = network()(*inputs).detach()
    found = {
        "error": error(velocity.detach(), expected),
        "from one process": error(velocity.detach(), alone),
        "types": sorted({str(t.dtype) for p in half.parameters() if p.grad is not None for t in (p, p.grad)}),
    }
    write(world, folder / "half.json", found)


def train_wan(world: World, folder: Path) -> None:
    """An iteration of the full method and the on-policy loss with a teacher of another kind, in float32 and in bfloat16."""
    encoding = (make_noise((1, 5, 16), [0])[0], None)
    adapter, data = adapter_for("wan-t2v-14b"), MadeUpForWan(world.rows(2))
    going_on = Continuation(adapter, {0: (0.6, 0.3, 0.0), 1: (1.0, 0.6)}, cfg=5.0, negative=encoding)
    for precision in ("float32", "bfloat16"):
        config = TrainConfig(
            iterations=1,
            batch=2,
            lr=1e-5,
            warmup=0,
            ema=0.5,
            head_channels=16,
            head_depth=1,
            on_policy_weight=1.0,
            precision=precision,  # type: ignore[arg-type]
        )
        seen: list[dict[str, float]] = []
        trainer = Trainer(config, adapter, wan_network(), wan_network(), data, world, going_on=going_on)
        trainer.observers = [lambda done, scalars, seen=seen: seen.append(dict(scalars))]
        trainer.run()
        write(world, folder / f"wan-{precision}-{world.size}.json", seen)
        weights = world.full_state(trainer.student)
        if world.is_main:
            save_file(weights, folder / f"wan-{precision}-{world.size}.safetensors")


def lora(world: World, path: Path) -> None:
    """The factors of a LoRA student after three steps, the last two after its checkpoint was read by a fresh one."""

    def fresh() -> tuple[Any, torch.optim.Optimizer, Ema]:
        adapted = add_lora(network(), Small("tiny").lora_targets(network()), 2)
        sharded = world.shard(adapted, BLOCKS, torch.float32)
        return sharded, torch.optim.AdamW([p for p in sharded.parameters() if p.requires_grad], 1e-2), Ema(sharded, 0.5)

    def step(student: Any, optimizer: torch.optim.Optimizer, ema: Ema) -> None:
        latent, *rest = random_inputs(CONFIG, (1, 2, 4, 6))
        (student(latent, *rest) - latent).square().mean().backward()
        world.clip((p for p in student.parameters() if p.requires_grad), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(student)

    def parts(student: Any, optimizer: torch.optim.Optimizer, ema: Ema) -> dict[str, Any]:
        return {"student": student, "optimizer": state.OptimizerState(student, optimizer), "ema": ema}

    run = fresh()
    step(*run)
    saved = state.save(path.with_suffix(".run"), 1, parts(*run))
    run = fresh()
    state.load(saved, parts(*run))
    for _ in range(2):
        step(*run)
    with run[2].swapped(run[0]):
        weights = world.full_state(run[0], trainable=True)
    if world.is_main:
        save_file(weights, path)


def refusal(world: World) -> str:
    odd = DiTConfig(hidden_size=24, num_heads=3, depth_double=1, depth_single=1, text_dim=8, rope_dims=(2, 2, 4))
    with pytest.raises(InvalidValueError) as caught:
        world.split_sequence(HunyuanVideoDiT(odd, device="meta"))
    return str(caught.value)


# ---- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    alone = World()
    train(alone, folder / "one", 4)
    begin_halfway(folder, "one", "one to four")
    lora(alone, folder / "lora-alone.safetensors")
    train_wan(alone, folder)
    in_processes(4, job, folder, worlds=5)
    begin_halfway(folder, "two", "two to one")
    train(alone, folder / "two to one", 4)
    return folder


def begin_halfway(folder: Path, run: str, copy: str) -> None:
    """A run that will go on from another's checkpoint after two iterations."""
    (folder / copy / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / run / "config.json", folder / copy)
    at = "checkpoints/step_00000002"
    shutil.copytree(folder / run / at, folder / copy / at)


PARTS = {"student": 1e-5, "ema": 1e-5, "heads": 1e-5, "optimizer": 1e-7, "head_optimizer": 1e-7, "queues": 1e-5}


def tensors(found: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in found.items():
        if isinstance(value, dict):
            yield from tensors(value, f"{path}{name}/")
        elif isinstance(value, Tensor):
            yield path + name, value


def distance(one: Path, other: Path, part: str, at: int) -> float:
    """Largest absolute difference of two runs' checkpoints after `at` iterations."""
    ours, theirs = (dict(tensors(state.read(run / "checkpoints" / f"step_{at:08d}", part))) for run in (one, other))
    assert ours.keys() == theirs.keys() and ours
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


class TestSharding:
    @pytest.mark.parametrize("run", ["two", "four", "two by two"])
    @pytest.mark.parametrize("part", PARTS)
    def test_several_processes_train_what_one_does(self, runs: Path, run: str, part: str) -> None:
        """Two iterations of the full method: 2 and 4 processes, and 4 as two pairs that share each sample's tokens."""
        assert distance(runs / "one", runs / run, part, 2) < PARTS[part]

    def test_and_that_is_far_from_where_they_began(self, runs: Path) -> None:
        begun, trained = random_weights(CONFIG), state.read(runs / "one/checkpoints/step_00000002", "student")
        assert max(float((begun[name] - trained[name]).abs().max()) for name in begun) > 1e-4

    @pytest.mark.parametrize(("run", "unbroken"), [("two to one", "two"), ("one to four", "one")])
    @pytest.mark.parametrize("part", PARTS)
    def test_another_number_of_processes_goes_on_as_the_first_would_have(
        self, runs: Path, run: str, unbroken: str, part: str
    ) -> None:
        """Eight steps more, from a checkpoint that the other number of processes wrote."""
        assert distance(runs / run, runs / unbroken, part, 4) < PARTS[part]

    def test_blocks_compute_in_bfloat16_and_masters_and_gradients_stay_float32(self, runs: Path) -> None:
        """To the bit what a network of bf16 weights computes, and but for rounding what one process does under autocast: guidance
        of 6 is 6016 to all of them, and 6000 would be another condition."""
        found = json.loads((runs / "half.json").read_text())
        assert found.pop("from one process") < 0.03
        assert found == {"error": 0.0, "types": ["torch.float32"]}

    def test_another_networks_teacher_and_student_are_sharded_too(self, runs: Path) -> None:
        """Wan's, whose code is not ours: an iteration with all losses and classifier-free guidance, in one process and in two."""
        alone, together = (load_file(runs / f"wan-float32-{size}.safetensors") for size in (1, 2))
        assert alone.keys() == together.keys()
        assert max(float((alone[name] - together[name]).abs().max()) for name in alone) < 1e-5
        alone, together = (json.loads((runs / f"wan-bfloat16-{size}.json").read_text())[0] for size in (1, 2))
        for what in ("trajectory", "on_policy", "adversarial/student", "adversarial/heads"):
            assert together[f"{what}/key_0"] == pytest.approx(alone[f"{what}/key_0"], rel=0.01, abs=1e-3)

    def test_a_lora_student_is_sharded_saved_and_trained_alike(self, runs: Path) -> None:
        alone, together = (load_file(runs / f"{name}.safetensors") for name in ("lora-alone", "lora"))
        assert alone.keys() == together.keys() and len(lora_pairs(alone)) * 2 == len(alone)
        assert max(float((alone[name] - together[name]).abs().max()) for name in alone) < 1e-5
        assert all(up.any() for _, up in lora_pairs(alone).values())


class TestSharedTokens:
    @pytest.mark.parametrize(("size", "tokens", "manner"), CASES)
    def test_velocity_features_and_every_gradient_are_those_of_one_process(
        self, runs: Path, size: int, tokens: str, manner: str
    ) -> None:
        assert json.loads((runs / f"sequence-{size}.json").read_text())[f"{tokens}, {manner}"] < LIMIT

    def test_heads_that_do_not_divide_are_named_with_what_would(self, runs: Path) -> None:
        message = json.loads((runs / "refusal.json").read_text())
        assert "3 attention heads" in message and "among 2 processes" in message and "one of 1" in message

    def test_a_network_that_cannot_share_tokens_says_so(self) -> None:
        class Pair:
            def size(self, dim: int) -> int:
                return 2

        with pytest.raises(InvalidValueError, match="Linear cannot share a sample's tokens"):
            World(mesh=Pair()).split_sequence(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


class TestWorld:
    @pytest.mark.parametrize(
        ("environment", "sequence", "message"),
        [
            ({}, 2, "1 process cannot form groups of 2"),
            ({"RANK": "0", "WORLD_SIZE": "6", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, 4, "divisor of 6"),
            ({"RANK": "0", "WORLD_SIZE": "2"}, 1, "no MASTER_ADDR, MASTER_PORT: start the processes with torchrun"),
        ],
    )
    def test_a_world_that_cannot_be_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], sequence: int, message: str
    ) -> None:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(AccVideoError, match=message):
            World.start(sequence, "cpu")

    def test_a_batch_that_does_not_divide_is_refused(self) -> None:
        class Three:
            def size(self, dim: int) -> int:
                return 3

        with pytest.raises(InvalidValueError, match="batch of 4 does not divide among 3"):
            World(mesh=Three()).rows(4)  # type: ignore[arg-type]

    def test_processes_that_share_tokens_agree_or_all_know_that_they_do_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Pair:
            def size(self, dim: int) -> int:
                return 2

            def get_group(self, name: str) -> str:
                return name

        def gather(said: list[object], own: object, group: str) -> None:
            assert group == "sequence"
            said[:] = [("a", "b"), own]

        monkeypatch.setattr(dist, "all_gather_object", gather)
        world = World(mesh=Pair())  # type: ignore[arg-type]
        assert world.agree(("a", "b"))
        assert not world.agree(("a", "c"))
        assert World().agree(("a", "c"))

    def test_who_failed_does_not_wait_for_the_others_before_it_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Destroying a group of NCCL's waits for collectives that the others are in, and this process never joins."""
        left: list[str] = []
        monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append("together"))
        world = World(mesh=object())  # type: ignore[arg-type]
        with pytest.raises(InvalidValueError, match="damaged"), world:
            raise InvalidValueError("damaged")
        assert left == []
        with world:
            pass
        assert left == ["together"]


class TestEma:
    @pytest.mark.parametrize("decay", [0.0, 0.9])
    def test_the_average_follows_and_a_swap_leaves_no_trace(self, decay: float) -> None:
        layer = torch.nn.Linear(3, 2)
        ema, expected = Ema(layer, decay), layer.weight.detach().clone()
        for _ in range(3):
            with torch.no_grad():
                layer.weight += 1
            ema.update(layer)
            expected = decay * expected + (1 - decay) * layer.weight.detach()
        own = layer.weight.detach().clone()
        with ema.swapped(layer):
            torch.testing.assert_close(layer.weight.detach(), expected)
        assert torch.equal(layer.weight, own)

    def test_what_was_taken_of_the_averages_stays_theirs_after_the_swap(self) -> None:
        layer = torch.nn.Linear(3, 2)
        ema = Ema(layer, 0.9)
        ema.averages["weight"] += 1
        with ema.swapped(layer):
            taken = World().full_state(layer)
        assert torch.equal(taken["weight"], ema.averages["weight"]) and not torch.equal(taken["weight"], layer.weight)

    def test_the_networks_own_weights_come_back_after_an_error_too(self) -> None:
        layer = torch.nn.Linear(3, 2)
        ema, own = Ema(layer, 0.9), layer.weight.detach().clone()
        ema.averages["weight"] += 1
        with pytest.raises(ZeroDivisionError), ema.swapped(layer):
            assert not torch.equal(layer.weight, own)
            _ = 1 / 0
        assert torch.equal(layer.weight, own)
