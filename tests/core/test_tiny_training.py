"""The tiny world's training loop: its optimizer and probe, resuming, processes, what it refuses."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from accvideo_core.devices import pick_device
from accvideo_core.errors import CheckpointError, InvalidValueError
from accvideo_core.tiny import clips, load_tiny, muon, training, weights_path
from accvideo_core.tiny.tasks import flow, make_task
from tests.tiny_training import contents, in_small, train, train_all

ROOT = Path(__file__).parents[2]


@pytest.fixture
def models(tmp_path):
    """The bundled models, with the student in the place of the guided base and of the teacher."""
    (folder := tmp_path / "models").mkdir()
    for part in ("text_encoder", "vae"):
        shutil.copy(weights_path(part), folder)
    for part in ("guided", "teacher"):
        shutil.copy(weights_path("student"), folder / f"{part}.safetensors")
    return folder


# ---- training -------------------------------------------------------------------------------------------------------


def test_probe_targets_lie_where_the_tokens_are():
    """The coverage of a token's cells, against the frames cut up by hand."""
    scenes = clips.sample_scenes(2, clips.keyed_generator("probe"))
    cells = flow.cell_coverage(scenes)
    cover = clips.coverage(scenes)
    assert cells.shape == (2, 5 * 4 * 4, 16)
    for t, h, w, f, p, q in ((0, 1, 2, 0, 0, 1), (1, 0, 3, 0, 1, 0), (3, 2, 1, 2, 0, 0), (4, 3, 3, 3, 1, 1)):
        frame = max(0, 4 * t - 3 + f)
        row, column = 16 * h + 8 * p, 16 * w + 8 * q
        expected = cover[:, frame, row : row + 8, column : column + 8].mean((1, 2))
        torch.testing.assert_close(cells[:, 16 * t + 4 * h + w, 4 * f + 2 * p + q], expected)


def test_probe_learns_the_scene_from_features_that_hold_it():
    """From features that are the coverage itself, place and motion can be read: its loss falls well below chance."""
    torch.manual_seed(0)
    probe = flow.SceneProbe(32)
    optimizer = torch.optim.Adam(probe.parameters(), lr=1e-2)
    scenes = clips.sample_scenes(64, clips.keyed_generator("probe"))
    cells = flow.cell_coverage(scenes)
    features = torch.cat([cells, torch.randn(64, 80, 16, generator=clips.keyed_generator("rest"))], -1)
    losses = []
    for _ in range(60):
        loss = probe(features, scenes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("shape", [(3, 96, 32), (2, 32, 80)])
def test_orthogonalize_keeps_the_singular_vectors_and_evens_the_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    core = left.mT @ muon.orthogonalize(matrices) @ right.mT
    diagonal = core.diagonal(dim1=1, dim2=2)
    assert values.amax() > 2 * values.amin() and 0.6 < diagonal.amin() and diagonal.amax() < 1.25
    torch.testing.assert_close(core, torch.diag_embed(diagonal), atol=1e-4, rtol=0)


def test_muon_steps_by_orthogonal_nesterov_momentum_scaled_like_adamw():
    layers = torch.nn.ModuleList([torch.nn.Linear(6, 4, bias=False), torch.nn.Conv2d(2, 4, 3, bias=False)])
    parameters, before = list(layers.parameters()), [p.detach().clone() for p in layers.parameters()]
    optimizer = muon.Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.5)
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(2)]
    momenta = [torch.zeros_like(p) for p in parameters]
    for its in gradients:
        for i, (parameter, gradient) in enumerate(zip(parameters, its, strict=True)):
            parameter.grad = gradient.clone()
            momenta[i] = 0.9 * momenta[i] + 0.1 * gradient
            flat = (0.1 * gradient + 0.9 * momenta[i]).flatten(1)
            step = muon.orthogonalize(flat[None])[0] * 0.2 * max(flat.shape) ** 0.5
            before[i] = before[i] * (1 - 0.1 * 0.5) - 0.1 * step.view_as(gradient)
        optimizer.step()
    for parameter, expected in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), expected)


