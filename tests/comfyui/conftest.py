"""One real ComfyUI per checkout for the whole test run, each in its own environment (see setup_envs.py).

Without a checkout the tests skip, by name; with ACCVIDEO_REQUIRE_COMFYUI=1 they fail instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from accvideo_core.tiny import weights_folder
from tests.comfyui.server import Server, no_comfyui
from tests.comfyui.setup_envs import find_checkouts, prepare, python_of

CHECKOUTS = find_checkouts()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make the environments here, where no test's time limit runs."""
    if (
        any({"server", "native"} & set(getattr(item, "fixturenames", ())) for item in session.items)
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
