"""Clips as files and pictures: H.264 MP4 that browsers play, contact sheets, clips side by side under labels.

A clip is a uint8 array (T, H, W, 3), an image a uint8 array (H, W, 3), both RGB. The arrangements take either, so a sheet
of stills and a comparison video are built by the same functions.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Colorspace
from PIL import Image, ImageDraw, ImageFont

from .errors import InvalidValueError, OutputError
from .files import atomic_path

Pixels = npt.NDArray[np.uint8]

BACKGROUND, INK = 24, 235
GAP = 8
_BT709 = 1  # the code of BT.709 for matrix, primaries and transfer alike (ITU-T H.273)
_LIMITED_RANGE = 1


@dataclass(frozen=True)
class Video:
    """What `read_mp4` found: frames (T, H, W, 3) uint8 RGB, frames per second, and the text the file carries."""

    frames: Pixels
    fps: float
    metadata: Mapping[str, str]


def write_mp4(path: str | os.PathLike[str], frames: Pixels, fps: float, metadata: Mapping[str, str] | None = None) -> None:
    """Write a clip as H.264 in MP4: yuv420p in BT.709, index in front, so that a browser plays it while it loads.

    frames    (T, H, W, 3) uint8 RGB, T >= 1, H and W even (chroma is stored at half size)
    fps       frames per second, from 0.001 to 1000
    metadata  text kept under any key; ComfyUI reads the workflow back from `prompt` and `workflow`
    Raises InvalidValueError for other frames or fps, OutputError where it cannot be written. Written whole or not at all.
    """
    frames = _check_clip(frames, "frames")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise InvalidValueError(
            f"frames are {width}x{height}; H.264 needs an even width and height, so pad or crop one row or column"
        )
    rate = frame_rate(fps)
    with atomic_path(path) as temporary:
        try:
            _encode(temporary, frames, rate, metadata or {})
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise OutputError(f"cannot write {str(path)!r}: the video encoder failed ({error})") from error


def _encode(path: Path, frames: Pixels, rate: Fraction, metadata: Mapping[str, str]) -> None:
    height, width = frames.shape[1:3]
    with av.open(os.path.abspath(path), "w", format="mp4", options={"movflags": "use_metadata_tags+faststart"}) as container:
        container.metadata.update({key: str(value) for key, value in metadata.items()})
        # crf 16 is visually lossless; the preset costs time only.
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        # A player shown no matrix guesses one by the size, and shows other colours than we had.
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_mp4(path: str | os.PathLike[str]) -> Video:
    """Read a whole video into memory (T * H * W * 3 bytes). Any container and codec that FFmpeg knows.

    Raises InvalidValueError, naming the file, where it is missing, damaged or holds no video.
    """
    with opened_video(path) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        rate, metadata = stream.average_rate, dict(container.metadata)
    if not frames or not rate:
        raise InvalidValueError(f"{str(path)!r} holds no video frames; it may be cut off, so make or download it again")
    return Video(np.stack(frames), float(rate), metadata)


def read_metadata(path: str | os.PathLike[str]) -> Mapping[str, str]:
    """The text that a video file carries; no frame is decoded. InvalidValueError as `read_mp4`."""
    with opened_video(path) as container:
        return dict(container.metadata)


@contextlib.contextmanager
def opened_video(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The container of a video file (PyAV), with a video in it. InvalidValueError, naming the file, for another file, and where
    reading from it fails."""
    try:
        # FFmpeg takes what stands before a colon for a protocol, unless the path is absolute; and a title may be no UTF-8.
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise InvalidValueError(f"{str(path)!r} holds no video; give an MP4 or another video file")
            yield container
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidValueError(
            f"cannot read {str(path)!r} as a video: {reason}; give a whole MP4 or another video file"
        ) from error


def write_png(path: str | os.PathLike[str], image: Pixels) -> None:
    """Write an image (H, W, 3) as PNG, whole or not at all. Raises InvalidValueError and OutputError as `write_mp4`."""
    image = _check(image, 3, "image")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        Image.fromarray(image).save(file, format="PNG")


def upscale(pixels: Pixels, factor: int) -> Pixels:
    """Enlarge an image or a clip by a whole factor, each pixel a square (nearest neighbour), so that nothing is invented."""
    if isinstance(factor, bool) or int(factor) != factor or factor < 1:
        raise InvalidValueError(f"upscale is {factor}; it must be a whole number of at least 1")
    return np.repeat(np.repeat(pixels, int(factor), axis=-3), int(factor), axis=-2)


