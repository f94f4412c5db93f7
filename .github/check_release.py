"""For publish.yml: prints `new=true` where pyproject.toml has another version than the commit before, `new=false` where not.

Fails, with a sentence, where a new version lacks what ComfyUI's registry asks for and no file here can know.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]


def missing(project: dict[str, Any]) -> list[str]:
    """What has to be filled in before a first release."""
    urls, comfy = project["project"].get("urls", {}), project["tool"]["comfy"]
    wanted = {
        "[project.urls] Repository": urls.get("Repository", ""),
        "[tool.comfy] Icon": comfy.get("Icon", ""),
    }
    return [f"{name} is {value!r}, not a web address" for name, value in wanted.items() if not value.startswith("https://")]


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    command = ["git", "show", "HEAD^:pyproject.toml"]
    before = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    old = tomllib.loads(before.stdout)["project"]["version"] if before.returncode == 0 else None
    new = project["project"]["version"] != old or os.environ.get("GITHUB_EVENT_NAME") == "workflow_dispatch"
    if new and (lacking := missing(project)):
        print(f"not published: {'; '.join(lacking)}; fill it in in pyproject.toml", file=sys.stderr)
        return 1
    print(f"new={str(new).lower()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
