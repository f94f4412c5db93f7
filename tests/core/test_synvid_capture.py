"""Captured trajectories against an independent solve; what happens when the disk is slow or full, or a sample is broken."""

from __future__ import annotations

import json
import shutil
import threading
import time

import pytest
import torch

from accvideo_core import cli
from accvideo_core.checkpoint.fingerprint import fingerprint
from accvideo_core.dit import Conditioning
from accvideo_core.errors import InvalidValueError, OutputError, SynVidError
from accvideo_core.headless.models import TinyText
from accvideo_core.sampling import Step, euler_flow, make_noise
from accvideo_core.schedule import flow_sigmas
from accvideo_core.synvid import Header, SynVidStore
from accvideo_core.synvid.capture import KeyLatents, batches, capture, my_share, stack_texts
from accvideo_core.synvid.plan import Plan
from accvideo_core.tiny import load_tiny
from tests.soak.capture_restart import make_plan, soak

PROMPTS = ("a red ball moving left on a black background", "a shape", "an azure box rising")
SHAPE = (16, 5, 8, 8)


# ---- the trajectory itself --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher():
    network, _, _ = load_tiny("teacher")
    return network


@pytest.fixture(scope="module")
def captured(teacher, tmp_path_factory):
    """(store, conditioning, noise): the tiny teacher's trajectories of PROMPTS as one batch, stored in float32."""
    folder = tmp_path_factory.mktemp("captured")
    plan, encoder = Plan(folder / "plan", create=True), TinyText(torch.device("cpu"))
    for seed, prompt in enumerate(PROMPTS):
        plan.add(prompt, *encoder.encode(prompt), seed, SHAPE, f"s{seed}")
    header = Header.of("tiny", fingerprint(teacher.state_dict().items()), dtype="float32")
    store = SynVidStore(folder / "dataset", header)
    assert capture(teacher, plan, list(plan.items.values()), store, batch=3) == []
    texts = [plan.text(item.text) for item in plan.items.values()]
    return store, stack_texts(texts, 6.0), make_noise((3, *SHAPE), range(3))


@pytest.fixture(scope="module")
def solved(teacher, captured):
    """{step: latent} of 50 Euler steps written out here, and the same with a float64 state, for the same batch."""
    _, conditioning, noise = captured
    sigmas = [float(torch.tensor(7 * t / (1 + 6 * t)).float()) for t in (1 - i / 50 for i in range(51))]
    latent, exact = noise.clone(), noise.double()
    path, exact_path = {0: latent}, {0: exact}
    with torch.inference_mode():
        for j in range(50):
            sigma, dt = torch.full((3,), sigmas[j]), sigmas[j + 1] - sigmas[j]
            latent = latent + dt * teacher(latent, sigma, conditioning)
            exact = exact + dt * teacher(exact.float(), sigma, conditioning).double()
            path[j + 1], exact_path[j + 1] = latent, exact
    return sigmas, path, exact_path


def test_a_captured_trajectory_is_an_independent_solve_bit_for_bit(captured, solved):
    store, _, noise = captured
    sigmas, path, exact = solved
    for key in range(6):
        position = 50 - 10 * key
        stored = torch.stack([store.read(f"s{row}", key) for row in range(3)])
        assert torch.equal(stored, path[position])
        torch.testing.assert_close(stored.double(), exact[position], rtol=1e-4, atol=1e-4)
        assert store.header.key_sigmas[key] == sigmas[position]
    assert torch.equal(noise, torch.stack([store.noise(f"s{row}") for row in range(3)]))
    assert sigmas[50] == 0 and sigmas[0] == 1 and sigmas[10] == pytest.approx(28 / 29)


