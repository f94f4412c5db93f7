"""The tiny VAE, text encoder, training loop and pipeline; what the bundled weights can do is the model card's to say."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from accvideo_core.checkpoint import load_student
from accvideo_core.devices import pick_device
from accvideo_core.dit import DiTConfig, HunyuanVideoDiT
from accvideo_core.errors import AccVideoError, CheckpointError, InvalidValueError
from accvideo_core.sampling import euler_flow, make_noise, multistep_flow
from accvideo_core.schedule import PRESETS
from accvideo_core.studies import compare, evaluation
from accvideo_core.tiny import LATENT_SCALE, clips, load_tiny, muon, oracle, part_hash, training, weights_path
from accvideo_core.tiny.pipeline import TinyPipeline, latent_shape
from accvideo_core.tiny.prompts import read_prompt
from accvideo_core.tiny.tasks import flow, make_task
from accvideo_core.tiny.tasks.common import draw_guidance, to_network
from accvideo_core.tiny.tasks.student import StudentTask, draw_noise_and_prompts
from accvideo_core.tiny.tasks.vae import DecoderTask
from accvideo_core.tiny.text import TinyTextEncoder
from accvideo_core.tiny.vae import TinyVAE, gaussian_derivatives
from tests.tiny_training import in_small, train, train_all

EXAM = Path(os.environ.get("ACCVIDEO_EXAM") or Path(__file__).parents[3] / "shared" / "exam")
ROOT = Path(__file__).parents[2]
PROMPT = "a red ball moving left on a black background"


@pytest.fixture(scope="module")
def vae():
    """Random weights in every layer, so that a connection that should not be there would show."""
    torch.manual_seed(0)
    vae = TinyVAE()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return vae.eval().requires_grad_(False)


def frames(count=2, length=17, size=32):
    return torch.rand(count, 3, length, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ---- VAE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, 17])
def test_vae_shapes(vae, length):
    x = frames(length=length)
    latent = vae.encode(x)
    assert latent.shape == (2, 16, (length - 1) // 4 + 1, 4, 4)
    assert vae.decode(latent).shape == x.shape


def test_vae_is_causal_both_ways(vae):
    x = frames()
    latent = vae.encode(x)
    decoded = vae.decode_unit(latent)
    later = x.clone()
    later[:, :, 9:] = 0
    torch.testing.assert_close(vae.encode(later)[:, :, :3], latent[:, :, :3], rtol=0, atol=1e-5)
    assert float((vae.encode(later)[:, :, 3:] - latent[:, :, 3:]).abs().max()) > 1e-3
    torch.testing.assert_close(vae.encode(x[:, :, :1]), latent[:, :, :1], rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode_unit(latent[:, :, :3]), decoded[:, :, :9], rtol=0, atol=1e-5)


def test_encoder_filters_are_derivatives():
    """On a picture that grows by one a pixel, only plain windows and their x derivative answer; the same for y and t."""
    filters = gaussian_derivatives()
    torch.testing.assert_close(filters.flatten(1).norm(dim=1), torch.ones(16), rtol=1e-3, atol=0)
    place = torch.arange(16.0) - 7.5
    ramps = {"x": place.expand(12, 16, 16), "y": place[:, None].expand(12, 16, 16)}
    ramps["t"] = torch.arange(4.0).sub(1.5).repeat_interleave(3)[:, None, None].expand(12, 16, 16)
    grey, blue_red, green_rest = (
        torch.tensor(c).repeat(4)[:, None, None] for c in ([1.0] * 3, [-1.0, 0.0, 1.0], [-1.0, 2.0, -1.0])
    )
    answers = {("x", 1): grey, ("y", 2): grey, ("t", 3): grey, ("x", 10): blue_red, ("y", 11): blue_red, ("t", 12): blue_red}
    answers |= {("x", 14): green_rest, ("y", 15): green_rest}
    for (axis, channel), colour in answers.items():
        answer = torch.einsum("kcyx,cyx->k", filters, ramps[axis] * colour)
        assert abs(float(answer[channel])) > 1
        answer[channel] = 0
        assert float(answer.abs().max()) < 1e-2  # no other order, axis or colour sees it


@pytest.mark.parametrize("shape", [(1, 3, 4, 32, 32), (1, 3, 5, 30, 32), (1, 4, 5, 32, 32), (3, 5, 32, 32)])
def test_vae_names_frames_it_cannot_encode(vae, shape):
    with pytest.raises(InvalidValueError, match=r"4n\+1|\(B, 3, T, H, W\)"):
        vae.encode(torch.zeros(shape))


# ---- text -----------------------------------------------------------------------------------------------------------


def test_padding_a_prompt_changes_nothing():
    torch.manual_seed(0)
    encoder = TinyTextEncoder().eval()
    with torch.no_grad():
        text, pooled, mask = encoder.encode(["a red ball", "a violet thing drifting leftwards on a teal background"])
        alone, alone_pooled, no_mask = encoder.encode(["a red ball"])
    assert no_mask is None and mask.sum(1).tolist() == [4, 10]
    torch.testing.assert_close(text[:1, :4], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled[:1], alone_pooled, rtol=0, atol=1e-5)


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


@pytest.fixture(scope="module")
def as_base(tmp_path_factory):
    """The bundled models, with the student in the base's place and the teacher's."""
    folder = tmp_path_factory.mktemp("as_base")
    for part in ("text_encoder", "vae"):
        shutil.copy(weights_path(part), folder)
    for part in ("base", "guided", "teacher"):
        shutil.copy(weights_path("student"), folder / f"{part}.safetensors")
    return folder


def test_shape_filters_tell_shapes_apart_from_all_else(as_base):
    """Between a square and a circle alike in all else they answer far more than the channels do, by their share of a latent."""
    vae = load_tiny("base", folder=as_base)[2]
    filters = flow.shape_filters(vae, torch.device("cpu"))
    torch.testing.assert_close(filters.square().sum((1, 2, 3)), torch.ones(12))
    scenes = clips.sample_scenes(32, clips.keyed_generator("shapes"))
    circle, square, other = (
        vae.encode(to_network(clips.paint(named, clips.coverage(named)), torch.device("cpu"))) * LATENT_SCALE
        for named in (replace(scenes, shape=torch.full((32,), 0)), replace(scenes, shape=torch.full((32,), 1)), scenes)
    )

    def share(view):
        return (view(square) - view(circle)).square().mean() / view(other).var()

    def seen(latents):
        return torch.nn.functional.conv2d(latents.transpose(1, 2).flatten(0, 1), filters, padding=1)

    assert share(seen) > 4 * share(lambda latents: latents)


def test_the_flow_error_weighs_noise_levels_and_the_filters_view(as_base, small):
    task = flow.BaseTask(0, torch.device("cpu"), as_base)
    difference = make_noise((2, 16, 5, 8, 8), [0, 1])
    view = torch.nn.functional.conv2d(difference.transpose(1, 2).flatten(0, 1), task.error.each.filters, padding=1).unflatten(
        0, (2, 5)
    )
    each = (difference.square().mean((1, 2, 3, 4)) + view.square().mean((1, 2, 3, 4))) / 2
    at = torch.tensor([0.5, 1.0])
    torch.testing.assert_close(task.error(difference, at), (each / torch.tensor([0.39, 6.3])).mean())
    between = flow.level_weight(torch.tensor([0.4]))
    torch.testing.assert_close(between, torch.tensor([(0.55 * 0.39) ** -0.5]))


def test_the_guided_base_learns_what_guidance_makes_of_it(as_base, tmp_path, small):
    """The base's velocity, pushed on from the one without a prompt, and from a weaker base's where there is one."""
    task = flow.GuidedTask(0, torch.device("cpu"), as_base)
    task.pool.size = 4
    batch = task.draw(0, 4, slice(1, 3))

    def velocity(network, prompts):
        with torch.no_grad():
            return network(batch.noisy, batch.sigma, task.text.condition(prompts, batch.guidance))

    said = velocity(task.base, batch.prompts)
    pushed = (task.scale - 1) * (said - velocity(task.base, ["", ""]))
    loss = task.error(pushed, batch.sigma)
    torch.testing.assert_close(task.loss(0, 4, slice(1, 3)), loss)  # it starts as the base
    shutil.copytree(as_base, tmp_path / "early")
    state = load_file(as_base / "base.safetensors")
    save_file({name: t * 0.9 for name, t in state.items()}, tmp_path / "early" / "base.safetensors")
    guided = flow.GuidedTask(0, torch.device("cpu"), as_base, tmp_path / "early")
    guided.pool.size = 4
    more = guided.push * (said - velocity(guided.weaker, batch.prompts))
    assert more.abs().max() > 0.1
    torch.testing.assert_close(guided.loss(0, 4, slice(1, 3)), task.error(pushed + more, batch.sigma))
    assert guided.made_from["weaker"] != guided.made_from["base"] == task.made_from["base"] and "weaker" not in task.made_from
    task.scale = 1.0
    assert task.loss(0, 4, slice(1, 3)) < 1e-9 < loss


def test_the_teacher_learns_to_complete_prompts(as_base, tmp_path, small):
    """From a point of a trajectory, with a part of its prompt, it learns where the guided base goes with the whole of it."""
    task = flow.TeacherTask(0, torch.device("cpu"), as_base, tmp_path, 4)
    task.prepare(training.Share())
    assert task.latents.shape == (4, 3, 16, 5, 8, 8) and len(task.sigmas) == 3
    assert all(
        set(named) == set(clips.CLASSES) and read_prompt(p) == named for p, named in zip(task.prompts, task.names, strict=True)
    )
    sigmas = PRESETS["tiny"].sigmas(5)
    for prompt, latents in zip(task.prompts, task.latents, strict=True):
        x = latents[:1].float()  # the noise, rounded to float16, gives the trajectory again
        for i in range(4):
            cond = task.text.condition([prompt], torch.tensor([6.0]))
            with torch.no_grad():
                x = x + (sigmas[i + 1] - sigmas[i]) * task.guided(x, sigmas[i : i + 1], cond).float()
            if i % 2:
                torch.testing.assert_close(latents[(i + 1) // 2][None].float(), x, rtol=0.02, atol=0.02)
    seen = []
    network = task.network

    def spy(noisy, sigma, cond):
        seen.append((noisy, sigma, cond))
        return network(noisy, sigma, cond)

    task.network = spy
    loss = task.loss(0, 4, slice(1, 3))
    (noisy, sigma, cond) = seen[0]
    places = [(int(i), int(k)) for x in noisy for i in range(4) for k in range(3) if torch.equal(task.latents[i, k].float(), x)]
    assert len(places) == 2 and torch.equal(sigma, task.sigmas[[k for _, k in places]])
    whole = task.text.condition([task.prompts[i] for i, _ in places], cond.guidance)
    with torch.no_grad():
        expected = task.error(network(noisy, sigma, cond).float() - task.guided(noisy, sigma, whole).float(), sigma)
    torch.testing.assert_close(loss, expected)
    assert loss > 0  # the prompt it sees leaves something open


def test_the_student_learns_its_first_segments_from_more_trajectories(as_base, tmp_path, small):
    """Two whole trajectories and five that end at the third key point; a segment is learned from all that have it, and the first
    are solved in five steps of second order each."""
    start = tmp_path / "start.safetensors"
    state = load_file(as_base / "teacher.safetensors")
    save_file({name: t * 0.9 for name, t in state.items()}, start)
    task = StudentTask(0, torch.device("cpu"), as_base, tmp_path, 2, early=5, start=start)
    assert all(torch.equal(p, (state[name] * 0.9).float()) for name, p in task.network.named_parameters())
    task.prepare(training.Share())
    assert [len(latents) for latents in task.latents] == [7, 7, 7, 7, 2, 2] and len(set(task.prompts)) == 7
    noise = [latents.float() for latents in task.latents[:4]]
    cond = task.text.condition(task.prompts[2:], torch.full((5,), 6.0))
    with torch.no_grad():
        solved = multistep_flow(lambda x, s: task.teacher(x, s, cond), noise[0][2:], PRESETS["tiny"].sigmas(25)[:16])[5::5]
    for expected, latents in zip(solved, noise[1:], strict=True):
        torch.testing.assert_close(latents[2:], expected, rtol=0.02, atol=0.02)
    seen, network = [], task.network

    def spy(noisy, sigma, cond):
        seen.append((noisy, sigma, cond))
        return network(noisy, sigma, cond)

    task.network = spy
    places = set()
    for step in range(4):
        loss = task.loss(step, 10, slice(2, 9))
        noisy, sigma, cond = seen[step]
        found = [(k, i) for x in noisy for k in range(5) for i, y in enumerate(task.latents[k]) if torch.equal(y.float(), x)]
        places |= set(found)
        assert len(found) == 7 and torch.equal(sigma, task.sigmas[[k for k, _ in found]])
        said = task.text.condition([task.prompts[i] for _, i in found], cond.guidance)
        assert torch.equal(said.text, cond.text)
        change = torch.stack([task.latents[k + 1][i].float() - task.latents[k][i].float() for k, i in found])
        fall = torch.tensor([float(task.sigmas[k + 1] - task.sigmas[k]) for k, _ in found]).view(-1, 1, 1, 1, 1)
        with torch.no_grad():
            torch.testing.assert_close(loss.detach(), task.error(network(noisy, sigma, cond) - change / fall).mean())
    assert {k for k, i in places if i > 1} == {0, 1, 2} and {k for k, i in places if i < 2} >= {3, 4}


def test_a_student_is_given_its_teachers_last_step_and_held_in_the_others(as_base, tmp_path, small):
    """Where it arrives itself, from new noise and prompts alone: nothing is captured for it."""
    start = tmp_path / "start.safetensors"
    save_file({name: t * 0.9 for name, t in load_file(as_base / "teacher.safetensors").items()}, start)
    how = {"push": (0, 0, 0, 0, -1), "teacher_steps": 2, "turns": (4, 1, 4)}
    task = StudentTask(0, torch.device("cpu"), as_base, tmp_path / "run", 3, start=start, **how)
    task.prepare(training.Share())
    assert not (tmp_path / "run").exists()
    first, seen, network = load_student(start, dtype=torch.float32), [], task.network
    task.network = lambda *given: seen.append(given) or network(*given)
    loss, again = task.loss(0, 6, slice(0, 6)), task.loss(0, 6, slice(2, 4))
    (latent, sigma, cond), (part, _, _) = seen
    torch.testing.assert_close(part, latent[2:4], rtol=1e-4, atol=1e-4)
    assert sorted(sigma.tolist(), reverse=True) == [task.sigmas[1]] * 2 + [task.sigmas[4]] * 4
    generator = clips.keyed_generator(0, "student", 0)  # what is drawn before the noise
    torch.randperm(6, generator=generator), torch.rand(6, generator=generator, dtype=torch.float64)
    draw_guidance(6, generator)
    noise, prompts = draw_noise_and_prompts(6, generator)
    assert torch.equal(task.text.condition(prompts, cond.guidance).text, cond.text)

    def row_of(row):
        """What row of the batch it is to begin with, and its velocity there."""
        told, level = cond.rows([row]), sigma[row : row + 1]
        until = task.sigmas[: task.sigmas.tolist().index(float(level)) + 1]
        arrived = euler_flow(lambda x, s: first(x, s, told), noise[row : row + 1], until)
        if level == task.sigmas[1]:
            return arrived, first(arrived, level, told)
        end = euler_flow(lambda x, s: task.teacher(x, s, told), arrived, PRESETS["tiny"].sigmas(10)[8:])
        return arrived, (arrived - end) / task.sigmas[4]

    with torch.no_grad():
        expected, due = (torch.cat(rows) for rows in zip(*map(row_of, range(6)), strict=True))
        torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loss.detach(), task.error(network(latent, sigma, cond) - due).mean())
        torch.testing.assert_close(again.detach(), task.error((network(latent, sigma, cond) - due)[2:4]).mean())


def test_a_students_second_step_is_pushed_on_from_the_teachers(as_base, tmp_path, small):
    """Where it arrives itself from new noise, half as far again as it lies from where one step of the teacher's goes; the other
    segments are learned as ever."""
    start = tmp_path / "start.safetensors"
    save_file({name: t * 0.9 for name, t in load_file(as_base / "teacher.safetensors").items()}, start)
    how = {"push": (None, 0.5, None, None, None), "turns": (0, 1, 1, 1, 1, 1, 2, 2, 3, 4)}
    task = StudentTask(0, torch.device("cpu"), as_base, tmp_path, 3, start=start, **how)
    task.prepare(training.Share())
    first = load_student(start, dtype=torch.float32)
    seen, pushed, network, push = [], [], task.network, task.pushed
    task.network = lambda *given: seen.append(given) or network(*given)
    task.pushed = lambda *given: pushed.append((given, push(*given))) or pushed[-1][1]
    loss = task.loss(0, 10, slice(1, 8))
    ((noisy, sigma, cond),), (((noise, _, told), (latent, due)),) = seen, pushed
    second = sigma == task.sigmas[1]
    assert 3 <= len(noise) == int(second.sum()) and noise.std() == pytest.approx(1, abs=0.05)
    assert torch.equal(noisy[second], latent) and torch.equal(cond.text[second], told.text) and len(noise[0].unique()) > 5000
    levels = [level.expand(len(noise)) for level in task.sigmas[:2]]
    with torch.no_grad():
        arrived = noise + (task.sigmas[1] - task.sigmas[0]) * first(noise, levels[0], told)
        torch.testing.assert_close(latent, arrived)
        torch.testing.assert_close(due, 1.5 * first(arrived, levels[1], told) - 0.5 * task.teacher(arrived, levels[1], told))
        found = [
            (k, i) for x in noisy[~second] for k in range(5) for i, y in enumerate(task.latents[k]) if torch.equal(y.float(), x)
        ]
        change = torch.stack([task.latents[k + 1][i].float() - task.latents[k][i].float() for k, i in found])
        fall = torch.tensor([float(task.sigmas[k + 1] - task.sigmas[k]) for k, _ in found]).view(-1, 1, 1, 1, 1)
        target = torch.empty_like(noisy)
        target[second], target[~second] = due, change / fall
        torch.testing.assert_close(loss.detach(), task.error(network(noisy, sigma, cond) - target).mean())
    assert torch.equal(task.first.final_layer.linear.bias, first.final_layer.linear.bias) and not task.first.training


def test_a_student_that_started_from_another_says_so(as_base, tmp_path, small):
    start = weights_path("student")
    weights = shutil.copytree(as_base, tmp_path / "w")
    (path,) = train("student", tmp_path, 1, weights=weights, trajectories=2, early=2, start=start)
    with safe_open(path, "pt") as file:
        known = file.metadata()
    assert known["early"] == "2" and known["start"] == part_hash("student")
    before = contents(weights)
    with pytest.raises(InvalidValueError, match="made from something else"):
        train("student", tmp_path, 2, weights=weights, trajectories=2, early=2)
    other = tmp_path / "other.safetensors"
    save_file(HunyuanVideoDiT(replace(DiTConfig.tiny(), depth_single=1)).init_weights(0).state_dict(), other)
    with pytest.raises(InvalidValueError, match=r"other.safetensors', which is not of the tiny teacher's size"):
        train("student", tmp_path / "again", 1, weights=weights, trajectories=2, start=other)
    assert contents(weights) == before


def test_the_decoder_learns_from_what_teacher_and_student_denoised(as_base):
    """Of six latents one is a clip's own, one has a little noise, two are the teacher's from up to sigma 0.75, two the student's
    from one of its last two keys; all are held to the clip."""
    shutil.copy(weights_path("student"), as_base)
    task = DecoderTask(0, torch.device("cpu"), as_base)
    clean, noise = make_noise((2, 16, 5, 8, 8), [0, 1]), make_noise((2, 16, 5, 8, 8), [2, 3])
    evenly, keys = task.ways(torch.tensor([0.4, 0.8]), torch.tensor([0, 1]))
    torch.testing.assert_close(evenly, torch.tensor([[0.3, 0.225, 0.15, 0.075, 0], [0.6, 0.45, 0.3, 0.15, 0]]))
    torch.testing.assert_close(keys, torch.tensor([[14 / 17, 7 / 11, 0], [7 / 11, 7 / 11, 0]]))
    seen = []

    def straight(latent, now, cond):
        seen.append((latent, now))
        return noise - clean

    for sigmas in (evenly, keys):
        seen.clear()
        torch.testing.assert_close(task.denoise(straight, clean, noise, sigmas, ["a shape", ""]), clean, atol=1e-5, rtol=0)
        assert len(seen) == sigmas.shape[1] - 1
        for (latent, now), sigma in zip(seen, sigmas.T, strict=False):
            torch.testing.assert_close(now, sigma)
            torch.testing.assert_close(latent, torch.lerp(clean, noise, now.view(-1, 1, 1, 1, 1)), atol=1e-5, rtol=0)
    held = []
    task.error = lambda latent, frames, weight: held.append((latent, frames)) or latent.mean()
    task.denoise = lambda network, clean, noise, sigmas, prompts: torch.full_like(clean, 7.0 if network is task.student else 8.0)
    task.loss(0, 7, slice(1, 7))
    ((latent, frames),) = held
    own = task.encode(frames)
    assert [float(x.mean()) for x in latent[[0, 1, 3, 4]]] == [8.0, 7.0, 8.0, 7.0]
    assert 0 < (latent[2] - own[2]).std() < task.noise and torch.equal(latent[5], own[5])


@pytest.fixture
def small():
    with in_small():
        yield


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


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


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
    with pytest.raises(CheckpointError, match="reinstall accvideo"):
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
    with pytest.raises(InvalidValueError, match="teacher steps is 0; it must be at least 1"):
        make_task(training.TrainArgs("student", teacher_steps=0), tmp_path, torch.device("cpu"))
    with pytest.raises(InvalidValueError, match=r"turns is \(1, 5\); the segments are 0 to 4"):
        make_task(training.TrainArgs("student", turns=(1, 5)), tmp_path, torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"vae\.safetensors"):
        train("teacher", tmp_path / "empty", 1)
    with pytest.raises(InvalidValueError, match="device 'tpu'"):
        pick_device("tpu")
    with pytest.raises(InvalidValueError, match="device 'meta'"):
        pick_device("meta")


# ---- bundled weights ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student():
    return TinyPipeline.load("student")


def test_bundled_models_load_and_say_what_they_are():
    network, text, vae = load_tiny("teacher")
    assert network.config.hidden_size == 128 and network.dtype == torch.float32
    assert not any(p.requires_grad for m in (network, text, vae) for p in m.parameters())


def test_bundled_latents_have_unit_deviation(student):
    scenes = clips.sample_scenes(64, clips.keyed_generator(99))
    latents = student.vae.encode(to_network(clips.render(scenes), torch.device("cpu"))) * LATENT_SCALE
    std = latents.std(dim=(0, 2, 3, 4))
    assert float(std.min()) > 0.8 and float(std.max()) < 1.25


def test_bundled_vae_keeps_colour_and_background(student):
    scenes = clips.sample_scenes(32, clips.keyed_generator(98))
    video = to_network(clips.render(scenes), torch.device("cpu"))
    rebuilt = student.vae.decode(student.vae.encode(video))
    verdicts = [oracle.read(((c + 1) / 2).permute(1, 2, 3, 0).numpy()) for c in rebuilt]
    for kind in ("colour", "background"):
        assert np.mean([v[kind] == (scenes.names(i)[kind], True) for i, v in enumerate(verdicts)]) >= 0.9


def test_a_clip_does_not_depend_on_its_batch(student):
    both = student.generate([PROMPT, "a shape"], [3, 4])
    alone = student.generate([PROMPT], [3])
    torch.testing.assert_close(both.latents[:1], alone.latents, rtol=1e-3, atol=1e-3)
    assert both.frames.shape == (2, 17, 64, 64, 3) and both.frames.dtype == np.uint8
    assert set(both.seconds) == {"text", "sampling", "vae"}


def test_other_sizes_generate_too(student):
    assert student.generate(["a shape"], [0], frames=5, height=32, width=48).frames.shape == (1, 5, 32, 48, 3)


def test_generation_is_noise_conditioning_and_euler(student):
    """The pipeline's latent, rebuilt by hand."""
    made = student.generate([PROMPT], [11])
    latent = make_noise((1, 16, 5, 8, 8), [11])
    sigmas = [1, 28 / 29, 21 / 23, 14 / 17, 7 / 11, 0.0]
    with torch.no_grad():
        conditioning = student.condition([PROMPT])
        for high, low in pairwise(sigmas):
            latent = latent + (low - high) * student.network(latent, torch.tensor([high]), conditioning)
    torch.testing.assert_close(made.latents, latent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "said"),
    [((16, 64, 64), "frames is 16.*13 or 17|17"), ((17, 60, 64), "height is 60.*48 or 64"), ((17, 64, 0), "width is 0")],
)
def test_impossible_sizes_are_named(size, said):
    with pytest.raises(InvalidValueError, match=said):
        latent_shape(*size)


