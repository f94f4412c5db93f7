"""The run around Algorithm 1: what its options do, that it goes on bit for bit after it was killed, what it reports."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from accvideo_core.distill import state
from accvideo_core.distill.config import TrainConfig
from accvideo_core.distill.health import Health
from accvideo_core.distill.parallel import World
from accvideo_core.distill.report import Console
from accvideo_core.distill.rollout import keyed_noise
from accvideo_core.distill.source import Judged
from accvideo_core.distill.trainer import Trainer
from accvideo_core.distill.validation import write_sheet
from accvideo_core.dit import HunyuanVideoDiT
from accvideo_core.errors import AccVideoWarning, InvalidValueError, TrainingError
from tests.distill_data import EXPORTABLE, MINUTE, MadeUp, network, trainer, weights

ROOT = Path(__file__).resolve().parents[2]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def after(iterations: int = 1, **chosen: Any) -> dict[str, Tensor]:
    run = trainer(**chosen)
    for iteration in range(iterations):
        run.iteration(iteration)
    return weights(run)


# ---- options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [{"micro_batch": 1}, {"micro_batch": 3}, {"checkpointing": True}], ids=str)
def test_micro_batches_and_checkpointing_are_the_same_training_as_a_batch_in_one_go(chosen: dict[str, Any]) -> None:
    """By plain gradient descent: Adam makes steps of one size of gradients that differ by rounding alone."""

    def descended(**chosen: Any) -> dict[str, Tensor]:
        run = trainer(r1_weight=10.0, on_policy_weight=0.1, clip=1e9, **chosen)
        run.optimizer, run.head_optimizer = torch.optim.SGD(run.trained, 0.1), torch.optim.SGD(run.heads.parameters(), 0.1)
        run.iteration(0)
        return weights(run) | dict(run.heads.state_dict())

    whole, other = descended(lr=0.1, head_lr=0.1), descended(lr=0.1, head_lr=0.1, **chosen)
    assert all(torch.allclose(whole[name], other[name], rtol=0, atol=1e-5) for name in whole)


def test_processes_that_share_tokens_do_not_train_on_different_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them could not read a sample and took the next."""
    run = trainer()
    before = weights(run)
    monkeypatch.setattr(type(run.world), "agree", lambda self, what: what != ("1.0", "1.1", "1.2", "1.3"))
    with pytest.raises(TrainingError, match=r"read different samples, this one 1\.0, 1\.1, 1\.2, 1\.3: not all of them"):
        run.iteration(0)
    assert not same(before, weights(run))  # the draw before it was trained on


def test_processes_that_share_tokens_do_not_validate_on_different_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(held_out=MadeUp(2))
    monkeypatch.setattr(type(run.world), "agree", lambda self, what: False)
    with pytest.raises(TrainingError, match=r"read different samples, this one 0\.0, 0\.1: not all of them"):
        run.validate(1)


