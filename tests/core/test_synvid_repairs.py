"""Datasets and plans on several machines: what is lost is put back from where it is, what conflicts is refused by name."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from accvideo_core import cli
from accvideo_core.errors import AccVideoWarning, SynVidError
from accvideo_core.sampling import make_noise
from accvideo_core.synvid import Header, SampleInfo, SynVidReader, SynVidStore
from accvideo_core.synvid.capture import capture, my_share
from accvideo_core.synvid.merge import merge_synvid
from accvideo_core.synvid.plan import Plan
from accvideo_core.synvid.texts import text_file
from tests.synvid_data import HEADER, PLAN, SHAPE, dataset, flip, key_of

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = '{"id": "one", "prompt": "a red ball"}\n{"id": "two", "prompt": "a green box"}\n'


def encode(folder: Path, prompts: str, *words: str) -> int:
    (folder / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    return cli.main(["encode", str(folder / "prompts.jsonl"), "-o", str(folder / "plan"), "--device", "cpu", *words])


# ---- two at once --------------------------------------------------------------------------------------------------------


def test_a_second_writer_of_a_plan_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    one = Plan(tmp_path, create=True)
    one.add("a", torch.ones(1, 3), None, 0, SHAPE)
    two = Plan(tmp_path)
    one.add("b", torch.ones(1, 3), None, 0, SHAPE)
    with pytest.raises(SynVidError, match="another process is adding to"):
        two.add("c", torch.ones(1, 3), None, 0, SHAPE)
    assert [item.prompt for item in Plan(tmp_path).items.values()] == ["a", "b"]
    Plan(tmp_path).add("c", torch.ones(1, 3), None, 0, SHAPE)
    assert [item.prompt for item in Plan(tmp_path).items.values()] == ["a", "b", "c"]
    late = Plan(tmp_path)
    late._lines.path.unlink()  # added to as it was, it would begin with a hole
    with pytest.raises(SynVidError, match="another process is adding to"):
        late.add("d", torch.ones(1, 3), None, 0, SHAPE)


def small(folder: Path, count: int) -> Plan:
    plan = Plan(folder / "plan", create=True)
    for i in range(count):
        plan.add(f"prompt {i}", torch.full((2, 3), float(i)), torch.zeros(4), i, SHAPE, f"s{i:02}")
    return plan


def test_independent_captures_divide_a_dataset_between_them(tmp_path: Path) -> None:
    """Two that begin together each make the first batches, notice each other, and share the rest."""
    plan, count = small(tmp_path, 40), 40
    header = Header.of("tiny", "0" * 64, 2, 2)
    turns = threading.Barrier(2)

    def network(latent: torch.Tensor, sigma: torch.Tensor, told: object) -> torch.Tensor:
        turns.wait(20)  # side by side: neither is ever a step ahead
        time.sleep(0.02)  # nor a disk that is slower than they are
        return latent.tanh()

    faults: list[str] = []

    def work() -> None:
        try:
            store = SynVidStore(tmp_path / "dataset", header)
            faults.extend(capture(network, plan, my_share(plan, store), store))
        except threading.BrokenBarrierError:
            pass
        finally:
            turns.abort()  # the other goes on alone no more

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    store = SynVidStore(tmp_path / "dataset")
    entries, _ = store.entries()
    twice = len(entries) - len(store.samples())
    assert not faults and len(store.samples()) > count // 2 and twice < count // 2
    free = SynVidStore(tmp_path / "dataset")
    assert capture(lambda x, s, told: x.tanh(), plan, my_share(plan, free), free) == []
    assert len(free.samples()) == count and free.verify() == []


# ---- one id, two samples ------------------------------------------------------------------------------------------------


def test_an_id_of_another_sample_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(tmp_path, PROMPTS) == 0
    for words, prompts, said in (
        ((), PROMPTS.replace("red", "blue"), "prompt 'a red ball' there, 'a blue ball' now"),
        ((), PROMPTS.replace('"id": "two"', '"seed": 7, "id": "two"'), "seed"),
        (("--height", "96", "--width", "96"), PROMPTS, "shape (16, 5, 8, 8) there, (16, 5, 12, 12) now"),
    ):
        assert encode(tmp_path, prompts, *words) == 1
        assert said in capsys.readouterr().err
    assert len(Plan(tmp_path / "plan").items) == 2
    store = dataset(tmp_path / "data", 1, batch=1)
    plan = Plan(tmp_path / "other", create=True)
    plan.add("prompt 7", torch.ones(1, 3), None, 0, SHAPE, PLAN[0])
    with pytest.raises(SynVidError, match="prompt 'prompt 0' there, 'prompt 7' now"):
        my_share(plan, store)
    other = SynVidStore(tmp_path / "more", HEADER)
    info = SampleInfo(PLAN[0], "prompt 7", other.put_text(torch.ones(1, 8), None), 0, 0.5)
    other.commit([key_of(PLAN[0], key)[None] for key in range(2)], [info], make_noise((1, *SHAPE), [0]))
    with pytest.raises(SynVidError, match="prompt 'prompt 0' there, 'prompt 7' now"):
        merge_synvid([store.path, other.path], tmp_path / "merged")


# ---- lost encodings -----------------------------------------------------------------------------------------------------


def test_a_lost_encoding_is_put_back_by_the_commands_that_the_error_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(tmp_path, PROMPTS) == 0
    plan, data = tmp_path / "plan", tmp_path / "data"
    words = ["capture", "--plan", str(plan), "-o", str(data), "--steps", "2", "--keys", "2", "--device", "cpu"]
    assert cli.main(words) == 0
    lost = text_file(Plan(plan).items["two"].text)
    (plan / lost).unlink()
    (data / lost).unlink()
    assert cli.main(["inspect", str(data), "--verify", "--withdraw"]) == 1
    assert "encode the prompts into the plan again" in capsys.readouterr().out
    assert encode(tmp_path, PROMPTS, "--json") == 0
    assert json.loads(capsys.readouterr().out) | {"plan": ""} == {
        "plan": "", "samples": 2, "added": 0, "restored": 1, "left_out": [],
    }  # fmt: skip
    assert cli.main(words) == 0 and "1 encodings" in capsys.readouterr().err
    assert SynVidStore(data).verify() == []


def test_an_encoding_that_cannot_be_read_takes_no_other_sample_with_it(tmp_path: Path) -> None:
    plan = small(tmp_path, 4)
    (plan.path / text_file(plan.items["s02"].text)).unlink()
    store = SynVidStore(tmp_path / "data", Header.of("tiny", "0" * 64, 2, 2))
    faults = capture(lambda x, s, told: x.tanh(), plan, list(plan.items.values()), store, batch=2)
    assert len(faults) == 1 and "sample s02" in faults[0] and set(store.samples()) == {"s00", "s01", "s03"}


def test_a_capture_gives_up_when_no_encoding_can_be_read(tmp_path: Path) -> None:
    plan = small(tmp_path, 20)
    shutil.rmtree(plan.path / "text")
    store = SynVidStore(tmp_path / "data", Header.of("tiny", "0" * 64, 2, 2))
    with pytest.raises(SynVidError, match="11 trajectories could not be stored.*sample s00"):
        capture(lambda x, s, told: x.tanh(), plan, list(plan.items.values()), store)


# ---- merging ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("damaged", "whole"), ("whole", "damaged")])
def test_what_one_source_has_damaged_is_taken_from_another(tmp_path: Path, order: tuple[str, str]) -> None:
    for name in order:
        dataset(tmp_path / name, 4, batch=2)
    damaged = SynVidStore(tmp_path / "damaged")
    flip(damaged.path / damaged.sample(PLAN[0]).file, -1)
    report = merge_synvid([tmp_path / name for name in order], tmp_path / "out")
    assert (report.copied, report.already, report.damages) == (4, 0, ())
    assert SynVidReader(tmp_path / "out").verify() == []


def test_merging_puts_back_an_encoding_that_the_output_has_lost(tmp_path: Path) -> None:
    store, backup = dataset(tmp_path / "data", 2), dataset(tmp_path / "backup", 2)
    (store.path / text_file(store.sample(PLAN[1]).text)).unlink()
    report = merge_synvid([backup.path], store.path)
    assert (report.copied, report.already, report.damages) == (0, 2, ()) and store.verify() == []


# ---- other machines -----------------------------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys, warnings
from accvideo_core.synvid import SynVidReader, SynVidDataset
reader = SynVidReader(sys.argv[1])
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    damages = [damage.what for damage in reader.verify()]
    SynVidDataset(sys.argv[1])[0, reader.header.segments - 1]
print(json.dumps({"damages": damages, "told": sorted({str(w.message) for w in told})}))
"""


