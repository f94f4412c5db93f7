"""The workflows' pictures in ComfyUI's template browser: `make thumbnails`, or of some alone, `... thumbnails NAME [NAME ...]`.

Starts the first ComfyUI found (see setup_envs.py), runs workflows/api/*.json and writes four frames of the video each saved to
workflows/<same name>.jpg. Workflows for HunyuanVideo run on the tiny models, and their pictures say so; a workflow that makes no
video, or for Wan, whose tiny networks are random, has a drawing of its groups instead. It needs the bundled weights; random ones
make no picture worth having.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from accvideo_core.errors import AccVideoError
from accvideo_core.files import atomic_path
from accvideo_core.media import beside, label_bar, read_mp4, stack, upscale
from accvideo_core.tiny import weights_folder, weights_path
from tests.comfyui.model_files import PROMPTS, install
from tests.comfyui.server import PARTS, ROOT, Server, load_prompt, on_tiny_models
from tests.comfyui.setup_envs import find_checkouts, prepare

WIDTH = 192  # of one frame, in pixels
SIDE, PAPER, INK, BOX, EDGE = 2 * WIDTH, (24, 26, 30), (235, 235, 235), (42, 58, 74), (63, 120, 158)


def picture(clip: np.ndarray, label: str = "") -> np.ndarray:
    """Four frames of a clip (T, H, W, 3), first to last, two by two, above a label."""
    frames = [upscale(clip[i], max(1, WIDTH // clip.shape[2])) for i in np.linspace(0, len(clip) - 1, 4).round().astype(int)]
    sheet = stack([beside(frames[:2]), beside(frames[2:])])
    return stack([sheet, label_bar(label, sheet.shape[1])], gap=0) if label else sheet


def drawing(workflow: dict[str, Any]) -> np.ndarray:
    """The title of a UI workflow's note, and its groups one below the other with the names of their nodes."""
    note = next(node for node in workflow["nodes"] if node["type"] == "MarkdownNote")["widgets_values"][0]
    head = label_bar(note.splitlines()[0].lstrip("# "), SIDE, 20)
    groups = workflow["groups"]
    height = 56
    image = Image.new("RGB", (SIDE, max(len(groups) * (height + 18) + 6, SIDE - len(head))), PAPER)
    draw, large, small = ImageDraw.Draw(image), ImageFont.load_default(17), ImageFont.load_default(12)
    for row, group in enumerate(groups):
        y = row * (height + 18)
        if row:
            draw.line([(SIDE // 2, y - 18), (SIDE // 2, y)], EDGE, 3)
        draw.rounded_rectangle([16, y, SIDE - 16, y + height], 8, BOX, EDGE, 2)
        draw.text((28, y + 7), group["title"], INK, large)
        left, _, width, _ = group["bounding"]
        inside = [node["title"] for node in workflow["nodes"] if left <= node["pos"][0] < left + width]
        line = ", ".join(inside)
        while small.getlength(line) > SIDE - 60:
            line = line.rstrip(".")[:-1].rstrip() + "..."
        draw.text((28, y + 32), line, INK, small)
    return stack([head, np.asarray(image)], gap=0)


def worth_running(prompt: dict[str, Any]) -> bool:
    """Whether it makes a video, with a network that is no noise."""
    kinds = {content["class_type"] for content in prompt.values()}
    return "SaveVideo" in kinds and "CLIPLoader" not in kinds


def in_its_words(prompt: dict[str, Any], text: str) -> dict[str, Any]:
    """With a prompt that the tiny models know."""
    for content in prompt.values():
        if content["class_type"] == "CLIPTextEncode" and isinstance(content["inputs"]["text"], str):
            content["inputs"]["text"] = text
    return prompt


def main(names: list[str]) -> int:
    missing = [part for part in PARTS if not weights_path(part).is_file()]
    checkouts = find_checkouts()
    if missing or not checkouts:
        print(f"missing weights: {', '.join(missing)}" if missing else "no ComfyUI found: set COMFYUI_PATH", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as base:
        server = Server(checkouts[0], prepare(checkouts[0]), Path(base), weights_folder())
        try:
            server.wait_until_ready()
            install(server.base, weights_folder(), fp8=False)
            for path in sorted((ROOT / "workflows").glob("*.json")):
                if not names or path.stem in names:
                    print(write(server, path), flush=True)
        except AccVideoError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        finally:
            server.stop()
    return 0


def write(server: Server, workflow: Path) -> Path:
    """Make the picture of a UI workflow and return where it lies."""
    prompt = load_prompt(workflow.parent / "api" / workflow.name)
    tiny = any(content["class_type"] == "AccVideoTinyModels" for content in prompt.values())
    if not worth_running(prompt):
        made = drawing(json.loads(workflow.read_text(encoding="utf-8")))
    else:
        prompt = on_tiny_models(prompt if tiny else in_its_words(prompt, PROMPTS[len(workflow.stem) % len(PROMPTS)]))
        video = next(file for file in server.run(prompt).files if file.folder == "output" and file.filename.endswith(".mp4"))
        made = picture(read_mp4(server.path(video)).frames, "" if tiny else "made with the tiny models in place of HunyuanVideo")
    target = workflow.with_suffix(".jpg")
    with atomic_path(target) as temporary:
        Image.fromarray(made).save(temporary, format="JPEG", quality=92)
    return target


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
