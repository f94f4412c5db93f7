"""A few frames of a video, evenly spread, without decoding all of it: what a vision model is shown."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from ..errors import InvalidValueError
from ..media import opened_video


def sample_frames(path: Path, count: int, side: int) -> list[Image.Image]:
    """`count` frames, each from the middle of one of `count` equal parts of the video's time, upright and made to fit in
    side x side pixels (never enlarged). A video of fewer frames gives each once.

    Raises InvalidValueError, naming the file, where it is missing, damaged or holds no video.
    """
    with opened_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = list(_at_moments(container, stream, count))
    if not frames:
        raise InvalidValueError(f"{str(path)!r} holds no video frames; it may be cut off")
    return [_upright(frame, side) for frame in frames]


def as_jpeg(image: Image.Image) -> bytes:
    """The image as a JPEG file."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def _at_moments(container: av.container.InputContainer, stream: av.VideoStream, count: int) -> Iterator[av.VideoFrame]:
    """The frame on show at each moment, in order, no frame twice. Where the length is not known, all frames are decoded."""
    length = _length(container, stream)
    if length is None:
        frames = list(container.decode(stream))
        chosen = dict.fromkeys(min(len(frames) - 1, int((i + 0.5) * len(frames) / count)) for i in range(count))
        yield from (frames[i] for i in chosen if frames)
        return
    base, begin = Fraction(stream.time_base or 1), stream.start_time or 0
    last: int | None = None
    for i in range(count):
        moment = begin + int(length * Fraction(2 * i + 1, 2 * count) / base)
        container.seek(moment, stream=stream)  # to the key frame at or before it
        shown = None
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts > moment:
                shown = shown or frame
                break
            shown = frame
        if shown is not None and (last is None or shown.pts is None or shown.pts > last):
            last = shown.pts
            yield shown


def _length(container: av.container.InputContainer, stream: av.VideoStream) -> Fraction | None:
    """Seconds, from the stream or its container."""
    if stream.duration and stream.time_base:
        return stream.duration * Fraction(stream.time_base)
    return Fraction(container.duration, av.time_base) if container.duration else None


def _upright(frame: av.VideoFrame, side: int) -> Image.Image:
    # Phones store frames lying on their side and say in the file how far to turn them, anticlockwise.
    image = Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image
