"""`accvideo queue` against a real ComfyUI, which is killed and started again in the middle."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from accvideo_core import cli
from accvideo_core.synvid import SynVidReader
from tests.comfyui.server import ROOT, Server, load_prompt

COUNT = 8


def workflow(path: Path, dataset: str, sampler: dict[str, Any] | None = None, **nodes: Any) -> Path:
    """The shipped tiny capture workflow with 5 steps, its inspecting nodes left out; other nodes added."""
    prompt = load_prompt(ROOT / "workflows" / "api" / "accvideo_tiny_synvid.json")
    kept = {name: content for name, content in prompt.items() if int(name) <= 7}
    kept["5"]["inputs"] |= {"steps": 5} | (sampler or {})
    kept["7"]["inputs"] |= {"dataset": dataset}
    path.write_text(json.dumps(kept | nodes))
    return path


def prompts(path: Path, count: int) -> Path:
    colours, shapes, ways = ("red", "blue", "green", "yellow"), ("circle", "square"), ("left", "right", "up", "down")
    texts = [f"a {colour} {shape} moving {way}" for colour in colours for shape in shapes for way in ways]
    path.write_text("\n".join(f"{text} {'very ' * (i // len(texts))}fast" for i, text in enumerate((texts * 2)[:count])))
    return path


def queue_through_a_kill(server: Server, folder: Path, count: int, ahead: int = 3) -> tuple[dict[str, Any], SynVidReader]:
    """Queue `count` prompts; kill the server when about half are captured, start it again; (report, dataset)."""
    dataset, report = server.base / "output" / "synvid" / "queued", folder / "report.json"
    words = ["queue", str(workflow(folder / "w.json", "queued")), "--prompts", str(prompts(folder / "p.txt", count))]
    words += ["--server", server.url, "--ahead", str(ahead), "--report", str(report)]
    codes: list[int] = []
    command = threading.Thread(target=lambda: codes.append(cli.main(words)))
    command.start()
    while command.is_alive() and len(list(dataset.glob("latents/*/*.safetensors"))) < count // 2:
        time.sleep(0.01)
    assert command.is_alive()
    server.kill()
    time.sleep(2)  # it is noticed that nobody answers
    server.start()
    command.join(600)
    assert codes == [0]
    return json.loads(report.read_text()), SynVidReader(dataset)


def test_a_server_killed_half_way_loses_nothing_and_doubles_nothing(server: Server, tmp_path: Path, capsys) -> None:
    report, reader = queue_through_a_kill(server, tmp_path, COUNT)
    assert report["captured"] == COUNT and report["before"] == 0 and report["restarts"] == 1 and report["failed"] == []
    samples = reader.samples()
    assert len(samples) == COUNT and reader.verify() == []
    assert set(Counter(sample.prompt for sample in samples.values()).values()) == {1}
    assert len(list(reader.folder.path.glob("manifest/*"))) == 2, "one of each server process"
    lines = sum(len(path.read_bytes().splitlines()) for path in reader.folder.path.glob("manifest/*"))
    assert lines == COUNT, "committed once, not twice and united"
    # The command again, for a prompt more: the others are not queued.
    more, again = prompts(tmp_path / "more.txt", COUNT + 1), tmp_path / "again.json"
    words = ["queue", str(tmp_path / "w.json"), "--prompts", str(more), "--server", server.url, "--report", str(again)]
    assert cli.main(words) == 0
    assert json.loads(again.read_text()) | {"seconds": 0} == {
        "server": server.url,
        "dataset": str(reader.folder.path),
        "samples": COUNT + 1,
        "before": COUNT,
        "captured": 1,
        "restarts": 0,
        "seconds": 0,
        "failed": [],
    }
    assert len(reader.samples()) == COUNT + 1


def failing(server_url: str, capsys: pytest.CaptureFixture[str], path: Path, file: Path) -> str:
    assert cli.main(["queue", str(path), "--prompts", str(file), "--server", server_url]) in (1, 2)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_a_prompt_that_fails_is_named_and_the_others_are_captured(server: Server, tmp_path: Path, capsys) -> None:
    (tmp_path / "p.txt").write_text("a red circle\nzeppelins over Friedrichshafen\na blue square\n")
    err = failing(server.url, capsys, workflow(tmp_path / "w.json", "some"), tmp_path / "p.txt")
    assert "failed: 'zeppelins over Friedrichshafen', seed" in err and "no word of" in err
    found = SynVidReader(server.base / "output" / "synvid" / "some").samples()
    assert {sample.prompt for sample in found.values()} == {"a red circle", "a blue square"}


def test_a_workflow_that_comfyui_refuses(server: Server, tmp_path: Path, capsys) -> None:
    file = prompts(tmp_path / "p.txt", 3)
    err = failing(server.url, capsys, workflow(tmp_path / "w.json", "no", {"shift": -1.0}), file)
    assert "ComfyUI refused the prompt: AccVideoTrajectorySampler (node 5): Value -1.0 smaller than min of 0.01: shift" in err
    stray = {"class_type": "SomebodysNode", "inputs": {}}
    err = failing(server.url, capsys, workflow(tmp_path / "w.json", "no", stray=stray), file)
    assert "has no node SomebodysNode; install the packs they are of" in err


def test_a_cancelled_command_leaves_nothing_in_the_queue(server: Server, tmp_path: Path) -> None:
    """As Ctrl-C does: what runs ends and is kept, what waits is taken back."""
    from accvideo_core.comfy_queue import Job, QueueArgs, Report, Template, _Run

    path = workflow(tmp_path / "w.json", "cancelled", {"steps": 50})
    template = Template.read(path)
    jobs = [Job(text, 1, template.ids(text, 1)) for text in ("a red circle", "a blue square", "a green circle")]
    run = _Run(QueueArgs(path, path, server.url, ahead=3), template, Report(server.url))

    async def go() -> None:
        task = asyncio.create_task(run.all(jobs))
        await asyncio.sleep(1.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())

    async def waiting(comfy: Any) -> Any:
        return (await comfy._request("GET", "/queue"))[1]["queue_pending"]

    assert server.ask(waiting) == []
