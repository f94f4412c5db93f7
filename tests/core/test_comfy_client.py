"""The client against a stand-in server that answers as ComfyUI does; tests/comfyui drives it against real ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from accvideo_core import comfy_client
from accvideo_core.comfy_client import (
    ComfyClient,
    ComfyError,
    ComfyForgot,
    ComfyInterrupted,
    ComfyUnreachable,
    OutputFile,
    Progress,
    describe_refusal,
)

PROMPT = {"4": {"class_type": "AccVideoSampler", "inputs": {}}}
DONE = {"outputs": {"7": {"images": [{"filename": "a.mp4", "subfolder": "video", "type": "output"}], "animated": [True]}}}
FAULT = {
    "type": "value_smaller_than_min",
    "message": "Value 0 smaller than min of 1",
    "details": "steps",
    "extra_info": {"input_name": "steps"},
}


class StandIn:
    """Plays one scripted run: `say(socket)` speaks on the websocket once the prompt came, then `entry` is in /history."""

    def __init__(
        self,
        entry: dict[str, Any] | None = None,
        say: Callable[[web.WebSocketResponse], Awaitable[None]] | None = None,
        answer: dict[str, Any] | None = None,
        status: int = 200,
        view: Callable[[web.StreamResponse], Awaitable[Any]] | None = None,
    ) -> None:
        self.entry, self.say, self.status, self.view = entry, say, status, view
        self.answer = {"prompt_id": "p", "number": 1, "node_errors": {}} if answer is None else answer
        self.posted: list[tuple[str, Any]] = []
        self.queued = asyncio.Event()
        self.finished = False

    async def websocket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await self.queued.wait()
        if self.say is not None:
            await self.say(socket)
        self.finished = True
        if not socket.closed:
            await socket.send_json({"type": "execution_success", "data": {"prompt_id": "p"}})
            await socket.receive()
        return socket

    async def post(self, request: web.Request) -> web.Response:
        self.posted.append((request.path, await request.json()))
        if request.path != "/prompt":
            return web.Response()
        self.queued.set()
        return web.json_response(self.answer, status=self.status)

    async def get(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/queue":
            running = [] if self.finished or self.entry is None else [[0, "p", {}, {}, []]]
            return web.json_response({"queue_running": running, "queue_pending": []})
        if request.path == "/view" and self.view is not None:
            response = web.StreamResponse()
            await response.prepare(request)
            await self.view(response)
            return response
        if request.path == "/view":
            known = request.query["filename"] == "a.mp4"
            return web.Response(body=b"movie") if known else web.Response(status=404)
        return web.json_response({"p": self.entry} if self.finished and self.entry is not None else {})

    def play(self, act: Callable[[ComfyClient], Awaitable[Any]], timeout: float = 60.0) -> Any:
        async def go() -> Any:
            application = web.Application()
            application.add_routes(
                [web.get("/ws", self.websocket), web.post("/{name}", self.post), web.get("/{name:.*}", self.get)]
            )
            async with TestServer(application) as server, ComfyClient(str(server.make_url("/")), timeout) as comfy:
                return await act(comfy)

        return asyncio.run(go())


def test_a_run_reports_steps_previews_and_files() -> None:
    async def say(socket: web.WebSocketResponse) -> None:
        await socket.send_json({"type": "progress", "data": {"prompt_id": "another", "node": "4", "value": 9, "max": 9}})
        await socket.send_bytes(b"\0\0\0\1\0\0\0\1" + b"jpeg")
        await socket.send_json({"type": "progress", "data": {"prompt_id": "p", "node": "4", "value": 1, "max": 5}})

    seen: list[Any] = []
    result = StandIn(DONE, say).play(lambda comfy: comfy.run(PROMPT, on_progress=seen.append, on_preview=seen.append))
    assert seen == [b"jpeg", Progress("4", 1, 5)]
    assert result.files == (OutputFile("7", "images", "a.mp4", "video", "output"),)


def test_a_lost_websocket_loses_no_result() -> None:
    async def say(socket: web.WebSocketResponse) -> None:
        await socket.close()

    assert len(StandIn(DONE, say).play(lambda comfy: comfy.run(PROMPT)).files) == 1


def test_what_packs_broadcast_is_passed_over() -> None:
    async def say(socket: web.WebSocketResponse) -> None:
        for text in (
            '{"type": "monitor", "data": [1, 2]}',
            '{"type": "progress", "data": "p"}',
            '{"data": {}}',
            "[1]",
            "no JSON",
        ):
            await socket.send_str(text)

    assert len(StandIn(DONE, say).play(lambda comfy: comfy.run(PROMPT)).files) == 1


def test_a_run_is_asked_after_while_a_pack_broadcasts_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed from the queue, it will never be told of on the websocket; others are, more often than every SILENCE seconds."""
    monkeypatch.setattr(comfy_client, "SILENCE", 0.1, raising=False)

    async def say(socket: web.WebSocketResponse) -> None:
        while not socket.closed:
            await socket.send_json({"type": "monitor", "data": {"cpu": 3}})
            await socket.send_json({"type": "progress", "data": {"prompt_id": "another", "node": "4", "value": 1, "max": 5}})
            with suppress(asyncio.TimeoutError):
                await socket.receive(timeout=0.01)

    async def run(comfy: ComfyClient) -> None:
        await asyncio.wait_for(comfy.run(PROMPT), 8)

    with pytest.raises(ComfyForgot, match="no longer knows prompt p"):
        StandIn(None, say).play(run)


