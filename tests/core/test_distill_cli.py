"""`accvideo distill`: from prompts to a student on the tiny world; files of configuration; what it refuses, by name."""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from accvideo_core import cli
from accvideo_core.checkpoint import Student, find_student, load_student
from accvideo_core.distill.adapters import HunyuanAdapter
from accvideo_core.distill.parallel import World
from accvideo_core.distill.source import Judged, SynVidSource, split
from accvideo_core.errors import AccVideoWarning, InvalidValueError, SynVidError
from accvideo_core.headless.distill import DistillArgs, build
from accvideo_core.sampling import few_step, make_noise
from accvideo_core.schedule import PRESETS
from accvideo_core.synvid import Header, SynVidDataset
from accvideo_core.synvid.verdicts import Verdict, digest, read_verdicts, write_verdicts
from accvideo_core.tiny import part_hash, weights_folder
from accvideo_core.tiny.share import Share
from accvideo_core.tiny.tasks import flow
from accvideo_core.tiny.tasks.student import StudentTask
from tests.distill_data import EXPORTABLE, network
from tests.synvid_data import HEADER, dataset, latent_files

CONFIG, LATENT = replace(EXPORTABLE, in_channels=16, out_channels=16), (16, 2, 4, 6)
SMALL = ["--batch", "2", "--iterations", "2", "--held-out", "2", "--vae", "none", "--head-channels", "8", "--device", "cpu"]
SMALL += ["--save-every", "1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    HunyuanAdapter("tiny").export(network(CONFIG).state_dict(), path)
    return path


def header(teacher: Path, **changed: Any) -> Header:
    adapter = HunyuanAdapter("tiny")
    return replace(Header.of("tiny", adapter.fingerprint(adapter.load(teacher)), steps=10, segments=5), **changed)


@pytest.fixture(scope="module")
def captured(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captured")
    dataset(path, 8, shape=LATENT, header=header(teacher))
    return path


@pytest.fixture(scope="module")
def tiny_captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four trajectories of the bundled teacher, in 10 steps."""
    folder = tmp_path_factory.mktemp("tiny")
    prompts, plan, data = folder / "prompts.txt", folder / "plan", folder / "data"
    prompts.write_text("a red ball moving left\na blue box\na triangle on a grey background\na snowy disc\n")
    assert cli.main(f"encode {prompts} -o {plan} --device cpu".split()) == 0
    assert cli.main(f"capture --plan {plan} -o {data} --batch 4 --steps 10 --device cpu".split()) == 0
    return data


def words(data: Path, out: Path, teacher: Path, *more: str) -> list[str]:
    return ["distill", "--dataset", str(data), "--out", str(out), "--teacher", str(teacher), *SMALL, *more]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_from_prompts_to_a_student_of_the_tiny_world(
    tiny_captured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bundled teacher, captured, distilled, sampled: what the documentation says, as small as it goes."""
    out = tmp_path / "run"
    for line in (
        f"distill --dataset {tiny_captured} -o {out} --iterations 1 --batch 2 --held-out 2 --head-channels 16 --device cpu",
        f"generate ball --student {out / 'student.safetensors'} -o {tmp_path / 'a.mp4'} --device cpu",
    ):
        assert cli.main(line.split()) == 0, capsys.readouterr().err
    assert {"config.json", "student.safetensors", "best.safetensors", "sheets/iteration-000001.png"} <= files(out)
    assert any(name.startswith("tensorboard/events") for name in files(out)) and (tmp_path / "a.mp4").stat().st_size > 0
    with safe_open(out / "student.safetensors", "pt") as file:
        assert find_student("student.safetensors", file.metadata()) == Student(5)
        made_from = {part: file.metadata()[part] for part in ("encoder", "text_encoder")}
    assert made_from == {part: part_hash(part) for part in made_from}  # so that it is refused beside others
    assert "iteration 1/1  trajectory 0." in capsys.readouterr().out


def test_the_tiny_student_learns_from_a_dataset_too(tiny_captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "shape_filters", functools.partial(flow.shape_filters, size=16))  # quick
    weights, data = tmp_path / "weights", SynVidDataset(tiny_captured)
    shutil.copytree(weights_folder(), weights)
    line = f"tiny train student --dataset {tiny_captured} --steps 1 --batch 2 --run {tmp_path / 'run'} --weights {weights}"
    assert cli.main([*line.split(), "--device", "cpu"]) == 0
    with safe_open(weights / "student.safetensors", "pt") as file:
        told = file.metadata()
    assert (told["dataset"], told["trajectories"]) == (data.digest, "4") and find_student("", told) == Student(5)
    task = StudentTask(0, torch.device("cpu"), weights, tmp_path / "unused", 1, tiny_captured)
    task.prepare(Share())
    assert [latents.shape for latents in task.latents] == [(4, 16, 5, 8, 8)] * 6
    assert task.prompts == [sample.prompt for sample in data.samples]
    for key in range(6):
        assert torch.equal(task.latents[5 - key][2].float(), data.trajectory(2)[key].half().float())
    state = load_file(weights / "teacher.safetensors")
    state["img_in.proj.bias"] = state["img_in.proj.bias"] + 1
    save_file(state, weights / "teacher.safetensors")
    with pytest.raises(SynVidError, match="do not fit the network"):
        StudentTask(0, torch.device("cpu"), weights, tmp_path / "unused", 1, tiny_captured)


def test_a_run_writes_what_it_says_and_goes_on(
    captured: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main([*words(captured, out, teacher), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["iterations"] == 2 and told["student"] == str(out / "student.safetensors")
    with safe_open(told["student"], framework="pt") as file:
        metadata = file.metadata()
    assert metadata["iteration"] == "2" and json.loads(metadata["config"])["batch"] == 2
    assert metadata["dataset"] == split(captured, 2)[0].digest and metadata["teacher"] == header(teacher).fingerprint
    student = load_student(told["student"], dtype=torch.float32)
    assert not torch.equal(student.img_in.proj.weight, network(CONFIG).img_in.proj.weight)
    text = SynVidSource(SynVidDataset(captured), 1).batch(0, 0).conditioning(6.0)
    clean = few_step(lambda x, s: student(x, s, text), make_noise((1, *LATENT), [0]), PRESETS["tiny"])
    assert clean.isfinite().all()
    assert cli.main([*words(captured, out, teacher, "--iterations", "3"), "--log-every", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("iteration 3/3") and files(out) >= {"checkpoints/step_00000003/state.json"}
    assert not any("step_00000001" in name for name in files(out))  # the last two are kept


def test_values_come_from_the_file_and_the_command_line_overrides_them(
    captured: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {"dataset": str(captured), "out": str(tmp_path / "run"), "teacher": str(teacher), "lr": 3e-4, "checkpointing": True}
    toml, as_json = tmp_path / "run.toml", tmp_path / "run.json"
    toml.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in written.items()))
    as_json.write_text(json.dumps(written | {"out": str(tmp_path / "other"), "lora": None}), encoding="utf-8-sig")
    short = [*SMALL, "--json", "--no-tensorboard", "--held-out", "0", "--adversarial-weight", "0"]
    assert cli.main(["distill", "--config", str(toml), *short]) == 0, capsys.readouterr().err
    assert cli.main(["distill", f"--config={as_json}", *short, "--lr", "2e-4", "--no-checkpointing"]) == 0
    settings = [json.loads((tmp_path / run / "config.json").read_text())["config"] for run in ("run", "other")]
    assert [s["lr"] for s in settings] == [3e-4, 2e-4] and [s["checkpointing"] for s in settings] == [True, False]
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        ("lr = = 1", "cannot read the configuration"),
        ("learning = 1", "there is nothing named learning to choose"),
        ("checkpoint = true", "did you mean 'checkpointing'"),
        ("compile = 1", "compile is 1; it must be true or false"),
        ("batch = 'many'", "batch"),
        ("batch = 0", "batch is 0"),
        ("lr = [1, 2]", "Unrecognized options: 2"),
        ("[lr]\nstudent = 1", "no tables"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str) -> None:
    (tmp_path / "run.toml").write_text(content)
    assert cli.main(["distill", "--config", str(tmp_path / "run.toml")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_is_missing_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["distill", "--dataset", "here"]) == 2
    assert "a run needs a dataset and a folder" in capsys.readouterr().err
    assert cli.main(["distill", "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed, more, said",
    [
        ({"fingerprint": "a" * 64}, [], "the teacher at hand is"),
        ({"family": "wan-t2v-14b", "guidance": None}, ["--any-schedule"], "of the family wan-t2v-14b, the network is of tiny"),
        ({"guidance": None}, [], "their embedded guidance is None"),
        ({}, ["--batch", "7"], "make no batch of 7"),
        ({}, ["--held-out", "8"], "8 of the 8 samples"),
        ({}, ["--clean-block", "single_blocks.9"], "no block named single_blocks.9"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused_before_anything_is_written(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], more: list[str], said: str
) -> None:
    dataset(tmp_path / "data", 8, shape=LATENT, header=header(teacher, **changed))
    assert cli.main([*words(tmp_path / "data", tmp_path / "run", teacher), *more]) in (1, 2)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_another_schedule_is_refused_unless_it_is_wanted(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path / "data", 8, shape=LATENT, header=replace(HEADER, fingerprint=header(teacher).fingerprint))
    command = words(tmp_path / "data", tmp_path / "run", teacher, "--no-tensorboard")
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert "at sigmas 1, 0.875, 0, students of tiny are sampled at sigmas 1, 0.9655" in said and "--any-schedule" in said
    assert cli.main([*command, "--any-schedule"]) == 0


@pytest.mark.parametrize(
    "verdicts, said",
    [
        ("", "accepts 0 of the 6 samples to train on, fewer than a batch of 2; judge more of them"),
        ("A\nA\nA\nR\n", "rejects 1 of the 6 samples to train on, fewer than a batch of 2"),
        ("A\n{}\n", "line 2: 'id'; a verdict looks like"),
        ("A\nnonsense\n", "line 2: Expecting value"),
        ('A\n{"id": "x", "accepted": 1}\n', "line 2: accepted is 1; say true or false"),
        ('{"id": "x", "accepted": true, "weight": 0}\n', "line 1: weight is 0; it must be a finite number above 0"),
        (
            '{"id": "x", "accepted": true}\n{"id": "x", "accepted": false}\n',
            "id 'x' is no text, or has a verdict already",
        ),
        (None, "cannot read the verdicts"),
    ],
    ids=str,
)
def test_verdicts_that_cannot_be_used_are_refused_before_anything_is_written(
    captured: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verdicts: str | None, said: str
) -> None:
    path = tmp_path / "verdicts.jsonl"
    if verdicts is not None:
        names = iter(sample.id for sample in split(captured, 2)[0].samples)
        lines = [{"A": True, "R": False}.get(line, line) for line in verdicts.splitlines()]
        told = [line if isinstance(line, str) else json.dumps({"id": next(names), "accepted": line}) for line in lines]
        path.write_text("\n".join(told))
    with warnings.catch_warnings(record=True):  # of those without a verdict
        assert cli.main(words(captured, tmp_path / "run", teacher, "--verdicts", str(path))) == 1
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "config.json").exists()


def test_verdicts_make_another_student_and_a_run_goes_on_with_them_alone(
    captured: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, path, out = split(captured, 2)[0].samples, tmp_path / "verdicts.jsonl", tmp_path / "run"
    write_verdicts(path, {sample.id: Verdict(number % 2 == 0, 1.0 + number) for number, sample in enumerate(samples)})
    command = [*words(captured, out, teacher, "--no-tensorboard"), "--head-keys", "3", "1", "--log-every", "1"]
    assert cli.main([*command, "--verdicts", str(path)]) == 0, capsys.readouterr().err
    told = json.loads((out / "config.json").read_text())
    assert told["config"]["head_keys"] == [3, 1] and told["source"]["verdicts"] == digest(read_verdicts(path))
    assert "rejected " in capsys.readouterr().out
    assert cli.main([*command, "--verdicts", str(path), "--iterations", "3"]) == 0, capsys.readouterr().err
    assert cli.main(words(captured, out, teacher, "--verdicts", str(path), "--adversarial-weight", "0")) == 2
    assert "verdicts are for the heads, and adversarial_weight is 0" in capsys.readouterr().err
    assert cli.main([*command, "--iterations", "4"]) == 2
    assert "holds another run (verdicts " in capsys.readouterr().err


def test_a_student_learns_where_it_arrives_itself(
    captured: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--log-every", "1", "--adversarial-weight", "0", "--on-policy-weight", "0.5"]
    good, out = ["--on-policy-keys", "0", "--on-policy-steps", "2"], tmp_path / "run"
    assert cli.main([*words(captured, out, teacher), *more, *good]) == 0, capsys.readouterr().err
    assert "on policy " in capsys.readouterr().out
    for bad, said in (
        (["--on-policy-steps", "3"], "on_policy_steps is 3; the teacher took 2 in the segment to key 0; set 1 to 2"),
        (
            ["--on-policy-steps", "2", "--on-policy-keys", "5"],
            "on_policy_keys has 5; the dataset's segments end at keys 0",
        ),
    ):
        assert cli.main([*words(captured, tmp_path / "other", teacher), *more, *bad]) == 2
        assert said in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "other").exists()


def test_a_head_for_a_key_that_is_none_is_refused_before_anything_is_written(
    captured: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words(captured, tmp_path / "run", teacher), "--head-keys", "9"]) == 2
    assert "head_keys are (9,)" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_accepted_and_rejected_trajectories_come_as_the_verdicts_say_with_weights_of_mean_1(
    captured: Path, tmp_path: Path
) -> None:
    data, path = SynVidDataset(captured), tmp_path / "verdicts.jsonl"
    names = [sample.id for sample in data.samples]
    said = {name: Verdict(number < 4, 1.0 + number) for number, name in enumerate(names[:7])} | {
        "of another dataset": Verdict(True)
    }
    write_verdicts(path, said)
    assert read_verdicts(path) == said
    others = {"id": "a", "accepted": True, "why": "as\u2028asked"}  # as another program writes it, on Windows
    (tmp_path / "other.jsonl").write_text(json.dumps(others, ensure_ascii=False) + "\r\n", encoding="utf-8-sig", newline="")
    assert read_verdicts(tmp_path / "other.jsonl") == {"a": Verdict(True)}
    with pytest.warns(AccVideoWarning, match="no verdict on 1 of the 8 samples to train on"):
        judged = Judged.of(path, captured, data, 2)
    assert judged.rejected is not None
    for source, wanted in ((judged.accepted, names[:4]), (judged.rejected, names[4:7])):
        seen = {name for step in range(8) for name in source.batch(step, 0).ids}
        assert seen == set(wanted)
        assert sum(judged.weights[name] for name in wanted) == pytest.approx(len(wanted))
    assert judged.weights[names[3]] == pytest.approx(4 * judged.weights[names[0]]) and names[7] not in judged.weights
    assert judged.digest == digest({name: said[name] for name in names[:7]}) != digest(said)
    write_verdicts(path, {name: Verdict(True) for name in names})
    assert Judged.of(path, captured, data, 2).rejected is None


def test_an_empty_dataset_and_a_truncated_file_are_named(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path / "none", 0, header=header(teacher))
    assert cli.main(words(tmp_path / "none", tmp_path / "run", teacher)) == 1
    assert "holds no whole samples" in capsys.readouterr().err
    dataset(tmp_path / "cut", 8, batch=2, shape=LATENT, header=header(teacher))
    broken = latent_files(tmp_path / "cut")[0]
    broken.write_bytes(broken.read_bytes()[:-10])
    with pytest.warns(AccVideoWarning, match="is left out"):
        training, _ = split(tmp_path / "cut", 0)
    assert len(training) == 6


def test_held_out_samples_that_do_not_divide_among_the_processes_are_refused_by_name(tmp_path: Path) -> None:
    """The default of 16 is no multiple of every number of GPUs."""

    class Three:
        def size(self, dim: int) -> int:
            return 3

        def get_local_rank(self, name: str) -> int:
            return 0

    world = World(mesh=Three())  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="held_out is 16, which does not divide among 3 data-parallel processes"):
        build(DistillArgs(batch=3), str(tmp_path), tmp_path / "run", world)


def test_held_out_samples_are_never_trained_on_and_hang_on_the_seed_alone(captured: Path) -> None:
    def ids(data: SynVidDataset | None) -> set[str]:
        assert data is not None
        return {sample.id for sample in data.samples}

    (training, aside), (again, aside_again), (_, other) = split(captured, 3), split(captured, 3), split(captured, 3, seed=1)
    assert ids(aside) == ids(aside_again) != ids(other) and ids(training) == ids(again)
    assert not ids(training) & ids(aside) and len(ids(training)) == 5
    source = SynVidSource(training, 2)
    assert source.batch(3, 0).ids == source.batch(3, 4).ids and set(source.batch(3, 0).keys) == {0}
    shares = [SynVidSource(training, 2, rank=rank, world=2).batch(3, 1) for rank in (0, 1)]
    assert tuple(share.ids[0] for share in shares) == source.batch(3, 1).ids
    with pytest.raises(SynVidError, match="cannot be held out"):
        split(captured, 8)


def test_a_lora_goes_on_with_its_base_alone_and_names_it(
    captured: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoints hold the factors alone: on another base they would be another student."""
    out, other = tmp_path / "run", tmp_path / "other.safetensors"
    HunyuanAdapter("tiny").export(network(CONFIG, seed=1).state_dict(), other)
    command = words(captured, out, teacher, "--lora", "2", "--adversarial-weight", "0", "--no-tensorboard")
    assert cli.main([*command, "--student", str(other)]) == 0
    base = HunyuanAdapter("tiny").fingerprint(HunyuanAdapter("tiny").load(other))
    with safe_open(out / "student.safetensors", "pt") as file:
        assert file.metadata()["base"] == base != file.metadata()["teacher"]
    capsys.readouterr()
    assert cli.main([*command, "--iterations", "3"]) == 2
    assert f"another run (base {base}, now {header(teacher).fingerprint})" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*command, "--iterations", "3", "--student", str(other)]) == 0


def test_what_changed_in_the_samples_since_a_run_began_is_said_with_its_cure(
    captured: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(captured, tmp_path / "run", teacher, "--adversarial-weight", "0", "--no-tensorboard")
    assert cli.main(command) == 0
    capsys.readouterr()
    assert cli.main([*command, "--held-out", "4"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "(samples 6, now 4; digest" in said and "--held-out as it was, what is damaged captured again" in said


def test_a_share_of_rejected_trajectories_wants_verdicts(
    captured: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(captured, tmp_path / "run", teacher, "--rejected-share", "0.5")) == 2
    assert "rejected_share is 0.5, and without --verdicts no trajectory is rejected" in " ".join(capsys.readouterr().err.split())
