"""The shipped workflows and the nodes' descriptions, held against what a real ComfyUI says its nodes are."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from accvideo_core.comfy_client import ComfyClient
from accvideo_core.media import read_mp4
from tests.comfyui import workflow_list
from tests.comfyui.model_files import install
from tests.comfyui.server import ROOT, Server, load_prompt, on_tiny_models, tiny_prompt

NODES = (
    "AccVideoStudentLoader",
    "AccVideoTinyModels",
    "AccVideoLoraStack",
    "AccVideoLoraApply",
    "AccVideoLoraMerge",
    "AccVideoLoraExtract",
    "AccVideoSampler",
    "AccVideoSigmas",
    "AccVideoVAEDecode",
    "AccVideoCompare",
    "AccVideoTrajectorySampler",
    "AccVideoSynVidWriter",
    "AccVideoSynVidInspect",
    "AccVideoPrompts",
    "AccVideoPlanWriter",
)
NOTES = ("Note", "MarkdownNote")  # of the front end alone
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FILES = ("file", "clip_name", "clip_name1", "clip_name2", "vae_name", "unet_name", "lora", "checkpoint", "tuned", "base", "image")
# inputs that list what this ComfyUI has
OTHERS = {  # nodes of other packs, as they describe themselves
    "UnetLoaderGGUF": {"input": {"required": {"unet_name": [["a.gguf"]]}}, "output": ["MODEL"]},
}
WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str, "COMFY_DYNAMICCOMBO_V3": str}


@pytest.fixture(scope="module")
def node_types(server: Server) -> dict[str, Any]:
    return server.ask(lambda comfy: comfy.node_types())


def inputs_of(node_type: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """{input: (type, options)} in the order the front end shows them, old and new ways of writing a combo made one."""
    inputs = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in node_type["input"].get(group, {}).items():
            options = dict(options[0]) if options else {}
            if isinstance(kind, list):
                kind, options = "COMBO", options | {"options": kind}
            inputs[name] = (kind, options)
    return inputs


def as_prompt(workflow: dict[str, Any], node_types: dict[str, Any]) -> dict[str, Any]:
    """A UI workflow as an API prompt, the way the front end makes it; every link and widget is checked on the way."""
    links = {link[0]: link for link in workflow["links"]}
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert workflow["last_node_id"] == max(nodes) and workflow["last_link_id"] == max(links)
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            assert not node["inputs"] and not node["outputs"]
            continue
        declared = inputs_of(node_types[node["type"]])
        filled: dict[str, Any] = {}
        for slot, socket in enumerate(node["inputs"]):
            kind, _ = declared[socket["name"]]
            # A widget has a socket only where something is linked to it.
            assert kind == socket["type"] and (kind in WIDGETS) == ("widget" in socket)
            assert "widget" not in socket or (socket["widget"] == {"name": socket["name"]} and socket["link"] is not None)
            if socket["link"] is None:
                assert socket["name"] in node_types[node["type"]]["input"]["optional"]
                continue
            _, source, source_slot, target, target_slot, link_kind = links.pop(socket["link"])
            assert (target, target_slot) == (node["id"], slot) and kind in (link_kind, "*")
            output = nodes[source]["outputs"][source_slot]
            assert socket["link"] in output["links"] and output["type"] == link_kind
            assert node_types[nodes[source]["type"]]["output"][source_slot] == link_kind
            filled[socket["name"]] = [str(source), source_slot]
        values = list(node["widgets_values"])
        for name, (kind, options) in declared.items():
            if kind not in WIDGETS or not values:  # values missing at the end: the front end takes the defaults
                continue
            value = values.pop(0)
            assert isinstance(value, WIDGETS[kind]), (node["type"], name, value)
            if options.get("control_after_generate"):
                assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
            if name in filled:  # linked: what the widget shows is not used
                continue
            if kind == "COMBO" and options.get("options") and name not in FILES:
                assert value in options["options"]
            filled[name] = value
        assert not values, f"{node['type']} has {len(values)} widget values too many"
        for name in node_types[node["type"]]["input"]["required"]:
            assert name in filled, f"{node['type']} lacks {name}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": filled}
    assert not links, "links that lead nowhere"
    return prompt


def every(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def api_of(path: Path) -> dict[str, Any]:
    return load_prompt(path.parent / "api" / path.name)


def is_tiny(path: Path) -> bool:
    return any(content["class_type"] == "AccVideoTinyModels" for content in api_of(path).values())


RELEASED = [path for path in WORKFLOWS if not is_tiny(path)]


@every(WORKFLOWS)
def test_a_ui_workflow_is_its_api_workflow(node_types: dict[str, Any], path: Path) -> None:
    made, shipped = as_prompt(json.loads(path.read_text()), node_types | OTHERS), api_of(path)
    assert set(made) == set(shipped)
    for key, node in shipped.items():
        assert made[key]["class_type"] == node["class_type"]
        for name, value in made[key]["inputs"].items():
            assert node["inputs"].get(name) == value, (key, name)
        # Not in the UI workflow: an input only some versions have. Its value must be the default.
        for name in set(node["inputs"]) - set(made[key]["inputs"]):
            kind, options = inputs_of((node_types | OTHERS)[node["class_type"]]).get(name, (None, {}))
            assert kind is None or options.get("default", node["inputs"][name]) == node["inputs"][name]


@pytest.fixture(scope="module")
def stocked(server: Server, weights: Path) -> Server:
    """With every file that a workflow names."""
    install(server.base, weights)
    return server


def needs_its_pack(path: Path, node_types: dict[str, Any]) -> None:
    if any(content["class_type"] not in node_types for content in api_of(path).values()):
        pytest.skip("no ComfyUI-GGUF: set COMFYUI_GGUF_PATH, or clone city96/ComfyUI-GGUF to ~/comfy/ComfyUI-GGUF")


@every(WORKFLOWS)
def test_a_workflow_runs_on_tiny_models(stocked: Server, node_types: dict[str, Any], path: Path) -> None:
    """To as many videos as it saves, or where it saves none, to a report of the file it wrote."""
    needs_its_pack(path, node_types)
    prompt = on_tiny_models(api_of(path), teacher_steps=50 if is_tiny(path) else 10)
    result = stocked.run(prompt)
    saved = [stocked.path(file) for file in result.files if file.folder == "output"]
    assert len(saved) == sum(content["class_type"] == "SaveVideo" for content in prompt.values())
    for video in saved:
        assert len(read_mp4(video).frames) == 17
    for content in prompt.values() if not saved else ():
        if "name" in content["inputs"]:
            assert any(content["inputs"]["name"] in text for texts in result.texts.values() for text in texts)


@every(RELEASED)
def test_a_workflow_for_released_models_is_accepted_as_it_is(stocked: Server, node_types: dict[str, Any], path: Path) -> None:
    """With files under the names it gives and nothing else changed. A long run before it keeps it from being started."""
    needs_its_pack(path, node_types)
    busy = tiny_prompt(steps=1000, seed=time.time_ns(), model=["watch", 0])
    watched = {"model": ["1", 0], "log": str(stocked.base / "calls"), "seconds": 1.0}
    busy["watch"] = {"class_type": "AccVideoTestWatch", "inputs": watched}

    async def accepted(comfy: ComfyClient) -> None:
        first = await comfy.queue(busy)
        try:
            await comfy.remove(await comfy.queue(api_of(path)))  # raises what ComfyUI finds wrong
        finally:
            await comfy.remove(first)
            await comfy.interrupt(first)

    stocked.ask(accepted)


def test_files_are_those_of_their_descriptions() -> None:
    """`make workflows` would change nothing."""
    described = dict(workflow_list.texts())
    folder = ROOT / "workflows"
    assert set(described) == {str(path.relative_to(folder)) for path in folder.rglob("*.json")}
    for name, text in described.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"{name}: run `make workflows`"


@every(WORKFLOWS)
def test_a_workflow_says_what_it_needs_and_where_from(path: Path) -> None:
    """Notes; groups that hold every node; packs, for those who lack them; a link for each model file, or its name in the note."""
    workflow = json.loads(path.read_text())
    nodes = [node for node in workflow["nodes"] if node["type"] not in NOTES]
    notes = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    note = "\n".join(notes)
    assert "**Memory" in note and all(group["title"].partition(":")[0] in note for group in workflow["groups"])
    for it in nodes:
        ours = it["type"].startswith("AccVideo")
        assert it["properties"]["cnr_id"] == ("accvideo" if ours else "ComfyUI-GGUF" if "GGUF" in it["type"] else "comfy-core")
        assert not ours or it["properties"]["ver"] == workflow_list.version()
        (x, y), (width, height) = it["pos"], it["size"]
        inside = [
            group
            for group in workflow["groups"]
            if _covers(group["bounding"], (x, y - 30)) and _covers(group["bounding"], (x + width, y + height))
        ]
        assert len(inside) == 1, f"{it['title']} is in {len(inside)} groups"
        named = {value for value in it["widgets_values"] if str(value).endswith((".safetensors", ".gguf", ".pt"))}
        linked = {model["name"] for model in it["properties"].get("models", ())}
        assert linked <= named and all(name in note for name in named), it["title"]
        for model in it["properties"].get("models", ()):
            assert model["url"] == f"https://huggingface.co/{model['url'].split('.co/')[1]}" and model["url"] in note
            assert model["url"].endswith(f"/{model['name']}") and "/resolve/main/" in model["url"]
            assert model["directory"] in ("diffusion_models", "loras", "text_encoders", "vae", "clip_vision")
    for i, first in enumerate(nodes):
        for second in nodes[i + 1 :]:
            (x, y), (u, v) = first["pos"], second["pos"]
            assert x != u or y + first["size"][1] < v or v + second["size"][1] < y, "nodes lie on one another"


def _covers(bounds: list[int], point: tuple[int, int]) -> bool:
    x, y, width, height = bounds
    return x <= point[0] <= x + width and y <= point[1] <= y + height


@every(WORKFLOWS)
def test_a_workflow_has_a_picture(path: Path) -> None:
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert min(picture.size) >= 256


@pytest.mark.parametrize("node_id", NODES)
def test_every_node_explains_itself(node_types: dict[str, Any], node_id: str) -> None:
    node = node_types[node_id]
    assert node["category"] == "AccVideo"
    assert node["display_name"].startswith("AccVideo ") and len(node["description"]) > 60
    for name, (_, options) in inputs_of(node).items():
        assert len(options.get("tooltip", "")) > 15, f"{node_id}.{name} has no tooltip"
    assert all(len(tooltip or "") > 15 for tooltip in node["output_tooltips"])
    chinese = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))[node_id]["display_name"]
    for name, title in ((f"{node_id}.md", node["display_name"]), (f"{node_id}/zh.md", chinese)):
        page = (ROOT / "web" / "docs" / name).read_text(encoding="utf-8")
        assert page.startswith(f"# {title}\n")
        for key in inputs_of(node):
            assert key in page, f"{name} says nothing of {key}"


def test_the_help_pages_are_served(server: Server) -> None:
    import urllib.request

    for name in (f"{node_id}{end}" for node_id in NODES for end in (".md", "/zh.md")):
        with urllib.request.urlopen(f"{server.url}/extensions/accvideo/docs/{name}") as answer:
            assert answer.read().decode() == (ROOT / "web" / "docs" / name).read_text(encoding="utf-8")


def test_the_pack_loads(server: Server) -> None:
    """ComfyUI prints a line per pack with its import time at each start; a failed import would say so on the same line."""
    lines = [line for line in server.console().splitlines() if line.rstrip().endswith("custom_nodes/accvideo")]
    assert lines and not any("FAILED" in line for line in lines)
