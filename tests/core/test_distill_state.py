"""Checkpoints of a run: exact, whole or not there, and refused by name where they do not fit."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from accvideo_core.distill import state
from accvideo_core.errors import CheckpointError, InvalidValueError, OutputError


class Run:
    """A network in training, with all that a checkpoint holds."""

    def __init__(self, seed: int = 0, width: int = 4) -> None:
        torch.manual_seed(seed)
        self.network = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.SiLU(), torch.nn.Linear(width, 2))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-2, (0.8, 0.95))
        self.rest: dict[str, Any] = {"queue": {"0": torch.randn(2, 3), "1": torch.randn(1)}, "place": (1, 2), "half": 0.1 + 0.2}

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.network(torch.arange(6.0).view(2, 3)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def parts(self) -> dict[str, Any]:
        return {"network": self.network, "optimizer": state.OptimizerState(self.network, self.optimizer), "rest": self.rest}

    def same(self, other: Run) -> bool:
        ours, theirs = self.network.state_dict(), other.network.state_dict()
        return all(torch.equal(ours[name], theirs[name]) for name in ours)


def write_until_killed(folder: Path) -> None:
    torch.set_num_threads(1)  # the threads of the process it was forked from are not there to wait for
    last = state.newest(folder)
    for step in itertools.count(0 if last is None else state.step_of(last) + 1):
        state.save(folder, step, {"all": {"x": torch.full((400_000,), float(step)), "step": step}}, keep=2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run = Run()
    run.step(3)
    return state.save(tmp_path, 3, run.parts(), {"told": [1, None]})


class TestExactness:
    def test_a_run_that_goes_on_equals_an_unbroken_one_bit_for_bit(self, saved: Path) -> None:
        unbroken, resumed = Run(), Run(seed=1)
        unbroken.step(8)
        assert state.load(saved, resumed.parts()) == {"told": [1, None]}
        resumed.step(5)
        assert resumed.same(unbroken)
        ours, theirs = (run.optimizer.state_dict() for run in (resumed, unbroken))
        assert ours["param_groups"] == theirs["param_groups"]
        assert all(torch.equal(ours["state"][i][key], theirs["state"][i][key]) for i in ours["state"] for key in ours["state"][i])

    def test_whatever_json_and_tensors_hold_comes_back_as_it_was(self, saved: Path) -> None:
        kept, found = Run().rest, Run(seed=1)
        state.load(saved, found.parts())
        assert found.rest["place"] == (1, 2) and found.rest["half"] == 0.1 + 0.2
        assert torch.equal(found.rest["queue"]["0"], kept["queue"]["0"])

    def test_a_part_can_be_read_without_knowing_its_shapes(self, saved: Path) -> None:
        kept, found = Run().rest["queue"], state.read(saved, "rest")
        assert found["half"] == 0.1 + 0.2 and found["queue"].keys() == kept.keys()
        assert all(torch.equal(found["queue"][name], kept[name]) for name in kept)

    def test_an_empty_part_too(self, tmp_path: Path) -> None:
        assert state.read(state.save(tmp_path, 1, {"rest": {"queue": {}}, "more": {"x": torch.ones(1)}}), "rest") == {}

    def test_a_run_saved_before_its_first_step_begins_there(self, tmp_path: Path) -> None:
        begun, resumed = Run(), Run(seed=1)
        state.load(state.save(tmp_path, 0, begun.parts()), resumed.parts())
        begun.step(2)
        resumed.step(2)
        assert resumed.same(begun)


class TestWholeness:
    def test_the_newest_is_found_and_the_last_few_are_kept(self, tmp_path: Path) -> None:
        assert state.newest(tmp_path / "nowhere") is None
        run = Run()
        for step in (9, 10, 100):
            assert state.save(tmp_path, step, run.parts(), keep=2) == state.newest(tmp_path)
        assert sorted(map(state.step_of, tmp_path.iterdir())) == [10, 100]

    def test_what_a_killed_process_left_is_not_seen_and_goes_with_the_next(self, tmp_path: Path) -> None:
        """A process that only writes checkpoints is killed again and again; what it leaves can always be gone on from."""
        halves = 0
        for delay in (0.0, 0.013, 0.029, 0.047, 0.061):
            process = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn").Process(
                target=write_until_killed, args=(tmp_path,)
            )
            process.start()
            begun = state.newest(tmp_path)
            while state.newest(tmp_path) == begun:
                assert process.is_alive(), "it writes until it is killed"
                time.sleep(0.001)
            time.sleep(delay)
            process.kill()
            process.join()
            halves += len(list(tmp_path.glob(".step_*")))
            newest = state.newest(tmp_path)
            assert newest is not None
            found = state.read(newest, "all")
            assert found["step"] == state.step_of(newest) and (found["x"] == found["step"]).all()
        state.save(tmp_path, 10**6, {"all": {"x": torch.ones(1)}})
        assert halves and not list(tmp_path.glob(".step_*"))

    def test_nothing_is_written_over(self, saved: Path) -> None:
        with pytest.raises(OutputError, match="exists"):
            state.save(saved.parent, 3, Run(seed=1).parts())
        resumed, kept = Run(seed=1), Run()
        state.load(saved, resumed.parts())
        kept.step(3)
        assert resumed.same(kept)

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="file"):
            state.save(tmp_path / "file" / "run", 1, Run().parts())

    def test_a_disk_that_fills_up_leaves_what_was_there(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(OutputError, match="no space left on device; free some space"):
            state.save(saved.parent, 4, Run().parts())
        assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def data(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.distcp"))


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


def poison(checkpoint: Path) -> None:
    index = checkpoint / ".metadata"
    size = index.stat().st_size
    content = pickle.dumps(Harmful())
    index.write_bytes(content + bytes(size - len(content)))


class TestDamage:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda c: cut(data(c)), r"\.distcp has \d+ bytes instead of \d+; remove the folder"),
            (lambda c: data(c).unlink(), r"\.distcp is missing"),
            (lambda c: cut(c / "state.json"), "no whole checkpoint"),
            (lambda c: (c / "state.json").unlink(), "no whole checkpoint"),
            (poison, r"may not hold (posix|nt)\.system"),
        ],
        ids=["truncated", "missing", "half a record", "no record", "a pickle that runs code"],
    )
    def test_damage_is_named_and_nothing_is_changed(self, saved: Path, damage: Callable[[Path], None], message: str) -> None:
        damage(saved)
        run = Run(seed=1)
        with pytest.raises(CheckpointError, match=message):
            state.load(saved, run.parts())
        assert run.same(Run(seed=1))

    def test_one_of_another_network_is_refused_by_the_tensors_names(self, saved: Path) -> None:
        wider, deeper = Run(width=5), Run()
        deeper.network.append(torch.nn.Linear(2, 2))
        with pytest.raises(CheckpointError, match=r"network/0.weight is \(4, 3\), not \(5, 3\)"):
            state.load(saved, wider.parts())
        with pytest.raises(CheckpointError, match=r"network/3.weight is not in it"):
            state.load(saved, {"network": deeper.network})
        with pytest.raises(CheckpointError, match=r"network/2.bias has no place here"):
            state.load(saved, {"network": Run().network[:2]})

    @pytest.mark.parametrize("bad", [{"a/b": 1}, {"a": object()}, {3: 1}], ids=["slash", "object", "number"])
    def test_states_that_cannot_be_kept_are_refused_before_anything_is_written(self, tmp_path: Path, bad: Any) -> None:
        with pytest.raises(InvalidValueError):
            state.save(tmp_path, 1, {"part": bad})
        assert not list(tmp_path.iterdir())

    def test_the_record_is_plain_json(self, saved: Path) -> None:
        assert json.loads((saved / "state.json").read_text())["step"] == 3
