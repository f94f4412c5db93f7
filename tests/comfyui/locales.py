"""The English names and tooltips of the nodes in the file ComfyUI's front end reads, taken from their schemas: `make locales`.

locales/zh/nodeDefs.json has the same entries in Chinese, by hand; tests/comfyui/test_locales.py says what is missing there.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from accvideo_core.tiny import weights_folder
from tests.comfyui.server import ROOT, Server
from tests.comfyui.setup_envs import find_checkouts, prepare


def node_definitions(node_types: dict[str, Any]) -> dict[str, Any]:
    """{node: display_name, description, inputs {name: name, tooltip}, outputs {place: name, tooltip}} of our nodes."""
    made = {}
    for node_id, node in sorted(node_types.items()):
        if node["python_module"] != "custom_nodes.accvideo":
            continue
        inputs = {}
        for group in ("required", "optional"):
            for name, (_, *options) in node["input"].get(group, {}).items():
                inputs[name] = {"name": name, "tooltip": options[0]["tooltip"]}
        outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
        made[node_id] = {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": inputs,
            "outputs": {str(place): {"name": name, "tooltip": tooltip} for place, (name, tooltip) in enumerate(outputs)},
        }
    return made


def as_text(definitions: dict[str, Any]) -> str:
    return json.dumps(definitions, ensure_ascii=False, indent=2) + "\n"


def main() -> int:
    checkouts = find_checkouts()
    if not checkouts:
        print("no ComfyUI found: set COMFYUI_PATH", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as base:
        server = Server(checkouts[0], prepare(checkouts[0]), Path(base), weights_folder())
        try:
            server.wait_until_ready()
            definitions = node_definitions(server.ask(lambda comfy: comfy.node_types()))
        finally:
            server.stop()
    (ROOT / "locales" / "en" / "nodeDefs.json").write_text(as_text(definitions), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