def test_each_part_trains_resumes_exactly_and_feeds_the_next(tmp_path, small):
    """A run stopped after 2 of 3 steps and resumed writes the weights of an unbroken run, bit for bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for part in training.PARTS:
        written = train(part, whole, 3, trajectories=4)
        assert all(p.is_file() for p in written) and (whole / "run" / part / "sheet.png").is_file()
        before = contents(broken)
        with pytest.raises(KeyboardInterrupt):
            train(part, broken, 3, stop_at=2, trajectories=4, save_every=0.0)
        assert contents(broken) == before
        resumed = train(part, broken, 3, trajectories=4)
        for a, b in zip(written, resumed, strict=True):
            left, right = load_file(a), load_file(b)
            assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)

    with pytest.raises(InvalidValueError, match="made from something else.*teacher"):  # trajectories of another teacher
        train("student", broken, 3, weights=other_weights(whole, tmp_path / "other"), trajectories=4)


def test_each_part_trains_in_bfloat16(tmp_path):
    with in_small(torch.bfloat16):
        for part in training.PARTS:
            for path in train(part, tmp_path, 2, trajectories=4):
                assert all(t.isfinite().all() for t in load_file(path).values())


def test_two_processes_train_what_one_does(tmp_path):
    """torchrun with two processes, each with half of every batch, writes the weights of one process, up to rounding."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests" / "tiny_training.py"), str(shared)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    train_all(alone)
    for name in ("vae", "text_encoder", "base", "guided", "teacher", "student"):
        left, right = (load_file(folder / f"{name}.safetensors") for folder in (alone, shared))
        for key in left:
            torch.testing.assert_close(left[key].float(), right[key].float(), rtol=0.02, atol=1e-4)
    with pytest.raises(InvalidValueError, match="batch of 3 does not divide among 2 processes"):
        training.Share(0, 2).rows(3)


