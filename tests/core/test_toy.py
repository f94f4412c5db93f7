"""The one-dimensional experiment: its exact velocity, what counts as useless, the paper's trend, and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from accvideo_core.errors import InvalidValueError, MissingExtraError
from accvideo_core.schedule import flow_sigmas
from accvideo_core.studies import toy
from accvideo_core.tiny.clips import keyed_generator

SMALL = dict(iterations=10, student_iterations=3, batch=64, width=8, trajectories=64, repeats=2)


def test_the_exact_velocity_is_the_mean_of_noise_minus_data() -> None:
    """Against Monte Carlo: samples of (data, noise) whose mixture falls near a point."""
    generator = keyed_generator("toy test")
    sigma = 0.6
    x, z = toy.data(400_000, 0.0, generator), torch.randn(400_000, 1, generator=generator)
    noisy = (1 - sigma) * x + sigma * z
    for place in (-1.5, -0.2, 0.4, 1.0):
        near = (noisy - place).abs() < 0.02
        exact = toy.exact_velocity(torch.tensor([[place]]), torch.tensor([sigma]))
        assert float((z - x)[near].mean()) == pytest.approx(float(exact), abs=0.15)


def test_the_sampler_reaches_the_data_and_keeps_every_state() -> None:
    noise = torch.randn(500, 1, generator=keyed_generator(1))
    states = toy.trajectories(toy.exact_velocity, noise, flow_sigmas(50, 1.0))
    assert states.shape == (51, 500, 1) and torch.equal(states[0], noise)
    torch.testing.assert_close(states[-1].abs(), torch.full((500, 1), 3.0), atol=1e-3, rtol=0)
    assert torch.equal(states[-1] > 0, noise > 0)


def test_distance_to_the_nearest_trajectory() -> None:
    far = toy.distance_to_nearest(torch.tensor([[-2.0], [0.4], [0.9], [5.0]]), torch.tensor([[1.0], [0.0], [-1.0]]))
    torch.testing.assert_close(far, torch.tensor([1.0, 0.4, 0.1, 4.0]))


def test_the_more_data_differ_the_more_points_are_useless() -> None:
    """The trend of the paper's Fig. 2 (0.8 to 29 %), from the closed form alone."""
    sigmas = flow_sigmas(50, 1.0)
    paths = toy.trajectories(toy.exact_velocity, torch.randn(2048, 1, generator=keyed_generator(2)), sigmas)
    shares = [toy.useless_share(paths, sigmas, m, 0.05, keyed_generator(3)) for m in toy.PAPER]
    assert shares[0] < 0.02 and 0.2 < shares[-1] < 0.4
    assert all(b > a for a, b in zip(shares, shares[1:], strict=False))


def test_segments_start_where_they_should_and_end_where_the_teacher_goes() -> None:
    args = toy.ToyArgs(trajectories=256)
    own, forward = (toy.segments(args, toy.exact_velocity, m) for m in (None, 3.0))
    levels = toy.key_levels(args)
    assert levels.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert torch.equal(own.cleaner[1:], own.noisier[:-1])  # one trajectory, cut at its keys
    assert forward.noisier[0].abs().mean() == pytest.approx(0.8 * 1.5, abs=0.05)  # (1 - 0.2) * 1.5, far from the teacher's 2.4
    assert own.noisier[0].abs().mean() == pytest.approx(0.8 * 3, abs=0.05)
    there = toy.trajectories(toy.exact_velocity, forward.noisier[0], flow_sigmas(50, 1.0)[40:])
    torch.testing.assert_close(there[-1], forward.cleaner[0])


def test_outcomes() -> None:
    wanted = torch.tensor([[-3.0], [3.0]])
    assert toy.outcome(wanted.flip(0), wanted) == {"wasserstein": 0.0, "off": 0.0}
    assert toy.outcome(torch.tensor([[-3.1], [0.0]]), wanted) == {"wasserstein": pytest.approx(1.55), "off": 0.5}


def test_a_student_learns_the_segments() -> None:
    args = toy.ToyArgs(**SMALL | dict(student_iterations=150, student_lr=5e-3, width=32))
    own = toy.segments(args, toy.exact_velocity, None)
    student = toy.distill(args, toy.ToyNet(32), own, "test")
    levels = toy.key_levels(args)
    with torch.no_grad():
        reached = own.noisier[2] + (levels[2] - levels[3]) * student(own.noisier[2], levels[3].expand(64))
    assert (reached - own.cleaner[2]).square().mean() < 0.1 * (own.noisier[2] - own.cleaner[2]).square().mean()


def test_the_command_writes_figure_numbers_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = toy.ToyArgs(out=tmp_path, mismatches=(0.0, 1.5), **SMALL)
    assert toy.run(args) == 0
    table = (tmp_path / "toy.md").read_text()
    assert table in capsys.readouterr().out and "0.78%" in table and "17.43%" in table
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "toy.json").read_text())
    assert set(found["teachers"]) == {"closed form", "trained"}
    assert set(found["teachers"]["trained"]["outcomes"]) == {
        "teacher",
        "teacher, few steps",
        "trajectories",
        "forward diffusion, M = 0",
        "forward diffusion, M = 1.5",
    }
    toy.run(toy.ToyArgs(out=tmp_path, mismatches=(0.0, 1.5), json=True, **SMALL))
    assert json.loads(capsys.readouterr().out) == found  # everything follows from the seed


@pytest.mark.parametrize(
    ("wrong", "said"), [({"keys": 7}, "7 key segments"), ({"mismatches": (7.0,)}, "mismatches"), ({"batch": 1}, "batch is 1")]
)
def test_bad_arguments_are_named_before_the_work(tmp_path: Path, wrong: dict, said: str) -> None:
    with pytest.raises(InvalidValueError, match=said):
        toy.run(toy.ToyArgs(out=tmp_path / "new", **wrong))
    assert not (tmp_path / "new").exists()


def test_a_figure_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"-m pip install matplotlib \(the extra accvideo\[train\]\)"):
        toy.run(toy.ToyArgs(out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()