def test_the_export_of_a_lora_copies_its_factors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base, 26 GB of 13 B, stays where it is."""
    run, copied = trainer(EXPORTABLE, lora=2), dict[str, Tensor]()
    full_state = World.full_state

    def observed(self: World, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        copied.update(state := full_state(self, *args, **kwargs))
        return state

    monkeypatch.setattr(World, "full_state", observed)
    run.export(tmp_path / "lora.safetensors", 0)
    assert copied and all(".lora_" in name for name in copied)


class Wordy(MadeUp):
    """Trajectories whose prompts are of another length each time."""

    def batch(self, step: int, key: int) -> Any:
        made = super().batch(step, key)
        return replace(made, text=made.text.repeat(1, 1 + step % 3, 1))


def test_compiled_blocks_stay_compiled_for_every_kind_of_call_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its limit torch computes without the compiler, and tells only its own log."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, fullgraph=True, backend="eager"))
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True, cache_size_limit=8):
        run = trainer(replace(MINUTE, depth_double=2), source=Wordy(), compile=True, micro_batch=1, on_policy_weight=1.0)
        for iteration in range(2):
            run.iteration(iteration)
    torch.compiler.reset()


@pytest.fixture(scope="module")
def usual() -> dict[str, Tensor]:
    return after()


@pytest.mark.parametrize(
    "chosen",
    [
        {"target": "x0"},
        {"trajectory_weight": 0.0},
        {"adversarial_weight": 0.0},
        {"gan_loss": "hinge"},
        {"heads": "one"},
        {"head": "3d"},
        {"seed": 1},
        {"queue_length": 2},
        {"head_warmup": 1},
        {"head_keys": (0,)},
        {"head_keys": (1,)},
        {"on_policy_weight": 1.0},
        {"on_policy_weight": 1.0, "on_policy_keys": (0,)},
    ],
    ids=str,
)
def test_every_option_of_the_method_leads_elsewhere(usual: dict[str, Tensor], chosen: dict[str, Any]) -> None:
    assert not same(usual, after(**chosen))


def test_a_head_or_a_loss_for_a_key_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"head_keys are \(2,\); the trajectories' keys that can have one are 0 to 1"):
        trainer(head_keys=(2,))
    with pytest.raises(
        InvalidValueError, match=r"on_policy_keys are \(0, 5\); the trajectories' keys that can have one are 0 to 1"
    ):
        trainer(on_policy_weight=1.0, on_policy_keys=(0, 5))


class Named(MadeUp):
    """Trajectories whose samples have a name of their own, and another place in the world."""

    def batch(self, step: int, key: int) -> Any:
        made = super().batch(step, key)
        ids = tuple(f"{self.name} {i}" for i in range(len(made.ids)))
        return replace(made, ids=ids, clean=made.clean + len(self.name))


def test_heads_are_shown_accepted_and_rejected_trajectories_each_with_its_weight() -> None:
    weights = {"accepted 0": 2.0, "rejected 1": 3.0, "accepted 3": 0.5}
    judged = Judged(Named(name="accepted"), Named(name="rejected"), weights, "-")
    run = trainer(judged=judged, rejected_share=0.25, head_keys=(0,), gan_loss="hinge")
    heads = copy.deepcopy(run.heads)
    run.iteration(0)

    def logits(source: Any) -> Tensor:
        """Of each sample, by heads that have not learned yet; within 1, where a hinge is a line."""
        batch = source.batch(0, 0)
        features = run.features(batch.clean, 0, run.adapter.conditioning(batch, 6.0))
        said = heads(features, 0, (2, 2, 3)).detach()
        assert said.abs().max() < 1
        return said.flatten(1).mean(1)

    real = (torch.tensor([2.0, 1.0, 1.0, 0.5]) * (1 - logits(judged.accepted))).mean()
    refused = (torch.tensor([1.0, 3.0, 1.0, 1.0]) * (1 + logits(judged.rejected))).mean()
    fake = 1 + run.scalars["logits/fake/key_0"]
    torch.testing.assert_close(run.scalars["adversarial/heads/key_0"], real + 0.75 * fake + 0.25 * refused)
    assert "logits/rejected/key_0" in run.scalars and "adversarial/heads/key_1" not in run.scalars


def test_micro_batches_are_the_same_with_verdicts() -> None:
    def descended(**chosen: Any) -> dict[str, Tensor]:
        judged = Judged(Named(name="accepted"), Named(name="rejected"), {"accepted 0": 2.0, "rejected 1": 3.0}, "-")
        run = trainer(judged=judged, clip=1e9, **chosen)
        run.optimizer, run.head_optimizer = torch.optim.SGD(run.trained, 0.1), torch.optim.SGD(run.heads.parameters(), 0.1)
        run.iteration(0)
        return weights(run) | dict(run.heads.state_dict())

    whole, other = descended(), descended(micro_batch=1)
    assert all(torch.allclose(whole[name], other[name], rtol=0, atol=1e-5) for name in whole)


def test_a_run_goes_on_with_the_verdicts_it_began_with_alone(tmp_path: Path) -> None:
    first, other = (Judged(MadeUp(name="a"), None, {}, digest) for digest in ("first", "other"))
    resumable(tmp_path, iterations=1, judged=first).run()
    for judged, said in ((other, "verdicts first, now other"), (None, "verdicts first, now None")):
        with pytest.raises(InvalidValueError, match=said):
            resumable(tmp_path, iterations=2, judged=judged).run()
    resumable(tmp_path, iterations=2, judged=first, head_keys=None).run()


def test_r1_holds_back_the_heads() -> None:
    runs = [trainer(r1_weight=weight, r1_sigma=0.1, head_lr=1e-2) for weight in (0.0, 1e4)]
    for run in runs:
        for iteration in range(3):
            run.iteration(iteration)
    batch = runs[0].source.batch(99, 0)
    told = runs[0].adapter.conditioning(batch, 6.0)
    noises = [keyed_noise(batch.clean, 0, "disturbance", i, 0) for i in range(8)]
    disturbed = [runs[0].features(batch.clean + 0.1 * noise, 0, told) for noise in noises]
    moved = []
    for run in runs:
        said, *others = (run.heads(f, 0, (2, 2, 3)).detach() for f in (runs[0].features(batch.clean, 0, told), *disturbed))
        moved.append(float(torch.stack([(other - said).square().mean() for other in others]).mean()))
    assert moved[1] < 0.2 * moved[0]


def test_the_trajectory_loss_falls_to_the_trajectories_it_sees_again_and_again() -> None:
    class Few(MadeUp):
        def batch(self, step: int, key: int) -> Any:
            return super().batch(0, key)

    seen: list[dict[str, float]] = []
    sees = [lambda _, scalars: seen.append(dict(scalars))]
    trainer(source=Few(2), batch=2, adversarial_weight=0.0, iterations=20, lr=5e-3, observers=sees).run()
    assert all(seen[-1][f"trajectory/key_{key}"] < 0.6 * seen[0][f"trajectory/key_{key}"] for key in (0, 1))


def test_the_learning_rate_rises_and_stays_or_falls_to_nothing() -> None:
    for decay, last in (("constant", 1.0), ("cosine", 0.0)):
        config = TrainConfig(iterations=100, warmup=10, decay=decay)
        shares = [config.learning_rate_share(i) for i in (0, 4, 9, 10, 55, 100)]
        assert shares[:4] == pytest.approx([0.1, 0.5, 1.0, 1.0]) and shares[5] == pytest.approx(last)
        assert shares[4] == pytest.approx((1 + last) / 2)
        late = TrainConfig(iterations=130, warmup=10, decay=decay, head_warmup=30)  # the student's, behind the heads' warm-up
        assert [late.learning_rate_share(i, late.head_warmup) for i in (34, 39, 85, 130)] == pytest.approx(
            shares[1:3] + shares[4:]
        )
        assert late.learning_rate_share(29, 30) == 0


@pytest.mark.parametrize(
    "chosen, said",
    [
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"ema": 1.0}, "ema is 1.0; it must be at least 0 and below 1"),
        ({"trajectory_weight": 0, "adversarial_weight": 0}, "are all 0, so nothing is learned"),
        ({"on_policy_weight": -1}, "on_policy_weight is -1; it must be at least 0"),
        ({"on_policy_steps": 0}, "on_policy_steps is 0; it must be at least 1"),
        ({"on_policy_keys": ()}, r"on_policy_keys are \(\); name keys from 0"),
        ({"on_policy_keys": (0,)}, r"on_policy_keys are \(0,\), and on_policy_weight is 0"),
        ({"target": "x0", "on_policy_weight": 1}, "target is 'x0', but the on-policy loss regresses"),
        ({"target": "noise"}, "target is 'noise'; choose 'velocity' or 'x0'"),
        ({"gan_loss": "wgan"}, "gan_loss is 'wgan'; choose 'softplus' or 'hinge'"),
        ({"lora": 0}, "lora is 0"),
        ({"rejected_share": 1.5}, "rejected_share is 1.5; it must be from 0 to 1"),
        ({"head_keys": ()}, r"head_keys are \(\); name keys from 0"),
        ({"head_keys": (1, -1)}, r"head_keys are \(1, -1\); name keys"),
        ({"adversarial_weight": 0, "head_keys": (0,)}, r"head_keys is \(0,\), and with an adversarial_weight of 0"),
        ({"adversarial_weight": 0, "head_warmup": 5}, "head_warmup is 5, and with an adversarial_weight of 0 there are no heads"),
        ({"iterations": 3, "head_warmup": 3}, "head_warmup is 3 of 3 iterations, so the student learns nothing"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidValueError, match=said):
        TrainConfig(**chosen)


def test_a_lora_student_trains_its_factors_alone_and_is_exported_as_a_lora(tmp_path: Path) -> None:
    base = network(EXPORTABLE)
    run = trainer(EXPORTABLE, lora=2, iterations=1, folder=tmp_path, student=network(EXPORTABLE))
    run.run()
    names = {name for name, p in run.student.named_parameters() if p.requires_grad}
    assert names and all(".lora_" in name for name in names)
    assert all(torch.equal(p, base.get_parameter(n)) for n, p in run.student.named_parameters() if n not in names)
    file = load_file(tmp_path / "student.safetensors")
    assert file and all(name.endswith((".lora_down.weight", ".lora_up.weight", ".alpha")) for name in file)
    teachers = {p.data_ptr() for p in run.teacher.parameters()} if run.teacher else set()
    assert teachers & {p.data_ptr() for p in run.student.parameters()}  # one base serves both


# ---- going on -------------------------------------------------------------------------------------------------------------

KILLED = """if True:
    import os, signal, sys
    from pathlib import Path
    from tests.core.test_distill_trainer import resumable
    def kill(done, scalars):
        if done == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    resumable(Path(sys.argv[1]), [kill]).run()
