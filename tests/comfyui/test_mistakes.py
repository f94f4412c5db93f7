"""Every mistake that docs/mistakes.md lists is made, and answered as it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.comfyui.mistakes import MISTAKES, PAGE, Kit, Make, answer, page, read_page
from tests.comfyui.server import Server

ALL = {what: make for mistakes in MISTAKES.values() for what, make in mistakes.items()}


@pytest.mark.parametrize(("what", "make"), ALL.items(), ids=list(ALL))
def test_a_mistake_is_answered_as_the_page_says(server: Server, weights: Path, tmp_path: Path, what: str, make: Make) -> None:
    assert answer(make, Kit(server, weights, tmp_path)) in read_page()[what]


def test_the_page_is_of_the_list_and_no_answer_comes_from_the_depths() -> None:
    answers = read_page()
    assert page({what: said[::-1] for what, said in answers.items()}) == PAGE.read_text(encoding="utf-8")
    for said in (one for several in answers.values() for one in several):
        assert not any(word in said for word in ("mat1", "size mismatch", "must match", "Traceback", "index out of range")), said
        assert len(said) > 30
