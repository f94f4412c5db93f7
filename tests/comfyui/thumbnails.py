"""The workflows' pictures in ComfyUI's template browser, made from real runs: `make thumbnails`.

Starts the first ComfyUI found (see setup_envs.py), runs every workflows/api/*.json (those for the released models on the tiny
ones), and writes four frames of the video it saved to workflows/<same name>.jpg. It needs the bundled weights; random ones make
no picture worth having.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from accvideo_core.errors import AccVideoError
from accvideo_core.files import atomic_path
from accvideo_core.media import beside, read_mp4, stack, upscale
from accvideo_core.tiny import weights_folder, weights_path
from tests.comfyui.server import PARTS, ROOT, Server, load_prompt, on_tiny_models
from tests.comfyui.setup_envs import find_checkouts, prepare

WIDTH = 192  # of one frame, in pixels


def picture(clip: np.ndarray) -> np.ndarray:
    """Four frames of a clip (T, H, W, 3), first to last, two by two."""
    frames = [upscale(clip[i], max(1, WIDTH // clip.shape[2])) for i in np.linspace(0, len(clip) - 1, 4).round().astype(int)]
    return stack([beside(frames[:2]), beside(frames[2:])])


def main() -> int:
    missing = [part for part in PARTS if not weights_path(part).is_file()]
    checkouts = find_checkouts()
    if missing or not checkouts:
        print(f"missing weights: {', '.join(missing)}" if missing else "no ComfyUI found: set COMFYUI_PATH", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as base:
        server = Server(checkouts[0], prepare(checkouts[0]), Path(base), weights_folder())
        try:
            server.wait_until_ready()
            (server.base / "input" / "prompts.txt").write_text("a blue square moving down on a grey background\n")
            for workflow in sorted((ROOT / "workflows" / "api").glob("*.json")):
                files = server.run(on_tiny_models(load_prompt(workflow))).files
                video = next(file for file in files if file.filename.endswith(".mp4"))
                target = ROOT / "workflows" / f"{workflow.stem}.jpg"
                with atomic_path(target) as temporary:
                    Image.fromarray(picture(read_mp4(server.path(video)).frames)).save(temporary, format="JPEG", quality=92)
                print(target)
        except AccVideoError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        finally:
            server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