def label_bar(text: str, width: int, size: int = 14) -> Pixels:
    """An image of that width with the text in it, broken into as many lines as it needs; `size` is the letters' height.

    Drawn with Pillow's built-in font, which knows English letters: others show as boxes.
    """
    font = ImageFont.load_default(size)
    lines = _wrap(text, width - GAP, font)
    line_height = math.ceil(size * 1.35)
    image = Image.new("RGB", (width, line_height * len(lines) + GAP), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        draw.text((GAP // 2, GAP // 2 + row * line_height), line, font=font, fill=(INK,) * 3)
    return np.asarray(image)


def stack(blocks: Sequence[Pixels], gap: int = GAP) -> Pixels:
    """Put images or clips under one another, left-aligned.

    Among clips an image stands still and a shorter clip holds its last frame; the result is as long as the longest.
    """
    return _join(blocks, axis=-3, gap=gap)


def beside(blocks: Sequence[Pixels], gap: int = GAP) -> Pixels:
    """Put images or clips next to one another, top-aligned; otherwise as `stack`."""
    return _join(blocks, axis=-2, gap=gap)


def side_by_side(clips: Sequence[Pixels], labels: Sequence[str], factor: int = 1, title: str = "") -> Pixels:
    """One clip of several, each under its label, the title above them all; (T, H, W, 3) of even size, ready for `write_mp4`.

    clips   each (T, H, W, 3) uint8; a shorter one holds its last frame
    labels  one a clip, e.g. "student, 5 steps, 0.8 s"
    factor  whole enlargement of the clips, not of the labels
    """
    if not clips or len(clips) != len(labels):
        raise InvalidValueError(f"{len(labels)} labels for {len(clips)} clips; give at least one clip and one label for each")
    shown = [upscale(_check_clip(clip, f"clip {label!r}"), factor) for clip, label in zip(clips, labels, strict=True)]
    bars = [label_bar(label, clip.shape[2]) for clip, label in zip(shown, labels, strict=True)]
    tallest = max(bar.shape[0] for bar in bars)
    columns = [stack([_pad(bar, tallest, bar.shape[1]), clip], gap=0) for bar, clip in zip(bars, shown, strict=True)]
    joined = beside(columns)
    if title:
        joined = stack([label_bar(title, joined.shape[2], size=16), joined], gap=0)
    return _pad(joined, joined.shape[1] + joined.shape[1] % 2, joined.shape[2] + joined.shape[2] % 2)


def contact_sheet(rows: Sequence[tuple[str, Pixels]], moments: int = 5, factor: int = 1, title: str = "") -> Pixels:
    """An image with a row of stills for each (label, clip): `moments` frames from first to last, evenly spread, left to right.

    Sheets of several prompts are made by `stack` of one sheet each, the prompt its title.
    """
    if not rows or moments < 1:
        raise InvalidValueError(f"{len(rows)} rows of {moments} moments; a contact sheet needs at least one of each")
    blocks = []
    for label, clip in rows:
        clip = upscale(_check_clip(clip, f"clip {label!r}"), factor)
        chosen = np.unique(np.linspace(0, len(clip) - 1, moments).round().astype(int))
        stills = beside([clip[i] for i in chosen], gap=GAP // 2)
        blocks.append(stack([label_bar(label, stills.shape[1]), stills], gap=0) if label else stills)
    if title:
        blocks.insert(0, label_bar(title, max(block.shape[1] for block in blocks), size=16))
    return stack(blocks, gap=GAP // 2)


def _join(blocks: Sequence[Pixels], axis: int, gap: int) -> Pixels:
    if not blocks:
        raise InvalidValueError("nothing to put together; give at least one image or clip")
    moving = [block.shape[0] for block in blocks if block.ndim == 4]
    if moving:
        blocks = [_last_frame_held(block if block.ndim == 4 else block[None], max(moving)) for block in blocks]
    height, width = (max(block.shape[a] for block in blocks) for a in (-3, -2))
    parts: list[Pixels] = []
    for block in blocks:
        block = _pad(block, height, block.shape[-2]) if axis == -2 else _pad(block, block.shape[-3], width)
        space = list(block.shape)
        space[axis] = gap
        parts += [np.full(space, BACKGROUND, np.uint8), block] if parts else [block]
    return np.concatenate(parts, axis)


def _last_frame_held(clip: Pixels, length: int) -> Pixels:
    return clip[np.minimum(np.arange(length), len(clip) - 1)]


def _pad(pixels: Pixels, height: int, width: int) -> Pixels:
    """Fill up with background below and to the right."""
    if pixels.shape[-3:-1] == (height, width):
        return pixels
    padded = np.full((*pixels.shape[:-3], height, width, 3), BACKGROUND, np.uint8)
    padded[..., : pixels.shape[-3], : pixels.shape[-2], :] = pixels
    return padded


def _wrap(text: str, width: int, font: Any) -> list[str]:
    """Break a text into lines no wider than `width` pixels, at spaces, and inside a word that is wider than a line."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".lstrip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def frame_rate(fps: float) -> Fraction:
    """fps as the fraction a container stores; 29.97 and 23.976 become the broadcasters' 30000/1001 and 24000/1001.
    InvalidValueError for one below 0.001 or above 1000."""
    if not (isinstance(fps, (int, float, Fraction)) and math.isfinite(fps) and 0.001 <= fps <= 1000):
        raise InvalidValueError(f"fps is {fps}; it must be from 0.001 to 1000 frames per second")
    broadcast = Fraction(round(fps * 1.001) * 1000, 1001)
    is_broadcast = fps != int(fps) and abs(float(broadcast) - fps) < 1e-3
    return broadcast if is_broadcast else Fraction(fps).limit_denominator(1001)


def _check_clip(frames: Pixels, what: str) -> Pixels:
    return _check(frames, 4, what)


def _check(pixels: Pixels, ndim: int, what: str) -> Pixels:
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != ndim or pixels.shape[-1] != 3 or 0 in pixels.shape:
        expected = "(T, H, W, 3)" if ndim == 4 else "(H, W, 3)"
        raise InvalidValueError(
            f"{what}: {pixels.dtype} of shape {pixels.shape}; needed are uint8 RGB values of shape {expected}, none empty"
        )
    return pixels