# ---- commands -------------------------------------------------------------------------------------------------------


def test_generate_writes_a_video_and_its_recipe(tmp_path, capsys):
    from accvideo_core.headless import generate
    from accvideo_core.media import read_mp4

    path = tmp_path / "clip.mp4"
    assert generate.run(generate.GenerateArgs(PROMPT, path, seed=5, upscale=2, json=True, device="cpu")) == 0
    said = json.loads(capsys.readouterr().out)
    video = read_mp4(path)
    assert video.frames.shape == (17, 128, 128, 3) and video.fps == 8
    assert said["steps"] == 5 and said["file"] == str(path) and said["seconds"]["sampling"] > 0
    assert json.loads(video.metadata["accvideo"])["seed"] == 5


def test_compare_writes_video_and_sheet_and_measures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "COLUMNS", (("teacher", 10), ("teacher", 2), ("student", 2)))
    assert compare.run(compare.CompareArgs((PROMPT, "a shape"), tmp_path, upscale=1, json=True, device="cpu")) == 0
    said = json.loads(capsys.readouterr().out)
    assert (tmp_path / "comparison.mp4").is_file() and (tmp_path / "comparison.png").is_file()
    seconds = said["sampling_seconds"]
    assert set(seconds) == {"teacher_10", "teacher_2", "student_2"}
    assert said["speedup"] == pytest.approx(seconds["teacher_10"] / seconds["student_2"])


