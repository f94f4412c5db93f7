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


def read_workflow(path: Path) -> Nodes:
    """InvalidValueError, naming the file, for what is no workflow in API format."""
    try:
        nodes = json.loads(path.read_text(encoding="utf-8"))
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
           class; or `prompt`, the text that leads to an input named positive
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
    before, _, key = name.rpartition(".")
    if name == "prompt" and (places := prompt_places(nodes)):
        return places
    chosen = [node for node in nodes if not before or before in (node, nodes[node]["class_type"], _title(nodes[node]))]
    held = [(node, it) for node in chosen for it, value in nodes[node]["inputs"].items() if not isinstance(value, list)]
    if places := [(node, it) for node, it in held if it == key]:
        return places
    if before and not chosen:
        raise InvalidValueError(f"no node has the id, title or class {before!r}; there are {', '.join(map(_say, nodes.items()))}")
    names = ", ".join(dict.fromkeys(it for _, it in held)) or "none"
    where = ", ".join(_say((node, nodes[node])) for node in chosen) if before else "the workflow"
    raise InvalidValueError(f"no input {key!r} is written into {where}; there are {names}")


def prompt_places(nodes: Nodes) -> list[tuple[str, str]]:
    """Where the words are that lead to an input named positive: the first texts met on the way back from there."""
    places: dict[tuple[str, str], None] = {}
    ways = [value for node in nodes.values() for key, value in node["inputs"].items() if key == "positive"]
    seen: set[str] = set()
    while ways:
        way = ways.pop(0)
        node = str(way[0]) if isinstance(way, list) and way else ""
        if node not in nodes or node in seen:
            continue
        seen.add(node)
        inputs = nodes[node]["inputs"]
        texts = [key for key in TEXTS if key in inputs]
        places |= {(node, key): None for key in texts if isinstance(inputs[key], str)}
        ways += [inputs[key] for key in texts] if texts else list(inputs.values())
    return list(places)


def _title(node: Mapping[str, Any]) -> str:
    return str(node.get("_meta", {}).get("title", ""))


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
