"""The long form of tests/comfyui/test_queue.py: 50 prompts through `accvideo queue`, ComfyUI killed half-way and started again.

`python -m tests.soak.queue_restart [prompts]` does it on every ComfyUI found (see tests/comfyui/setup_envs.py) and prints what
the report, the dataset and its manifests say; exit code 1 unless every prompt was captured once.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from accvideo_core.tiny import weights_folder
from tests.comfyui.server import Server
from tests.comfyui.setup_envs import find_checkouts, prepare
from tests.comfyui.test_queue import queue_through_a_kill


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    fault = not find_checkouts()
    for checkout in find_checkouts():
        with tempfile.TemporaryDirectory() as base:
            server = Server(checkout, prepare(checkout), Path(base) / "comfyui", weights_folder())
            try:
                server.wait_until_ready()
                report, reader = queue_through_a_kill(server, Path(base), count)
            finally:
                server.stop()
            samples = reader.samples()
            lines = sum(len(path.read_bytes().splitlines()) for path in reader.folder.path.glob("manifest/*"))
            found = {"prompts": len({it.prompt for it in samples.values()}), "samples": len(samples), "manifest_lines": lines}
            damages = [str(damage) for damage in reader.verify()]
            print(json.dumps({"comfyui": checkout.name, **report, **found, "damages": damages, "unnamed": reader.unnamed()}))
            fault |= set(found.values()) != {count} or bool(damages) or report["failed"] != []
    return int(fault)


if __name__ == "__main__":
    sys.exit(main())
