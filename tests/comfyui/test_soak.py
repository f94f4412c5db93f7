"""The short form of tests/soak/comfyui_soak.py: a few prompts of every kind, some interrupted, on one server."""

from __future__ import annotations

from accvideo_core.synvid import SynVidReader
from tests.comfyui.server import Server
from tests.soak.comfyui_soak import soak


def test_prompts_of_every_kind_and_interrupts_among_them(server: Server) -> None:
    report = soak(server, 14, 4, seed=1)
    assert report.failed == [] and report.interrupted == 4 and report.prompts == len(report.resident) == 14
    captured = SynVidReader(server.base / "output" / "synvid" / "soak")
    assert captured.samples() and captured.verify() == []
