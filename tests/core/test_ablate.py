"""The ablation: its arms, what they learn from, that it goes on where it stopped, and its table."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from accvideo_core.distill.adapters import adapter_for
from accvideo_core.errors import CheckpointError, InvalidValueError
from accvideo_core.sampling import euler_flow
from accvideo_core.studies import ablate, ablation_report, arms, metrics
from accvideo_core.tiny import load_vae, oracle, weights_path
from accvideo_core.tiny.pipeline import PRESET
from accvideo_core.tiny.prompts import read_prompt
from accvideo_core.tiny.tasks.common import to_network
from accvideo_core.tiny.vae import LATENT_SCALE

CPU = torch.device("cpu")
DONE = ("teacher-5", "full", "forward-mismatched")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    """The bundled world with the first 1 + 2 blocks of its teacher, sampled in 10 steps."""
    folder = tmp_path_factory.mktemp("weights")
    for part in ("vae", "text_encoder"):
        shutil.copy(weights_path(part), folder)
    state = load_file(weights_path("teacher"))
    kept = {n: t for n, t in state.items() if not n.startswith(("double_blocks.1", "double_blocks.2", *_single(2, 6)))}
    save_file(kept, folder / "teacher.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCVIDEO_TINY_WEIGHTS", str(folder))
        for module in (ablate, arms):
            patch.setattr(module, "PRESET", dataclasses.replace(PRESET, teacher_steps=10))
        yield folder


def _single(start: int, end: int) -> tuple[str, ...]:
    return tuple(f"single_blocks.{i}." for i in range(start, end))


def arguments(out: Path, **changes) -> ablate.AblateArgs:
    small = dict(arms=DONE, seeds=(1,), minutes=1e-4, batch=2, trajectories=3, rows=2, device="cpu", json=True)
    return ablate.AblateArgs(out=out, **small | changes)


@pytest.fixture(scope="module")
def done(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that has run."""
    out = tmp_path_factory.mktemp("study")
    assert ablate.run(arguments(out, docs=out / "docs")) == 0
    return out


def test_every_arm_updates_the_student_as_often() -> None:
    for arm in arms.ARMS.values():
        if arm.config is not None:
            assert arm.iterations(60) * arm.updates == 60
            config = ablate.config_of(ablate.AblateArgs(), arm, 60, 3)
            assert (config.seed, config.iterations) == (3, arm.iterations(60))
    assert arms.ARMS["full"].updates == 10 and arms.ARMS["adversarial"].updates == arms.ARMS["x0"].updates == 5


