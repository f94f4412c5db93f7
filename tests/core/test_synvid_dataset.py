"""Training reads segments of whole samples, in an order that ids, seed and step tell; datasets join and can be looked at."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader

from accvideo_core import cli
from accvideo_core.errors import AccVideoWarning, InvalidValueError, SynVidError
from accvideo_core.synvid import Header, SynVidDataset, SynVidReader, SynVidSampler, SynVidStore
from accvideo_core.synvid.folder import Folder
from accvideo_core.synvid.merge import merge_synvid
from accvideo_core.synvid.sheet import key_figures, plot, project, trajectory_sheet
from tests.synvid_data import HEADER, PLAN, SHAPE, commit, dataset, flip, key_of, latent_files

TALL = (4, 2, 6, 4)


@pytest.fixture(scope="module")
def two_buckets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 samples of SHAPE and 7 of TALL, ids of both mixed."""
    path = tmp_path_factory.mktemp("synvid")
    store = dataset(path, 11, batch=4)
    commit(store, PLAN[11:18], TALL)
    return path


def ids_of(sampler: SynVidSampler, steps: range) -> list[list[str]]:
    samples = sampler._dataset.samples
    return [[samples[draw.sample].id for draw in sampler.draws(step)] for step in steps]


# ---- segments -----------------------------------------------------------------------------------------------------------


def test_a_segment_goes_from_a_key_to_the_next_cleaner_one(two_buckets: Path) -> None:
    read = SynVidDataset(two_buckets)
    assert len(read) == 18 and {shape: len(members) for shape, members in read.buckets.items()} == {SHAPE: 11, TALL: 7}
    index = next(i for i, sample in enumerate(read.samples) if sample.id == PLAN[3])
    low, high = read[index, 0], read[index, 1]
    assert torch.equal(low.clean, key_of(PLAN[3], 0).half().float()) and torch.equal(low.noisy, high.clean)
    assert torch.equal(high.noisy, read.reader.noise(PLAN[3])) and low.clean.dtype == torch.float32
    assert (low.sigma, low.sigma_noisy, high.sigma_noisy) == (0.0, HEADER.key_sigmas[1], 1.0)
    assert low.prompt == "prompt 3" and low.text.shape == (4, 8) and low.pooled is not None and low.pooled[0] == 4
    assert [torch.equal(a, b) for a, b in zip(read.trajectory(index), (low.clean, low.noisy, high.noisy), strict=True)] == [
        True
    ] * 3
    with pytest.raises(InvalidValueError, match="no segment 2; segments go from 0 to 1"):
        read.segment(index, 2)


def test_a_batch_has_the_velocities_and_masks_the_text(two_buckets: Path) -> None:
    read = SynVidDataset(two_buckets, ids=PLAN[:3])
    segments = [read[i, i % 2] for i in range(3)]
    batch = read.collate(segments)
    for row, segment in enumerate(segments):
        expected = (segment.clean - segment.noisy) / (segment.sigma - segment.sigma_noisy)
        torch.testing.assert_close(batch.velocity[row], expected)
        assert batch.mask is not None and int(batch.mask[row].sum()) == len(segment.text)
        assert torch.equal(batch.text[row, : len(segment.text)], segment.text) and not batch.text[row, len(segment.text) :].any()
    told = batch.conditioning(read.header.guidance)
    assert told.guidance is not None and told.guidance.tolist() == [6.0] * 3 and told.text_mask is batch.mask
    assert read.collate(segments[:1]).mask is None and batch.to("cpu").keys == (0, 1, 0)


