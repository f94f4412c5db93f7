"""A client for ComfyUI's HTTP API: queue a prompt, follow it, stop it, fetch what it made.

A prompt is a workflow in API format, {node id: {"class_type": ..., "inputs": {...}}}. Progress comes over the websocket;
the outcome is always taken from /history, so a lost connection loses no result.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from .errors import AccVideoError
from .files import atomic_path

Prompt = Mapping[str, Mapping[str, Any]]
SILENCE = 5.0  # seconds without a word about a run, after which ComfyUI is asked whether it still knows it
GATEWAY = (502, 503, 504)  # what a proxy answers while the ComfyUI behind it is down
SYNVID_MISSING = "/accvideo/synvid/missing"  # what our pack answers: {dataset, ids} -> {dataset, missing}


class ComfyError(AccVideoError):
    """ComfyUI cannot be reached, refused a prompt, or failed while running it."""


class ComfyUnreachable(ComfyError):
    """Nobody answers at the address, or not in time."""


class ComfyRefused(ComfyError):
    """ComfyUI did not accept the prompt: it lacks a node, or an input cannot be."""


class ComfyForgot(ComfyError):
    """ComfyUI does not know a prompt that was queued: it was removed, or ComfyUI was started again."""


class ComfyInterrupted(ComfyError):
    """The run was stopped by an interrupt."""


@dataclass(frozen=True)
class Progress:
    """`value` of `total` steps done by the node with this id."""

    node: str
    value: int
    total: int


@dataclass(frozen=True)
class OutputFile:
    """A file an output node wrote; `kind` is the name ComfyUI lists it under: images, latents, audio, ..."""

    node: str
    kind: str
    filename: str
    subfolder: str
    folder: str


@dataclass(frozen=True)
class Result:
    """A finished run: its files, the texts its nodes showed {node id: [...]}, the seconds it took, and what our nodes warn of
    {node id: [...]}."""

    prompt_id: str
    files: tuple[OutputFile, ...] = ()
    texts: Mapping[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    warnings: Mapping[str, list[str]] = field(default_factory=dict)


def address_of(url: str) -> str:
    """What may be shown of it: without a name and password."""
    return re.sub("//[^/]*@", "//", url.rstrip("/"))


class ComfyClient:
    """`async with ComfyClient(url) as comfy: result = await comfy.run(prompt)`.

    url      where ComfyUI listens; a name and password in it (http://name:password@host) are sent, and told to nobody else
    timeout  seconds an answer to one HTTP request may take; a run itself may take any time, and so may a file while its bytes
             keep coming
    """

    def __init__(self, url: str = "http://127.0.0.1:8188", timeout: float = 60.0) -> None:
        self.url, self.address = url.rstrip("/"), address_of(url)
        self.client_id = uuid.uuid4().hex
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._file_timeout = aiohttp.ClientTimeout(total=None, connect=timeout, sock_connect=timeout, sock_read=timeout)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ComfyClient:
        self._session = aiohttp.ClientSession(timeout=self._timeout)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()

    async def run(
        self,
        prompt: Prompt,
        on_progress: Callable[[Progress], None] | None = None,
        on_preview: Callable[[bytes], None] | None = None,
        on_queued: Callable[[str], None] | None = None,
        workflow: Mapping[str, Any] | None = None,
    ) -> Result:
        """Queue a prompt and wait for its end.

        on_progress, on_preview  called for each step and each preview picture (JPEG or PNG bytes)
        on_queued                called once with the prompt id
        workflow                 the same workflow in UI format, for ComfyUI to store in what it saves
        Raises ComfyError with one sentence per fault when ComfyUI refuses or fails, ComfyInterrupted when it was stopped.
        """
        begin = time.monotonic()
        async with self._listen() as socket:
            prompt_id = await self.queue(prompt, workflow)
            if on_queued is not None:
                on_queued(prompt_id)
            entry = await self._end(socket, prompt_id, on_progress, on_preview)
        return _result(prompt_id, entry, time.monotonic() - begin)

    async def rejoin(self, prompt_id: str, on_progress: Callable[[Progress], None] | None = None) -> Result:
        """Wait for the end of a prompt queued before, after the connection was lost. ComfyForgot if ComfyUI does not know it."""
        begin = time.monotonic()
        async with self._listen() as socket:
            if (entry := await self._entry(prompt_id)) is None:
                entry = await self._end(socket, prompt_id, on_progress, None)
        return _result(prompt_id, entry, time.monotonic() - begin)

    async def queue(self, prompt: Prompt, workflow: Mapping[str, Any] | None = None) -> str:
        """Queue a prompt and return its id. A prompt ComfyUI would run only in part is taken back and raises ComfyError."""
        body: dict[str, Any] = {"prompt": prompt, "client_id": self.client_id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        status, answer = await self._request("POST", "/prompt", body)
        if status == 200 and answer.get("node_errors"):
            await self.remove(answer["prompt_id"])
            await self.interrupt(answer["prompt_id"])
        if status != 200 or answer.get("node_errors"):
            raise ComfyRefused(f"ComfyUI refused the prompt: {describe_refusal(answer)}")
        return str(answer["prompt_id"])

    async def remove(self, prompt_id: str) -> None:
        """Take a prompt off the queue; one that is running runs on."""
        await self._request("POST", "/queue", {"delete": [prompt_id]})

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of a pack's own route. Raises ComfyError with the route's sentence, or because there is no such route."""
        status, answer = await self._request("POST", path, body)
        if status in (404, 405):
            raise ComfyError(f"ComfyUI at {self.address} does not know {path}; install AccVideo there, or update it, and restart")
        if status != 200:
            raise ComfyError(f"ComfyUI at {self.address} answered {path}: {answer.get('error') or f'status {status}'}")
        return answer

    async def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop what is running, or only if it is this prompt."""
        await self._request("POST", "/interrupt", {} if prompt_id is None else {"prompt_id": prompt_id})

    async def node_types(self) -> dict[str, Any]:
        """/object_info: every node type this ComfyUI has, with its inputs and outputs."""
        return (await self._request("GET", "/object_info"))[1]

    async def history(self, prompt_id: str) -> dict[str, Any] | None:
        """ComfyUI's record of a finished run, or None while it is queued or running, or unknown."""
        return (await self._request("GET", f"/history/{prompt_id}"))[1].get(prompt_id)

    async def fetch(self, file: OutputFile) -> bytes:
        """The content of a file a run made."""
        query = {"filename": file.filename, "subfolder": file.subfolder, "type": file.folder}
        async with self._open("GET", "/view", params=query, timeout=self._file_timeout) as response:
            if response.status != 200:
                raise ComfyError(
                    f"ComfyUI has no file {file.filename!r} any more (status {response.status}), and saves none again for a "
                    "prompt that it remembers; restart it, or change something, such as the seed, and run the prompt again"
                )
            return await response.read()

    async def download(self, file: OutputFile, path: str | Path) -> Path:
        """Write a file a run made to `path`, all or nothing."""
        content = await self.fetch(file)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        return Path(path)

    async def _end(
        self,
        socket: aiohttp.ClientWebSocketResponse,
        prompt_id: str,
        on_progress: Callable[[Progress], None] | None,
        on_preview: Callable[[bytes], None] | None,
    ) -> dict[str, Any]:
        """The record of a run, once it has ended."""
        ended = False
        while True:
            if ended:  # said on the websocket; the record is written right after
                await asyncio.sleep(0.05)
            else:
                ended = await self._follow(socket, prompt_id, on_progress, on_preview)
            if (entry := await self._entry(prompt_id)) is not None:
                return entry

    async def _entry(self, prompt_id: str) -> dict[str, Any] | None:
        entry = await self.history(prompt_id)
        if entry is not None:
            return entry
        _, queue = await self._request("GET", "/queue")
        if prompt_id in {item[1] for item in [*queue["queue_running"], *queue["queue_pending"]]}:
            return None
        entry = await self.history(prompt_id)  # it may have ended between the two questions
        if entry is None:
            raise ComfyForgot(
                f"ComfyUI no longer knows prompt {prompt_id}; it was removed from the queue or ComfyUI was restarted"
            )
        return entry

    async def _follow(
        self,
        socket: aiohttp.ClientWebSocketResponse,
        prompt_id: str,
        on_progress: Callable[[Progress], None] | None,
        on_preview: Callable[[bytes], None] | None,
    ) -> bool:
        """Pass on what the websocket says. True when it says the run ended, False when it closes or says nothing about this run
        for SILENCE seconds, whatever else it tells."""
        heard = time.monotonic()
        while (left := heard + SILENCE - time.monotonic()) > 0:
            try:
                message = await socket.receive(timeout=left)
            except asyncio.TimeoutError:
                return False
            if message.type == aiohttp.WSMsgType.BINARY and on_preview is not None and message.data[:4] == b"\0\0\0\1":
                on_preview(message.data[8:])  # event 1 is a preview; its picture format follows
            elif message.type == aiohttp.WSMsgType.TEXT:
                kind, data = _event(message.data)
                if data.get("prompt_id") != prompt_id:
                    continue
                heard = time.monotonic()
                if kind == "progress" and on_progress is not None:
                    on_progress(Progress(str(data.get("node")), int(data["value"]), int(data["max"])))
                elif kind in ("execution_success", "execution_error", "execution_interrupted"):
                    return True
            elif message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.ERROR):
                await asyncio.sleep(1)  # no more progress, but the record will tell
                return False
        return False

    @contextlib.asynccontextmanager
    async def _listen(self) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        try:
            socket = await self._http.ws_connect(f"{self.url}/ws", params={"clientId": self.client_id}, max_msg_size=0)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as error:
            raise self._unreachable(error) from error
        async with socket:
            yield socket

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        async with self._open(method, path, json=body) as response:
            text = await response.text(errors="replace")
            if method == "GET" and response.status != 200:
                raise ComfyError(
                    f"ComfyUI at {self.address} answered {path} with status {response.status}; is this really ComfyUI?"
                )
            try:
                answer = json.loads(text) if text else {}
            except json.JSONDecodeError:
                answer = None
            if not isinstance(answer, dict):
                if response.status == 200:  # the page of another server, or of a proxy that wants a login
                    raise ComfyError(f"{self.address} answered {path} with no JSON object; is this really ComfyUI?")
                answer = {"error": f"status {response.status}"}
            return response.status, answer

    @contextlib.asynccontextmanager
    async def _open(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._http.request(method, f"{self.url}{path}", **options) as response:
                if response.status in GATEWAY:
                    raise self._unreachable(f"status {response.status}")
                if response.method != method:  # HTTP makes a question of what is posted to an address that has moved
                    address = str(response.url).removesuffix(path)
                    raise ComfyError(f"{self.address} sends on to {address}; give that as the address")
                yield response
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, aiohttp.InvalidURL) as error:
            if isinstance(error, AccVideoError):
                raise
            raise self._unreachable(error) from error

    def _unreachable(self, error: BaseException | str) -> ComfyUnreachable:
        reason = str(error) or type(error).__name__
        return ComfyUnreachable(
            f"no ComfyUI answers at {self.address} ({reason}); start it, or give the address it prints at its start"
        )

    @property
    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("use ComfyClient as an async context manager")
        return self._session


