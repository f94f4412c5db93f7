"""`accvideo sample`: a plan's latents from one process or many are the same latents, and ComfyUI's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from accvideo_core import cli
from accvideo_core.checkpoint import save_original
from accvideo_core.distill.adapters import adapter_for
from accvideo_core.dit import DiTConfig
from accvideo_core.dit.attention import KERNELS
from accvideo_core.errors import InvalidValueError
from accvideo_core.media import read_mp4
from accvideo_core.synvid.plan import Plan
from accvideo_core.tiny import LATENT_SCALE, load_vae
from accvideo_core.tiny.vae import to_pixels
from tests.gloo import Ranks, in_processes
from tests.networks import random_weights

FOUR_HEADS = DiTConfig(hidden_size=512, num_heads=4, depth_double=1, depth_single=1, text_dim=16, pooled_dim=24)
RAGGED, EVEN = (16, 3, 6, 10), (16, 2, 4, 4)  # 45 tokens, which neither 2 nor 4 processes divide, and 8
WAYS = {
    "tokens of two": (2, ["--sequence", "2"]),
    "tokens of four": (4, ["--sequence", "4"]),
    "two pairs": (4, ["--sequence", "2", "--batch", "2"]),
    "videos of two": (2, ["--batch", "2"]),
    "weights of two": (2, ["--shard"]),
    "weights of four, tokens of two": (4, ["--shard", "--sequence", "2"]),
}


def random_plan(path: Path, shapes: Sequence[tuple[int, ...]] = (RAGGED, EVEN, RAGGED, RAGGED, EVEN)) -> Plan:
    """Prompts of 4 to 8 tokens, encoded for FOUR_HEADS."""
    plan, generator = Plan(path, create=True), torch.Generator().manual_seed(0)
    for i, shape in enumerate(shapes):
        plan.add(f"prompt {i}", torch.randn(4 + i, 16, generator=generator), torch.randn(24, generator=generator), i, shape)
    return plan


def command(folder: Path, out: str, *more: str) -> list[str]:
    words = ["sample", str(folder / "plan"), "-o", str(folder / out), "--student", str(folder / "student.safetensors")]
    return [*words, "--steps", "2", "--device", "cpu", "--attention", "sdpa", "--json", *more]


def latents_of(folder: Path) -> dict[str, Tensor]:
    return {path.stem: load_file(path)["latent_tensor"] for path in folder.glob("*.latent")}


def prepare(folder: Path) -> Plan:
    save_original(folder / "student.safetensors", random_weights(FOUR_HEADS))
    return random_plan(folder / "plan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan and its latents from one process, in `alone`, and in each of WAYS from several."""
    folder = tmp_path_factory.mktemp("sample")
    prepare(folder)
    assert cli.main(command(folder, "alone")) == 0
    in_processes(4, sample_in_all_ways, folder, len(WAYS))
    return folder


def sample_in_all_ways(ranks: Ranks, folder: Path) -> None:
    for name, (size, words) in WAYS.items():
        with ranks.environment(size) as inside:
            if inside:
                assert cli.main(command(folder, name, *words)) == 0


@pytest.mark.parametrize("way", WAYS)
def test_several_processes_sample_what_one_does(folder: Path, way: str) -> None:
    alone, together = latents_of(folder / "alone"), latents_of(folder / way)
    assert alone.keys() == together.keys() == Plan(folder / "plan").items.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(together[name], expected, rtol=0, atol=3e-5)
        assert expected.std() > 0.5


def test_a_latent_is_as_comfyui_saves_one(folder: Path) -> None:
    plan = Plan(folder / "plan")
    for item in plan.items.values():
        with safe_open(folder / "alone" / f"{item.id}.latent", framework="pt") as file:
            assert set(file.keys()) == {"latent_tensor", "latent_format_version_0"}
            assert file.get_tensor("latent_tensor").shape == (1, *item.shape)
            told = json.loads(file.metadata()["accvideo"])
        assert told["prompt"] == item.prompt and told["seed"] == item.seed
        assert (told["model"], told["steps"], told["shift"], told["guidance"]) == ("student.safetensors", 2, 7.0, 6.0)


