"""Give every ComfyUI checkout a virtual environment of its own, beside it (`<checkout>-venv`), with what it and the pack need.

Each ComfyUI version pins its own front end, so they cannot share one. `python tests/comfyui/setup_envs.py` does it for
all checkouts found; the ComfyUI tests call it too. A stamp in the environment makes a second run instant.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

# gguf is an extra of ours. ComfyUI 0.3.64 imports requests and counts on transformers to bring it, which transformers 5 no
# longer does.
UNLISTED = ("requests", "gguf")
ROOT = Path(__file__).resolve().parents[2]


def find_checkouts() -> list[Path]:
    """ComfyUI checkouts: COMFYUI_PATH (a path list) if set, else ~/comfy/ComfyUI and its siblings ~/comfy/ComfyUI-*."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        paths = [Path(path).expanduser() for path in named.split(os.pathsep) if path]
        missing = [str(path) for path in paths if not (path / "main.py").is_file()]
        if missing:
            raise FileNotFoundError(f"COMFYUI_PATH names folders without a main.py: {', '.join(missing)}")
        return [path.resolve() for path in paths]
    home = Path.home() / "comfy"
    return [path for path in [home / "ComfyUI", *sorted(home.glob("ComfyUI-*"))] if (path / "main.py").is_file()]


def environment_of(checkout: Path) -> Path:
    return checkout.with_name(checkout.name + "-venv")


def python_of(checkout: Path) -> Path:
    return environment_of(checkout) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def prepare(checkout: Path) -> Path:
    """Make or update the environment of a checkout and return its Python; nothing to do when the stamp agrees."""
    python, stamp = python_of(checkout), environment_of(checkout) / "accvideo-stamp"
    files = [checkout / "requirements.txt", ROOT / "requirements.txt", ROOT / "constraints.txt"]
    wanted = hashlib.sha256(b"\0".join([file.read_bytes() for file in files] + [name.encode() for name in UNLISTED])).hexdigest()
    if python.is_file() and stamp.is_file() and stamp.read_text() == wanted:
        return python
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(environment_of(checkout))], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for file in files[:2]:
        command += ["-r", str(file)]
    subprocess.run([*command, *UNLISTED, "-c", str(files[2])], check=True)
    stamp.write_text(wanted)
    return python


if __name__ == "__main__":
    checkouts = find_checkouts()
    for checkout in checkouts:
        print(f"{checkout}: {prepare(checkout)}", flush=True)
    if not checkouts:
        print("no ComfyUI found: set COMFYUI_PATH, or clone one to ~/comfy/ComfyUI")
