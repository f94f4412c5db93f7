"""What every test stands on: the repository root is a package for ComfyUI alone and is never imported by a test run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


class RootIsNoPackage:
    """pytest takes a folder with an `__init__.py` for a package and imports it before the tests below it.

    The root's `__init__.py` is ComfyUI's and needs ComfyUI, so the root is collected as a plain folder instead. This is
    registered as a plugin of its own because hooks of a conftest do not apply to the folder above it.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None  # type: ignore[no-any-return]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsNoPackage())
    # What tests hold equal, up to rounding or bit for bit, is computed in float32 on whatever machine; bfloat16 where they ask.
    for fast in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        setattr(torch.cpu, fast, bool)
