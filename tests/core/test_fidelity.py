"""`accvideo evaluate --out`: how close a model is to its teacher."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from accvideo_core.errors import CheckpointError, InvalidValueError, OutputError
from accvideo_core.sampling import make_noise
from accvideo_core.studies import evaluation, fidelity, metrics
from accvideo_core.studies.exam import read_clips, score_reads
from accvideo_core.studies.plans import drawn_plan
from accvideo_core.tiny.clips import keyed_generator, render, sample_scenes
from accvideo_core.tiny.pipeline import PRESET, TinyPipeline
from tests.networks import TWO_HEADS, random_weights

ROWS = drawn_plan(4)


@pytest.fixture(scope="module")
def student() -> TinyPipeline:
    return TinyPipeline.load("student")


@pytest.fixture(scope="module")
def made(student: TinyPipeline) -> fidelity.Made:
    return fidelity.make(student, ROWS, PRESET.sigmas(5), 3, quiet=True)


def test_what_a_model_makes_is_what_generate_makes(student: TinyPipeline, made: fidelity.Made) -> None:
    plain = student.generate([r.prompt for r in ROWS], [r.seed for r in ROWS])
    assert made.first.shape == made.second.shape == (4, 6, 16, 5, 8, 8)
    torch.testing.assert_close(made.first[:, 0], plain.latents, rtol=1e-3, atol=1e-3)
    assert np.abs(made.frames.astype(int) - plain.frames).max() <= 3
    assert torch.equal(made.first[:, 5], make_noise((4, 16, 5, 8, 8), [r.seed for r in ROWS]))
    assert (made.second[:, 5] - made.first[:, 5]).std() == pytest.approx(math.sqrt(2), rel=0.02)


def test_from_its_own_keys_a_model_goes_its_own_way(student: TinyPipeline, made: fidelity.Made) -> None:
    reached = fidelity.forced(student, ROWS, made.first, PRESET.sigmas(5), 3)
    torch.testing.assert_close(reached, made.first[:, :5], rtol=1e-3, atol=1e-3)
    finer = fidelity.forced(student, ROWS[:1], made.first[:1], PRESET.sigmas(10), 3)
    alone = fidelity.make(student, ROWS[:1], PRESET.sigmas(10), 1, quiet=True).first
    torch.testing.assert_close(finer[:, 4], alone[:, 4], rtol=1e-3, atol=1e-3)


def synthetic(scale: float = 1.0, shift: float = 0.0, seed: int = 0) -> fidelity.Made:
    """30 samples whose keys are Gaussian; clips of true scenes."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (scale * torch.randn(30, 6, 16, 2, 4, 4, generator=generator) + shift for _ in range(2))
    frames = (render(sample_scenes(30, keyed_generator(7))).numpy() * 255).round().astype(np.uint8)
    return fidelity.Made(first, second, frames, read_clips(frames))


def test_the_teacher_against_itself_is_the_floor() -> None:
    rows, teacher = drawn_plan(30), synthetic()
    found = fidelity.fidelity(teacher, teacher, teacher.first[:, :5], rows)
    assert found["trajectory_error"] == {name: [fidelity.Estimate(0, 0, 0)] * 5 for name in ("teacher_forced", "self_rolled")}
    assert found["sliced_wasserstein"]["model"] == found["sliced_wasserstein"]["floor"]
    assert all(abs(e.value) < 0.01 for e in found["mmd"]["floor"])
    ones = [found["diversity"], found["amplitude"], *found["temporal_energy"].values(), *found["high_frequency_energy"].values()]
    ones += found["sliced_wasserstein"]["ratio"]
    assert all(e == fidelity.Estimate(1, 1, 1) for e in ones)
    assert all(e is None or e.value == 0 for e in found["open_tv"].values())


def test_every_measure_sees_what_it_is_for() -> None:
    rows, teacher, model = drawn_plan(30), synthetic(), synthetic(scale=0.5, seed=1)
    model.frames[:, 1:] = model.frames[:, :1]  # nothing moves
    found = fidelity.fidelity(model, teacher, teacher.first[:, :5] + 1, rows)
    assert found["diversity"].value == pytest.approx(0.25, rel=0.05)
    assert found["amplitude"].value == pytest.approx(0.5, rel=0.03)
    assert found["temporal_energy"]["latent"].value == pytest.approx(0.25, rel=0.05)
    assert found["high_frequency_energy"]["latent"].value == pytest.approx(0.25, rel=0.05)
    assert found["temporal_energy"]["pixels"].value == 0
    # An error of 1 on a way of deviation sqrt(2); the other model's keys have nothing to do with the teacher's.
    assert found["trajectory_error"]["teacher_forced"][3].value == pytest.approx(math.sqrt(1 / 2), rel=0.05)
    assert found["trajectory_error"]["self_rolled"][0].value == pytest.approx(math.sqrt(1.25 / 2), rel=0.05)
    far = found["sliced_wasserstein"]
    assert far["model"][0].low > far["floor"][0].high and found["mmd"]["model"][0].low > found["mmd"]["floor"][0].high


