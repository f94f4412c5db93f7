"""What `accvideo queue` makes of a workflow, and what it says where trying is of no use; tests/comfyui drives real servers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from accvideo_core import cli, comfy_queue
from accvideo_core.comfy_client import ComfyError, ComfyForgot, ComfyUnreachable
from accvideo_core.comfy_queue import Template
from accvideo_core.comfy_workflow import read_workflow
from accvideo_core.errors import InvalidValueError
from accvideo_core.synvid import sample_id

SKIPPED = "the workflow ran, but the dataset lacks the sample; does its writer run?"
ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "workflows" / "api" / "accvideo_tiny_synvid.json"


def read_template(path: Path) -> Template:
    return Template.of(read_workflow(path), path)


@pytest.mark.parametrize(("name", "shape"), [("accvideo_tiny_synvid", (16, 5, 8, 8)), ("accvideo_synvid", (16, 24, 68, 120))])
def test_the_shipped_workflows_have_places_for_a_prompt_and_a_seed(name: str, shape: tuple) -> None:
    template = read_template(ROOT / "workflows" / "api" / f"{name}.json")
    assert template.shape == shape and template.rows == 1
    filled = template.filled("a new prompt", 7)
    kinds = {node["class_type"]: node["inputs"] for node in filled.values()}
    assert kinds["CLIPTextEncode"]["text"] == kinds["AccVideoSynVidWriter"]["prompt"] == "a new prompt"
    assert kinds["AccVideoTrajectorySampler"]["seed"] == 7
    assert template.ids("a new prompt", 7) == (sample_id("a new prompt", 7, shape),)
    assert template.filled("another", 8) != filled and "a new prompt" not in json.dumps(template.filled("another", 8))


def changed(change: Callable[[dict[str, Any]], Any], path: Path) -> Path:
    nodes = json.loads(TINY.read_text())
    path.write_text(json.dumps(change(nodes) or nodes))
    return path


def test_a_prompt_that_is_written_twice_is_one_place_and_a_batch_is_several_samples(tmp_path: Path) -> None:
    def change(nodes: dict[str, Any]) -> None:
        nodes["3"]["inputs"]["text"] = nodes["7"]["inputs"]["prompt"] = "a red circle"
        nodes["4"]["inputs"]["batch_size"] = 2

    template = read_template(changed(change, tmp_path / "w.json"))
    assert template.places == (("3", "text"), ("7", "prompt"))
    assert template.ids("x", 7) == tuple(sample_id("x", seed, (16, 5, 8, 8)) for seed in (7, 8))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda nodes: {"nodes": [], "links": []}, "is a workflow of the editor; export it"),
        (lambda nodes: [1], "is no workflow in API format"),
        (lambda nodes: nodes.pop("7") and None, "has 0 nodes AccVideoSynVidWriter; it must have one"),
        (lambda nodes: nodes.update(again=nodes["7"]), "has 2 nodes AccVideoSynVidWriter"),
        (lambda nodes: nodes["7"]["inputs"].update(prompt="something else"), "its prompt is not what a text encoder is given"),
        (lambda nodes: nodes["7"]["inputs"].update(dataset=["2", 0]), "write the dataset's name into it"),
        (lambda nodes: nodes["4"].update(class_type="EmptySD3LatentImage"), "its latent comes from EmptySD3LatentImage"),
        (lambda nodes: nodes["4"]["inputs"].update(width=["2", 0]), "so its size is not known"),
    ],
)
def test_a_workflow_of_no_use(tmp_path: Path, change: Callable[[dict], Any], sentence: str) -> None:
    with pytest.raises(InvalidValueError, match=sentence):
        read_template(changed(change, tmp_path / "w.json"))


@pytest.fixture
def stand_in() -> Iterator[Callable[..., str]]:
    """Starts servers that answer GET with what they are given, and POST not at all; gives their addresses."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def start(answer: Any) -> str:
        async def go() -> str:
            async def get(request: web.Request) -> web.Response:
                return web.json_response(answer) if isinstance(answer, dict) else web.Response(text=answer)

            application = web.Application()
            application.add_routes([web.get("/{name:.*}", get)])
            runner = web.AppRunner(application)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            return f"http://127.0.0.1:{runner.addresses[0][1]}"

        return asyncio.run_coroutine_threadsafe(go(), loop).result(10)

    yield start
    loop.call_soon_threadsafe(loop.stop)