def describe_refusal(answer: Mapping[str, Any]) -> str:
    """One sentence per fault from ComfyUI's answer to POST /prompt: `node_errors`, else `error`."""
    sentences = []
    for node, report in (answer.get("node_errors") or {}).items():
        for fault in report["errors"]:
            says = f"{fault['message']}: {fault.get('details')}"
            if fault["type"] == "custom_validation_failed":
                # ComfyUI writes "<input> - <the node's sentence>", once for every input the node looked at.
                says = re.sub(r"^\w+ - ", "", str(fault.get("details")))
            sentences.append(f"{report['class_type']} (node {node}): {says}")
    if not sentences:
        error = answer.get("error") or "no reason given"
        says = error if isinstance(error, str) else f"{error.get('message')} {error.get('details') or ''}".strip()
        sentences.append(says)
    return "; ".join(dict.fromkeys(sentence.strip().rstrip(".") for sentence in sentences))


def _event(text: str) -> tuple[Any, Mapping[str, Any]]:
    """Type and data of a message on the websocket. Packs broadcast what they like there: what has no data is (None, {})."""
    try:
        event = json.loads(text)
    except ValueError:
        return None, {}
    data = event.get("data") if isinstance(event, dict) else None
    return (event.get("type"), data) if isinstance(data, dict) else (None, {})


def _result(prompt_id: str, entry: Mapping[str, Any], seconds: float) -> Result:
    status = entry.get("status") or {}
    for kind, data in status.get("messages", []):
        if kind == "execution_interrupted":
            raise ComfyInterrupted(f"the run was interrupted at {data['node_type']} (node {data['node_id']})")
        if kind == "execution_error":
            raise ComfyError(f"{data['node_type']} (node {data['node_id']}): {' '.join(str(data['exception_message']).split())}")
    if status.get("status_str") not in (None, "success"):
        raise ComfyError(f"the run ended with {status.get('status_str')!r} and no reason; look at ComfyUI's console")
    files, texts, warnings = [], {}, {}
    for node, shown in entry.get("outputs", {}).items():
        for kind, items in shown.items():
            for item in items or ():
                if isinstance(item, Mapping) and "filename" in item:
                    files.append(OutputFile(node, kind, item["filename"], item.get("subfolder", ""), item.get("type", "output")))
        if "text" in shown:
            texts[node] = [str(text) for text in shown["text"]]
        if told := [warning["text"] for run in shown.get("accvideo_sampling", []) for warning in run.get("warnings", [])]:
            warnings[node] = told
    return Result(prompt_id, tuple(files), texts, seconds, warnings)
