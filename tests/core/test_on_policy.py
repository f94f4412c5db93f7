"""The teacher going on from where a student arrives: as it did when its trajectories were captured, in fewer steps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accvideo_core.distill.adapters import HunyuanAdapter
from accvideo_core.distill.on_policy import Continuation, levels
from accvideo_core.errors import InvalidValueError, SynVidError
from accvideo_core.sampling import euler_flow
from accvideo_core.synvid import Header, SynVidDataset
from accvideo_core.synvid.capture import capture
from accvideo_core.synvid.plan import Plan
from accvideo_core.synvid.store import SynVidStore
from tests.core.test_distill_trainer import same
from tests.distill_data import EXPORTABLE, network, trainer, weights
from tests.synvid_data import SHAPE

ADAPTER, TEACHER = HunyuanAdapter("tiny"), network()


@pytest.fixture(scope="module", params=[1.0, 4.0], ids=["plain", "cfg"])
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SynVidDataset:
    """Three trajectories of `TEACHER` in 6 steps, a key after every third."""
    folder, cfg, generator = tmp_path_factory.mktemp("captured"), request.param, torch.Generator().manual_seed(3)

    def encoded(length: int) -> tuple[Tensor, Tensor]:
        return torch.randn(length, 8, generator=generator), torch.randn(6, generator=generator)

    plan = Plan(folder / "plan", create=True)
    items = [plan.add(f"prompt {seed}", *encoded(2 + seed), seed, SHAPE) for seed in range(3)]
    told: dict[str, Any] = {} if cfg == 1 else {"negative": "blurred", "cfg": cfg}
    negative = None if cfg == 1 else encoded(3)
    if negative is not None:
        told["negative_text"] = plan_text(plan, negative)
    header = Header.of("tiny", ADAPTER.fingerprint(TEACHER), 6, 2, dtype="float32", store_noise=True, **told)
    store = SynVidStore(folder / "data", header)
    assert capture(TEACHER, plan, items, store, batch=3, negative=negative) == []
    return SynVidDataset(folder / "data")


def plan_text(plan: Plan, encoding: tuple[Tensor, Tensor]) -> str:
    plan.add_negative("blurred", *encoding)
    return plan.negatives["blurred"]


def test_in_the_steps_of_the_capture_the_teacher_goes_on_to_the_captured_latents(captured: SynVidDataset) -> None:
    going_on = Continuation.of(ADAPTER, captured.reader, 3)
    for key in (1, 0):
        batch = captured.collate([captured[sample, key] for sample in range(3)])
        with torch.no_grad():
            made = going_on(TEACHER, batch.noisy, key, ADAPTER.conditioning(batch, 6.0))
        torch.testing.assert_close(made, batch.clean, rtol=1e-4, atol=1e-5)


def test_in_one_step_it_is_one_euler_step_with_its_guidance(captured: SynVidDataset) -> None:
    batch = captured.collate([captured[sample, 0] for sample in range(3)])
    told, going_on = ADAPTER.conditioning(batch, 6.0), Continuation.of(ADAPTER, captured.reader, 1)
    sigma = torch.tensor([captured.header.key_sigmas[1], 0.0])
    with torch.no_grad():
        made = going_on(TEACHER, batch.noisy, 0, told)
        alone = euler_flow(lambda x, s: TEACHER(x, s, told), batch.noisy, sigma)
    assert torch.allclose(made, alone) == (captured.header.cfg == 1)


def test_the_teachers_sigmas_are_taken_as_evenly_as_can_be() -> None:
    header = Header.of("tiny", "0" * 64)  # 50 steps, 10 a segment
    found = levels(header, 3)
    assert list(found) == [0, 1, 2, 3, 4] and found[0] == tuple(header.sigmas[i] for i in (40, 43, 47, 50)) and found[4][0] == 1.0
    assert [(of[-1], of[0]) for of in found.values()] == list(zip(header.key_sigmas, header.key_sigmas[1:], strict=False))
    assert levels(header, 10)[2] == header.sigmas[20:31] and levels(header, 1)[1] == header.sigmas[30:41:10]
    for steps in (0, 11):
        with pytest.raises(InvalidValueError, match=f"on_policy_steps is {steps}; .* 10 in the segment to key 0; set 1 to 10"):
            levels(header, steps)
    uneven = replace(header, keys=(0, 1, 50))
    assert levels(uneven, 7, [0])[0][1] == header.sigmas[8]
    with pytest.raises(InvalidValueError, match="the teacher took 1 in the segment to key 1; set 1$"):
        levels(uneven, 7)
    with pytest.raises(InvalidValueError, match="on_policy_keys has 2; the dataset's segments end at keys 0 to 1"):
        levels(uneven, 1, [2])


def test_without_the_negative_prompts_encoding_the_cure_is_named(tmp_path: Path) -> None:
    reader = SynVidStore(tmp_path, Header.of("tiny", "0" * 64, cfg=5.0, negative="blurred"))
    with pytest.raises(InvalidValueError, match="cfg is 5; a cfg other than 1 needs"):
        Continuation(ADAPTER, {}, cfg=5.0)
    with pytest.raises(SynVidError, match="cfg 5 and has no encoding of its negative prompt.*capture again"):
        Continuation.of(ADAPTER, reader, 3)  # type: ignore[arg-type]


def test_a_run_of_this_loss_alone_approaches_the_teacher_and_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    chosen: dict[str, Any] = dict(trajectory_weight=0.0, adversarial_weight=0.0, on_policy_weight=1.0, lr=3e-3)
    seen: list[float] = []
    observers = [lambda _, scalars: seen.append(sum(scalars[f"on_policy/key_{key}"] for key in (0, 1)))]
    start = network(EXPORTABLE, seed=1)
    whole = trainer(EXPORTABLE, student=start, folder=tmp_path / "whole", iterations=30, observers=observers, **chosen)
    whole.run()
    assert sum(seen[-5:]) < 0.7 * sum(seen[:5]) and all(map(math.isfinite, seen))
    for iterations in (15, 30):
        part = trainer(EXPORTABLE, student=network(EXPORTABLE, seed=1), folder=tmp_path / "part", iterations=iterations, **chosen)
        part.run()
    assert same(weights(whole), weights(part))


def test_the_loss_needs_a_teacher_and_how_it_goes_on() -> None:
    one = network()
    with pytest.raises(InvalidValueError, match="the on-policy loss need a teacher of its own"):
        trainer(student=one, teacher=one, adversarial_weight=0.0, on_policy_weight=1.0)
    with pytest.raises(InvalidValueError, match="nothing says how the teacher goes on"):
        trainer(on_policy_weight=1.0, going_on=None)
