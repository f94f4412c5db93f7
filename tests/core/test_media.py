"""Clips become files that browsers play and come back as they were; sheets show what they are given, under its label."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from accvideo_core import media
from accvideo_core.errors import InvalidValueError, OutputError
from accvideo_core.media import beside, contact_sheet, label_bar, read_mp4, side_by_side, stack, upscale, write_mp4, write_png
from accvideo_core.synvid.frames import sample_frames

COLOURS = np.array(
    [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), (255, 255, 255), (0, 0, 0)]
)


def plates(length: int = 5, size: int = 32) -> np.ndarray:
    """(T, 2 size, 4 size, 3): eight pure colours in squares, one place further with every frame."""
    frames = np.stack([np.roll(COLOURS, shift, axis=0).reshape(2, 4, 3) for shift in range(length)]).astype(np.uint8)
    return upscale(frames, size)


def test_mp4_keeps_frames_order_colours_and_rate(tmp_path: Path) -> None:
    clip = plates(11)
    write_mp4(tmp_path / "a.mp4", clip, 8)
    video = read_mp4(tmp_path / "a.mp4")
    assert video.frames.shape == clip.shape and video.frames.dtype == np.uint8 and video.fps == 8
    # Chroma at half size blurs the borders between squares; their middles must be the colours themselves.
    middles = np.s_[:, 16::32, 16::32]
    assert np.abs(video.frames[middles].astype(int) - clip[middles]).max() <= 4


def test_mp4_is_what_browsers_play(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", plates(), 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.frames) == ("h264", "yuv420p", 5)
        bt709 = (1, 1, 1)
        codec = stream.codec_context
        assert (codec.colorspace, codec.color_primaries, codec.color_trc) == bt709 and codec.color_range == 1
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"ftyp") < data.index(b"moov") < data.index(b"mdat"), "the index must come before the pictures"


def test_same_frames_make_the_same_file(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, plates(), 8, {"prompt": "{}"})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_metadata_survives(tmp_path: Path) -> None:
    workflow = '{"nodes": [' + '"kötter 中",' * 5000 + "0]}"
    write_mp4(tmp_path / "a.mp4", plates(1), 8, {"workflow": workflow, "prompt": "{}"})
    metadata = read_mp4(tmp_path / "a.mp4").metadata
    assert metadata["workflow"] == workflow and metadata["prompt"] == "{}"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_colon_in_a_relative_path_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_mp4("12:30/a.mp4", plates(3), 8)
    assert len(read_mp4("12:30/a.mp4").frames) == len(sample_frames(Path("12:30/a.mp4"), 3, 64)) == 3


@pytest.mark.parametrize("fps", [1, 8, 12.5, 23.976, 24, 25, 29.97, 30000 / 1001, 59.94, 60, 120])
def test_frame_rates(tmp_path: Path, fps: float) -> None:
    write_mp4(tmp_path / "a.mp4", plates(3, 8), fps)
    video = read_mp4(tmp_path / "a.mp4")
    assert video.fps == pytest.approx(fps, rel=2e-5) and len(video.frames) == 3


def test_broadcast_rates_are_exact() -> None:
    assert [str(media.frame_rate(fps)) for fps in (23.976, 29.97, 59.94, 24, 12.5)] == [
        "24000/1001",
        "30000/1001",
        "60000/1001",
        "24",
        "25/2",
    ]


@pytest.mark.parametrize("fps", [0, 1e-4, -8, float("nan"), float("inf"), 1e6, "8"])
def test_impossible_frame_rates(tmp_path: Path, fps: float) -> None:
    with pytest.raises(InvalidValueError, match=f"fps is {fps}"):
        write_mp4(tmp_path / "a.mp4", plates(1), fps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (np.zeros((2, 31, 32, 3), np.uint8), "32x31.*even"),
        (np.zeros((2, 32, 33, 3), np.uint8), "33x32.*even"),
        (np.zeros((0, 32, 32, 3), np.uint8), r"\(0, 32, 32, 3\)"),
        (np.zeros((32, 32, 3), np.uint8), r"\(32, 32, 3\).*\(T, H, W, 3\)"),
        (np.zeros((2, 3, 32, 32), np.uint8), "T, H, W, 3"),
        (np.zeros((2, 32, 32, 3), np.float32), "float32.*uint8"),
    ],
)
def test_frames_of_another_kind(tmp_path: Path, frames: np.ndarray, words: str) -> None:
    with pytest.raises(InvalidValueError, match=words):
        write_mp4(tmp_path / "a.mp4", frames, 8)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for write in (lambda p: write_mp4(p, plates(1), 8), lambda p: write_png(p, plates(1)[0])):
        with pytest.raises(OutputError, match="part of the path is a file"):
            write(tmp_path / "file" / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size to stand for a full disk")
def test_a_disk_that_fills_up_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"old")
    program = """if True:
        import resource, sys
        import numpy as np
        from accvideo_core.errors import OutputError
        from accvideo_core.media import write_mp4
        noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            write_mp4(sys.argv[1], noise, 8)
        except OutputError as error:
            print(error)
    """
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.mp4")], capture_output=True, text=True, check=True)
    assert "a.mp4" in run.stdout and "too large" in run.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"old"


def test_an_encoder_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise av.error.ExternalError(1, "generic error in an external library")

    monkeypatch.setattr(media, "_encode", fail)
    with pytest.raises(OutputError, match=r"a\.mp4.*the video encoder failed"):
        write_mp4(tmp_path / "a.mp4", plates(1), 8)
    assert list(tmp_path.iterdir()) == []


def test_reading_what_is_no_video(tmp_path: Path) -> None:
    write_mp4(tmp_path / "whole.mp4", plates(), 8)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:200])
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("missing.mp4", "cut.mp4", "text.mp4", "empty.mp4", "."):
        with pytest.raises(InvalidValueError) as caught:
            read_mp4(tmp_path / name)
        assert repr(str(tmp_path / name)) in str(caught.value) and "\n" not in str(caught.value)


def test_png_is_exact(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)
    with pytest.raises(InvalidValueError, match="image"):
        write_png(tmp_path / "b.png", image[..., 0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_upscale_makes_squares() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    large = upscale(clip, 3)
    assert large.shape == (2, 9, 12, 3)
    for y in range(3):
        for x in range(3):
            assert np.array_equal(large[:, y::3, x::3], clip)
    for factor in (0, -1, 1.5, True):
        with pytest.raises(InvalidValueError, match=f"upscale is {factor}"):
            upscale(clip, factor)


def test_labels_are_legible_and_differ() -> None:
    bars = [label_bar(text, 200) for text in ("teacher, 50 steps", "student, 5 steps", "")]
    assert all(bar.shape == bars[0].shape and bar.dtype == np.uint8 for bar in bars)
    assert (bars[0] > 200).sum() > 100 and (bars[1] > 200).sum() > 100 and (bars[2] > 200).sum() == 0
    assert not np.array_equal(bars[0], bars[1])


@pytest.mark.parametrize("text", ["a red ball " * 12, "w" * 90])
def test_long_labels_are_broken_not_cut(text: str) -> None:
    """As much ink in a narrow bar of many lines as in a wide bar of one."""
    narrow, wide = label_bar(text, 120), label_bar(text, 3000)
    assert narrow.shape[1] == 120 and narrow.shape[0] > 3 * wide.shape[0]
    ink = [(bar.astype(int) - media.BACKGROUND).sum() for bar in (narrow, wide)]
    assert ink[0] == pytest.approx(ink[1], rel=0.1)
    assert (narrow[:, -2:] == media.BACKGROUND).all(), "nothing runs into the edge"


def test_stack_and_beside_hold_the_last_frame_and_fill_with_background() -> None:
    long, short, image = plates(4, 2), plates(2, 4), np.full((6, 6, 3), 99, np.uint8)
    column = stack([long, short, image], gap=1)
    assert column.shape == (4, 4 + 1 + 8 + 1 + 6, 16, 3)
    assert np.array_equal(column[:, :4, :8], long)
    assert np.array_equal(column[:, 5:13], short[[0, 1, 1, 1]])
    assert (column[:, 14:, :6] == 99).all() and (column[:, :5, 8:] == media.BACKGROUND).all()
    row = beside([image, plates(1, 2)[0]], gap=2)
    assert row.shape == (6, 6 + 2 + 8, 3) and np.array_equal(row[:4, 8:], plates(1, 2)[0])
    with pytest.raises(InvalidValueError, match="at least one"):
        stack([])


@pytest.mark.parametrize("size", [5, 8])
def test_side_by_side_shows_every_clip_and_can_be_encoded(tmp_path: Path, size: int) -> None:
    clips = [plates(3, size), plates(3, size)[:, ::-1], plates(2, size)]
    shown = side_by_side(clips, ["teacher, 50 steps", "teacher, 5 steps, and a long label that breaks", "student"], 3, "a prompt")
    write_mp4(tmp_path / "a.mp4", shown, 8)
    assert shown.shape[0] == 3
    height, width = 2 * size * 3, 4 * size * 3
    for number, clip in enumerate([clips[0], clips[1], clips[2][[0, 1, 1]]]):
        column = shown[:, :, number * (width + media.GAP) :][:, :, :width]
        tops = range(shown.shape[1] - height + 1)
        assert any(np.array_equal(column[:, y : y + height], upscale(clip, 3)) for y in tops), (
            f"clip {number} is not in its column"
        )


def test_side_by_side_needs_a_label_a_clip() -> None:
    for clips, labels in (([], []), ([plates()], []), ([plates()], ["a", "b"])):
        with pytest.raises(InvalidValueError, match="labels for"):
            side_by_side(clips, labels)
    with pytest.raises(InvalidValueError, match="clip 'student'"):
        side_by_side([plates().astype(float)], ["student"])


def test_contact_sheet_spreads_its_moments_over_the_clip() -> None:
    clip = np.stack([np.full((8, 8, 3), 10 * t, np.uint8) for t in range(17)])
    sheet = contact_sheet([("", clip)], moments=5)
    gap = media.GAP // 2
    assert sheet.shape == (8, 5 * 8 + 4 * gap, 3)
    assert [sheet[0, i * (8 + gap), 0] for i in range(5)] == [0, 40, 80, 120, 160]
    assert contact_sheet([("", clip[:3])], moments=5).shape == (8, 3 * 8 + 2 * gap, 3), "no frame is shown twice"
    assert contact_sheet([("", clip)], moments=1).shape == (8, 8, 3)


def test_contact_sheet_has_a_row_a_clip_and_a_title() -> None:
    clip = plates(5, 8)
    one, two = contact_sheet([("teacher", clip)]), contact_sheet([("teacher", clip), ("student", clip)])
    assert two.shape == (2 * one.shape[0] + media.GAP // 2, one.shape[1], 3)
    assert np.array_equal(two[: one.shape[0]], one)
    titled = contact_sheet([("teacher", clip)], title="a red ball")
    assert np.array_equal(titled[-one.shape[0] :], one) and titled.shape[0] > one.shape[0]
    with pytest.raises(InvalidValueError, match="0 rows"):
        contact_sheet([])
    with pytest.raises(InvalidValueError, match="0 moments"):
        contact_sheet([("a", clip)], moments=0)
