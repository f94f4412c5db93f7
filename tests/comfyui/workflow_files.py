"""Writes workflows: one description of nodes, groups and notes becomes the UI file and the API file, so that they cannot differ.

`workflow_list.py` holds the descriptions; `make workflows` writes workflows/*.json and workflows/api/*.json from them.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Link = tuple[int, int]  # (node id, output slot)
SEED = ("seed", 0, "fixed")
LATER = ("format.codec", "auto")  # an input of SaveVideo in newer ComfyUI, which the UI file of an older one does not have
COLUMN, GAP, NOTE_WIDTH = 340, 60, 480
PREVIEW = 260  # pixels that a sampler's node grows by while it runs: the picture and what it took


@dataclass(frozen=True)
class Kind:
    """A node type. sockets: (name, type), with a ? after the name of an optional one; widgets: (name, default) in the order of
    the node, with the control value of a seed or index behind; outputs: (name, type); pack: its id in the registry."""

    sockets: tuple[tuple[str, str], ...] = ()
    widgets: tuple[tuple[Any, ...], ...] = ()
    outputs: tuple[tuple[str, str], ...] = ()
    pack: str = "comfy-core"
    extra: int = 0  # pixels of height beside sockets and widgets: pictures, long texts


MODEL, CLIP, VAE = ("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE")
VIDEO_SIZE = (("width", 960), ("height", 544), ("length", 93))
SCHEDULE = (("shift", 7.0), ("guidance", 6.0), ("cfg", 1.0))
SAMPLED = (MODEL, ("positive", "CONDITIONING"), ("latent", "LATENT"), ("negative?", "CONDITIONING"))
WRITTEN = (("path", "STRING"), ("report", "STRING"), ("file", "COMBO"))
LORAS = "ACCVIDEO_LORA_STACK"

KINDS = {
    "CLIPLoader": Kind((), (("clip_name", ""), ("type", "wan"), ("device", "default")), (("CLIP", "CLIP"),)),
    "DualCLIPLoader": Kind(
        (), (("clip_name1", ""), ("clip_name2", ""), ("type", "hunyuan_video"), ("device", "default")), (("CLIP", "CLIP"),)
    ),
    "VAELoader": Kind((), (("vae_name", ""),), (("VAE", "VAE"),)),
    "CLIPVisionLoader": Kind((), (("clip_name", ""),), (("CLIP_VISION", "CLIP_VISION"),)),
    "CLIPVisionEncode": Kind(
        (("clip_vision", "CLIP_VISION"), ("image", "IMAGE")), (("crop", "none"),), (("CLIP_VISION_OUTPUT", "CLIP_VISION_OUTPUT"),)
    ),
    "LoadImage": Kind((), (("image", "example.png"),), (("IMAGE", "IMAGE"), ("MASK", "MASK")), extra=280),
    "CLIPTextEncode": Kind((CLIP,), (("text", ""),), (("CONDITIONING", "CONDITIONING"),), extra=70),
    "PrimitiveStringMultiline": Kind((), (("value", ""),), (("STRING", "STRING"),), extra=70),
    "EmptyHunyuanLatentVideo": Kind((), (*VIDEO_SIZE, ("batch_size", 1)), (("LATENT", "LATENT"),)),
    "WanImageToVideo": Kind(
        (
            *(("positive", "CONDITIONING"), ("negative", "CONDITIONING"), VAE),
            *(("clip_vision_output?", "CLIP_VISION_OUTPUT"), ("start_image?", "IMAGE")),
        ),
        (("width", 832), ("height", 480), ("length", 81), ("batch_size", 1)),
        (("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("latent", "LATENT")),
    ),
    "VAEDecode": Kind((("samples", "LATENT"), VAE), (), (("IMAGE", "IMAGE"),)),
    "VAEDecodeTiled": Kind(
        (("samples", "LATENT"), VAE),
        (("tile_size", 256), ("overlap", 64), ("temporal_size", 64), ("temporal_overlap", 8)),
        (("IMAGE", "IMAGE"),),
    ),
    "CreateVideo": Kind((("images", "IMAGE"), ("audio?", "AUDIO")), (("fps", 24.0),), (("VIDEO", "VIDEO"),)),
    "SaveVideo": Kind((("video", "VIDEO"),), (("filename_prefix", ""), ("format", "auto"), ("codec", "auto")), extra=280),
    "PreviewImage": Kind((("images", "IMAGE"),), extra=360),
    "PreviewAny": Kind((("source", "*"),), extra=150),
    "UnetLoaderGGUF": Kind((), (("unet_name", ""),), (("MODEL", "MODEL"),), "ComfyUI-GGUF"),
    "AccVideoStudentLoader": Kind((), (("file", ""), ("weight_dtype", "default"), ("attention", "auto")), (MODEL,), "accvideo"),
    "AccVideoTinyModels": Kind((), (("which", "student"),), (MODEL, CLIP, VAE), "accvideo"),
    "AccVideoLoraStack": Kind(
        (("stack?", LORAS),), (("lora", ""), ("strength", 1.0), ("blocks", "all")), (("stack", LORAS),), "accvideo"
    ),
    "AccVideoLoraApply": Kind(
        (MODEL, ("stack", LORAS)), (("allow_unmatched", False),), (MODEL, ("report", "STRING")), "accvideo"
    ),
    "AccVideoLoraMerge": Kind(
        (("stack", LORAS),),
        (("checkpoint", ""), ("dtype", "keep"), ("name", "accvideo/merged"), ("overwrite", False), ("allow_unmatched", False)),
        WRITTEN,
        "accvideo",
    ),
    "AccVideoLoraExtract": Kind(
        (),
        (
            *(("tuned", ""), ("base", ""), ("rank", 32), ("energy", 0.0), ("key_format", "comfyui"), ("dtype", "fp16")),
            *(("name", "accvideo/extracted"), ("overwrite", False), ("lossy", False)),
        ),
        WRITTEN,
        "accvideo",
    ),
    "AccVideoSampler": Kind(
        SAMPLED,
        (SEED, ("family", "hunyuan-t2v"), ("steps", 5), *SCHEDULE, ("denoise", 1.0)),
        (("latent", "LATENT"), ("seconds", "FLOAT")),
        "accvideo",
        PREVIEW + 40,
    ),
    "AccVideoTrajectorySampler": Kind(
        SAMPLED,
        (SEED, ("family", "hunyuan-t2v"), ("steps", 50), ("keys", 5), *SCHEDULE, ("negative_prompt", "")),
        (("latent", "LATENT"), ("trajectory", "ACCVIDEO_TRAJECTORY")),
        "accvideo",
        PREVIEW + 60,
    ),
    "AccVideoCompare": Kind(
        (("first", "IMAGE"), ("second", "IMAGE")),
        (
            *(("first_label", "teacher, 50 steps"), ("second_label", "student, 5 steps")),
            *(("first_seconds", 0.0), ("second_seconds", 0.0), ("fps", 24.0)),
        ),
        (("frames", "IMAGE"), ("video", "VIDEO")),
        "accvideo",
        300,
    ),
    "AccVideoPrompts": Kind(
        (),
        (("file", "prompts.txt"), ("index", 0, "fixed")),
        (("prompt", "STRING"), ("count", "INT"), ("seed", "INT")),
        "accvideo",
    ),
    "AccVideoPlanWriter": Kind(
        (CLIP,),
        (("file", "prompts.txt"), *VIDEO_SIZE, ("seeds", 1), ("seed", 0), ("name", "my_plan")),
        (("plan", "STRING"), ("report", "STRING")),
        "accvideo",
    ),
    "AccVideoSynVidWriter": Kind(
        (("trajectory", "ACCVIDEO_TRAJECTORY"), ("frames?", "IMAGE")),
        (("prompt", ""), ("dataset", "my_dataset"), ("fps", 24.0), ("dtype", "float16"), ("store_noise", False)),
        (("dataset", "STRING"), ("report", "STRING"), ("sample", "STRING")),
        "accvideo",
        200,
    ),
    "AccVideoSynVidInspect": Kind(
        (("vae?", "VAE"),), (("dataset", "my_dataset"), ("sample", "")), (("sheet", "IMAGE"), ("report", "STRING")), "accvideo"
    ),
}
# What a widget's socket is where something is linked to it, for those that are.
LINKED = {"text": "STRING", "prompt": "STRING", "dataset": "STRING", "sample": "STRING", "seed": "INT", "lora": "COMBO"}
LINKED |= {"file": "COMBO", "first_seconds": "FLOAT", "second_seconds": "FLOAT"}


@dataclass
class Node:
    """One node; `of("model")` is its output of that name, to be given to another."""

    id: int
    type: str
    title: str
    inputs: dict[str, Any]
    controls: dict[str, str]
    models: list[dict[str, str]]
    group: int

    def of(self, name: str) -> Link:
        names = [output for output, _ in KINDS[self.type].outputs]
        return self.id, names.index(name)

    @property
    def widgets(self) -> list[Any]:
        """As the UI file lists them: those of the node, each with its control behind, the linked ones at what they would show."""
        values = []
        for name, default, *control in KINDS[self.type].widgets:
            value = self.inputs.get(name, default)
            values += [default if isinstance(value, tuple) else value, *(self.controls.get(name, it) for it in control)]
        return values

    @property
    def sockets(self) -> list[tuple[str, str, bool]]:
        """(name, type, whether it is a widget's)."""
        kind = KINDS[self.type]
        widgets = [(name, LINKED[name], True) for name, *_ in kind.widgets if isinstance(self.inputs.get(name), tuple)]
        return [*((name.rstrip("?"), socket, False) for name, socket in kind.sockets), *widgets]

    @property
    def size(self) -> tuple[int, int]:
        kind = KINDS[self.type]
        rows = 24 * max(len(kind.sockets), len(kind.outputs)) + 26 * len(self.widgets)
        return COLUMN, 40 + rows + kind.extra


@dataclass
class Graph:
    """A workflow. Nodes are numbered as they are made; each lies in the group it was made in, groups from left to right."""

    name: str
    version: str
    nodes: list[Node] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    @contextlib.contextmanager
    def group(self, title: str) -> Iterator[None]:
        """Nodes made inside lie there; a title that was used before is that group again."""
        if title not in self.groups:
            self.groups.append(title)
        self._group = self.groups.index(title)
        yield

    def node(
        self, kind: str, title: str = "", models: list[dict[str, str]] | None = None, control: str | None = None, **inputs: Any
    ) -> Node:
        """inputs: values of widgets, and links; what is left out has its default. control: that of a seed or an index."""
        known = KINDS[kind]
        names = [name.rstrip("?") for name, *_ in (*known.sockets, *known.widgets)]
        if unknown := set(inputs) - set(names):
            raise ValueError(f"{kind} has no {', '.join(sorted(unknown))}")
        controls = {name: control for name, _, *kept in known.widgets if kept and control}
        made = Node(len(self.nodes) + 1, kind, title or kind, inputs, controls, models or [], self._group)
        self.nodes.append(made)
        return made

    def note(self, title: str, text: str) -> None:
        self.notes.append((title, text))

    def api(self) -> dict[str, Any]:
        """What the HTTP API takes."""
        prompt = {}
        for node in self.nodes:
            values = {name: node.inputs.get(name, default) for name, default, *_ in KINDS[node.type].widgets}
            if node.type == "SaveVideo":
                values |= dict([LATER])
            values |= {name: node.inputs[name] for name, _, _ in node.sockets if node.inputs.get(name) is not None}
            inputs = {name: [str(value[0]), value[1]] if isinstance(value, tuple) else value for name, value in values.items()}
            prompt[str(node.id)] = {"class_type": node.type, "inputs": inputs, "_meta": {"title": node.title}}
        return prompt

    def ui(self) -> dict[str, Any]:
        """What the front end loads."""
        links: list[list[Any]] = []
        leaving: dict[Link, list[int]] = {}
        nodes = []
        places, bounds = self._layout()
        for order, node in enumerate(self.nodes):
            entries = []
            for slot, (name, socket, widget) in enumerate(node.sockets):
                entry: dict[str, Any] = {"name": name, "type": socket, "link": None}
                if widget:
                    entry["widget"] = {"name": name}
                if (source := node.inputs.get(name)) is not None:
                    links.append([len(links) + 1, *source, node.id, slot, self._type_of(source)])
                    entry["link"] = len(links)
                    leaving.setdefault(source, []).append(len(links))
                entries.append(entry)
            nodes.append(self._entry(node, order, places[node.id], entries))
        for node, entry in zip(self.nodes, nodes, strict=True):
            outputs = KINDS[node.type].outputs
            entry["outputs"] = [
                {"name": name, "type": kind, "links": leaving.get((node.id, slot))} for slot, (name, kind) in enumerate(outputs)
            ]
        y = 60
        for title, text in self.notes:
            height = 90 + 22 * sum(1 + len(line) // 58 for line in text.split("\n"))
            nodes.append(
                {
                    "id": len(nodes) + 1,
                    "type": "MarkdownNote",
                    "pos": [-NOTE_WIDTH - GAP, y],
                    "size": [NOTE_WIDTH, height],
                    "flags": {},
                    "order": len(nodes),
                    "mode": 0,
                    "inputs": [],
                    "outputs": [],
                    "title": title,
                    "properties": {},
                    "widgets_values": [text],
                }
            )
            y += height + 50
        groups = [
            {"id": i + 1, "title": title, "bounding": bounds[i], "color": "#3f789e", "font_size": 24, "flags": {}}
            for i, title in enumerate(self.groups)
        ]
        named = uuid.uuid5(uuid.NAMESPACE_URL, f"accvideo/workflows/{self.name}")
        return {
            "id": str(named),
            "revision": 0,
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": groups,
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _layout(self) -> tuple[dict[int, list[int]], list[list[int]]]:
        """(place of each node, bounds of each group): a column for each group."""
        places, bounds, x = {}, [], 0
        for group in range(len(self.groups)):
            y = 60
            for node in (node for node in self.nodes if node.group == group):
                places[node.id] = [x, y]
                y += node.size[1] + 50
            bounds.append([x - 15, -20, COLUMN + 30, y + 10])
            x += COLUMN + GAP
        return places, bounds

    def _entry(self, node: Node, order: int, place: list[int], inputs: list[dict[str, Any]]) -> dict[str, Any]:
        pack = KINDS[node.type].pack
        properties: dict[str, Any] = {"Node name for S&R": node.type, "cnr_id": pack}
        if pack == "accvideo":
            properties["ver"] = self.version
        if node.models:
            properties["models"] = node.models
        return {
            "id": node.id,
            "type": node.type,
            "pos": place,
            "size": list(node.size),
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": inputs,
            "outputs": [],
            "title": node.title,
            "properties": properties,
            "widgets_values": node.widgets,
        }

    def _type_of(self, source: Link) -> str:
        return KINDS[self.nodes[source[0] - 1].type].outputs[source[1]][1]


def as_text(workflow: dict[str, Any]) -> str:
    """A UI workflow as JSON with one node, link or group a line."""
    lines = []
    for key, value in workflow.items():
        if key in ("nodes", "links", "groups") and value:
            rows = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in value)
            lines.append(f'  "{key}": [\n{rows}\n  ]')
        else:
            lines.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"