def test_evaluate_scores_and_keeps_the_frames(tmp_path, capsys):
    plan = tmp_path / "plan.jsonl"
    rows = [
        {"prompt": PROMPT, "seed": i, "named": {"colour": "red", "shape": "circle", "motion": "left", "background": "black"}}
        for i in range(3)
    ]
    plan.write_text("\n".join(json.dumps(r) for r in rows))
    kept = tmp_path / "frames.npz"
    assert evaluation.run(evaluation.EvaluateArgs(plan, frames_out=kept, batch=2, json=True, device="cpu")) == 0
    said = json.loads(capsys.readouterr().out)
    frames = np.load(kept)["frames"]
    assert frames.shape == (3, 17, 64, 64, 3) and frames.dtype == np.uint8 and said["clips"] == 3
    assert said["background"]["named_right"] == np.mean([oracle.read(f)["background"].name == "black" for f in frames])


@pytest.mark.skipif(not (EXAM / "score.py").is_file(), reason=f"no reference scorer in {EXAM} (set ACCVIDEO_EXAM)")
def test_the_reference_scorer_reads_the_frames_and_agrees(tmp_path, capsys):
    lines = (EXAM / "heldout.jsonl").read_text().splitlines()[:12]
    plan, kept = tmp_path / "plan.jsonl", tmp_path / "frames.npz"
    plan.write_text("\n".join(lines))
    evaluation.run(evaluation.EvaluateArgs(plan, frames_out=kept, json=True, device="cpu"))
    ours = json.loads(capsys.readouterr().out)
    command = [sys.executable, str(EXAM / "score.py"), str(kept), "--plan", str(plan), "--json"]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert ours["right_95"] == pytest.approx(theirs["right_95"], abs=0.1) and ours["clips"] == theirs["clips"] == 12
    for kind in clips.CLASSES:  # one clip in twelve may be read differently: the oracles agree on 97 % of damaged clips
        assert ours[kind] == pytest.approx(theirs[kind], abs=0.1)


