"""What is committed to a SynVid dataset stays there, once, as it was; what is damaged is known; nothing else gets in."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accvideo_core import files
from accvideo_core.checkpoint import load_student, open_checkpoint
from accvideo_core.checkpoint.fingerprint import fingerprint
from accvideo_core.errors import AccVideoWarning, OutputError, SynVidError
from accvideo_core.sampling import euler_flow, make_noise
from accvideo_core.synvid import Header, SampleInfo, SynVidReader, SynVidStore, Trajectory, header, sample_id
from accvideo_core.synvid.manifest import parse
from accvideo_core.synvid.tensors import bit_sum
from accvideo_core.tiny import weights_path
from accvideo_core.tiny.pipeline import TinyPipeline
from tests.synvid_data import HEADER, PLAN, SHAPE, commit, dataset, flip, key_of, latent_files

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork and no SIGKILL on this system")
needs_mount = pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root to mount a small disk")
OTHER = {
    "family": "hunyuan-t2v",
    "fingerprint": "e" * 64,
    "sigmas": (1.0, 0.9, 0.8, 0.5, 0.0),
    "keys": (0, 1, 4),
    "shift": 5.0,
    "guidance": None,
    "negative": "",
    "dtype": "float32",
    "store_noise": True,
    "latent_space": "another VAE",
}


def with_fields(**changed: object) -> Header:
    return Header(**{**vars(HEADER), **changed})  # type: ignore[arg-type]


# ---- what goes in comes out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [{}, {"dtype": "float32"}, {"store_noise": True}], ids=str)
def test_a_captured_batch_is_read_back(tmp_path: Path, stored: dict) -> None:
    store = dataset(tmp_path / "synvid", 5, batch=3, header=with_fields(**stored))
    reader = SynVidReader(store.path)
    assert list(reader.samples()) == sorted(PLAN[:5]) and reader.verify() == []
    for name in PLAN[:5]:
        sample, seed = reader.sample(name), PLAN.index(name)
        assert (sample.prompt, sample.seed, sample.shape, sample.seconds) == (f"prompt {seed}", seed, SHAPE, 0.5)
        for key in range(2):
            assert torch.equal(reader.read(name, key), key_of(name, key).to(store.header.torch_dtype))
        assert torch.equal(reader.read(sample, 2), make_noise((1, *SHAPE), [seed])[0])
        text, pooled = reader.text(sample.text)
        assert torch.equal(text, torch.full((1 + seed % 10, 8), float(seed))) and pooled is not None and pooled[0] == 1 + seed
    several = reader.read_keys(PLAN[0], (2, 0, 1, 0))
    assert all(torch.equal(found, reader.read(PLAN[0], key)) for found, key in zip(several, (2, 0, 1, 0), strict=True))


def test_a_trajectory_saves_itself_and_text_is_stored_once(tmp_path: Path) -> None:
    seeds = (2**64 - 1, 7)
    keys = tuple(torch.randn(2, *SHAPE) for _ in range(2))
    text = torch.randn(1, 3, 8, dtype=torch.bfloat16)
    trajectory = Trajectory(keys, make_noise((2, *SHAPE), seeds), HEADER, text, None, seeds, seconds=3.0)
    store = SynVidStore(tmp_path, HEADER)
    ids = trajectory.save(store, ["Ünïcode 🎬 \ud800"])
    assert ids == [sample_id("Ünïcode 🎬 \ud800", seed, SHAPE) for seed in seeds]
    assert store.sample(ids[0]).prompt == "Ünïcode 🎬 \ud800" and store.sample(ids[0]).seconds == 1.5
    assert len(list((tmp_path / "text").rglob("*.safetensors"))) == 1
    found, pooled = store.text(store.sample(ids[1]).text)
    assert torch.equal(found, text[0]) and pooled is None
    with pytest.raises(SynVidError, match="guidance: 6.0 there, 1.0 here"):
        Trajectory(keys, keys[0], with_fields(guidance=1.0), text, None, seeds, 1.0).save(store, ["x"])


def test_segment_velocities_survive_fp16_and_not_bf16(tmp_path: Path) -> None:
    """The tiny teacher's own trajectories: within 1 % relative rms of the fp32 ones in every segment."""
    made = Header.of("tiny", "f" * 64)
    pipeline = TinyPipeline.load("teacher")
    noise, latents = make_noise((1, 16, 5, 8, 8), [1]), {}
    velocity = pipeline.velocity(pipeline.condition(["a red circle"]))
    with torch.inference_mode():
        euler_flow(velocity, noise, torch.tensor(made.sigmas), [lambda step: latents.setdefault(step.index + 1, step.latent)])
    keys = [latents[position] for position in reversed(made.keys[1:])]
    store = SynVidStore(tmp_path, made)
    ids = Trajectory(tuple(keys), noise, made, torch.ones(1, 1, 4), None, (1,), 1.0).save(store, ["x"])
    stored = [torch.stack([store.read(name, key) for name in ids]) for key in range(6)]
    table = {}
    for segment in range(5):
        exact = keys[segment] - [*keys, noise][segment + 1]
        for dtype in (torch.float16, torch.bfloat16):
            pair = [
                noise if k == 5 else (stored[k] if dtype == torch.float16 else keys[k].bfloat16()).float()
                for k in (segment, segment + 1)
            ]
            table[segment, dtype] = float((pair[0] - pair[1] - exact).norm() / exact.norm())
    assert all(table[segment, torch.float16] <= 0.01 for segment in range(5)), table
    assert table[4, torch.bfloat16] > 0.01, table


