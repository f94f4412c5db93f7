"""What ComfyUI shows and answers while a node runs: progress, interrupts, the workflow in a file, requests to its server."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.utils

from ...accvideo_core.errors import AccVideoError
from ...accvideo_core.progress import byte_progress


def progress_bar(total: int) -> Callable[[int], None]:
    """Shows `done` of `total` on the running node; raises where the user has cancelled."""
    bar = comfy.utils.ProgressBar(total)
    return lambda done: bar.update_absolute(done, total)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (bytes done, bytes in all) that moves the node's bar and the console's, and raises ComfyUI's own
    exception when the user has pressed cancel."""
    bar = comfy.utils.ProgressBar(1)
    with byte_progress(what, leave=True) as console:

        def report(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)
            console(done, total)

        yield report


def workflow_metadata(node: type[Any]) -> dict[str, str]:
    """What a file carries so that it can be dragged back into ComfyUI, for a node whose schema asks for both hidden values."""
    if comfy.cli_args.args.disable_metadata:
        return {}
    extra = {"prompt": node.hidden.prompt, **(node.hidden.extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in extra.items() if value is not None}


def add_route(path: str, answer: Callable[[dict[str, Any]], Awaitable[Any]]) -> None:
    """Let ComfyUI's server answer POST requests there: `answer` is given the request's JSON object and returns what is sent as
    JSON; an AccVideoError becomes status 400 with its sentence. Without a running server there is nothing to add it to."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web

    async def handle(request: web.Request) -> web.Response:
        try:
            body = await request.json()
            return web.json_response(await answer(body if isinstance(body, dict) else {}))
        except (AccVideoError, ValueError, TypeError, KeyError) as error:
            return web.json_response({"error": str(error)}, status=400)

    server.routes.post(path)(handle)
