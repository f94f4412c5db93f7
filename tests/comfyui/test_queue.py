"""`accvideo queue` against a real ComfyUI, which is killed and started again in the middle."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from accvideo_core import cli
from accvideo_core.media import read_mp4
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
    from accvideo_core.comfy_workflow import read_workflow

    path = workflow(tmp_path / "w.json", "cancelled", {"steps": 50})
    template = Template.of(read_workflow(path), path)
    jobs = [Job(text, 1, template.ids(text, 1)) for text in ("a red circle", "a blue square", "a green circle")]
    run = _Run(QueueArgs(path, prompts=path, server=server.url, ahead=3), template, Report(server.url))

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


def test_one_run_brings_its_video_here(server: Server, tmp_path: Path, capsys) -> None:
    """The same seed and words give the file ComfyUI saved; another seed another one."""
    words = ["queue", str(ROOT / "workflows" / "api" / "accvideo_tiny_t2v.json"), "--server", server.url]
    words += ["--set", "prompt=a blue square moving down"]
    made = [tmp_path / f"{seed}.mp4" for seed in (7, 8)]
    for seed, path in zip((7, 8), made, strict=True):
        assert cli.main([*words, "--set", f"seed={seed}", "-o", str(path)]) == 0
        assert capsys.readouterr().out.startswith(str(path))
    first, second = (read_mp4(path) for path in made)
    assert first.frames.shape == (17, 64, 64, 3) and (first.frames != second.frames).any()
    carried = json.loads(first.metadata["prompt"])
    assert carried["2"]["inputs"]["text"] == "a blue square moving down" and carried["4"]["inputs"]["seed"] == 7
    assert cli.main([*words, "--set", "steps=0", "-o", str(made[0])]) == 1
    assert "AccVideoSampler (node 4): Value 0 smaller than min of 1: steps" in capsys.readouterr().err


def example(language: str) -> str:
    """The example in that language from docs/api.md."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    return text.split(f"```{language}\n", 1)[1].split("```", 1)[0]


def run_example(server: Server, folder: Path, command: list[str], name: str, code: str) -> str:
    """What the example prints, run in a folder where it finds the workflow; its address is the server's."""
    shutil.copytree(ROOT / "workflows" / "api", folder / "workflows" / "api")
    (folder / name).write_text(code.replace("127.0.0.1:8188", server.url.removeprefix("http://")), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, name], cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_example_runs(server: Server, tmp_path: Path) -> None:
    assert "step 5 of 5" in run_example(server, tmp_path, [sys.executable], "example.py", example("python"))
    assert [read_mp4(tmp_path / f"triangle-{seed}.mp4").frames.shape for seed in range(3)] == [(17, 64, 64, 3)] * 3


def test_the_javascript_example_runs(server: Server, tmp_path: Path) -> None:
    node = shutil.which("node")
    version = subprocess.run([node, "--version"], capture_output=True, text=True).stdout if node else "none"
    major = int(version[1:].split(".")[0]) if node else 0
    if major < 20:
        pytest.skip(f"Node.js 20 or newer is needed to run it; found {version.strip()}")
    flags = ["--experimental-websocket"] if major < 22 else []
    assert "step 5 of 5" in run_example(server, tmp_path, [node, *flags], "example.mjs", example("js"))
    (video,) = tmp_path.glob("*.mp4")
    assert read_mp4(video).frames.shape == (17, 64, 64, 3)