def test_bytes_on_disk_are_the_latents_and_little_more(tmp_path: Path) -> None:
    shape = (16, 5, 8, 8)
    store = SynVidStore(tmp_path, Header.of("tiny", "f" * 64))
    for begin in range(0, 32, 8):
        commit(store, PLAN[begin : begin + 8], shape)
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    texts = sum(tensor.nbytes for name in PLAN[:32] for tensor in store.text(store.sample(name).text) if tensor is not None)
    text_headers = sum(path.stat().st_size for path in (tmp_path / "text").rglob("*.safetensors")) - texts
    information = 32 * 5 * 2 * 16 * 5 * 8 * 8 + texts
    assert (on_disk - text_headers) / information <= 1.02


def test_the_sum_of_bits_of_any_length() -> None:
    assert bit_sum(torch.tensor([1, 2], dtype=torch.int64)) == f"{3:016x}"
    assert bit_sum(torch.tensor([-1, 3], dtype=torch.int64)) == f"{2:016x}"
    assert bit_sum(torch.tensor([1, 0, 0, 0, 5], dtype=torch.float16)) == f"{0x3C00 + 0x4500:016x}"
    assert bit_sum(torch.zeros(3, 5, dtype=torch.float16)[1]) == f"{0:016x}"


# ---- the header ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHER)
def test_a_header_that_disagrees_is_an_error_naming_the_field(tmp_path: Path, name: str) -> None:
    SynVidStore(tmp_path, HEADER)
    with pytest.raises(SynVidError, match=rf"another way \({name}: .* there, .* here\)"):
        SynVidStore(tmp_path, with_fields(**{name: OTHER[name]}))


def test_what_is_only_told_may_differ_and_the_first_stays(tmp_path: Path) -> None:
    SynVidStore(tmp_path, HEADER)
    told = {"teacher": "renamed", "file_sha256": "0" * 64, "negative_text": "1" * 64, "torch_version": "9.9"}
    assert SynVidStore(tmp_path, with_fields(**told)).header == HEADER
    assert set(vars(HEADER)) == set(OTHER) | set(told) | {"cfg"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sigmas": (1.0, 1.0, 0.0)}, "must fall"),
        ({"sigmas": (2.0, 1.0, 0.5, 0.25, 0.0)}, "must fall"),
        ({"keys": (0, 2)}, "key positions"),
        ({"keys": (0, 2, 2, 4)}, "key positions"),
        ({"dtype": "bfloat16"}, "too coarse"),
        ({"cfg": 5.0}, "no negative prompt"),
        ({"shift": float("nan")}, "finite"),
    ],
)
def test_headers_that_make_no_sense(changes: dict, words: str) -> None:
    with pytest.raises(SynVidError, match=words):
        with_fields(**changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found | {"version": 2}, "version 2 is newer"),
        (lambda found: found | {"version": 0}, "version 0 cannot be read any more"),
        (lambda found: found | {"surprise": 1}, "unknown fields surprise"),
        (lambda found: found | {"format": "other"}, "no SynVid header"),
        (lambda found: found | {"sigmas": None}, "cannot be read"),
        (lambda found: {"format": "synvid", "version": 1}, "cannot be read"),
        (lambda found: [found], "no SynVid header"),
    ],
)
def test_headers_a_reader_refuses(tmp_path: Path, change: Callable, words: str) -> None:
    (tmp_path / "synvid.json").write_text(json.dumps(change(json.loads(HEADER.to_json()))) + " }"[:0])
    with pytest.raises(SynVidError, match=words) as caught:
        SynVidReader(tmp_path)
    assert "synvid.json" in str(caught.value)


