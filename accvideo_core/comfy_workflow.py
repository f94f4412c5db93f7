"""Workflows in ComfyUI's API format, {node id: {"class_type": ..., "inputs": {...}}}: reading them, and setting their inputs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from .errors import InvalidValueError

Nodes = dict[str, dict[str, Any]]
TEXTS = ("text", "prompt", "value", "string")  # inputs that a text encoder, or a text node before it, keeps its words in
WRITER = "AccVideoSynVidWriter"  # its `prompt` records the words that were encoded


def read_workflow(path: Path) -> Nodes:
    """InvalidValueError, naming the file, for what is no workflow in API format."""
    try:
        nodes = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InvalidValueError(f"cannot read the workflow {str(path)!r}: {error}") from error
    if isinstance(nodes, dict) and "nodes" in nodes:
        raise InvalidValueError(f"{str(path)!r} is a workflow of the editor; export it with 'Export (API)' and give that")
    if not isinstance(nodes, dict) or not all(isinstance(n, dict) and "class_type" in n for n in nodes.values()):
        raise InvalidValueError(f"{str(path)!r} is no workflow in API format; export it with 'Export (API)'")
    return {name: {**node, "inputs": dict(node.get("inputs", {}))} for name, node in nodes.items()}


def with_settings(nodes: Nodes, settings: Iterable[str]) -> Nodes:
    """A copy with inputs set, each setting `name=value`.

    name   an input's name, which sets it wherever it is written into a node; `node.input` for one node, by its id, title or
           class; or `prompt`, the text that leads to an input named positive, and what a SynVid Writer records of it
    value  read as what the input holds now: a number, true or false, or text as it stands. ComfyUI's editor writes 1.0 as 1, so
           a whole number says nothing about what the input takes
    Raises InvalidValueError for a setting without "=", a name that nothing has, and a value of another kind.
    """
    nodes = deepcopy(nodes)
    for setting in settings:
        name, found, value = setting.partition("=")
        if not found:
            raise InvalidValueError(f"{setting!r} sets nothing; write NAME=VALUE, for example seed=7")
        for node, key in find_inputs(nodes, name.strip()):
            inputs = nodes[node]["inputs"]
            inputs[key] = _value(value, inputs[key], f"{key} of {nodes[node]['class_type']} (node {node})")
    return nodes


def find_inputs(nodes: Nodes, name: str) -> list[tuple[str, str]]:
    """Every (node, input) of that name which holds a value; InvalidValueError, listing the names there are, for none."""
    if name == "prompt" and (places := prompt_places(nodes)):
        return places
    held = [(node, key) for node, it in nodes.items() for key, value in it["inputs"].items() if not isinstance(value, list)]
    # Compared whole: a title may have dots, and so has an input that comes with a choice (SaveVideo's format.codec).
    if places := [(node, key) for node, key in held if name == key or name in (f"{it}.{key}" for it in _called(nodes, node))]:
        return places
    before = next((it for node in nodes for it in _called(nodes, node) if name.startswith(f"{it}.")), "")
    if "." in name and not before:
        there, before = ", ".join(map(_say, nodes.items())), name.rpartition(".")[0]
        raise InvalidValueError(f"no node has the id, title or class {before!r}; there are {there}")
    chosen = [node for node in nodes if not before or before in _called(nodes, node)]
    names = ", ".join(dict.fromkeys(key for node, key in held if node in chosen)) or "none"
    where = ", ".join(_say((node, nodes[node])) for node in chosen) if before else "the workflow"
    raise InvalidValueError(f"no input {name.removeprefix(f'{before}.')!r} is written into {where}; there are {names}")


def prompt_places(nodes: Nodes) -> list[tuple[str, str]]:
    """Where the words are that lead to an input named positive, and where a SynVid Writer is told them for its dataset."""
    places = _first_texts(nodes, [(node, key) for node, it in nodes.items() for key in it["inputs"] if key == "positive"])
    if places:
        told = [(node, "prompt") for node, it in nodes.items() if it["class_type"] == WRITER and "prompt" in it["inputs"]]
        places += _first_texts(nodes, told)
    return list(dict.fromkeys(places))


def _first_texts(nodes: Nodes, inputs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first texts met on the way back from these inputs, but for what comes into a node as its negative."""
    places, ways, seen = list[tuple[str, str]](), list(inputs), set[str]()
    while ways:
        node, key = ways.pop(0)
        value = nodes[node]["inputs"][key]
        if isinstance(value, str):
            places.append((node, key))
        source = str(value[0]) if isinstance(value, list) and value else ""
        if source in nodes and source not in seen:
            seen.add(source)
            held = nodes[source]["inputs"]
            texts = [it for it in TEXTS if it in held]
            links = [it for it, given in held.items() if isinstance(given, list) and it != "negative"]
            ways += [(source, it) for it in texts or links]
    return places


def _called(nodes: Nodes, node: str) -> list[str]:
    """What a setting may call a node: its id, class and title."""
    title = str(nodes[node].get("_meta", {}).get("title", ""))
    return [node, nodes[node]["class_type"], *([title] if title else [])]


def _say(item: tuple[str, Mapping[str, Any]]) -> str:
    name, node = item
    return f"{node['class_type']} (node {name})"


def _value(text: str, now: Any, what: str) -> Any:
    try:
        if isinstance(now, bool):
            return {"true": True, "false": False}[text.strip().lower()]
        if isinstance(now, (int, float)):
            number = json.loads(text)
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ValueError
            whole = isinstance(now, int) and isinstance(number, float) and number.is_integer()
            return int(number) if whole else number
    except (ValueError, KeyError):
        kind = "true or false" if isinstance(now, bool) else "a number"
        raise InvalidValueError(f"{text!r} is no value for {what}; it holds {now}, so give {kind}") from None
    return text