def test_a_study_leaves_results_table_and_figure(done: Path) -> None:
    for arm, seed in (("teacher-5", 0), ("full", 1), ("forward-mismatched", 1)):
        result = json.loads((done / arm / f"seed-{seed}" / "result.json").read_text())
        assert (result["arm"], result["seed"], result["score"]["clips"]) == (arm, seed, 2)
        assert (result["config"] is None) == (arm == "teacher-5")
        assert not (done / arm / f"seed-{seed}" / "checkpoints").exists()
    full = json.loads((done / "full" / "seed-1" / "result.json").read_text())
    assert full["recipe"]["updates"] == 10 and full["config"]["iterations"] == 1 and "logits/real/key_0" in full["last"]
    assert not (done / "teacher-5" / "seed-1").exists() and not (done / "adversarial").exists()
    table = (done / "ablation.md").read_text()
    assert "| both losses, a head for every key (AccVideo) |" in table and "adversarial loss alone" not in table
    assert (done / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "(images/ablation.png)" in (done / "docs" / "ablation.md").read_text() and (done / "docs/images/ablation.png").exists()


def test_what_is_done_is_not_done_again(done: Path, monkeypatch, capsys) -> None:
    for name in ("do", "teacher_made", "measured_updates"):
        monkeypatch.setattr(ablate, name, lambda *_: pytest.fail("it was done already"))
    assert ablate.run(arguments(done)) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


def test_an_arm_goes_on_where_it_was_stopped(done: Path, tmp_path: Path, monkeypatch) -> None:
    """To the same student as without the stop."""
    shutil.copytree(done, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "forward-mismatched" / "seed-1")
    real = ablate.Trainer.save

    def save(trainer, iteration: int) -> None:
        real(trainer, iteration)
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate.Trainer, "save", save)
    with pytest.raises(KeyboardInterrupt):
        ablate.run(arguments(tmp_path / "stopped"))
    monkeypatch.setattr(ablate.Trainer, "save", real)
    steps = []
    monkeypatch.setattr(
        ablate.Trainer, "iteration", lambda self, i, real=ablate.Trainer.iteration: (steps.append(i), real(self, i))
    )
    ablate.run(arguments(tmp_path / "stopped"))
    assert steps == [1]
    ours, theirs = (
        load_file(folder / "forward-mismatched" / "seed-1" / "student.safetensors") for folder in (tmp_path / "stopped", done)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_arm_takes_the_time_of_all_its_iterations_whenever_they_were_done(done: Path, tmp_path: Path, monkeypatch) -> None:
    """Stopped after the first of two, and again when it is trained but not judged."""
    shutil.copytree(done, tmp_path / "stopped")
    folder = tmp_path / "stopped" / "forward-mismatched" / "seed-1"
    shutil.rmtree(folder)
    report, save, make = ablate.Trainer._report, ablate.Trainer.save, ablate.make

    def stop(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate.Trainer, "_report", lambda self, n, start: report(self, n, start) | {"speed/seconds": 100.0 * n})
    monkeypatch.setattr(ablate.Trainer, "save", lambda self, n: save(self, n) or stop())
    with pytest.raises(KeyboardInterrupt):
        ablate.run(arguments(tmp_path / "stopped"))
    monkeypatch.setattr(ablate.Trainer, "save", save)
    monkeypatch.setattr(ablate, "make", stop)
    with pytest.raises(KeyboardInterrupt):
        ablate.run(arguments(tmp_path / "stopped"))
    monkeypatch.setattr(ablate, "make", make)
    shutil.copytree(tmp_path / "stopped", tmp_path / "unknown")
    ablate.run(arguments(tmp_path / "stopped"))
    result = json.loads((folder / "result.json").read_text())
    assert result["seconds"] == 300 and result["last"]["speed/seconds"] == 200
    assert (tmp_path / "stopped" / "ablation.md").read_text().splitlines()[-3].endswith("| 5.0 |")
    told = tmp_path / "unknown" / "forward-mismatched" / "seed-1" / "checkpoints" / "told.json"
    for damage, said in ((lambda: told.write_text("{"), "cannot read"), (told.unlink, "lacks the times of iterations before")):
        damage()
        with pytest.raises(CheckpointError, match=rf"{said}.*delete .*seed-1' to do that arm again"):
            ablate.run(arguments(tmp_path / "unknown"))


def test_another_study_in_the_same_folder_is_named(done: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"study\.json.*lr 0\.0002, now 0\.1"):
        ablate.run(arguments(done, lr=0.1))
    shutil.copytree(done, tmp_path / "damaged")
    (tmp_path / "damaged" / "full" / "seed-1" / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"seed-1/result\.json.*do that arm again"):
        ablate.run(arguments(tmp_path / "damaged"))
    (tmp_path / "damaged" / "mismatched.safetensors").write_bytes(b"damaged")
    shutil.rmtree(tmp_path / "damaged" / "forward-mismatched")
    (tmp_path / "damaged" / "full" / "seed-1" / "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"mismatched\.safetensors.*delete it"):
        ablate.run(arguments(tmp_path / "damaged", arms=("forward-mismatched",)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"arms": ("full", "best")}, "no arm named best; arms are teacher-50"),
        ({"arms": ()}, r"arms are \(\).* name at least one"),
        ({"seeds": ()}, r"seeds \(\); name at least one"),
        ({"batch": 4}, "batch of 4 from 3"),
        ({"rows": 1}, "rows is 1"),
        ({"minutes": 0.0}, "minutes 0.0"),
    ],
)
def test_bad_arguments_are_named_before_the_work(tmp_path: Path, wrong: dict, said: str) -> None:
    with pytest.raises(InvalidValueError, match=said):
        ablate.run(arguments(tmp_path / "new", **wrong))
    assert not (tmp_path / "new").exists()


def test_a_plan_is_counted_by_its_own_rows(done: Path, world: Path, tmp_path: Path) -> None:
    results = ablate.all_results(done, json.loads((done / "study.json").read_text()))
    for result in results:
        result["recipe"]["rows"] = 200  # of a plan that has fewer
    assert "judged on 2 prompts" in ablation_report.as_markdown(results, ablation_report.summary(results))
    (tmp_path / "plan.jsonl").write_text('{"prompt": "a red ball", "seed": 1}\n')
    with pytest.raises(InvalidValueError, match="has 1 row; intervals need at least 2"):
        ablate.run(arguments(tmp_path / "new", plan=tmp_path / "plan.jsonl"))
    assert not (tmp_path / "new" / "synvid").exists()