def test_an_older_version_is_migrated_where_a_way_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(HEADER.to_json()) | {"version": 0}
    found["time_shift"] = found.pop("shift")
    (tmp_path / "synvid.json").write_text(json.dumps(found))
    monkeypatch.setitem(
        header.MIGRATIONS, 0, lambda old: {**{k: v for k, v in old.items() if k != "time_shift"}, "shift": old["time_shift"]}
    )
    assert SynVidReader(tmp_path).header == HEADER


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(SynVidError, match="holds no SynVid dataset"):
        SynVidStore(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- what must not get in -----------------------------------------------------------------------------------------------


def spoil(value: float, row: int = 1, everywhere: bool = False) -> Callable[[list[torch.Tensor]], None]:
    def change(keys: list[torch.Tensor]) -> None:
        keys[1][row] = (
            torch.full(SHAPE, value) if everywhere else keys[1][row].flatten().index_fill(0, torch.tensor([5]), value).view(SHAPE)
        )

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil(float("nan")), "key 1 of sample {1} holds NaN or infinities"),
        (spoil(float("-inf")), "key 1 of sample {1} holds NaN or infinities"),
        (spoil(70000.0, row=0), "key 1 of sample {0} reaches 7e+04, beyond torch.float16"),
        (spoil(0.0, everywhere=True), "key 1 of sample {1} is 0 everywhere"),
        (spoil(1e-9, everywhere=True), "key 1 of sample {1} is 0 everywhere"),
        (lambda keys: keys.pop(), "1 key latents"),
        (lambda keys: keys.__setitem__(0, keys[0][:1]), "2 key latents"),
    ],
)
def test_bad_latents_are_errors_that_name_the_sample(tmp_path: Path, change: Callable, words: str) -> None:
    store = SynVidStore(tmp_path, HEADER)
    text = store.put_text(torch.ones(1, 2))
    keys = [torch.stack([key_of(name, key) for name in PLAN[:2]]) for key in range(2)]
    change(keys)
    infos = [SampleInfo(name, "x", text, i, 1.0) for i, name in enumerate(PLAN[:2])]
    with pytest.raises(SynVidError) as caught:
        store.commit(keys, infos, make_noise((2, *SHAPE), [0, 1]))
    assert words.format(*PLAN) in str(caught.value)
    assert store.samples() == {} and latent_files(tmp_path) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"id": "UPPER"}, "the id 'UPPER'"),
        ({"id": "../evil"}, "the id '../evil'"),
        ({"id": PLAN[1]}, "one id twice"),
        ({"text": "0" * 64}, "put_text it first"),
        ({"text": "no hash"}, "the hash that put_text returned"),
        ({"seed": 4}, "not what its seed 4 gives"),
        ({"seed": -1}, "from 0 to 2"),
        ({"video": "videos/other.mp4"}, "store.video_path"),
        ({"video": f"videos/{PLAN[0]}.mp4"}, "write it there first"),
        ({"seconds": float("nan")}, "nan seconds"),
    ],
)
def test_bad_samples_are_refused(tmp_path: Path, changed: dict, words: str) -> None:
    store = SynVidStore(tmp_path, HEADER)
    text = store.put_text(torch.ones(1, 2))
    info = SampleInfo(**{"id": PLAN[0], "prompt": "x", "text": text, "seed": 0, "seconds": 1.0, **changed})
    keys = [torch.stack([key_of(name, key) for name in PLAN[:2]]) for key in range(2)]
    with pytest.raises(SynVidError, match=words):
        store.commit(keys, [info, SampleInfo(PLAN[1], "y", text, 1, 1.0)], make_noise((2, *SHAPE), [0, 1]))
    assert store.samples() == {} and latent_files(tmp_path) == []


