"""One real ComfyUI per checkout for the whole test run, each in its own environment (see setup_envs.py).

Without a checkout the tests skip, by name; with ACCVIDEO_REQUIRE_COMFYUI=1 they fail instead.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from accvideo_core.tiny import weights_folder
from tests.comfyui.server import Server, no_comfyui
from tests.comfyui.setup_envs import find_checkouts, prepare, python_of

CHECKOUTS = find_checkouts()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make the environments here, where no test's time limit runs."""
    if (
        any({"server", "native", "told"} & set(getattr(item, "fixturenames", ())) for item in session.items)
        and not session.config.option.collectonly
    ):
        for checkout in CHECKOUTS:
            prepare(checkout)


@pytest.fixture(scope="session")
def weights() -> Path:
    """Folder of the tiny models every server and this process use."""
    return weights_folder()


@pytest.fixture(scope="session", params=CHECKOUTS or [None], ids=lambda path: path.name if path else "no ComfyUI")
def server(request: pytest.FixtureRequest, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if request.param is None:
        no_comfyui()
    running = Server(request.param, python_of(request.param), tmp_path_factory.mktemp(request.param.name), weights)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module", params=CHECKOUTS or [None], ids=lambda path: path.name if path else "no ComfyUI")
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script of the module's TOLD_BY, run inside each ComfyUI under its own Python, writes into told.json."""
    if request.param is None:
        no_comfyui()
    script, folder = Path(__file__).with_name(request.module.TOLD_BY), tmp_path_factory.mktemp("told")
    command = [str(prepare(request.param)), str(script), str(request.param), str(folder)]
    variables = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=request.param, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "told.json").read_text())
