"""`accvideo decode`: a dataset's latents as videos, kept where they are what is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from accvideo_core import cli
from accvideo_core.media import read_mp4
from tests.synvid_data import HEADER, PLAN, dataset

LATENT = (16, 2, 2, 2)
FIRST, SECOND = PLAN[:2]


def captured(path: Path, teacher: str = "f") -> Path:
    dataset(path, 2, shape=LATENT, header=replace(HEADER, fingerprint=teacher * 64))
    return path


def test_videos_are_kept_only_where_they_are_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, videos = captured(tmp_path / "data"), tmp_path / "videos"
    words = ["decode", str(data), "-o", str(videos), "--device", "cpu", "--json"]

    def new(*more: str) -> int:
        assert cli.main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out)["new"]

    def refused(line: list[str]) -> str:
        before = {path: path.read_bytes() for path in videos.iterdir()}
        assert cli.main(line) == 2 and {path: path.read_bytes() for path in videos.iterdir()} == before
        return capsys.readouterr().err

    assert (new("--count", "1"), new(), new()) == (1, 1, 0)
    assert read_mp4(videos / f"{FIRST}.mp4").fps == 8
    assert f"{FIRST}.mp4 was made otherwise: key 0 there, 1 now; choose another folder" in refused([*words, "--key", "1"])
    assert "fps 8 there, 4.0 now" in refused([*words, "--fps", "4"])
    other = captured(tmp_path / "other", "e")
    assert "fingerprint 'fff" in refused(["decode", str(other), *words[2:]])
    (videos / f"{SECOND}.mp4").write_bytes(b"somebody's own")
    assert f"{SECOND}.mp4 is no video of this command's" in refused(words)


@pytest.mark.parametrize(
    "options, said",
    [
        ("--count 0", "count is 0; it must be at least 1"),
        ("--count -1", "count is -1"),
        ("--fps 0", "fps is 0.0; it must be from 0.001"),
        ("--key 3", "key is 3; keys of FOLDER go from 0, clean, to 2, noise"),
        ("--samples c", "has no samples c"),
    ],
)
def test_bad_values_are_refused_before_the_work(
    tmp_path: Path, options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = captured(tmp_path / "data")
    assert cli.main(["decode", str(data), "-o", str(tmp_path / "videos"), *options.split()]) == 2
    assert said.replace("FOLDER", str(data)) in capsys.readouterr().err and not (tmp_path / "videos").exists()