def test_noise_that_differs_in_its_last_digits_only_is_taken(tmp_path: Path) -> None:
    """A process without vector instructions draws them so, as other kinds of CPU do."""
    plan = Plan(tmp_path / "plan", create=True)
    plan.add("a", torch.ones(2, 3), torch.zeros(4), 7, (16, 5, 8, 8))
    store = SynVidStore(tmp_path / "data", Header.of("tiny", "0" * 64))
    assert capture(lambda x, s, told: x.tanh(), plan, list(plan.items.values()), store) == []
    told = {}
    for capability in ("default", "avx2"):
        found = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, str(store.path)],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        told[capability] = json.loads(found.stdout)
        assert told[capability]["damages"] == []
    noted = [any("last digits" in line for line in each["told"]) for each in told.values()]
    assert sum(noted) <= 1  # this machine's own way is one of the two, or both are one here


def test_noise_of_another_seed_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small(tmp_path, 1)
    store = SynVidStore(tmp_path / "data", Header.of("tiny", "0" * 64))
    assert capture(lambda x, s, told: x.tanh(), plan, list(plan.items.values()), store) == []
    before = store.noise("s00")
    monkeypatch.setattr("accvideo_core.synvid.reader.seeded_noise", lambda shape, seed: before * (1 + 1e-6))
    with pytest.warns(AccVideoWarning, match="last digits"):
        store.noise("s00")
    monkeypatch.setattr("accvideo_core.synvid.reader.seeded_noise", lambda shape, seed: make_noise((1, *shape), [seed + 1])[0])
    with pytest.raises(SynVidError, match="--store-noise"):
        store.noise("s00")
    assert cli.main(["inspect", str(store.path), "--verify", "--withdraw"]) == 1
    assert set(store.samples()) == {"s00"}  # its latents are sound, and stay


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files as any web server gives them; with `listing` None it refuses to list."""

    listing = True

    def log_message(self, *_: object) -> None:
        pass

    def list_directory(self, path: str):  # type: ignore[no-untyped-def]
        if self.listing:
            return super().list_directory(path)
        self.send_error(403)
        return None


def test_a_dataset_behind_a_web_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    dataset(tmp_path / "data", 2)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}/data"
        assert merge_synvid([address], tmp_path / "copy").copied == 2
        monkeypatch.setattr(Quiet, "listing", None)
        with pytest.raises(SynVidError, match="cannot be listed"):
            SynVidReader(address.replace("127.0.0.1", "localhost")).samples()
    finally:
        server.shutdown()
        server.server_close()


# ---- inspect ------------------------------------------------------------------------------------------------------------


def test_a_sheet_beside_a_verification_shows_a_whole_sample_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = dataset(tmp_path / "data", 2, batch=1, header=replace(HEADER, family="hunyuan-t2v"))
    first = min(PLAN[:2])
    flip(store.path / store.sample(first).file, -1)
    words = ["inspect", str(store.path), "--verify", "--json", "--sheet", str(tmp_path / "sheet.png")]
    assert cli.main(words) == 1
    assert json.loads(capsys.readouterr().out)["sheet"]["sample"] == max(PLAN[:2])
    assert cli.main([*words, "--sample", "nope"]) == 1
    assert "no sample 'nope'" in capsys.readouterr().err
    flip(store.path / store.sample(max(PLAN[:2])).file, -1)
    assert cli.main(words) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert len(problems) == 3 and problems[-1].startswith("no sheet: ")
    assert cli.main([*words, "--withdraw"]) == 1  # everything, and the report is there all the same
    assert len(json.loads(capsys.readouterr().out)["withdrawn"]) == 2 and not store.samples()
