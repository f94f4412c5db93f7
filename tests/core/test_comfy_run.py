"""`accvideo queue` without a capture: settings of a workflow, one run, VBench's videos; tests/comfyui has a real server."""

from __future__ import annotations

import asyncio
import codecs
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from accvideo_core import cli, comfy_run
from accvideo_core.comfy_client import OutputFile, Result
from accvideo_core.comfy_run import places, read_vbench_prompts, vbench_name
from accvideo_core.comfy_workflow import prompt_places, read_workflow, with_settings
from accvideo_core.errors import InvalidValueError

API = Path(__file__).resolve().parents[2] / "workflows" / "api"
TINY = API / "accvideo_tiny_t2v.json"


@pytest.mark.parametrize("path", sorted(API.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_workflow_that_samples_has_places_for_a_prompt_and_a_seed(path: Path) -> None:
    nodes = read_workflow(path)
    if path.stem in ("accvideo_merge", "accvideo_extract"):  # they make files, not videos
        assert prompt_places(nodes) == []
        return
    if any(node["class_type"] == "AccVideoPrompts" for node in nodes.values()):
        assert prompt_places(nodes) == []  # words and seed are its file's
        return
    nodes = with_settings(nodes, ["prompt=a blue = square", "seed=12"])
    words = [nodes[node]["inputs"][key] for node, key in prompt_places(nodes)]
    seeds = [node["inputs"]["seed"] for node in nodes.values() if "seed" in node["inputs"]]
    assert set(words) == {"a blue = square"} and set(seeds) == {12}


def test_settings_name_a_node_by_id_title_or_class_and_keep_its_kind(tmp_path: Path) -> None:
    nodes = read_workflow(TINY)
    (marked := tmp_path / "w.json").write_bytes(codecs.BOM_UTF8 + TINY.read_bytes())  # as Windows' editors write it
    assert read_workflow(marked) == nodes
    for name in ("4", "AccVideo Sampler", "AccVideoSampler"):
        assert with_settings(nodes, [f"{name}.shift=3"])["4"]["inputs"]["shift"] == 3
    changed = with_settings(nodes, ["steps=8", "which=teacher", "width=128", "SaveVideo.filename_prefix=a/b=c"])
    assert changed["4"]["inputs"]["steps"] == 8 and changed["1"]["inputs"]["which"] == "teacher"
    assert changed["7"]["inputs"]["filename_prefix"] == "a/b=c" and nodes["4"]["inputs"]["steps"] == 5
    assert with_settings(nodes, ["format.codec=h264"])["7"]["inputs"]["format.codec"] == "h264"
    assert with_settings(nodes, ["SaveVideo.format.codec=h264"])["7"]["inputs"]["format.codec"] == "h264"
    nodes["4"]["inputs"]["kept"] = True
    assert with_settings(nodes, ["kept=false"])["4"]["inputs"]["kept"] is False


@pytest.mark.parametrize(
    ("now", "text", "value"),
    [
        (6, "5.5", 5.5),
        (6, "7", 7),
        (6, "7.0", 7),
        (6, "1e3", 1000),
        (6.0, "7", 7),
        (6.0, "5.5", 5.5),
        (0, str(2**64 - 1), 2**64 - 1),
    ],
)
def test_a_number_may_be_any_where_there_is_one(now: float, text: str, value: float) -> None:
    """ComfyUI's "Export (API)" writes a guidance of 6.0 as 6."""
    nodes = {"4": {"class_type": "AccVideoSampler", "inputs": {"guidance": now}}}
    found = with_settings(nodes, [f"guidance={text}"])["4"]["inputs"]["guidance"]
    assert found == value and type(found) is type(value)


def test_true_or_false_stays_so() -> None:
    nodes = {"4": {"class_type": "AccVideoSampler", "inputs": {"kept": True}}}
    with pytest.raises(InvalidValueError, match=r"'1' is no value for kept .*; it holds True, so give true or false"):
        with_settings(nodes, ["kept=1"])


def test_the_words_are_found_through_other_nodes() -> None:
    nodes = {
        "a": {"class_type": "PrimitiveString", "inputs": {"value": "old"}},
        "b": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["z", 0], "text": ["a", 0]}},
        "c": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["b", 0], "guidance": 6.0}},
        "n": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["z", 0], "text": "bad"}},
        "s": {"class_type": "KSampler", "inputs": {"positive": ["c", 0], "negative": ["n", 0], "seed": 1}},
    }
    both = {"class_type": "WanImageToVideo", "inputs": {"positive": ["c", 0], "negative": ["n", 0], "vae": ["v", 0]}}
    sampler = {"class_type": "KSampler", "inputs": {"positive": ["w", 0], "negative": ["w", 1], "seed": 1}}
    through = nodes | {"w": both, "s": sampler}
    for changed in (with_settings(nodes, ["prompt=new"]), with_settings(through, ["prompt=new"])):
        assert changed["a"]["inputs"]["value"] == "new" and changed["n"]["inputs"]["text"] == "bad"