"""


def resumable(folder: Path, observers: Any = (), **chosen: Any) -> Trainer:
    settings = dict(iterations=4, save_every=2, queue_length=2, validate_every=3, r1_weight=1.0) | chosen
    return trainer(EXPORTABLE, folder=folder, observers=observers, held_out=MadeUp(batch=2, name="held out"), **settings)


def test_a_killed_run_goes_on_and_equals_an_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    command = [sys.executable, "-c", KILLED, str(broken)]
    torch.set_num_threads(1)
    killed = subprocess.run(command, cwd=ROOT, env=_one_thread(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert state.newest(broken / "checkpoints").name == "step_00000002" and not (broken / "student.safetensors").exists()
    seen: list[int] = []
    runs = [resumable(broken, [lambda done, _: seen.append(done)]), resumable(whole)]
    for run in runs:
        run.run()
    assert seen == [3, 4]
    ours, theirs = (state.newest(folder / "checkpoints") for folder in (broken, whole))
    for part in ("student", "ema", "optimizer", "heads", "head_optimizer", "queues"):
        a, b = (dict(state._walk(state.read(at, part))) for at in (ours, theirs))
        assert a.keys() == b.keys() and len(a) > 0
        for name in a:
            equal = torch.equal(a[name], b[name]) if isinstance(a[name], Tensor) else a[name] == b[name]
            assert equal, f"{part}: {name}"
    assert runs[0].best == runs[1].best is not None
    for file in ("student", "best"):
        assert same(*(load_file(folder / f"{file}.safetensors") for folder in (broken, whole)))


def _one_thread() -> dict[str, str]:
    import os

    return os.environ | {"OMP_NUM_THREADS": "1"}


def test_queues_can_be_left_behind(tmp_path: Path) -> None:
    resumable(tmp_path, iterations=2).run()
    kept, fresh = (resumable(tmp_path, iterations=3, keep_queues=keep) for keep in (True, False))
    assert [run.resume() for run in (kept, fresh)] == [2, 2]
    assert (len(kept.queues), len(fresh.queues)) == (2, 0)


def test_a_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    resumable(tmp_path, iterations=2).run()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for chosen, said in (({"seed": 3}, "seed 0, now 3"), ({"source": MadeUp(name="others")}, "name -, now others")):
        with pytest.raises(InvalidValueError, match=said):
            resumable(tmp_path, **chosen).run()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "config.json").rename(tmp_path / "moved.json")
    with pytest.raises(TrainingError, match="has checkpoints but no config.json"):
        resumable(tmp_path).run()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TrainingError, match="config.json' cannot be read"):
        resumable(tmp_path).run()
    told = json.loads((tmp_path / "moved.json").read_text())
    del told["config"]["head_warmup"]  # as a version wrote it that did not have it yet
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(InvalidValueError, match="head_warmup 0, now 1"):
        resumable(tmp_path, head_warmup=1).run()
    resumable(tmp_path, iterations=3, lr=5e-4).run()  # how long and how fast may change
    assert json.loads((tmp_path / "config.json").read_text())["config"]["lr"] == 5e-4


# ---- what is reported -----------------------------------------------------------------------------------------------------


def test_scalars_of_every_key_reach_the_observers() -> None:
    seen: dict[int, dict[str, float]] = {}
    trainer(iterations=2, held_out=MadeUp(2), observers=[lambda done, s: seen.update({done: dict(s)})]).run()
    assert list(seen) == [1, 2]
    for what in ("trajectory", "adversarial/student", "adversarial/heads", "logits/real", "logits/fake", "heads/right"):
        assert {f"{what}/key_0", f"{what}/key_1"} <= seen[1].keys()
    for key in (0, 1):
        ours, theirs = seen[1][f"gradient/trajectory/key_{key}"], seen[1][f"gradient/adversarial/key_{key}"]
        assert seen[1][f"gradient/ratio/key_{key}"] == pytest.approx(theirs / ours) and seen[1][f"gradient/heads/key_{key}"] > 0
    assert seen[1]["speed/trajectories"] > 0 and "validation/rolled/key_0" in seen[2] and "validation/rolled/key_0" not in seen[1]
    line = Console(2).line(1, seen[1])
    assert line.startswith("iteration 1/2  trajectory ") and "ratio" in line and "rolled" not in line


def test_validation_sees_the_average_and_training_goes_on_with_its_own_weights() -> None:
    run = trainer(ema=0.5, held_out=MadeUp(2))
    run.iteration(0)
    own = weights(run)
    figures = run.validate(1)
    assert same(own, weights(run))
    for name, value in run.ema.averages.items():
        run.student.get_parameter(name).data.copy_(value)
    run.best = None
    assert run.validate(1) == figures and not same(own, weights(run))


def test_the_teachers_own_trajectories_validate_to_nothing() -> None:
    """A student whose velocity is the segment's is at every key of the teacher's, from the same noise."""
    held_out = MadeUp(2)

    class Perfect(HunyuanVideoDiT):
        def forward(self, latent: Tensor, sigma: Tensor, *_: Any, **__: Any) -> Tensor:
            return held_out.batch(0, held_out.sigmas.index(pytest.approx(float(sigma[0]))) - 1).velocity

    run = trainer(held_out=held_out, batch=2, adversarial_weight=0.0)
    run.student.__class__ = Perfect
    figures = run.validate(1)
    assert figures.pop("validation/amplitude") == pytest.approx(1) and all(value < 1e-6 for value in figures.values())

    class Half(Perfect):
        def forward(self, latent: Tensor, sigma: Tensor, *given: Any, **named: Any) -> Tensor:
            less = held_out.batch(0, 0).clean / 2 / sigma[0] if sigma[0] < 1 else 0  # in the last of the two steps
            return super().forward(latent, sigma, *given, **named) + less

    run.student.__class__ = Half
    assert run.validate(1)["validation/amplitude"] == pytest.approx(0.5)


def test_the_best_student_is_kept_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(EXPORTABLE, folder=tmp_path, held_out=MadeUp(2))
    found = (({run.config.best: torch.tensor(figure)}, torch.zeros(1), torch.zeros(1)) for figure in (0.5, 0.25, 0.375))
    monkeypatch.setattr("accvideo_core.distill.trainer.validate", lambda *_: next(found))
    exported: list[tuple[str, int]] = []
    monkeypatch.setattr(run, "export", lambda path, done: exported.append((path.name, done)))
    for done in (1, 2, 3):
        run.validate(done)
    assert exported == [("best.safetensors", 1), ("best.safetensors", 2)] and run.best == 0.25


def test_a_run_that_goes_on_by_another_figure_has_no_best_yet(tmp_path: Path) -> None:
    def run(**chosen: Any) -> Trainer:
        made = trainer(EXPORTABLE, folder=tmp_path, held_out=MadeUp(2), adversarial_weight=0.0, save_every=1, **chosen)
        made.run()
        return made

    run(iterations=1)
    (tmp_path / "best.safetensors").unlink()
    other = run(iterations=2, best="validation/trajectory/key_1")
    assert other.best is not None and (tmp_path / "best.safetensors").exists()
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        assert file.metadata()["iteration"] == "2"


def test_fewer_iterations_than_are_done_are_refused(tmp_path: Path) -> None:
    trainer(EXPORTABLE, folder=tmp_path, iterations=2, adversarial_weight=0.0).run()
    done = {name: (tmp_path / name).read_bytes() for name in ("student.safetensors", "config.json")}
    with pytest.raises(InvalidValueError, match="has done 2 iterations and iterations is 1; set it to 2 or more"):
        trainer(EXPORTABLE, folder=tmp_path, iterations=1, adversarial_weight=0.0).run()
    assert {name: (tmp_path / name).read_bytes() for name in done} == done


def test_an_unknown_figure_to_choose_the_best_by_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="best is 'loss'; choose one of validation/"):
        trainer(best="loss", held_out=MadeUp(2))


def test_a_contact_sheet_shows_teacher_and_student_of_every_sample(tmp_path: Path) -> None:
    clip = MadeUp(3).batch(0, 0).clean
    image = write_sheet(tmp_path / "sheet.png", clip, -clip, ["one", "two", "three"], None, most=2)
    alone = write_sheet(tmp_path / "sheet.png", clip[:1], -clip[:1], ["one"], None)
    assert (tmp_path / "sheet.png").stat().st_size > 0 and image.shape[0] > 1.9 * alone.shape[0]
    shown: list[tuple[int, bool]] = []
    run = trainer(held_out=MadeUp(2), show=lambda done, ours, theirs: shown.append((done, ours.shape == theirs.shape)))
    run.validate(4)
    assert shown == [(4, True)]


# ---- what goes wrong ------------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_no_number_ends_the_run_before_it_changes_a_weight(tmp_path: Path) -> None:
    class Broken(MadeUp):
        def batch(self, step: int, key: int) -> Any:
            batch = super().batch(step, key)
            if step == 3:
                batch.clean[0, 0, 0, 0, 0] = float("nan")
            return batch

    run = trainer(EXPORTABLE, source=Broken(), folder=tmp_path, save_every=1, adversarial_weight=0.0)
    with pytest.raises(TrainingError, match="gradient of the trajectory became nan at iteration 1, key 0; no weight was changed"):
        run.run()
    assert all(p.isfinite().all() for p in run.student.parameters())
    assert state.newest(tmp_path / "checkpoints").name == "step_00000001"


@pytest.mark.parametrize(
    "name, value, said",
    [("logits/fake/key_1", -40.0, "key_1: logits/fake saturated"), ("heads/right/key_0", 1.0, "key_0: its head always wins")],
)
def test_saturated_logits_and_a_head_that_always_wins_are_said_once_after_patience(name: str, value: float, said: str) -> None:
    health = Health(3)
    steps = [value, value, 0.5, value, value]
    assert not any(health.look(i, {name: v}) for i, v in enumerate(steps))
    again = Health(3)
    again.restore(json.loads(json.dumps(health.state())))
    with pytest.warns(AccVideoWarning, match=said):
        assert len(again.look(5, {name: value})) == 1
    assert not again.look(6, {name: value})
    hasty = Health(1)  # lower than what was counted already
    hasty.restore(again.state())
    with pytest.warns(AccVideoWarning, match="for 5 iterations"):
        hasty.look(7, {name: value})


def test_out_of_memory_says_what_to_change_in_order_of_cost_and_only_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    for chosen, cures in (
        ({"precision": "auto"}, ["--micro-batch 1", "--checkpointing", "--lora 64", "more GPUs", "--sequence", "smaller videos"]),
        (
            {"precision": "auto", "micro_batch": 1, "checkpointing": True},
            ["--lora 64", "more GPUs", "--sequence", "smaller videos"],
        ),
    ):
        run = trainer(**chosen)
        monkeypatch.setattr(run, "iteration", fail)
        with pytest.raises(TrainingError, match="Tried to allocate 2.00 GiB") as caught:
            run.run()
        numbered = [part.split(" (")[0] for part in str(caught.value).split("in this order: ")[1].split("; ")]
        assert len(numbered) == len(cures) and all(c in n for c, n in zip(cures, numbered, strict=True)), numbered
    monkeypatch.setattr(run, "iteration", lambda _: torch.zeros(1) @ torch.zeros(2))
    with pytest.raises(RuntimeError, match="size"):  # any other fault passes as it is
        run.run()


def test_the_teacher_is_a_network_of_its_own() -> None:
    one = network()
    with pytest.raises(InvalidValueError, match="load its weights twice"):
        trainer(student=one, teacher=one)