def test_only_the_bytes_asked_for_are_read(two_buckets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, lengths = SynVidDataset(two_buckets), []
    parts = Folder.read_parts
    read[0, 0]  # the file's header is known from now on
    monkeypatch.setattr(Folder, "read_parts", lambda *a: (lengths.extend(len(view) for _, view in a[2]), parts(*a))[1])
    read[0, 0], read[0, 1]
    assert lengths == [2 * 4 * 2 * 4 * 6] * 3


# ---- order --------------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_sample_once_but_the_rest_of_each_bucket(two_buckets: Path) -> None:
    read = SynVidDataset(two_buckets)
    sampler = SynVidSampler(read, batch=2, seed=5)
    assert sampler.steps_per_epoch == 5 + 3
    epochs = [ids_of(sampler, range(8 * e, 8 * e + 8)) for e in range(6)]
    for epoch in epochs:
        drawn = [name for batch in epoch for name in batch]
        assert len(drawn) == len(set(drawn)) == 16
        assert all(len({read.reader.sample(name).shape for name in batch}) == 1 for batch in epoch)
    assert len({str(epoch) for epoch in epochs}) == 6
    assert len({frozenset(PLAN[:18]) - {name for batch in epoch for name in batch} for epoch in epochs}) > 1, "others sit out"
    shapes = [[len(batch) and read.reader.sample(batch[0]).shape for batch in epoch] for epoch in epochs]
    assert any(shape != sorted(shape) for shape in shapes), "buckets are mixed"


def test_the_order_is_of_the_seed_and_the_step_and_not_of_ranks_or_history(two_buckets: Path) -> None:
    read = SynVidDataset(two_buckets)
    whole = ids_of(SynVidSampler(read, batch=4, seed=1), range(9))
    for world in (2, 4):
        parts = [ids_of(SynVidSampler(read, 4, 1, rank, world), range(9)) for rank in range(world)]
        assert [[*chain(*step)] for step in zip(*parts, strict=True)] == whole
    backwards = SynVidSampler(read, batch=4, seed=1)
    assert [ids_of(backwards, range(step, step + 1))[0] for step in reversed(range(9))] == whole[::-1]
    assert ids_of(SynVidSampler(read, batch=4, seed=2), range(9)) != whole
    keys = [SynVidSampler(read, 4).draws(step)[0].key for step in range(5)]
    assert keys == [1, 0, 1, 0, 1]  # Algorithm 1: m-1 down to 0


def test_a_run_that_goes_on_sees_what_it_would_have_seen(two_buckets: Path) -> None:
    read = SynVidDataset(two_buckets)
    sampler = SynVidSampler(read, batch=4, seed=3)

    def loaded(sampler: SynVidSampler, steps: int) -> list[tuple]:
        loader = DataLoader(read, batch_sampler=sampler, collate_fn=read.collate)
        return [(batch.ids, batch.keys, float(batch.clean.sum())) for batch in islice(loader, steps)]

    straight = loaded(sampler, 7)
    state = json.loads(json.dumps(sampler.state(4)))
    assert loaded(SynVidSampler.resume(SynVidDataset(two_buckets), state), 3) == straight[4:]
    halves = [loaded(SynVidSampler.resume(read, state, rank, 2), 3) for rank in range(2)]
    assert [a[0] + b[0] for a, b in zip(*halves, strict=True)] == [ids for ids, _, _ in straight[4:]]


def test_a_dataset_that_has_grown_is_no_resume_but_its_first_ids_are(tmp_path: Path) -> None:
    store = dataset(tmp_path, 6)
    before = SynVidDataset(tmp_path)
    state = SynVidSampler(before, 2).state(3)
    commit(store, PLAN[6:9])
    with pytest.raises(SynVidError, match="began with 6 samples, here are 9"):
        SynVidSampler.resume(SynVidDataset(tmp_path), state)
    frozen = SynVidDataset(tmp_path, ids=[sample.id for sample in before.samples])
    assert SynVidSampler.resume(frozen, state).draws(3) == SynVidSampler(before, 2).draws(3)
    with pytest.raises(SynVidError, match="lacks 1 of the samples"):
        SynVidDataset(tmp_path, ids=PLAN[:10])


def test_batches_that_cannot_be_shared(two_buckets: Path) -> None:
    read = SynVidDataset(two_buckets)
    for batch, rank, world in ((3, 0, 2), (0, 0, 1), (4, 2, 2)):
        with pytest.raises(InvalidValueError, match="multiple of the ranks"):
            SynVidSampler(read, batch, 0, rank, world)
    with pytest.raises(InvalidValueError, match=r"7 samples of shape \(4, 2, 6, 4\) make no batch of 8"):
        SynVidSampler(read, 8)
    assert SynVidSampler(SynVidDataset(two_buckets, shapes=[SHAPE]), 8).steps_per_epoch == 1
    with pytest.raises(SynVidError, match="no whole samples of shape"):
        SynVidDataset(two_buckets, shapes=[(1, 1, 1, 1)])


# ---- damage -------------------------------------------------------------------------------------------------------------


def test_damaged_samples_are_named_and_never_trained_on(tmp_path: Path) -> None:
    store = dataset(tmp_path, 8, batch=2)
    lost, flipped = store.sample(PLAN[0]).file, store.sample(PLAN[2]).file
    (tmp_path / lost).unlink()
    flip(tmp_path / flipped, -1)  # the last row of key 1
    with pytest.warns(AccVideoWarning, match=f"sample .* is left out: {lost}: it is missing"):
        read = SynVidDataset(tmp_path)
    assert len(read) == 6 and {damage.id for damage in read.skipped} == set(PLAN[:2])
    index = next(i for i, sample in enumerate(read.samples) if sample.id == PLAN[3])
    with pytest.warns(AccVideoWarning, match=f"sample {PLAN[3]} is left out: .*is not what was committed"):
        other = read[index, 1]
    assert other.id not in PLAN[:2] and other.id != PLAN[3] and read[index, 1].id == other.id and read.skipped[-1].id == PLAN[3]
    sampler = SynVidSampler(read, 2)
    drawn = [read[draw].id for step in range(sampler.steps_per_epoch) for draw in sampler.draws(step)]
    assert PLAN[3] not in drawn
    for path in latent_files(tmp_path):
        path.write_bytes(b"x" * path.stat().st_size)
    fresh = SynVidDataset(tmp_path, ids=PLAN[4:6])
    with pytest.warns(AccVideoWarning), pytest.raises(SynVidError, match="no sample of shape .* is whole"):
        fresh[0, 0]


def test_a_remote_dataset_reads_like_a_local_one(two_buckets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("memory")
    files.put(str(two_buckets), "/remote/synvid", recursive=True)
    local, remote = SynVidDataset(two_buckets), SynVidDataset("memory://remote/synvid/")
    assert remote.samples == local.samples and remote.header == local.header and remote.reader.verify() == []
    for draw in ((0, 0), (5, 1)):
        mine, theirs = local[draw], remote[draw]
        assert (
            torch.equal(mine.clean, theirs.clean)
            and torch.equal(mine.noisy, theirs.noisy)
            and torch.equal(mine.text, theirs.text)
        )
    assert pickle.loads(pickle.dumps(remote)).digest == local.digest  # noqa: S301 - what DataLoader does for its workers
    files.rm(f"/remote/synvid/{local.samples[0].file}")
    with pytest.warns(AccVideoWarning, match="it is missing"):
        assert len(SynVidDataset("memory://remote/synvid")) < len(local)
    with pytest.raises(SynVidError, match="holds no SynVid dataset"):
        SynVidReader("memory://remote/nothing")
    with pytest.raises(SynVidError, match="cannot be used"):
        SynVidReader("nosuchprotocol://x")
    files.rm("/remote", recursive=True)


# ---- merging ------------------------------------------------------------------------------------------------------------


def test_merging_joins_what_is_whole_and_can_be_run_again(tmp_path: Path) -> None:
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    dataset(a, 4, batch=2)
    other = SynVidStore(b, HEADER)
    for begin in (2, 4, 6):
        commit(other, PLAN[begin : begin + 2], videos=True)
    damaged = other.sample(PLAN[6])
    other.video_path(PLAN[4]).write_bytes(b"changed")
    flip(b / damaged.file, -1)
    done: list[tuple[int, int]] = []
    report = merge_synvid([a, b], out, lambda *told: done.append(told))
    assert (report.copied, report.already) == (5, 0) and done[-1][0] == done[-1][1]
    assert {damage.id for damage in report.damages} == {PLAN[4], PLAN[6], PLAN[7]}
    merged = SynVidReader(out)
    assert set(merged.samples()) == {*PLAN[:4], PLAN[5]} and merged.verify() == [] and merged.header == HEADER
    assert torch.equal(merged.read(PLAN[5], 1), key_of(PLAN[5], 1).half()) and (out / "videos" / f"{PLAN[5]}.mp4").is_file()
    assert not (out / damaged.file).exists()
    again = merge_synvid([a], out)
    assert (again.copied, again.already, again.bytes) == (0, 4, 0) and merged.samples() == SynVidReader(out).samples()
    assert merge_synvid([b], out).copied == 0


def withdrawn_and_backed_up(tmp_path: Path) -> tuple[SynVidStore, Path, str]:
    """A dataset of which a latent file of three samples was damaged and withdrawn, a good copy of it, and the file."""
    store = dataset(tmp_path / "data", 6)
    shutil.copytree(store.path, tmp_path / "backup")
    lost = store.sample(PLAN[0]).file
    flip(store.path / lost, -1)
    assert cli.main(["inspect", str(store.path), "--verify", "--withdraw"]) == 1
    assert set(store.samples()) == set(PLAN[3:6])
    return store, tmp_path / "backup", lost


def test_merging_a_good_copy_restores_what_was_withdrawn(tmp_path: Path) -> None:
    store, backup, lost = withdrawn_and_backed_up(tmp_path)
    whole = SynVidReader(backup).samples()
    for attempt in (1, 2):  # and once more, when the restored file is damaged in its turn
        report = merge_synvid([backup], store.path)
        assert (report.copied, report.already, report.damages) == (3, 3, ())
        found = SynVidReader(store.path).samples()
        assert set(found) == set(PLAN[:6]) and store.verify() == [] and store.missing(PLAN[:6]) == []
        assert torch.equal(store.read(PLAN[1], 1), key_of(PLAN[1], 1).half())
        files = {found[name].file for name in PLAN[:3]}
        assert len(files) == 1 and lost not in files and {found[name].attempt for name in PLAN[:3]} == {attempt}
        assert [found[name] for name in PLAN[3:6]] == [whole[name] for name in PLAN[3:6]]
        manifests = {path: path.read_bytes() for path in (store.path / "manifest").iterdir()}
        again = merge_synvid([backup], store.path)
        assert (again.copied, again.already, again.bytes) == (0, 6, 0) and len(latent_files(store.path)) == 2 + attempt
        assert {path: path.read_bytes() for path in (store.path / "manifest").iterdir() if path in manifests} == manifests
        (lost,) = files
        flip(store.path / lost, -1)
        assert cli.main(["inspect", str(store.path), "--verify", "--withdraw"]) == 1
    commit(store, PLAN[:3])  # captured again instead
    assert (merge_synvid([backup], store.path).copied, store.verify()) == (0, [])


def test_a_restoring_merge_that_dies_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, backup, _ = withdrawn_and_backed_up(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SynVidStore, "adopt", lambda self, samples: (_ for _ in ()).throw(KeyboardInterrupt))
        merge_synvid([backup], store.path)  # the file is copied and not committed: it does not exist
    copied = {path: path.stat().st_mtime_ns for path in latent_files(store.path)}
    assert set(store.samples()) == set(PLAN[3:6]) and len(copied) == 3
    assert merge_synvid([backup], store.path).copied == 3
    assert {path: path.stat().st_mtime_ns for path in latent_files(store.path)} == copied, "not copied twice"
    assert set(store.samples()) == set(PLAN[:6]) and store.verify() == []


def test_restoring_from_several_copies_and_twice_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a damaged copy nothing comes; two merges that do not know of each other commit the same file."""
    store, backup, _ = withdrawn_and_backed_up(tmp_path)
    shutil.copytree(backup, tmp_path / "bad")
    for path in latent_files(tmp_path / "bad"):
        flip(path, -1)
    report = merge_synvid([tmp_path / "bad"], store.path)
    assert (report.copied, {damage.id for damage in report.damages}) == (0, set(PLAN[:3])) and len(latent_files(store.path)) == 2
    adopt, begun = SynVidStore.adopt, []

    def other_first(self: SynVidStore, samples: list) -> None:
        if not begun:
            begun.append(True)
            assert merge_synvid([backup], store.path).copied == 3
        adopt(self, samples)

    monkeypatch.setattr(SynVidStore, "adopt", other_first)
    assert merge_synvid([backup], store.path).copied == 3
    assert len(latent_files(store.path)) == 3 and set(store.samples()) == set(PLAN[:6]) and store.verify() == []


def test_merging_refuses_other_headers_before_anything_is_copied(tmp_path: Path) -> None:
    dataset(tmp_path / "a", 1)
    dataset(tmp_path / "b", 1, header=Header.of("tiny", "e" * 64, steps=4, segments=2))
    with pytest.raises(SynVidError, match="fingerprint"):
        merge_synvid([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    for bad in ([], [tmp_path / "a"]):
        with pytest.raises(InvalidValueError):
            merge_synvid(bad, tmp_path / "a")


# ---- looking ------------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = cli.main([str(word) for word in words])
    return code, "".join(capsys.readouterr())


def test_inspect_counts_verifies_and_withdraws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = dataset(tmp_path, 5, batch=3)
    (tmp_path / "latents" / "00").mkdir(exist_ok=True)
    (tmp_path / "latents" / "00" / "left.tmp").write_bytes(b"123")
    code, out = run(capsys, "inspect", tmp_path, "--json", "--verify")
    report = json.loads(out[: out.rindex("}") + 1])
    assert code == 0 and report["samples"] == 5 and report["shapes"] == {str(list(SHAPE)): 5} and report["problems"] == []
    assert report["files"] == {"latents": 2, "texts": 5, "videos": 0} and report["unnamed"] == {"files": 1, "bytes": 3}
    assert report["bytes"]["latents"] == sum(path.stat().st_size for path in latent_files(tmp_path))
    assert report["prompts"]["different"] == 5 and report["header"]["fingerprint"] == HEADER.fingerprint
    file = store.sample(PLAN[0]).file
    flip(tmp_path / file, -1)
    assert run(capsys, "inspect", tmp_path)[0] == 0, "only hashes tell a changed bit"
    code, out = run(capsys, "inspect", tmp_path, "--verify")
    assert code == 1 and f"PROBLEM         {file}: its content has changed (sample {PLAN[0]})" in out
    code, out = run(capsys, "inspect", tmp_path, "--verify", "--withdraw")
    assert code == 1 and sorted(SynVidStore(tmp_path).missing(PLAN[:5])) == sorted(PLAN[:3])
    assert run(capsys, "inspect", tmp_path, "--verify")[0] == 0


@pytest.mark.parametrize("words", [("--withdraw",), ("--step",), ("--verify", "--self-check")])
def test_inspect_refuses_what_does_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple) -> None:
    dataset(tmp_path, 1)
    assert run(capsys, "inspect", tmp_path, *words)[0] == 2
    (tmp_path / "a.safetensors").write_bytes(b"x")
    assert "is no SynVid dataset" in run(capsys, "inspect", tmp_path / "a.safetensors", "--verify")[1]


def test_a_sheet_shows_every_key_from_noise_to_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    shape = (16, 5, 8, 8)
    store = SynVidStore(tmp_path / "synvid", Header.of("tiny", "f" * 64, steps=4, segments=2))
    commit(store, PLAN[:1], shape)
    code, out = run(capsys, "inspect", store.path, "--sheet", tmp_path / "a.png", "--json")
    report = json.loads(out)
    assert code == 0 and report["sheet"]["shows"] == "decoded" and [key["key"] for key in report["sheet"]["keys"]] == [2, 1, 0]
    decoded = Image.open(tmp_path / "a.png")
    keys = store.read_keys(PLAN[0], (0, 1, 2))
    latents = trajectory_sheet(keys, store.header.key_sigmas)
    assert decoded.width > 5 * 160 and latents.shape[1] == decoded.width
    few = trajectory_sheet(keys, store.header.key_sigmas, moments=2, width=40)
    assert few.shape[0] < latents.shape[0] and few.dtype == latents.dtype


def test_figures_of_a_straight_path_have_one_velocity() -> None:
    noise, clean = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    sigmas = (0.0, 0.25, 1.0)
    keys = [clean + sigma * (noise - clean) for sigma in sigmas]
    figures = key_figures(keys, sigmas)
    rms = float((noise - clean).square().mean().sqrt())
    assert [figure.key for figure in figures] == [2, 1, 0] and figures[0].step is None
    assert [figure.velocity for figure in figures[1:]] == pytest.approx([rms, rms])
    assert [figure.step for figure in figures[1:]] == pytest.approx([0.75 * rms, 0.25 * rms])
    assert plot(figures).shape == (220, 800, 3)
    with pytest.raises(InvalidValueError, match="3 key latents for 2 sigmas"):
        key_figures(keys, sigmas[:2])


def test_a_projection_shows_what_varies_most() -> None:
    latent = torch.randn(8, 1, 16, 16) * 0.01
    latent[3, :, :, 8:] += 5.0
    image = project(latent)(latent)[0].astype(int)
    assert abs(image[:, :7, 0].mean() - image[:, 9:, 0].mean()) > 200
    assert project(latent[:1])(latent[:1]).shape == (1, 16, 16, 3)
    assert Counter(project(torch.zeros(4, 1, 2, 2))(torch.zeros(4, 1, 2, 2)).flatten().tolist()).total() == 12


def test_copies_of_a_dataset_are_datasets(tmp_path: Path) -> None:
    store = dataset(tmp_path / "a", 3)
    shutil.copytree(tmp_path / "a", tmp_path / "moved" / "elsewhere")
    assert SynVidReader(tmp_path / "moved" / "elsewhere").verify() == [] and store.verify() == []
