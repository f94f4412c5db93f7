"""What each part of the tiny world is trained on: targets and losses of base, teacher, student and decoder."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accvideo_core.checkpoint import load_student
from accvideo_core.dit import DiTConfig, HunyuanVideoDiT
from accvideo_core.errors import InvalidValueError
from accvideo_core.sampling import euler_flow, make_noise, multistep_flow
from accvideo_core.schedule import PRESETS
from accvideo_core.tiny import LATENT_SCALE, clips, load_tiny, part_hash, training, weights_path
from accvideo_core.tiny.prompts import read_prompt
from accvideo_core.tiny.tasks import flow, make_task
from accvideo_core.tiny.tasks.common import draw_guidance, to_network
from accvideo_core.tiny.tasks.student import StudentTask, draw_noise_and_prompts
from accvideo_core.tiny.tasks.vae import DecoderTask
from tests.tiny_training import contents, train


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


META = torch.device("meta")


class WithoutFloat64(TorchDispatchMode):
    """Makes of "meta" a device as MPS is, without float64. Numbers that go from it to the CPU are made up."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device", META) != META:
            return torch.rand(args[0].shape).to(kwargs.get("dtype") or args[0].dtype)
        made = func(*args, **kwargs)
        if any(isinstance(t, torch.Tensor) and t.is_meta and t.dtype == torch.float64 for t in tree_leaves(made)):
            raise TypeError(f"{func} makes a float64 tensor on a device without float64")
        return made


@pytest.mark.parametrize("part", ["base", "guided", "teacher", "student"])
def test_parts_are_made_and_learn_on_a_device_without_float64(part, as_base, tmp_path, small, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kw: contextlib.nullcontext())  # there is none for this device
    with WithoutFloat64():
        task = make_task(training.TrainArgs(part, run=tmp_path, trajectories=2), as_base, META)
        filters = task.error.filters if part == "student" else task.error.each.filters
        assert filters.device == META and filters.dtype == torch.float32 and filters.shape == (12, 16, 3, 3)
        if part in ("base", "guided"):
            task.pool.size = 4
        task.prepare(training.Share())
        task.loss(0, 4, slice(0, 2)).backward()


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


@pytest.mark.parametrize("amplitude", [1.0, 0.75])
def test_a_student_is_given_its_teachers_last_step_and_held_in_the_others(as_base, tmp_path, small, amplitude):
    """Where it arrives itself, from new noise and prompts alone: nothing is captured for it. The last step may be to lead to so
    much of the clean latent."""
    start = tmp_path / "start.safetensors"
    save_file({name: t * 0.9 for name, t in load_file(as_base / "teacher.safetensors").items()}, start)
    how = {"push": (0, 0, 0, 0, -1), "teacher_steps": 2, "turns": (4, 1, 4), "amplitude": amplitude}
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
        return arrived, (arrived - amplitude * end) / task.sigmas[4]

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