def test_what_is_missing_is_made_and_nothing_else(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path)
    assert cli.main(command(tmp_path, "out")) == 0
    lost, *kept = sorted((tmp_path / "out").iterdir())
    before, times = load_file(lost), [path.stat().st_mtime_ns for path in kept]
    lost.unlink()
    capsys.readouterr()
    assert cli.main(command(tmp_path, "out", "--batch", "3")) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["latents"], told["new"], told["left_out"]) == (5, 1, [])
    assert torch.equal(load_file(lost)["latent_tensor"], before["latent_tensor"])
    assert [path.stat().st_mtime_ns for path in kept] == times


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "3"], "steps 2 there, 3 now"),
        (["--shift", "5"], "shift 7.0 there, 5.0 now"),
        (["--guidance", "4"], "guidance 6.0 there, 4.0 now"),
        (["--student", "tiny"], "fingerprint"),
        (["--batch", "0"], "batch is 0; it must be at least 1"),
        (["--sequence", "2"], "1 process cannot form groups of 2"),
    ],
)
def test_a_folder_made_otherwise_and_bad_values_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    before = latents_of(folder / "alone")
    assert cli.main(command(folder, "alone", *more)) == 2
    assert said in capsys.readouterr().err
    after = latents_of(folder / "alone")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_latents_of_a_lossy_kernel_are_not_mixed_with_others(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(command(folder, "alone", "--attention", "sdpa")) == 0
    monkeypatch.setitem(KERNELS, "sdpa", replace(KERNELS["sdpa"], lossy=True))
    assert cli.main(command(folder, "alone", "--attention", "sdpa")) == 2
    assert "attention 'exact' there, 'sdpa' now" in capsys.readouterr().err


def test_a_file_that_is_not_ours_is_left_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = prepare(tmp_path)
    (tmp_path / "out").mkdir()
    theirs = tmp_path / "out" / f"{next(iter(plan.items))}.latent"
    theirs.write_bytes(b"something else")
    assert cli.main(command(tmp_path, "out")) == 2
    assert f"{theirs} is no latent of this command's" in capsys.readouterr().err and theirs.read_bytes() == b"something else"


def test_the_first_process_to_be_done_waits_for_the_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video of 50 steps may take an hour, and torch's half hour would end the processes that still sample."""
    told: dict[str, Any] = {}

    def join(*_: Any, **options: Any) -> None:
        told.update(options)
        raise InvalidValueError("that is all")

    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(command(folder, "patient")) == 2
    assert told["timeout"] > timedelta(days=7)


def test_a_plan_of_another_text_encoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_original(tmp_path / "student.safetensors", random_weights(FOUR_HEADS))
    plan = Plan(tmp_path / "plan", create=True)
    plan.add("a prompt", torch.ones(3, 20), torch.ones(24), 0, EVEN)
    assert cli.main(command(tmp_path, "out")) == 1
    assert "20" in capsys.readouterr().err and not list((tmp_path / "out").glob("*.latent"))


def test_values_that_are_not_finite_are_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prepare(tmp_path)
    velocity = type(adapter_for("tiny")).velocity

    def broken(self: object, network: object, latent: Tensor, *rest: object) -> Tensor:
        found = velocity(self, network, latent, *rest)
        return found * float("nan") if latent.shape[2:] == EVEN[1:] else found

    monkeypatch.setattr(type(adapter_for("tiny")), "velocity", broken)
    assert cli.main(command(tmp_path, "out")) == 1
    told, bad = capsys.readouterr(), [item.id for item in plan.items.values() if item.shape == EVEN]
    assert json.loads(told.out)["new"] == 3 and set(latents_of(tmp_path / "out")) == set(plan.items) - set(bad)
    assert all(f"left out: {name} has values that are not finite" in told.err for name in bad)


def test_compiled_blocks_are_the_same_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, compile_module = list[str](), torch.nn.Module.compile

    def traced(self: torch.nn.Module) -> None:
        compiled.append(type(self).__name__)
        compile_module(self, fullgraph=True, backend="aot_eager")  # traces as the real one does, and is quick

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    prepare(tmp_path)
    assert cli.main(command(tmp_path, "out", "--compile")) == 0
    assert compiled == ["DoubleStreamBlock", "SingleStreamBlock"]
    alone = latents_of(folder / "alone")
    for name, found in latents_of(tmp_path / "out").items():
        torch.testing.assert_close(found, alone[name], rtol=0, atol=3e-5)


def test_the_bundled_student_draws_what_generate_does(tmp_path: Path) -> None:
    prompt = "a red ball moving left on a black background"
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt, "seed": 3, "id": "ball"}) + "\n")
    assert cli.main(["encode", str(tmp_path / "prompts.jsonl"), "-o", str(tmp_path / "plan"), "--device", "cpu"]) == 0
    assert cli.main(["sample", str(tmp_path / "plan"), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 0
    video = tmp_path / "ball.mp4"
    assert cli.main(["generate", prompt, "-o", str(video), "--seed", "3", "--device", "cpu"]) == 0
    latent = load_file(tmp_path / "out" / "ball.latent")["latent_tensor"]
    with torch.no_grad():
        frames = to_pixels(load_vae().decode(latent))[0]
    encoded = read_mp4(video).frames
    assert abs(frames.astype(float) - encoded).mean() < 4  # of 255: what H.264 loses
    assert LATENT_SCALE * latent.std() > 0.5