@pytest.mark.parametrize(("text", "pooled"), [((2, 3, 4), (6,)), ((0, 4), (6,)), ((2, 4), (1, 6))])
def test_texts_of_other_shapes_are_refused(tmp_path: Path, text: tuple, pooled: tuple) -> None:
    with pytest.raises(SynVidError, match="one prompt's text"):
        SynVidStore(tmp_path, HEADER).put_text(torch.ones(text), torch.ones(pooled))
    with pytest.raises(SynVidError, match="NaN"):
        SynVidStore(tmp_path, HEADER).put_text(torch.full((2, 4), float("nan")))


# ---- damage is known ----------------------------------------------------------------------------------------------------


def gone(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    "harm", [gone, cut, lambda path: flip(path, -1), lambda path: flip(path, 20)], ids=["gone", "cut", "end", "start"]
)
@pytest.mark.parametrize("what", ["latents", "text", "videos"])
def test_verify_names_every_damaged_file_and_its_samples(tmp_path: Path, harm: Callable, what: str) -> None:
    store = SynVidStore(tmp_path, HEADER)
    for begin in (0, 2):
        commit(store, PLAN[begin : begin + 2], videos=True)
    sample = store.sample(PLAN[0])
    file = {"latents": sample.file, "text": f"text/{sample.text[:2]}/{sample.text}.safetensors", "videos": str(sample.video)}[
        what
    ]
    assert store.verify() == []
    harm(tmp_path / file) if what != "videos" or harm is gone else flip(tmp_path / file, 3)
    damages = SynVidStore(tmp_path).verify()
    assert {damage.file for damage in damages} == {file}
    assert {damage.id for damage in damages} == set(PLAN[:2] if what == "latents" else PLAN[:1])


def test_a_changed_bit_is_never_read(tmp_path: Path) -> None:
    store = dataset(tmp_path, 2, batch=2)
    path, size = latent_files(tmp_path)[0], 2 * 4 * 2 * 4 * 6
    whole = path.read_bytes()
    for key in range(2):
        for row in range(2):
            flip(path, len(whole) - (4 - 2 * key - row) * size + 17)
            for k in range(2):
                for r in range(2):
                    if (k, r) == (key, row):
                        with pytest.raises(SynVidError, match=rf"{PLAN[r]}: key_{k} in .* is not what was committed"):
                            store.read(PLAN[r], k)
                    else:
                        store.read(PLAN[r], k)
            path.write_bytes(whole)
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SynVidError, match=PLAN[1]):
            SynVidReader(tmp_path).read(PLAN[1], 1)


def test_a_damaged_text_is_mended_by_putting_it_again(tmp_path: Path) -> None:
    store = dataset(tmp_path, 1)
    path = next((tmp_path / "text").rglob("*.safetensors"))
    flip(path, -1)
    assert [damage.id for damage in store.verify()] == [PLAN[0]]
    commit(store, PLAN[:1])
    assert store.verify() == []


def test_noise_that_a_seed_no_longer_gives_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dataset(tmp_path, 1)
    monkeypatch.setattr("accvideo_core.synvid.tensors.make_noise", lambda shape, seeds: torch.zeros(shape))
    with pytest.raises(SynVidError, match="draws other numbers"):
        store.noise(PLAN[0])
    assert [(damage.id, "draws other numbers" in damage.what) for damage in store.verify()] == [(PLAN[0], True)]


def test_missing_and_withdrawn_samples_are_captured_again(tmp_path: Path) -> None:
    store = dataset(tmp_path, 6, batch=3)
    first, second = (store.sample(name).file for name in (PLAN[0], PLAN[3]))
    (tmp_path / first).unlink()
    store.withdraw(second)
    assert store.missing([*PLAN[:7], PLAN[0]]) == list(PLAN[:7])
    commit(store, PLAN[:3])
    commit(store, PLAN[3:6])
    assert store.missing(PLAN[:7]) == [PLAN[6]] and store.verify() == []
    assert not any(sample.file in (first, second) for sample in store.samples().values())


def test_a_torn_line_says_nothing_and_its_writer_goes_on_after_it(tmp_path: Path) -> None:
    dataset(tmp_path, 2, batch=1)
    manifest = tmp_path / "manifest" / "first.jsonl"
    whole = manifest.read_bytes()
    first = whole.index(b"\n") + 1
    for end in (first + 1, first + 100, len(whole) - 2, len(whole) - 1):
        manifest.write_bytes(whole[:end])
        store = SynVidStore(tmp_path, HEADER, "first")
        assert list(store.samples()) == [PLAN[0]] and store.verify() == []
        commit(store, [PLAN[1]])
        assert sorted(store.samples()) == sorted(PLAN[:2]) and manifest.read_bytes().count(b"\n") == 2