@pytest.mark.parametrize("told", ["old", ["a", 0]], ids=["written", "linked"])
def test_a_dataset_is_told_the_words_that_are_encoded(told: Any) -> None:
    """Else AccVideo SynVid Writer would record the words that the workflow was exported with."""
    nodes = {
        "a": {"class_type": "PrimitiveString", "inputs": {"value": "old"}},
        "b": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["z", 0], "text": "old"}},
        "s": {"class_type": "AccVideoTrajectorySampler", "inputs": {"positive": ["b", 0], "seed": 1}},
        "w": {"class_type": "AccVideoSynVidWriter", "inputs": {"trajectory": ["s", 1], "prompt": told, "dataset": "d"}},
    }
    changed = with_settings(nodes, ["prompt=new"])
    recorded = changed["a"]["inputs"]["value"] if isinstance(told, list) else changed["w"]["inputs"]["prompt"]
    assert changed["b"]["inputs"]["text"] == recorded == "new" and changed["w"]["inputs"]["dataset"] == "d"


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("seed", "'seed' sets nothing; write NAME=VALUE"),
        ("sed=7", "no input 'sed' is written into the workflow; there are which, text, width"),
        ("KSampler.seed=7", "no node has the id, title or class 'KSampler'; there are AccVideoTinyModels .node 1."),
        ("4.model=7", "no input 'model' is written into AccVideoSampler .node 4.; there are seed, family, steps"),
        ("7.format.codex=h264", "no input 'format.codex' is written into SaveVideo .node 7.; there are .*, format.codec"),
        ("seed=seven", "'seven' is no value for seed of AccVideoSampler .node 4.; it holds 1, so give a number"),
        ("seed=true", "'true' is no value for seed"),
        ("shift=true", "'true' is no value for shift of AccVideoSampler .node 4.; it holds 7.0, so give a number"),
    ],
)
def test_a_setting_of_no_use(setting: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["queue", str(TINY), "--set", setting, "--server", "http://127.0.0.1:9"]) == 2
    assert re.search(sentence, capsys.readouterr().err)


class Willing:
    """A ComfyUI as its client sees it, which saves `files` a run and keeps what it was asked."""

    def __init__(self, *files: str) -> None:
        self.asked: list[dict[str, Any]] = []
        self.files, self.most, self._now = files, 0, 0

    def client(self, url: str) -> Willing:
        return self

    async def __aenter__(self) -> Willing:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def run(self, nodes: dict[str, Any], on_progress: Any, on_queued: Any) -> Result:
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.sleep(0.001)
        self._now -= 1
        self.asked.append(nodes)
        ways = [f"video/{name}".rpartition("/") for name in self.files]
        files = [OutputFile("7", "images", name, folder, "output") for folder, _, name in ways]
        return Result("id", (*files, OutputFile("4", "images", "preview.png", "", "temp")), {"9": ["a report"]}, 1.5)

    async def download(self, file: OutputFile, path: Path) -> Path:
        Path(path).write_text(f"{file.subfolder.removeprefix('video')}{file.filename} {self.asked[-1]['4']['inputs']['seed']}")
        return Path(path)


@pytest.fixture
def willing(monkeypatch: pytest.MonkeyPatch):
    def start(*files: str) -> Willing:
        server = Willing(*files)
        monkeypatch.setattr(comfy_run, "ComfyClient", server.client)
        return server

    return start


def test_one_run_brings_its_video(willing, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = willing("AccVideo_1.mp4")
    words = ["queue", str(TINY), "--set", "prompt=a red ball", "--set", "seed=7"]
    assert cli.main([*words, "-o", str(tmp_path / "new" / "out.mp4")]) == 0
    assert (tmp_path / "new" / "out.mp4").read_text() == "AccVideo_1.mp4 7"
    assert capsys.readouterr().out.splitlines() == ["a report", str(tmp_path / "new" / "out.mp4"), "1.5 s"]
    assert server.asked[0]["2"]["inputs"]["text"] == "a red ball"
    assert cli.main([*words, "-o", str(tmp_path)]) == 0 and (tmp_path / "AccVideo_1.mp4").is_file()
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.split("\n", 3)[3])["made"] == ["output/video/AccVideo_1.mp4"]


def test_a_file_for_several_is_refused_and_nothing_is_written(willing, tmp_path: Path, capsys) -> None:
    willing("a.mp4", "b.mp4")
    assert cli.main(["queue", str(TINY), "-o", str(tmp_path / "out.mp4")]) == 1
    assert "saved 2 files (a.mp4, b.mp4); give -o a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert cli.main(["queue", str(TINY), "-o", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "b.mp4"}


def test_files_of_one_name_keep_their_subfolders(willing, tmp_path: Path, capsys) -> None:
    willing("teacher/video_1.mp4", "student/video_1.mp4", "all.mp4")
    assert cli.main(["queue", str(TINY), "-o", str(tmp_path)]) == 0
    brought = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.*")}
    assert brought == {
        "teacher/video_1.mp4": "/teachervideo_1.mp4 1",
        "student/video_1.mp4": "/studentvideo_1.mp4 1",
        "all.mp4": "all.mp4 1",
    }
    assert capsys.readouterr().out.splitlines()[1:3] == [str(tmp_path / way / "video_1.mp4") for way in ("teacher", "student")]