def other_weights(folder, copy):
    """The same weights but a teacher that was changed in one value."""
    shutil.copytree(folder, copy)
    with safe_open(folder / "teacher.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(folder / "teacher.safetensors")
    save_file(state | {"final_layer.linear.bias": state["final_layer.linear.bias"] + 1}, copy / "teacher.safetensors", metadata)
    return copy


def test_a_run_is_never_continued_as_another(tmp_path):
    train("vae", tmp_path, 1)
    with pytest.raises(InvalidValueError, match=r"made from something else \(seed 0, now 1\); choose another --run"):
        train("vae", tmp_path, 2, seed=1)
    (tmp_path / "run" / "vae" / "state.pt").write_bytes(b"PK damaged")
    with pytest.raises(CheckpointError, match=r"state\.pt' is damaged"):
        train("vae", tmp_path, 2)


@pytest.mark.parametrize(
    ("part", "first", "then", "said"),
    [
        ("teacher", {}, {"trajectories": 4}, "trajectories 2, now 4"),
        ("student", {}, {"trajectories": 4}, "trajectories 2, now 4"),
        ("student", {}, {"early": 2}, "early 0, now 2"),
        ("student", {"early": 2}, {"early": 0}, "early 2, now 0"),
    ],
)
def test_a_run_is_never_continued_with_other_trajectories(part, first, then, said, models, tmp_path, small):
    """Begun afresh, it goes on with those that are captured."""
    how = {"weights": models, "trajectories": 2} | first
    (path,) = train(part, tmp_path, 1, **how)
    with safe_open(path, "pt") as file:
        known = file.metadata()
    assert known["trajectories"] == "2" and known.get("early", "0") == str(first.get("early", 0))
    before = contents(tmp_path / "run" / part)
    assert len(before) == 1 + len(first)
    with pytest.raises(InvalidValueError, match=rf"state\.pt' was made from something else \({said}\)"):
        train(part, tmp_path, 2, **how | then)
    assert contents(tmp_path / "run" / part) == before
    (tmp_path / "run" / part / "state.pt").unlink()
    train(part, tmp_path, 1, **how | then)
    assert contents(tmp_path / "run" / part).items() >= before.items()


def test_a_student_that_needs_no_trajectories_goes_on_whatever_their_number(models, tmp_path, small):
    how = {"weights": models, "start": weights_path("student"), "push": (0.0,) * 5, "amplitude": 0.97}
    for steps, count in ((1, 2), (2, 4)):
        (path,) = train("student", tmp_path, steps, trajectories=count, **how)
    with safe_open(path, "pt") as file:
        assert [file.metadata()[name] for name in ("trajectories", "steps", "amplitude")] == ["0", "2", "0.97"]


def test_models_that_were_not_made_for_each_other_are_refused(tmp_path):
    for part in ("student", "text_encoder", "vae"):
        shutil.copy(weights_path(part), tmp_path)
    load_tiny("student", folder=tmp_path)
    state = load_file(tmp_path / "vae.safetensors")
    save_file(state | {"mean": state["mean"] + 1}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="was trained with another encoder than"):
        load_tiny("student", folder=tmp_path)
    save_file(state | {"dec_out.bias": state["dec_out.bias"] + 1}, tmp_path / "vae.safetensors")
    load_tiny("student", folder=tmp_path)  # another decoder of the same latents is no fault
    with pytest.raises(CheckpointError, match="; train it: accvideo tiny train teacher, with that folder as --weights"):
        load_tiny("teacher", folder=tmp_path)


def test_bad_training_arguments_are_named(tmp_path):
    with pytest.raises(InvalidValueError, match="lr -1"):
        train("vae", tmp_path, 1, lr=-1.0)
    with pytest.raises(InvalidValueError, match="steps is 0"):
        train("vae", tmp_path, 0)
    with pytest.raises(InvalidValueError, match="trajectories is 0"):
        make_task(training.TrainArgs("student", trajectories=0), tmp_path, torch.device("cpu"))
    with pytest.raises(InvalidValueError, match="early is -1"):
        make_task(training.TrainArgs("student", early=-1), tmp_path, torch.device("cpu"))
    file = tmp_path / "student.safetensors"
    for start, push in ((None, (0.0, 1.0, 0.0, 0.0, 0.0)), (file, (1.0,)), (file, (0.0, math.inf, 0.0, 0.0, None))):
        with pytest.raises(InvalidValueError, match=re.escape(f"push is {push}; it has a number or None for each of the 5")):
            make_task(training.TrainArgs("student", start=start, push=push), tmp_path, torch.device("cpu"))
    for amplitude in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidValueError, match=f"amplitude is {amplitude}; it must be above 0"):
            make_task(training.TrainArgs("student", amplitude=amplitude), tmp_path, torch.device("cpu"))
    with pytest.raises(InvalidValueError, match=r"amplitude is 0\.9, but turns is \(0, 3\), without the last segment, 4"):
        make_task(training.TrainArgs("student", amplitude=0.9, turns=(0, 3)), tmp_path, torch.device("cpu"))
    with pytest.raises(InvalidValueError, match="teacher steps is 0; it must be at least 1"):
        make_task(training.TrainArgs("student", teacher_steps=0), tmp_path, torch.device("cpu"))
    with pytest.raises(InvalidValueError, match="teacher steps is 3, but no segment is pushed; give --push"):
        make_task(training.TrainArgs("student", teacher_steps=3), tmp_path, torch.device("cpu"))
    own = training.TrainArgs("student", start=file, push=(None, 0.0, 0.0, 0.0, -1.0), turns=(1, 4), early=2)
    with pytest.raises(InvalidValueError, match="every segment trained on is the student's own; leave out --dataset and --early"):
        make_task(own, tmp_path, torch.device("cpu"))
    with pytest.raises(InvalidValueError, match=r"turns is \(1, 5\); the segments are 0 to 4"):
        make_task(training.TrainArgs("student", turns=(1, 5)), tmp_path, torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"vae\.safetensors"):
        train("teacher", tmp_path / "empty", 1)
    with pytest.raises(InvalidValueError, match="device 'tpu'"):
        pick_device("tpu")
    with pytest.raises(InvalidValueError, match="device 'meta'"):
        pick_device("meta")
