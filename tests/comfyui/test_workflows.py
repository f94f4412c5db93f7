"""The shipped workflows and the nodes' descriptions, held against what a real ComfyUI says its nodes are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.comfyui.server import ROOT, Server, on_tiny_models

NODES = (
    "AccVideoStudentLoader",
    "AccVideoTinyModels",
    "AccVideoLoraStack",
    "AccVideoLoraApply",
    "AccVideoLoraMerge",
    "AccVideoLoraExtract",
    "AccVideoSampler",
    "AccVideoSigmas",
    "AccVideoCompare",
    "AccVideoTrajectorySampler",
    "AccVideoSynVidWriter",
    "AccVideoSynVidInspect",
    "AccVideoPrompts",
    "AccVideoPlanWriter",
)
NOTES = ("Note", "MarkdownNote")  # of the front end alone
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FILES = ("file", "clip_name1", "clip_name2", "vae_name")  # inputs that list what this ComfyUI has
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


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_ui_workflow_is_its_api_workflow(server: Server, node_types: dict[str, Any], path: Path) -> None:
    made = as_prompt(json.loads(path.read_text()), node_types)
    shipped = json.loads((path.parent / "api" / path.name).read_text())
    assert set(made) == set(shipped)
    for key, node in shipped.items():
        assert made[key]["class_type"] == node["class_type"]
        for name, value in made[key]["inputs"].items():
            assert node["inputs"].get(name) == value, (key, name)
        # Not in the UI workflow: an input only some versions have. Its value must be the default.
        for name in set(node["inputs"]) - set(made[key]["inputs"]):
            kind, options = inputs_of(node_types[node["class_type"]]).get(name, (None, {}))
            assert kind is None or options.get("default", node["inputs"][name]) == node["inputs"][name]
    (server.base / "input" / "prompts.txt").write_text("a red circle moving right on a black background\n")
    files = server.run(on_tiny_models(made)).files
    assert len([file for file in files if file.folder == "output"]) == 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
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
