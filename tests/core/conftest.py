"""Fixtures of the library's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tiny_training import in_small


@pytest.fixture
def small() -> Iterator[None]:
    """Trainings of the tiny models, small enough for a test."""
    with in_small():
        yield