def test_forward_diffusion_noises_clips_and_goes_on_as_the_teacher(done: Path, tmp_path: Path) -> None:
    adapter = adapter_for("tiny")
    teacher = adapter.load(weights_path("teacher"), CPU, torch.float32).requires_grad_(False)
    dataset = arms.captured(done, adapter, teacher, 3, 0, CPU, True)
    noisy, clean = arms.forward_segments(tmp_path / "a.safetensors", dataset, "matched", adapter, teacher, 0, CPU, True, rows=2)
    again = arms.forward_segments(tmp_path / "b.safetensors", dataset, "matched", adapter, teacher, 0, CPU, True)
    torch.testing.assert_close(again, (noisy, clean), rtol=1e-2, atol=1e-2)  # whatever is computed at once
    source = arms.ForwardSource(dataset, 2, 0, "matched", noisy, clean)
    own = list(arms.clean_latents(dataset, "matched", 0))
    place = {sample.id: i for i, sample in enumerate(dataset.samples)}
    header = dataset.header
    for key in range(5):
        batch = source.batch(0, key)
        x = torch.stack([own[place[name]] for name in batch.ids])
        left = batch.noisy - (1 - header.key_sigmas[key + 1]) * x
        assert float(left.std()) == pytest.approx(header.key_sigmas[key + 1], rel=0.03)  # what is left is the noise
        told = adapter.conditioning(batch, source.guidance)
        way = torch.tensor(header.sigmas)[header.keys[4 - key] : header.keys[5 - key] + 1]
        reached = euler_flow(lambda z, s, told=told: adapter.velocity(teacher, z, s, told), batch.noisy, way)
        torch.testing.assert_close(batch.clean, reached, rtol=1e-2, atol=1e-2)
    assert source.state() != arms.SynVidSource(dataset, 2, 0).state()


def test_other_clips_show_what_their_prompts_say_but_smaller_and_slower(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen before they are encoded: the decoder, which knows the world's own sizes, takes such for worn larger ones."""
    rendered: list[torch.Tensor] = []
    render = arms.render
    monkeypatch.setattr(arms, "render", lambda scenes: rendered.append(render(scenes)) or rendered[-1])
    adapter = adapter_for("tiny")
    dataset = arms.captured(done, adapter, adapter.load(weights_path("teacher"), CPU, torch.float32), 3, 0, CPU, True)
    for sample, latent in zip(dataset.samples, arms.clean_latents(dataset, "mismatched", 0), strict=True):
        clip = rendered.pop()
        with torch.no_grad():
            torch.testing.assert_close(latent, load_vae().encode(to_network(clip, CPU))[0] * LATENT_SCALE)
        frames = (clip[0] * 255).round().to(torch.uint8).numpy()
        seen = oracle.read(frames)
        for kind in ("colour", "background"):
            assert read_prompt(sample.prompt).get(kind, seen[kind].name) == seen[kind].name
        ground = np.median(frames[:, :3].reshape(-1, 3), axis=0)
        covered = (np.abs(frames.astype(float) - ground).sum(-1) > 60).sum((1, 2))
        assert 20 < np.median(covered) < 110  # the teacher's data cover 130 to 320 pixels


def test_estimates_are_over_seeds_or_over_prompts() -> None:
    def result(arm: str, value: float) -> dict:
        entry = {"value": value, "low": value - 1, "high": value + 1}
        per_key = {"model": [entry], "ratio": [entry], "teacher_forced": [entry], "self_rolled": [entry]}
        energy = {"latent": entry, "pixels": entry}
        found = {"right": {"model": entry}, "diversity": entry, "temporal_energy": energy, "high_frequency_energy": energy}
        return {"arm": arm, "to_teacher": found | dict.fromkeys(("sliced_wasserstein", "mmd", "trajectory_error"), per_key)}

    found = ablation_report.summary([result("teacher-5", 0.5), result("full", 1.0), result("full", 2.0), result("full", 3.0)])
    assert all((e.value, e.low, e.high) == (0.5, -0.5, 1.5) for e in found["teacher-5"])
    assert all(e.value == 2 and e.high == pytest.approx(2 + 4.303 / 3**0.5) for e in found["full"])
    assert list(found) == ["teacher-5", "full"] and len(found["full"]) == len(ablation_report.MEASURES)
    share = ablation_report.MEASURES[0]
    assert ablation_report._cell(metrics.Estimate(0.028, -0.322, 0.377), share) == "2.8% (0.0% to 37.7%)"


def test_one_arm_that_is_far_off_does_not_hide_the_others() -> None:
    left, right = ablation_report._span([1.0, 1.12, 1.07, 1.08, 1.45, 7.04, -3.0, math.nan], 1.0)
    assert 0.9 < left < 1.0 and 1.45 < right < 1.6
    assert ablation_report._span([0.5, 0.5], None) == (0.4, 0.6)