def test_it_says_why_there_is_no_use_in_trying(stand_in, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a red circle\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"

    def says(server: str) -> str:
        report = tmp_path / "report.json"
        words = ["queue", str(TINY), "--prompts", str(tmp_path / "p.txt"), "--server", server, "--report", str(report)]
        assert cli.main(words) == 1
        assert json.loads(report.read_text())["captured"] == 0
        return capsys.readouterr().err

    kinds = {node["class_type"]: {} for node in json.loads(TINY.read_text()).values()}
    plain = {kind: {} for kind in kinds if not kind.startswith("AccVideo")}
    assert f"no ComfyUI answers at {closed}" in says(closed)
    assert f"no ComfyUI answers at {closed}" in says(closed.replace("//", "//me:secret@"))
    assert json.loads((tmp_path / "report.json").read_text())["server"] == closed
    absent = ", ".join(sorted(set(kinds) - set(plain)))
    assert f"has no node {absent}; install AccVideo into its custom_nodes" in says(stand_in(plain))
    assert "does not know /accvideo/synvid/missing; install AccVideo there, or update it" in says(stand_in(kinds))


class Unsteady:
    """A ComfyUI as its client sees it, which follows a script: "dies" before it captures, "dies late" after, "forgets", "fails",
    "skips" (runs, and nothing is captured); then all goes well. Shared by all clients of a run."""

    def __init__(self, script: list[str]) -> None:
        self.script, self.captured, self.runs, self.down = script, Counter[str](), 0, 0

    def client(self, url: str) -> Unsteady:
        return self

    async def __aenter__(self) -> Unsteady:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def node_types(self) -> dict[str, Any]:
        return {node["class_type"]: {} for node in json.loads(TINY.read_text()).values()}

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0)
        if self.down:
            self.down -= 1
            raise ComfyUnreachable("gone")
        return {"dataset": "there", "missing": [name for name in body["ids"] if name not in self.captured]}

    async def run(self, nodes: dict[str, Any], on_progress: Any, on_queued: Callable[[str], None]) -> None:
        on_queued("p")
        await asyncio.sleep(0)
        self.runs += 1
        act = self.script.pop(0) if self.script else ""
        if act in ("", "dies late"):
            inputs = {node["class_type"]: node["inputs"] for node in nodes.values()}
            seed = inputs["AccVideoTrajectorySampler"]["seed"]
            self.captured[sample_id(inputs["AccVideoSynVidWriter"]["prompt"], seed, (16, 5, 8, 8))] += 1
        if act.startswith("dies"):
            self.down = 2
            raise ComfyUnreachable("gone")
        if act in ("forgets", "fails"):
            raise {"forgets": ComfyForgot, "fails": ComfyError}[act](f"it {act}")

    async def rejoin(self, prompt_id: str, on_progress: Any) -> None:
        raise ComfyForgot("it was started again")


@pytest.mark.parametrize(("ahead", "restarts"), [("1", 2), ("3", 1)])  # of three at once, two meet the same outage
def test_an_unsteady_server_captures_every_prompt_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: str, restarts: int
) -> None:
    server = Unsteady(["", "dies", "dies late", "forgets", "fails", "skips"])
    monkeypatch.setattr(comfy_queue, "ComfyClient", server.client)
    monkeypatch.setattr(comfy_queue, "PAUSE", 0.001)
    (tmp_path / "p.txt").write_text("\n".join(f"a red circle {i}" for i in range(8)))
    words = ["queue", str(TINY), "--prompts", str(tmp_path / "p.txt"), "--ahead", ahead, "--report", str(tmp_path / "r.json")]
    assert cli.main(words) == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert [fault["reason"] for fault in report["failed"]] == ["it fails", SKIPPED]
    assert (report["samples"], report["before"], report["captured"], report["restarts"]) == (8, 0, 6, restarts)
    assert len(server.captured) == 6 and set(server.captured.values()) == {1} and server.runs == 10
    assert cli.main(words) == 0, "what failed is tried again, nothing else is"
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["before"], report["captured"]) == (6, 2) and server.runs == 12 and set(server.captured.values()) == {1}


@pytest.mark.parametrize(("script", "sentence"), [(["forgets"] * 50, "ComfyUI forgot it 5 times"), (["fails"] * 50, "it fails")])
def test_it_gives_up_when_nothing_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: list[str], sentence: str
) -> None:
    server = Unsteady(script)
    monkeypatch.setattr(comfy_queue, "ComfyClient", server.client)
    monkeypatch.setattr(comfy_queue, "IN_A_ROW", 3)
    (tmp_path / "p.txt").write_text("\n".join(f"a red circle {i}" for i in range(8)))
    assert cli.main(["queue", str(TINY), "--prompts", str(tmp_path / "p.txt")]) == 1
    assert f"3 samples in a row failed; the last: {sentence}" in capsys.readouterr().err