def test_a_changed_line_is_named_and_passed_over(tmp_path: Path) -> None:
    dataset(tmp_path, 2, batch=1)
    manifest = tmp_path / "manifest" / "first.jsonl"
    whole = manifest.read_bytes()
    for at in range(0, whole.index(b"\n"), 41):
        flip(manifest, at)
        with pytest.warns(AccVideoWarning, match=r"manifest/first\.jsonl: line 1"):
            assert list(SynVidReader(tmp_path).samples()) == [PLAN[1]]
        assert [damage.file for damage in SynVidReader(tmp_path).verify()] == ["manifest/first.jsonl"]
        manifest.write_bytes(whole)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_without_samples(content: bytes) -> None:
    entries, faults = parse(content)
    assert entries == [] and len(faults) == content.count(b"\n")


def test_of_two_captures_of_one_sample_one_counts_whoever_looks(tmp_path: Path) -> None:
    first, second = (SynVidStore(tmp_path, HEADER, name) for name in ("a", "b"))
    for store in (first, second):
        commit(store, PLAN[:2])
    assert first.samples() == second.samples() == SynVidReader(tmp_path).samples()
    assert len({sample.file for sample in first.samples().values()}) == 1


# ---- crashes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder where fsync costs nothing, if there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as folder:
        yield Path(folder)


def killed_at(event: int, work: Callable[[], None]) -> bool:
    """Run `work` in a fork that is killed with SIGKILL at its event-th change of the file system; whether it was."""
    child = os.fork()
    if not child:
        left = event

        def count(*_: object) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        changes = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.truncate", "os.chmod"}
        sys.addaudithook(lambda name, args: count() if name in changes else None)
        fsync = os.fsync
        os.fsync = lambda handle: (count(), fsync(handle), count())[1]  # type: ignore[assignment]
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@needs_fork
def test_a_crash_at_any_point_of_a_commit_loses_and_doubles_nothing(in_memory: Path) -> None:
    for event in range(200):
        path = in_memory / str(event)
        if not killed_at(event, lambda path=path: dataset(path, 2, batch=1)):  # type: ignore[misc]
            break
        store = SynVidStore(path, HEADER, "first" if event % 2 else None)  # under the same name, or one of its own
        committed = set(store.samples())
        assert committed in (set(), {PLAN[0]}, set(PLAN[:2])) and store.verify() == []
        for name in store.missing(PLAN[:2]):
            commit(store, [name])
        assert set(store.samples()) == set(PLAN[:2]) and store.verify() == []
        lines = b"".join(file.read_bytes() for file in (path / "manifest").iterdir())
        assert all(lines.count(b'"id":"%s"' % name.encode()) == 1 for name in PLAN[:2])
    assert event > 30, "the fork counts what the commit does"


@needs_fork
def test_killed_writers(in_memory: Path) -> None:
    """The long form: python -m tests.soak.synvid_kill"""
    from tests.soak.synvid_kill import soak

    kills, rounds, life = 0, 0, 0.015
    while kills < 4:  # a machine on which the writers are done before they are killed gives them less time in the next round
        counts = soak(in_memory / str(rounds), captures=80, writers=4, kills=16, life=life, seed=rounds)
        assert counts["samples"] == 80
        kills, rounds, life = kills + counts["kills"], rounds + 1, life / 2


@needs_fork
def test_a_dataset_made_by_many_at_once_has_the_header_of_one(tmp_path: Path) -> None:
    from tests.soak.synvid_kill import in_a_fork

    def make(path: Path, shift: float) -> None:
        try:
            SynVidStore(path, with_fields(shift=shift))
        except SynVidError:
            os._exit(3)

    for attempt in range(5):
        path = tmp_path / str(attempt)
        children = {in_a_fork(lambda path=path, i=i: make(path, float(i % 2 + 1))): i % 2 + 1 for i in range(4)}  # type: ignore[misc]
        codes = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
        won = SynVidReader(path).header.shift
        assert {children[child] for child, code in codes.items() if code == 0} == {won}
        assert {children[child] for child, code in codes.items() if code == 3} == {3 - won}
        assert [entry.name for entry in path.iterdir()] == ["synvid.json"]