def test_segment_velocities_survive_storage_in_float16(captured, solved):
    """Relative rms error of the velocity rebuilt from rounded key latents; the noise is made again and never rounded."""
    sigmas, path, _ = solved
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        rounded = {k: path[50 - 10 * k].to(dtype).float() if k < 5 else path[0] for k in range(6)}
        for k in range(5):
            dt = sigmas[50 - 10 * k] - sigmas[40 - 10 * k]
            true = (path[50 - 10 * k] - path[40 - 10 * k]) / dt
            errors[k, dtype] = float(((rounded[k] - rounded[k + 1]) / dt - true).norm() / true.norm())
    for k in reversed(range(5)):
        print(f"segment {k + 1} -> {k}: float16 {errors[k, torch.float16]:.3%}, bfloat16 {errors[k, torch.bfloat16]:.3%}")
    assert max(errors[k, torch.float16] for k in range(5)) <= 0.01
    assert errors[4, torch.bfloat16] > 0.01  # why it is float16


def test_full_capture_keeps_every_latent_and_key_only_what_lies_at_the_keys():
    noise, sigmas = make_noise((2, 4, 1, 2, 2), [0, 1]), flow_sigmas(10, 7.0)
    every, keys, steps = KeyLatents(10, 10), KeyLatents(10, 5), []
    euler_flow(lambda x, s: torch.tanh(x), noise, sigmas, [every, keys, lambda step: steps.append(step.latent)])
    assert all(torch.equal(a, b) for a, b in zip(every.latents(), reversed(steps), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(keys.latents(), reversed(steps[1::2]), strict=True))


def test_a_key_latent_is_a_copy_and_needs_the_whole_schedule():
    keys, latent = KeyLatents(2, 2), torch.ones(1, 1, 1, 1, 1)
    keys(Step(0, 2, 1.0, 0.5, latent, latent, latent))
    latent.zero_()
    with pytest.raises(SynVidError, match="1 of 2 key latents"):
        keys.latents()
    keys(Step(1, 2, 0.5, 0.0, latent, latent, latent))
    assert [float(key) for key in keys.latents()] == [0, 1]
    with pytest.raises(InvalidValueError, match="2 steps is to be kept, but 3"):
        keys(Step(0, 3, 1.0, 0.5, latent, latent, latent))


# ---- captures that go wrong -------------------------------------------------------------------------------------------


def network(latent, sigma, conditioning):
    """A stand-in of no cost; a text of 7s means a broken sample."""
    broken = (conditioning.text[:, 0, 0] == 7).view(-1, 1, 1, 1, 1)
    return torch.where(broken, float("nan"), latent.tanh())


def small(folder, count=6, broken=()):
    """(plan, store) of `count` samples a, b, c, ... of two steps."""
    plan = Plan(folder / "plan", create=True)
    for i in range(count):
        text = torch.full((2, 3), 7.0 if i in broken else float(i))
        plan.add(f"prompt {i}", text, torch.zeros(4), i, (2, 1, 2, 2 if i % 3 else 4), "abcdefghijklmnopqrstuvwxyz"[i])
    return plan, SynVidStore(folder / "dataset", Header.of("tiny", "0" * 64, 2, 2))


def test_a_broken_sample_is_named_and_takes_no_other_with_it(tmp_path):
    plan, store = small(tmp_path, broken=[1])
    done = []
    faults = capture(network, plan, list(plan.items.values()), store, batch=2, progress=done.append)
    assert len(faults) == 1 and "sample b" in faults[0] and "NaN" in faults[0]
    assert set(store.samples()) == set("acdef") and sum(done) == 5 and store.verify() == []
    assert [item.id for item in my_share(plan, store)] == ["b"]


def test_a_capture_gives_up_when_nothing_works(tmp_path):
    plan, store = small(tmp_path, 20, range(20))
    with pytest.raises(SynVidError, match="11 trajectories could not be stored.*sample a"):
        capture(network, plan, list(plan.items.values()), store)


def test_a_full_disk_ends_the_capture_and_keeps_what_is_there(tmp_path, monkeypatch):
    plan, store = small(tmp_path)
    real, calls = store.commit, []

    def commit(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OutputError("no space left on device")
        real(*arguments)

    monkeypatch.setattr(store, "commit", commit)
    with pytest.raises(OutputError, match="no space"):
        capture(network, plan, list(plan.items.values()), store)
    monkeypatch.undo()
    assert 2 <= len(store.samples()) < 6 and store.verify() == []
    assert capture(network, plan, my_share(plan, store), store) == [] and len(store.samples()) == 6


def test_sampling_does_not_wait_for_the_disk_until_two_batches_do(tmp_path, monkeypatch):
    plan, store = small(tmp_path, 5)
    real, disk, sampled = store.commit, threading.Event(), []

    def commit(*arguments):
        assert disk.wait(30)
        real(*arguments)

    def watched(latent, sigma, conditioning):
        sampled.append(float(conditioning.text[0, 0, 0]))
        return latent.tanh()

    monkeypatch.setattr(store, "commit", commit)
    items = list(plan.items.values())
    thread = threading.Thread(target=capture, args=(watched, plan, items, store))
    thread.start()
    deadline = time.monotonic() + 30
    while len(sampled) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    first = sorted(set(sampled))  # two batches wait for the disk, the third for them
    disk.set()
    thread.join(30)
    assert first == [0, 1, 2] and len(store.samples()) == 5


def test_a_batch_has_one_shape_and_its_texts_are_padded(tmp_path):
    plan, _ = small(tmp_path, 7)
    made = [[item.id for item in group] for group in batches(plan.items.values(), 2)]
    assert made == [["b", "c"], ["a", "d"], ["e", "f"], ["g"]]
    row, longer = (torch.ones(n, 3) for n in (1, 2))
    stacked = stack_texts([(row, torch.zeros(4)), (longer, torch.zeros(4))], 6.0)
    assert isinstance(stacked, Conditioning) and stacked.text_mask.tolist() == [[True, False], [True, True]]
    assert stacked.text[0, 1].tolist() == [0, 0, 0] and stacked.guidance.tolist() == [6, 6]
    assert stack_texts([(row, torch.zeros(4))], None).text_mask is None
    with pytest.raises(SynVidError, match="no pooled vector"):
        stack_texts([(row, None)], 6.0)
    with pytest.raises(SynVidError, match="different text encoders"):
        stack_texts([(row, torch.zeros(4)), (torch.ones(1, 2), torch.zeros(4))], 6.0)


# ---- the command ------------------------------------------------------------------------------------------------------


def test_two_processes_killed_half_way_and_one_that_finishes(tmp_path):
    """The short form of tests/soak/capture_restart.py."""
    assert soak(tmp_path, 16, 4, ["--steps", "25"])["captured_once"] == 16


def test_the_capture_command(tmp_path, capsys):
    plan, out = make_plan(tmp_path / "plan", 2), tmp_path / "dataset"
    words = ["capture", "--plan", str(plan.path), "--out", str(out), "--steps", "2", "--batch", "2", "--device", "cpu"]
    assert cli.main([*words, "--full", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["captured"] == 2
    store = SynVidStore(out)
    assert store.header.keys == (0, 1, 2) and store.header.shift == 7 and store.header.guidance == 6
    assert store.header.teacher == "teacher.safetensors" and len(store.header.file_sha256) == 64
    assert cli.main([*words, "--full", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["captured"] == 0
    for changed, said in (
        (["--keys", "1"], "keys: (0, 1, 2) there, (0, 2) here"),
        (["--full", "--shift", "5"], "shift: 7.0 there, 5.0 here"),
        (["--full", "--keys", "2"], "leave out --keys"),
        (["--keys", "3"], "3 key segments do not divide 2 steps"),
    ):
        assert cli.main([*words, *changed]) in (1, 2)
        assert said in capsys.readouterr().err
    shutil.rmtree(plan.path / "text")
    assert cli.main([*words, "--full", "--out", str(tmp_path / "other")]) == 1
    said = capsys.readouterr().err
    assert f"{plan.path}: text/" in said and "cannot be read" in said and "encode the prompts into the plan again" in said
