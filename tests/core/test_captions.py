"""`accvideo captions` against a local server that speaks the OpenAI protocol, and misbehaves by script."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from accvideo_core import cli
from accvideo_core.errors import PromptError
from accvideo_core.media import read_mp4, write_mp4
from accvideo_core.synvid import captions
from accvideo_core.synvid.frames import sample_frames
from accvideo_core.synvid.prompts import read_prompts
from accvideo_core.synvid.vision import Asking, VisionClient

LEVELS = (20, 60, 100, 140, 180, 220)  # the grey each video is told apart by
Answer = tuple[int, Any, dict[str, str]]


def said(text: str, **choice: Any) -> Answer:
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"} | choice]}, {}


def caption(level: int) -> str:
    return f"a calm grey surface of brightness {level} seen from above"


class Endpoint:
    """Answers what `script[level]` lists, in order, and then the caption; an entry "late" takes longer than a try may."""

    def __init__(self) -> None:
        self.script: dict[int, list[Answer | str]] = {}
        self.models: list[str] = ["vision"]
        self.asked: Counter[int] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.send(handler, (200, {"data": [{"id": name} for name in self.models]}, {}))

            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                pictures = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
                seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0].split(",")[1]))))
                level = min(LEVELS, key=lambda grey: abs(grey - float(seen.mean())))
                with lock:
                    self.asked[level] += 1
                    self.bodies.append(body)
                    self.keys.add(handler.headers["Authorization"])
                    answer = self.script[level].pop(0) if self.script.get(level) else said(caption(level))
                if isinstance(answer, str):
                    time.sleep(0.6)
                    answer = said("too late to be of any use to anybody")
                self.send(handler, answer)

            def log_message(handler, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        status, content, headers = answer
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            handler.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:
            pass  # the client had no patience


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    playing = Endpoint()
    yield playing
    playing.server.shutdown()
    playing.server.server_close()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for level in LEVELS:
        write_mp4(folder / f"{level}.mp4", np.full((4, 32, 32, 3), level, np.uint8), 8)
    return folder


@pytest.fixture
def run(endpoint: Endpoint, videos: Path, tmp_path: Path) -> Callable[..., tuple[int, dict[str, str]]]:
    """Runs the command with more options; gives its exit code and {video: prompt} of its file."""

    def go(*options: str, also: Sequence[Path] = ()) -> tuple[int, dict[str, str]]:
        out = tmp_path / "prompts.jsonl"
        patience = ["--timeout", "0.4", "--wait", "0.01"]
        words = [str(videos), *map(str, also), "-o", str(out), "--url", endpoint.url, *patience, *options]
        code = cli.main(["captions", *words])
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        assert len({row["video"] for row in rows}) == len(rows), "a video is there twice"
        return code, {Path(row["video"]).stem: row["prompt"] for row in rows}

    return go


ALL = {str(level): caption(level) for level in LEVELS}
MISBEHAVIOUR: list[Answer | str] = [
    (429, {"error": "slow down"}, {"Retry-After": "0.05"}),
    (503, b"starting", {}),
    "late",
    (200, b"<html>a proxy</html>", {}),
    (200, {"choices": []}, {}),
    (200, ["no", "object"], {}),
    said("  "),
    (200, {"choices": [{"message": {"content": None}}]}, {}),
    (200, b"{}", {"Content-Length": "400"}),  # the connection ends before the answer does
]


@pytest.mark.parametrize("workers", ["1", "6"])
def test_whatever_goes_wrong_nothing_is_lost_and_nothing_twice(endpoint: Endpoint, run, workers: str) -> None:
    for i, level in enumerate(LEVELS):
        endpoint.script[level] = MISBEHAVIOUR[i % 3 :: 3]
    assert run("-j", workers) == (0, ALL)
    assert endpoint.asked == dict.fromkeys(LEVELS, 4)
    assert run("-j", workers) == (0, ALL), "a second run finds all done"
    assert sum(endpoint.asked.values()) == 4 * len(LEVELS)


def test_what_fails_is_named_and_tried_again_next_time(endpoint: Endpoint, run, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.script = {20: [(500, b"", {})] * 3, 60: [said("cut o", finish_reason="length")], 100: [(400, b"too large", {})]}
    code, prompts = run("--tries", "3")
    assert code == 1 and prompts == {name: text for name, text in ALL.items() if name not in ("20", "60", "100")}
    err = capsys.readouterr().err
    assert "20.mp4: status 500 (), 3 times" in err
    assert "60.mp4: the description was cut off; raise --max-tokens" in err
    assert "100.mp4: refused with status 400 (too large)" in err
    assert run() == (0, ALL)
    assert endpoint.asked == {level: {20: 4, 60: 2, 100: 2}.get(level, 1) for level in LEVELS}


def test_a_run_goes_on_after_a_line_that_its_writer_died_in(endpoint: Endpoint, run, tmp_path: Path) -> None:
    assert run()[0] == 0
    out = tmp_path / "prompts.jsonl"
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:25])
    endpoint.asked.clear()
    assert run() == (0, ALL)
    assert sum(endpoint.asked.values()) == 3


def test_a_second_run_on_the_same_file_writes_over_nothing(tmp_path: Path) -> None:
    """Each would cut off what the other has added since it looked."""
    one, other = (captions.CaptionFile(tmp_path / "prompts.jsonl") for _ in range(2))
    one.add("a", prompt=ALL["20"])
    with pytest.raises(PromptError, match="another process has changed .*; let one at a time add to it"):
        other.add("b", prompt=ALL["60"])
    one.add("c", prompt=ALL["100"])
    assert captions.CaptionFile(tmp_path / "prompts.jsonl").done == {"a", "c"}


def test_a_path_that_is_no_utf_8_leaves_a_file_that_can_be_read(tmp_path: Path) -> None:
    file, video = captions.CaptionFile(tmp_path / "prompts.jsonl"), os.fsdecode(b"caf\xe9.mp4")
    file.add("a", prompt=ALL["20"], video=video)
    assert [prompt.text for prompt in read_prompts(file.path)] == [ALL["20"]]
    assert json.loads(file.path.read_text("utf-8"))["video"] == video


def test_only_descriptions_of_the_right_length_become_prompts(endpoint: Endpoint, run, tmp_path: Path) -> None:
    endpoint.script = {20: [said("grey")], 60: [said("very " * 40 + "grey")]}
    code, prompts = run("--max-words", "40")
    assert code == 0 and prompts == ALL | {"20": "", "60": ""}
    assert {prompt.text for prompt in read_prompts(tmp_path / "prompts.jsonl")} == set(ALL.values()) - {ALL["20"], ALL["60"]}
    run("--max-words", "40")
    assert endpoint.asked[20] == 1, "it is known, and not asked again"


def test_the_request_is_the_papers_question_about_evenly_spread_frames(
    endpoint: Endpoint, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCVIDEO_TEST_KEY", "sesame")
    run("--frames", "2", "--key-from", "ACCVIDEO_TEST_KEY")
    parts = endpoint.bodies[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url", "text"]
    assert [part["text"] for part in parts[::2]] == ["Frame1: ", "Frame2: ", "Describe this video in detail."]
    assert endpoint.bodies[0]["model"] == "vision" and endpoint.keys == {"Bearer sesame"}


def test_as_many_are_asked_at_once_as_there_are_workers() -> None:
    async def go(workers: int) -> int:
        asked, all_there = 0, asyncio.Event()
        body = json.dumps(said("a calm grey surface")[1]).encode()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            await reader.readuntil(b"\r\n\r\n")
            asked += 1
            if asked == workers:
                all_there.set()
            await all_there.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0, backlog=workers) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            async with VisionClient(url, Asking("What is this?", timeout=20, tries=1), "vision") as vision:
                return len(await asyncio.gather(*(vision.describe([b"a picture"]) for _ in range(workers))))

    assert asyncio.run(go(150)) == 150


def test_an_endpoint_that_is_of_no_use(endpoint: Endpoint, run, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sentence(*options: str) -> str:
        code, prompts = run(*options)
        assert code == 1 and prompts == {}
        return capsys.readouterr().err

    assert "cannot be used (no connection" in sentence("--url", "http://127.0.0.1:9/v1")
    endpoint.models = ["a", "b"]
    assert "serves a, b; choose one with --model" in sentence()
    for level in LEVELS:
        endpoint.script[level] = [(401, b"who are you", {})] * 9
    assert "(who are you); set the key in the environment variable" in sentence("--model", "a", "-j", "1")
    assert endpoint.asked.total() == 1


def test_an_endpoint_that_fails_every_time_is_given_up(
    endpoint: Endpoint, run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(captions, "IN_A_ROW", 3)
    for level in LEVELS:
        endpoint.script[level] = [(500, b"broken", {})] * 9
    assert run("--tries", "1", "-j", "1") == (1, {})
    assert "3 videos in a row could not be described; the last: status 500 (broken)" in capsys.readouterr().err
    assert endpoint.asked.total() == 3


def test_copies_and_files_that_are_no_videos(endpoint: Endpoint, run, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.mp4").write_bytes((videos / "20.mp4").read_bytes())
    (tmp_path / "torn.mp4").write_bytes((videos / "20.mp4").read_bytes()[:200])
    code, prompts = run(also=[tmp_path / "copy.mp4", tmp_path / "torn.mp4"])
    assert code == 1 and len(prompts) == len(ALL)
    assert endpoint.asked == dict.fromkeys(LEVELS, 1)


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_a_title_that_is_no_utf_8_is_no_hindrance(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w", metadata_encoding="latin-1") as container:
        container.metadata["title"] = "caf\xe9"
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 60, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    assert len(sample_frames(path, 2, 32)) == 1
    assert read_mp4(path).metadata["title"].startswith("caf")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--frames", "0"], "frames is 0; it must be at least 1"),
        (["--max-words", "2"], "max-words is 2, less than min-words, 5"),
        (["-o", "prompts.txt"], "'prompts.txt' must end in .jsonl"),
    ],
)
def test_wrong_usage(run, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*options)[0] in (1, 2)
    assert sentence in capsys.readouterr().err


def test_a_place_without_videos(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(also=[tmp_path / "nowhere"])
    assert f"there is no video or folder '{tmp_path / 'nowhere'}'" in capsys.readouterr().err


@pytest.mark.parametrize(("length", "count"), [(40, 8), (40, 1), (3, 8), (1, 4)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".h264"])
def test_frames_are_those_at_the_middle_of_equal_parts(tmp_path: Path, length: int, count: int, suffix: str) -> None:
    """Every frame's grey is its number; .mkv tells no length of the stream, a raw stream none at all."""
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "4", "g": "12"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(length):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 + 5 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = [round((float(np.asarray(image).mean()) - 10) / 5) for image in sample_frames(path, count, 16)]
    assert found == sorted({int((i + 0.5) * length / count) for i in range(count)})
    assert all(image.size == (16, 16) for image in sample_frames(path, 2, 16))