def test_places_of_files_in_a_folder(tmp_path: Path) -> None:
    def place(*ways: tuple[str, str, str]) -> list[str]:
        files = [OutputFile("7", "images", name, subfolder, folder) for folder, subfolder, name in ways]
        return [path.relative_to(tmp_path).as_posix() for path in places(files, tmp_path)]

    assert place() == []
    assert place(("output", "a/b", "x.mp4")) == ["x.mp4"]
    assert place(("output", "a/b", "x.mp4"), ("output", "a/c", "x.mp4")) == ["b/x.mp4", "c/x.mp4"]
    assert place(("output", "a\\b", "x.mp4"), ("output", "a", "y.mp4")) == ["b/x.mp4", "y.mp4"], "a server on Windows"
    assert place(("temp", "", "x.png"), ("input", "", "x.png")) == ["temp/x.png", "input/x.png"]
    assert place(("output", "/etc", "x.mp4"), ("output", "./", "y.mp4")) == ["etc/x.mp4", "y.mp4"]


@pytest.mark.parametrize("name", ["../x.mp4", "a/../../x.mp4", "..\\x.mp4", "teacher/..", "a\0b"])
def test_no_file_leads_out_of_the_folder(willing, tmp_path: Path, capsys, name: str) -> None:
    willing("a.mp4", name)
    assert cli.main(["queue", str(TINY), "-o", str(tmp_path / "out")]) == 1
    assert "which leads out of" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))


def test_whoever_stops_waiting_stops_the_run(willing) -> None:
    """It is waiting or runs, and may begin to in between: it is removed first, then interrupted if it is the one that runs."""
    server, told = willing(), []

    async def tell(what: str, prompt_id: str) -> None:
        told.append((what, prompt_id))

    async def go() -> None:
        queued = asyncio.Event()

        async def run(nodes: dict[str, Any], on_progress: Any, on_queued: Any) -> Result:
            on_queued("p")
            queued.set()
            await asyncio.sleep(60)
            raise AssertionError

        server.run, server.remove, server.interrupt = run, partial(tell, "remove"), partial(tell, "interrupt")
        waiting = asyncio.create_task(comfy_run._run(server, {}, quiet=True))
        await queued.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(go())
    assert told == [("remove", "p"), ("interrupt", "p")]


def test_vbench_videos_have_its_names_and_are_made_once(willing, tmp_path: Path, capsys) -> None:
    """Names as VBench's `evaluate` looks them up: "<prompt>-<sample>.mp4", five of each prompt."""
    server = willing("AccVideo_1.mp4")
    (tmp_path / "info.json").write_text(json.dumps([{"prompt_en": text} for text in ("a cat", "a dog.", "a cat")]))
    words = ["queue", str(TINY), "--vbench", str(tmp_path / "info.json"), "-o", str(tmp_path / "videos"), "--seed", "40"]
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a cat-2.mp4").write_text("before")
    assert cli.main([*words, "--ahead", "3"]) == 0
    assert "9 videos made, 1 were there already" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "videos").iterdir()}
    assert names == {f"{prompt}-{i}.mp4" for prompt in ("a cat", "a dog.") for i in range(5)}
    asked = {(it["2"]["inputs"]["text"], it["4"]["inputs"]["seed"]) for it in server.asked}
    assert asked == {(prompt, 40 + i) for prompt in ("a cat", "a dog.") for i in range(5)} - {("a cat", 42)}
    assert server.most == 3 and (tmp_path / "videos" / "a cat-2.mp4").read_text() == "before"
    assert cli.main(words) == 0 and len(server.asked) == 9


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--vbench", "PROMPTS"], "needs a folder for the videos"),
        (["--vbench", "PROMPTS", "--prompts", "PROMPTS"], "leave out --out and --vbench"),
        (["--vbench", "BAD", "-o", "OUT"], "is no VBench_full_info.json"),
        (["--vbench", "SLASH", "-o", "OUT"], "'black/white' cannot be a file name"),
    ],
)
def test_what_vbench_cannot_use(willing, tmp_path: Path, capsys, words: list[str], sentence: str) -> None:
    willing("a.mp4")
    (tmp_path / "PROMPTS").with_suffix(".txt").write_text("a cat\n")
    (tmp_path / "SLASH").with_suffix(".txt").write_text("black/white\n")
    (tmp_path / "BAD").with_suffix(".json").write_text('{"prompt": 1}')
    files = {path.stem: str(path) for path in tmp_path.iterdir()} | {"OUT": str(tmp_path / "out")}
    assert cli.main(["queue", str(TINY), *(files.get(word, word) for word in words)]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_prompt_too_long_for_a_file_name() -> None:
    assert vbench_name("x" * 249, 0).endswith("-0.mp4")
    with pytest.raises(InvalidValueError, match="cannot be a file name"):
        vbench_name("é" * 125, 0)


def test_prompts_of_a_text_file_come_once(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,seed\na cat,1\na cat,2\na dog,\n")
    assert read_vbench_prompts(tmp_path / "p.csv") == ["a cat", "a dog"]