def test_nobody_there() -> None:
    async def go() -> None:
        async with ComfyClient("http://127.0.0.1:9") as comfy:
            await comfy.run(PROMPT)

    with pytest.raises(ComfyError, match=r"no ComfyUI answers at http://127.0.0.1:9 \(.*\); start it"):
        asyncio.run(go())


def test_an_address_that_has_moved_is_told() -> None:
    """As that of a proxy which sends http:// on to https://."""

    async def there(comfy: ComfyClient) -> None:
        async def moved(request: web.Request) -> web.Response:
            raise web.HTTPMovedPermanently(f"{comfy.url}{request.path_qs}")

        application = web.Application()
        application.add_routes([web.route("*", "/{name:.*}", moved)])
        async with TestServer(application) as server, ComfyClient(str(server.make_url("/"))) as sent_on:
            for ask in (sent_on.queue(PROMPT), sent_on.post("/accvideo", {})):
                with pytest.raises(ComfyError, match=f"sends on to {comfy.url}; give that as the address"):
                    await ask

    StandIn(DONE).play(there)


def test_a_page_is_not_taken_for_comfyui() -> None:
    """As a development server gives at any path, and a proxy that wants a login."""

    for ask in ASKING:
        with pytest.raises(ComfyError, match="with no JSON object; is this really ComfyUI"):
            elsewhere(200, "<html></html>", ask)


def test_a_proxy_whose_comfyui_is_down_is_nobody() -> None:
    """So that a capture waits for it, as without a proxy."""
    file = OutputFile("7", "images", "a.mp4", "", "output")
    for ask in (*ASKING, lambda comfy: comfy.run(PROMPT), lambda comfy: comfy.fetch(file)):
        with pytest.raises(ComfyUnreachable, match="no ComfyUI answers at .*502.*; start it"):
            elsewhere(502, "<html>Bad Gateway</html>", ask)


ASKING: tuple[Callable[[ComfyClient], Awaitable[Any]], ...] = (
    lambda comfy: comfy.node_types(),
    lambda comfy: comfy.history("p"),
    lambda comfy: comfy.queue(PROMPT),
    lambda comfy: comfy.post(comfy_client.SYNVID_MISSING, {"dataset": "d", "ids": []}),
)


