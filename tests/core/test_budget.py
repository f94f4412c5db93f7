"""The budget against the figures it is made from, and against what a store really writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accvideo_core import cli
from accvideo_core.errors import InvalidValueError
from accvideo_core.sampling import make_noise
from accvideo_core.synvid import Header, SampleInfo, SynVidStore, sample_id
from accvideo_core.synvid.budget import BudgetArgs, plan_budget, work_per_step


@pytest.mark.parametrize(("shape", "pflop"), [((16, 33, 90, 160), 1.62 + 10.45), ((16, 24, 68, 120), 0.67 + 1.79)])
def test_work_per_step_is_linear_layers_and_attention(shape: tuple, pflop: float) -> None:
    assert work_per_step(shape, 256) == pytest.approx(pflop * 1e15, rel=0.01)


def test_the_papers_own_speed_gives_the_papers_own_seconds() -> None:
    for split, seconds in (("medium", 704), ("high", 3234)):
        budget = plan_budget(BudgetArgs(split, 1000, "a100"))  # type: ignore[arg-type]
        assert budget.seconds == seconds and budget.gpu_hours == pytest.approx(1000 * seconds / 3600)
        # The rate that other sizes are computed with is the same measurement seen another way.
        other = plan_budget(BudgetArgs(split, 1000, "a100", frames=89 if split == "medium" else 125))  # type: ignore[arg-type]
        assert 0.85 < other.seconds / seconds < 1


def test_a_measured_step_goes_before_any_published_one_and_guidance_doubles_it() -> None:
    assert plan_budget(BudgetArgs(step_seconds=2.0)).seconds == 100
    assert plan_budget(BudgetArgs(step_seconds=2.0, steps=40, cfg=True)).seconds == 160


def test_many_gpus_share_the_work_and_none_does_half_a_trajectory() -> None:
    (fleet,) = plan_budget(BudgetArgs(count=110_000, step_seconds=72.0, gpus=64, batch=2)).fleets
    rounds = 860  # 55 000 batches over 64
    assert fleet.days == pytest.approx(rounds * 2 * 3600 / 86400) and fleet.machines == 8
    assert fleet.hours_at_risk == 64 * 2
    fleets = plan_budget(BudgetArgs(count=110_000, step_seconds=72.0, days=10.0)).fleets
    wanted = next(it for it in fleets if it.gpus == 459)  # 110 000 hours in 240
    assert wanted.days <= 10 and [it.gpus for it in fleets if it.days <= 10] == [459]


@pytest.mark.parametrize("store_noise", [False, True])
def test_bytes_and_files_are_what_a_store_writes(tmp_path: Path, store_noise: bool) -> None:
    """8 trajectories of 4 prompts in files of 4, 16 x 3 x 32 x 32, 40 tokens."""
    store = SynVidStore(tmp_path / "set", Header.of("tiny", "0" * 64, store_noise=store_noise))
    for first in (0, 4):
        shape = (4, 16, 3, 32, 32)
        noise = make_noise(shape, range(first, first + 4))
        infos = []
        for seed in range(first, first + 4):
            prompt = f"{'a long description of a video ' * 10}{seed // 2}"
            text = store.put_text(torch.full((40, 4096), float(seed // 2)).half(), torch.zeros(768).half())
            infos.append(SampleInfo(sample_id(prompt, seed, shape[1:]), prompt, text, seed, 1.0))
        store.commit([noise * 0.5 * (k + 1) for k in range(5)], infos, noise)
    size = dict(height=256, width=256, frames=9)
    budget = plan_budget(BudgetArgs(count=8, batch=4, seeds=2, tokens=40, **size))  # type: ignore[arg-type]
    files = [path for path in (tmp_path / "set").rglob("*") if path.is_file()]
    planned = budget.storage[store_noise]
    assert sum(path.stat().st_size for path in files) == pytest.approx(planned.bytes, rel=0.01)
    assert len(files) == planned.files + 2  # the header, and this writer's manifest


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["budget", "--split", "medium", "--count", "38400", "--gpu", "h200"]) == 0
    table = capsys.readouterr().out
    assert "1,966 GPU hours" in table and "SGLang" in table and "5 keys, noise from its seed" in table
    assert cli.main(["budget", "--count", "110000", "--gpus", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [it["gpus"] for it in found["fleets"]] == [64] and found["storage"][0]["bytes"] == pytest.approx(3.7e12, rel=0.05)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"count": 0}, "count is 0; it must be at least 1"),
        ({"gpus": 0}, "gpus is 0"),
        ({"step_seconds": 0.0}, "step-seconds is 0.0"),
        ({"days": float("nan")}, "days is nan"),
        ({"height": 100}, "height is 100; it must be a multiple of 16"),
        ({"frames": 8}, r"frames is 8; it must be 4n\+1"),
    ],
)
def test_what_cannot_be(wrong: dict, sentence: str) -> None:
    with pytest.raises(InvalidValueError, match=sentence):
        plan_budget(BudgetArgs(**wrong))
