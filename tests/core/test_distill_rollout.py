"""Algorithm 1: its order, its detachment, its queues, followed by hand on a network of one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accvideo_core.distill.adapters import Adapter
from accvideo_core.distill.on_policy import Continuation
from accvideo_core.distill.rollout import Entry, Queues, keyed_noise
from accvideo_core.errors import InvalidValueError
from tests.distill_data import MadeUp, trainer

SIGMAS = (0.0, 0.5, 0.8, 1.0)
LEVELS = {0: (0.5, 0.25, 0.0), 1: (0.8, 0.6, 0.5), 2: (1.0, 0.8)}


class Line(nn.Module):
    """velocity = number * latent."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number, self.block = nn.Parameter(torch.tensor(number)), nn.Identity()


class Rows:
    """What a `Line` is told: nothing."""

    def rows(self, index: Any) -> Rows:
        return self


class Recording(Adapter):
    """A student and a teacher, whose number is 1, that are lines; whatever they are asked is written down."""

    def __init__(self) -> None:
        super().__init__("tiny")
        object.__setattr__(self, "log", [])

    def velocity(self, network: nn.Module, latent: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        assert isinstance(network, Line)
        asked = "student" if network.number.requires_grad else "teacher"
        self.log.append((asked, round(float(sigma[0]), 2), latent, float(network.number.detach())))
        return network.number * latent

    def features(self, network: nn.Module, latent: Tensor, sigma: Tensor, conditioning: Any, block: str) -> Tensor:
        seen = "fake" if latent.requires_grad else "real"
        self.log.append((seen, round(float(sigma[0]), 2), latent, 0.0))
        return latent.flatten(2).transpose(1, 2)

    @staticmethod
    def family_of(network: nn.Module) -> str | None:
        return "tiny"

    def block_names(self, network: nn.Module) -> tuple[str, ...]:
        return ("block",)

    def width(self, network: nn.Module) -> int:
        return 4

    def patch(self, network: nn.Module) -> tuple[int, int, int]:
        return 1, 1, 1

    def conditioning(self, texts: Any, guidance: float | None) -> Rows:
        return Rows()

    def embeds_guidance(self, network: nn.Module) -> bool:
        return False

    def original(self, state: Mapping[str, Tensor]) -> Any:
        return iter(state.items())

    def set_checkpointing(self, network: nn.Module, on: bool) -> None: ...
    def check_text(self, *_: Any) -> None: ...
    def load(self, *_: Any, **__: Any) -> Any: ...
    def export(self, state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None: ...


def recorded(iterations: int, **chosen: Any) -> tuple[Any, list[tuple[str, float, Tensor, float]]]:
    adapter = Recording()
    log = adapter.log
    going_on = Continuation(adapter, LEVELS, 6.0)
    data = MadeUp(sigmas=SIGMAS)
    run = trainer(teacher=Line(1.0), student=Line(0.3), adapter=adapter, source=data, going_on=going_on, **chosen)
    optimizers = {"student step": run.optimizer} | ({"head step": run.head_optimizer} if run.head_of else {})
    for name, optimizer in optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: log.append((name, 0.0, torch.empty(0), 0.0)))
    for iteration in range(iterations):
        run.iteration(iteration)
    return run, log


def test_an_iteration_goes_through_the_keys_from_noise_to_clean_and_updates_in_the_order_of_algorithm_1() -> None:
    _, log = recorded(1)
    expected: list[tuple[str, float]] = []
    for low, high in ((0.8, 1.0), (0.5, 0.8), (0.0, 0.5)):
        expected += [("student", high), ("student step", 0.0)]  # the trajectory loss
        expected += [("student", high), ("fake", low), ("real", low)]  # one Euler step, seen by the teacher
        expected += [("student step", 0.0), ("head step", 0.0)]
    assert [(what, sigma) for what, sigma, _, _ in log] == expected


def test_one_weight_of_zero_leaves_its_half_out() -> None:
    assert {what for what, *_ in recorded(1, trajectory_weight=0.0)[1][:1]} == {"student"}
    steps = [what for what, *_ in recorded(1, trajectory_weight=0.0)[1] if what.endswith("step")]
    assert steps == ["student step", "head step"] * 3
    run = trainer(student=Line(0.3), adapter=Recording(), source=MadeUp(sigmas=SIGMAS), adversarial_weight=0.0)
    run.iteration(0)
    assert run.teacher is None and [what for what, *_ in run.adapter.log] == ["student"] * 3


def test_while_the_heads_warm_up_they_learn_and_the_student_stands_still() -> None:
    run, log = recorded(2, head_warmup=1)
    steps = [what for what, *_ in log if what.endswith("step")]
    assert steps == ["head step"] * 3 + ["student step", "student step", "head step"] * 3
    assert [number for what, _, _, number in log if what == "student"][:4] == pytest.approx([0.3] * 4)
    assert float(run.scalars["gradient/adversarial/key_0"]) > 0


def test_keys_without_a_head_are_stepped_over_and_none_is_stepped_to_behind_the_last_head() -> None:
    run, log = recorded(2, trajectory_weight=0.0, head_keys=(2,))
    assert [sigma for what, sigma, _, _ in log if what == "student"] == [1.0, 1.0] and len(run.queues) == 0
    run, log = recorded(1, trajectory_weight=0.0, head_keys=(0,), micro_batch=3)
    steps = [("student", 1.0)] * 2 + [("student", 0.8)] * 2  # of 4 rows, without a gradient
    steps += [("student", 0.5), ("fake", 0.0), ("real", 0.0)] * 2 + [("student step", 0.0), ("head step", 0.0)]
    assert [(what, sigma) for what, sigma, _, _ in log] == steps and len(run.heads.heads) == 1
    latent = keyed_noise(torch.empty(4, 4, 2, 4, 6), 0, "noise", 0, 0)
    for high, low in ((1.0, 0.8), (0.8, 0.5)):
        latent = latent + (torch.tensor(low) - torch.tensor(high)) * (0.3 * latent)
    torch.testing.assert_close(torch.cat([log[4][2], log[7][2]]), latent)


def test_on_its_own_path_the_student_learns_what_the_teacher_makes_of_where_it_arrives() -> None:
    run, log = recorded(1, trajectory_weight=0.0, adversarial_weight=0.0, on_policy_weight=0.5, on_policy_keys=(0, 1))
    steps = [("student", 1.0)]  # nothing is learned in the noisiest segment
    steps += [("teacher", 0.8), ("teacher", 0.6), ("student", 0.8), ("student step", 0.0), ("student", 0.8)]
    steps += [("teacher", 0.5), ("teacher", 0.25), ("student", 0.5), ("student step", 0.0)]
    assert [(what, sigma) for what, sigma, _, _ in log] == steps and len(run.queues) == 0

    noise = keyed_noise(torch.empty(4, 4, 2, 4, 6), 0, "noise", 0, 0)
    arrived = noise - 0.2 * 0.3 * noise
    due = arrived * (1 - 0.2) * (1 - 0.1)  # two Euler steps along velocity = latent
    torch.testing.assert_close(log[3][2], arrived)
    loss = (0.3 * arrived - (due - arrived) / (0.5 - 0.8)).square().mean()
    torch.testing.assert_close(run.scalars["on_policy/key_1"], loss)
    slope = (2 * (0.3 * arrived - (due - arrived) / (0.5 - 0.8)) * arrived).mean()
    assert run.scalars["gradient/on_policy/key_1"] == pytest.approx(0.5 * abs(float(slope)), rel=1e-5)
    assert "on_policy/key_2" not in run.scalars
    changed = log[5][3]
    torch.testing.assert_close(log[6][2], arrived - 0.3 * changed * arrived)  # it goes on by the student as it is now


def test_the_on_policy_loss_comes_between_the_trajectory_and_the_adversarial_and_waits_for_the_heads() -> None:
    _, log = recorded(2, on_policy_weight=1.0, on_policy_keys=(2,), head_keys=(2,), head_warmup=1)
    warm = [("student", 1.0), ("real", 0.8), ("real", 0.8), ("head step", 0.0)]  # the first is a fake, without a gradient
    felt = [("student", 1.0), ("student step", 0.0), ("teacher", 1.0), ("student", 1.0), ("student step", 0.0)]
    felt += [("student", 1.0), ("fake", 0.8), ("real", 0.8), ("student step", 0.0), ("head step", 0.0)]
    felt += [("student", 0.8), ("student step", 0.0), ("student", 0.5), ("student step", 0.0)]
    assert [(what, sigma) for what, sigma, _, _ in log] == warm + felt


def generated(log: Sequence[tuple[str, float, Tensor, float]]) -> list[tuple[float, Tensor, float]]:
    """(sigma, input, the student's number) of the student's own steps: those whose output the teacher sees next."""
    pairs = zip(log, log[1:], strict=False)
    return [said[1:] for said, (after, *_) in pairs if said[0] == "student" and after == "fake"]


def test_a_rollout_begins_with_fresh_keyed_noise_and_each_stage_gets_the_one_before_without_its_gradient() -> None:
    run, log = recorded(2, seed=7)
    for iteration in range(2):
        stages = generated(log)[3 * iteration :][:3]
        latent = keyed_noise(torch.empty(4, 4, 2, 4, 6), 7, "noise", 3 * iteration, 0)
        for (high, found, number), low in zip(stages, (0.8, 0.5, 0.0), strict=True):
            assert torch.equal(found, latent) and not found.requires_grad
            latent = latent + (torch.tensor(low) - torch.tensor(high)) * (torch.tensor(number) * latent)
    assert len(run.queues) == 0  # with queues of length 1 all went on to key 0, whose queue is dropped


def test_the_real_latents_are_those_of_the_noises_own_draw_at_each_key() -> None:
    _, log = recorded(1)
    source = MadeUp(sigmas=SIGMAS)
    real = [latent for what, _, latent, _ in log if what == "real"]
    assert all(torch.equal(found, source.batch(0, key).clean) for found, key in zip(real, (2, 1, 0), strict=True))
    trained = [latent for (what, _, latent, _), (after, *_) in zip(log, log[1:], strict=False) if after == "student step"]
    noisy = [latent for latent in trained if any(torch.equal(latent, source.batch(2 - k, k).noisy) for k in range(3))]
    assert len(noisy) == 3  # the trajectory loss draws anew for every key


def test_queues_after_some_iterations_hold_what_a_hand_computes() -> None:
    """Length 2: a stage works on the entry before the newest. After iteration i, queue m has the last noise, queue k what
    stage k made in the same iteration."""
    run, log = recorded(4, queue_length=2)
    stages = generated(log)
    # iterations 0..3: nothing moves at first, then one stage more an iteration
    assert [round(sigma, 1) for sigma, *_ in stages] == [1.0, 1.0, 0.8, 1.0, 0.8, 0.5]
    found = {key: [entry.draw for entry in queue] for key, queue in run.queues._queues.items()}
    assert found == {3: [9], 2: [6], 1: [3]}
    noise = keyed_noise(torch.empty(4, 4, 2, 4, 6), 0, "noise", 9, 0)
    assert torch.equal(run.queues._queues[3][0].latent, noise)
    (_, last, number), (_, middle, other) = stages[3], stages[4]
    torch.testing.assert_close(run.queues._queues[2][0].latent, last - 0.2 * number * last)
    torch.testing.assert_close(run.queues._queues[1][0].latent, middle - 0.3 * other * middle)


def test_queues_are_first_in_first_out_drop_key_0_and_come_back_from_their_state_divided_otherwise() -> None:
    queues = Queues(2, length=2)
    latents = [torch.randn(4, 1, 1, 2, 2, requires_grad=True) for _ in range(3)]
    queues.push(0, Entry(9, latents[0]))
    assert len(queues) == 0
    queues.push(2, Entry(0, latents[0]))
    assert queues.pop(2) is None
    queues.push(2, Entry(1, latents[1]))
    queues.push(1, Entry(2, latents[2]))
    again = Queues(2, length=2)
    again.restore(queues.state(), range(2, 4), torch.device("cpu"))
    for made, rows in ((queues, slice(0, 4)), (again, slice(2, 4))):
        entry = made.pop(2)
        assert entry is not None and entry.draw == 0 and torch.equal(entry.latent, latents[0].detach()[rows])
        assert not entry.latent.requires_grad and made.pop(2) is None and len(made) == 2
    with pytest.raises(InvalidValueError, match="queue_length is 0"):
        Queues(2, length=0)


def test_a_samples_noise_hangs_on_seed_purpose_step_and_its_global_place_alone() -> None:
    whole = keyed_noise(torch.empty(4, 2, 3), 1, "noise", 5, 0)
    assert torch.equal(whole[2:], keyed_noise(torch.empty(2, 2, 3), 1, "noise", 5, 2))
    others = [keyed_noise(torch.empty(1, 2, 3), *key) for key in ((2, "noise", 5, 0), (1, "r1", 5, 0), (1, "noise", 6, 0))]
    assert not any(torch.equal(other, whole[:1]) for other in others)