def test_shares_have_intervals() -> None:
    rows = drawn_plan(30)
    result = score_reads(synthetic().reads, rows)
    assert result["valid"] == 1 and result["valid_95"][0] < 0.95
    low, high = result["intervals_95"]["colour"]["named_right"]
    assert 0 <= low <= result["colour"]["named_right"] <= high


def test_the_command_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "PRESET", dataclasses.replace(PRESET, teacher_steps=10))
    plan = tmp_path / "plan.jsonl"
    plan.write_text("\n".join(json.dumps(vars(row)) for row in ROWS))
    args = evaluation.EvaluateArgs(plan, out=tmp_path / "report", batch=4, json=True, device="cpu")
    assert evaluation.run(args) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "report" / "report.json").read_text())
    assert said["to_teacher"]["sliced_wasserstein"]["ratio"][0]["value"] > 0 and said["clips"] == 4
    table = (tmp_path / "report" / "report.md").read_text()
    assert "trajectory error, self rolled" in table and "tiny-student, 5 steps" in table
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_teachers_clips_are_made_once_for_several_models(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "PRESET", dataclasses.replace(PRESET, teacher_steps=10))
    made, make = [], fidelity.make
    monkeypatch.setattr(fidelity, "make", lambda pipeline, *rest: made.append(pipeline.which) or make(pipeline, *rest))
    plan = tmp_path / "plan.jsonl"
    plan.write_text("\n".join(json.dumps(vars(row)) for row in ROWS[:2]))
    args = evaluation.EvaluateArgs(plan, out=tmp_path / "one", teacher_clips=tmp_path / "kept", json=True, device="cpu")
    others = dataclasses.replace(args, out=tmp_path / "other")
    assert evaluation.run(args) == evaluation.run(others) == 0
    assert made == ["teacher", "student", "student"]
    assert len({(path / "report.json").read_bytes() for path in (args.out, others.out)}) == 1
    plan.write_text("\n".join(json.dumps(vars(row)) for row in ROWS[1:3]))
    with pytest.raises(InvalidValueError, match="was made from something else .plan .*delete it"):
        evaluation.run(args)
    (tmp_path / "kept").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="cannot read .*kept"):
        evaluation.run(args)
    with pytest.raises(InvalidValueError, match="give --out, too"):
        evaluation.run(dataclasses.replace(args, out=None))


def test_a_disk_that_the_clips_fill_takes_the_score_from_nobody(tmp_path: Path, capsys, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    plan = tmp_path / "plan.jsonl"
    plan.write_text(json.dumps(vars(ROWS[0])))
    with pytest.raises(OutputError, match="no space left"):
        evaluation.run(evaluation.EvaluateArgs(plan, steps=1, frames_out=tmp_path / "a.npz", json=True, device="cpu"))
    assert json.loads(capsys.readouterr().out)["clips"] == 1


def test_energies_of_many_clips_are_taken_a_few_at_a_time() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (201, 2, 4, 4, 3), np.uint8)
    seen: list[int] = []
    found = fidelity._in_pixels(lambda video: seen.append(len(video)) or metrics.temporal_energy(video), frames)
    assert max(seen) <= 100 and sum(seen) == 201
    assert found.numpy() == pytest.approx((np.diff(frames / 255, axis=1) ** 2).mean((1, 2, 3, 4)), rel=1e-5)


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    plan = tmp_path / "plan.jsonl"
    plan.write_text(json.dumps(vars(ROWS[0])))
    for wrong, said in (({"steps": 7}, "multiple of its 5"), ({"shift": 3.0}, "leave out --shift"), ({}, "at least 2 rows")):
        with pytest.raises(InvalidValueError, match=said):
            evaluation.run(evaluation.EvaluateArgs(plan, out=tmp_path / "report", device="cpu", **wrong))
    assert not (tmp_path / "report").exists()
    other = tmp_path / "other.safetensors"
    save_file(random_weights(TWO_HEADS), other)
    with pytest.raises(CheckpointError, match="text 32 wide"):
        evaluation.run(evaluation.EvaluateArgs(plan, weights=other, device="cpu"))
    with pytest.raises(InvalidValueError, match="name two models"):
        evaluation.run(evaluation.EvaluateArgs(plan, weights=other, teacher=True, device="cpu"))
