"""The shipped workflows; `make workflows` writes their files, in UI and API form (see workflow_files.py)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import tomllib
except ImportError:
    import tomli as tomllib

from accvideo_core.files import atomic_path
from tests.comfyui import workflow_real as real
from tests.comfyui import workflow_tiny as tiny
from tests.comfyui.workflow_files import Graph, as_text

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS: dict[str, Callable[[Graph], None]] = {
    "accvideo_t2v": real.t2v,
    "accvideo_t2v_720p": real.t2v_720p,
    "accvideo_t2v_loras": real.t2v_loras,
    "accvideo_teacher_lora": real.teacher_lora,
    "accvideo_compare": real.compare,
    "accvideo_synvid": real.synvid,
    "accvideo_plan": real.plan,
    "accvideo_merge": real.merge,
    "accvideo_extract": real.extract,
    "accvideo_gguf": real.gguf,
    "accvideo_wan_t2v": real.wan_t2v,
    "accvideo_wan_i2v": real.wan_i2v,
    "accvideo_tiny_t2v": tiny.tiny_t2v,
    "accvideo_tiny_compare": tiny.tiny_compare,
    "accvideo_tiny_synvid": tiny.tiny_synvid,
    "accvideo_tiny_plan": tiny.tiny_plan,
    "accvideo_lora": tiny.lora,
    "accvideo_student_from_lora": tiny.student_from_lora,
    "accvideo_lora_merge": tiny.lora_merge,
}


def version() -> str:
    """Of this pack, as nodes carry it."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def texts() -> Iterator[tuple[str, str]]:
    """(file below workflows/, what is in it) of every workflow, UI and API."""
    for name, describe in WORKFLOWS.items():
        graph = Graph(name, version())
        describe(graph)
        yield f"{name}.json", as_text(graph.ui())
        yield f"api/{name}.json", json.dumps(graph.api(), indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    for name, text in texts():
        with atomic_path(ROOT / "workflows" / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"{len(WORKFLOWS)} workflows in {ROOT / 'workflows'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