def test_scores_are_right_on_true_and_on_wrong_clips():
    scenes = clips.sample_scenes(40, clips.keyed_generator(3))
    video = (clips.render(scenes).numpy() * 255).round().astype(np.uint8)
    rows = [evaluation.Row("", 0, scenes.names(i)) for i in range(40)]
    assert evaluation.score(video, rows)["right"] == 1.0
    wrong = [evaluation.Row("", 0, {"colour": "red" if scenes.names(i)["colour"] != "red" else "blue"}) for i in range(40)]
    result = evaluation.score(video, wrong)
    assert result["right"] == 0.0 and result["valid"] == 1.0 and result["colour"]["named_right"] == 0.0
    low, high = result["right_95"]
    assert low == pytest.approx(0, abs=1e-9) and 0.05 < high < 0.12


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no rows"),
        ('{"prompt": null, "seed": 1}', "prompt is None"),
        ('{"prompt": "a", "seed": 1.5}', "seed is 1.5"),
        ('{"prompt": "on the", "seed": 1}', "no word of"),
        ("{not json}", "line 1"),
        ('{"prompt": "a"}', "seed"),
        ('{"prompt": "a", "seed": 1, "named": {"colour": "pink"}}', "pink"),
    ],
)
def test_bad_plans_are_named(tmp_path: Path, text, said):
    plan = tmp_path / "plan.jsonl"
    plan.write_text(text)
    with pytest.raises(AccVideoError, match=said):
        evaluation.read_plan(plan)
    with pytest.raises(AccVideoError, match="cannot read the plan"):
        evaluation.read_plan(tmp_path / "missing.jsonl")