def test_the_first_header_wins_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuse)
    SynVidStore(tmp_path, HEADER)
    with pytest.raises(FileExistsError), files.atomic_path(tmp_path / "synvid.json", replace=False) as temporary:
        temporary.write_text("another")
    assert SynVidStore(tmp_path, HEADER).header == HEADER
    assert [entry.name for entry in tmp_path.iterdir()] == ["synvid.json"]


# ---- disks that refuse --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@needs_mount
def test_a_full_disk_loses_only_what_was_not_committed(small_disk: Path) -> None:
    store = SynVidStore(small_disk / "synvid", HEADER)
    committed: list[str] = []
    with pytest.raises(OutputError, match="free some space"):
        for name in PLAN:
            commit(store, [name])
            committed.append(name)
    assert committed and sorted(store.samples()) == sorted(committed) and store.verify() == [] and store.unnamed() == {}


@needs_mount
def test_a_disk_that_becomes_read_only(small_disk: Path) -> None:
    store = dataset(small_disk / "synvid", 2)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for attempt in (
        lambda: commit(store, [PLAN[5]]),
        lambda: store.withdraw("x"),
        lambda: SynVidStore(small_disk / "new", HEADER),
    ):
        with pytest.raises(OutputError, match="read-only"):
            attempt()
    assert sorted(SynVidStore(small_disk / "synvid", HEADER).samples()) == sorted(PLAN[:2]) and store.verify() == []


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_manifest_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    store = dataset(tmp_path, 2)
    manifest = tmp_path / "manifest" / "first.jsonl"
    before, texts = manifest.read_bytes(), len(list((tmp_path / "text").rglob("*")))
    real = {"open": open, "fsync": os.fsync}

    class Full:
        """The manifest on a disk with 100 bytes left."""

        def __init__(self, path: Path) -> None:
            self.file = real["open"](path, "r+b", buffering=0)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def write(self, lines: bytes) -> int:
            return self.file.write(lines[:100])

    def fsync(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}") == str(manifest):
            raise OSError(errno.EIO, "Input/output error")
        real["fsync"](handle)

    if failing == "write":
        monkeypatch.setattr(
            "builtins.open",
            lambda path, *a, **k: Full(path) if a == ("r+b",) and Path(path) == manifest else real["open"](path, *a, **k),
        )
    elif sys.platform != "linux":
        pytest.skip("tells the manifest by /proc")
    else:
        monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match=r"first\.jsonl"):
        commit(store, [PLAN[2]])
    monkeypatch.undo()
    assert manifest.read_bytes() == before and len(latent_files(tmp_path)) == 1
    assert len(list((tmp_path / "text").rglob("*"))) >= texts and store.verify() == []
    commit(store, [PLAN[2]])
    assert sorted(store.samples()) == sorted(PLAN[:3])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_no_file_is_left_open(tmp_path: Path) -> None:
    """Windows replaces and deletes no open file."""
    before = len(os.listdir("/proc/self/fd"))
    store = dataset(tmp_path, 4)
    store.read_keys(PLAN[0], (0, 1, 2))
    assert store.verify() == [] and len(os.listdir("/proc/self/fd")) == before


# ---- the teacher --------------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_weights_and_not_of_their_order_or_layout() -> None:
    state = {"b.weight": torch.randn(5, 7), "a": torch.tensor(2.0), "c": torch.randn(3).to(torch.float8_e4m3fn)}
    one = fingerprint(state.items())
    assert (
        one
        == fingerprint(reversed(state.items()))
        == fingerprint((state | {"b.weight": state["b.weight"].T.contiguous().T}).items())
    )
    assert len(one) == 64
    for other in (
        {"b.weight": state["b.weight"].view(7, 5)},
        {"b.weight": state["b.weight"].index_fill(0, torch.tensor([4]), 9.0)},
        {"a": torch.tensor(2.5)},
        {"c": state["c"].float() + 0.25},
        {"d": torch.zeros(1)},
    ):
        assert fingerprint((state | other).items()) != one, other.keys()


def test_a_network_has_the_fingerprint_of_its_file() -> None:
    with open_checkpoint(weights_path("teacher")) as checkpoint:
        of_file = fingerprint((key, checkpoint.read(key)) for key in checkpoint)
    network = load_student(weights_path("teacher"))
    assert fingerprint(network.state_dict().items()) == of_file
    rounded = network.to(torch.float8_e4m3fn).state_dict()
    assert fingerprint(rounded.items()) != of_file