def elsewhere(status: int, text: str, ask: Callable[[ComfyClient], Awaitable[Any]]) -> None:
    """Ask what is no ComfyUI and answers everything alike."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, text=text, content_type="text/html")

    async def go() -> None:
        application = web.Application()
        application.add_routes([web.route("*", "/{name:.*}", answer)])
        async with TestServer(application) as server, ComfyClient(str(server.make_url("/"))) as comfy:
            await ask(comfy)

    asyncio.run(go())


def test_a_refusal_names_node_value_and_input() -> None:
    stand_in = StandIn(answer={"error": {}, "node_errors": {"4": {"class_type": "K", "errors": [FAULT]}}}, status=400)
    with pytest.raises(ComfyError, match=r"K \(node 4\): Value 0 smaller than min of 1: steps$"):
        stand_in.play(lambda comfy: comfy.run(PROMPT))


def test_a_prompt_accepted_in_part_is_taken_back() -> None:
    answer = {"prompt_id": "p", "number": 1, "node_errors": {"4": {"class_type": "K", "errors": [FAULT]}}}
    stand_in = StandIn(answer=answer)
    with pytest.raises(ComfyError, match="smaller than min"):
        stand_in.play(lambda comfy: comfy.queue(PROMPT))
    assert stand_in.posted[1:] == [("/queue", {"delete": ["p"]}), ("/interrupt", {"prompt_id": "p"})]


def test_a_nodes_own_validation_is_said_once() -> None:
    faults = [
        {
            "type": "custom_validation_failed",
            "message": "Custom validation failed for node",
            "details": f"{name} - no such family",
        }
        for name in ("family", "steps")
    ]
    assert describe_refusal({"node_errors": {"4": {"class_type": "K", "errors": faults}}}) == "K (node 4): no such family"


def test_a_refusal_without_nodes() -> None:
    error = {"message": "Cannot execute because node X does not exist.", "details": "Node ID '#4'"}
    assert describe_refusal({"error": error, "node_errors": {}}) == "Cannot execute because node X does not exist. Node ID '#4'"


@pytest.mark.parametrize(
    ("message", "kind", "sentence"),
    [
        (
            ["execution_error", {"node_id": "4", "node_type": "K", "exception_message": "shift is nan\n"}],
            ComfyError,
            r"K \(node 4\): shift is nan$",
        ),
        (["execution_interrupted", {"node_id": "4", "node_type": "K"}], ComfyInterrupted, r"interrupted at K \(node 4\)$"),
        (["execution_start", {}], ComfyError, "ended with 'error' and no reason"),
    ],
)
def test_a_failed_run_says_where_and_why(message: list, kind: type[ComfyError], sentence: str) -> None:
    entry = {"outputs": {}, "status": {"status_str": "error", "messages": [message]}}
    with pytest.raises(kind, match=sentence):
        StandIn(entry).play(lambda comfy: comfy.run(PROMPT))


def test_a_prompt_removed_from_the_queue_is_an_error() -> None:
    with pytest.raises(ComfyError, match="no longer knows prompt p"):
        StandIn(None).play(lambda comfy: comfy.run(PROMPT))


def test_files_are_downloaded_whole_or_not_at_all(tmp_path: Path) -> None:
    movie, gone = OutputFile("7", "images", "a.mp4", "", "output"), OutputFile("7", "images", "b.mp4", "", "output")
    StandIn().play(lambda comfy: comfy.download(movie, tmp_path / "out" / "a.mp4"))
    assert (tmp_path / "out" / "a.mp4").read_bytes() == b"movie"
    with pytest.raises(ComfyError, match=r"no file 'b\.mp4' any more .* change something, such as the seed, and run"):
        StandIn().play(lambda comfy: comfy.download(gone, tmp_path / "b.mp4"))
    assert not (tmp_path / "b.mp4").exists()


def test_a_download_may_take_long_while_bytes_come() -> None:
    async def slowly(response: web.StreamResponse) -> None:
        for _ in range(5):
            await response.write(b"movie")
            await asyncio.sleep(0.2)

    file = OutputFile("7", "images", "a.mp4", "", "output")
    assert StandIn(view=slowly).play(lambda comfy: comfy.fetch(file), timeout=0.7) == b"movie" * 5


def test_a_download_that_stops_halfway_is_an_error(tmp_path: Path) -> None:
    async def stop(response: web.StreamResponse) -> None:
        await response.write(b"mov")
        await asyncio.sleep(0.5)

    file = OutputFile("7", "images", "a.mp4", "", "output")
    with pytest.raises(ComfyUnreachable, match="Timeout on reading"):
        StandIn(view=stop).play(lambda comfy: comfy.download(file, tmp_path / "a.mp4"), timeout=0.1)
    assert not list(tmp_path.iterdir())
