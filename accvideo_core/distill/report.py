"""What a run tells while it goes: a line on the console, and TensorBoard."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtraError

_LINE = {  # what of the scalars stands in the line: title and the names whose mean it is
    "trajectory": "trajectory/",
    "on policy": "on_policy/",
    "student": "adversarial/student/",
    "heads": "adversarial/heads/",
    "real": "logits/real/",
    "fake": "logits/fake/",
    "rejected": "logits/rejected/",
    "right": "heads/right/",
    "ratio": "gradient/ratio/",
    "rolled": "validation/rolled/",
    "GB": "memory/peak_gb",
    "s": "speed/seconds",
}


class Console:
    """A line every so many iterations, and at each validation: means over the keys."""

    def __init__(self, total: int, every: int = 10, file: TextIO | None = None) -> None:
        self.total, self.every, self.file = total, every, file

    def __call__(self, done: int, scalars: Mapping[str, float]) -> None:
        validated = any(name.startswith("validation/") for name in scalars)
        if validated or done % self.every == 0 or done in (1, self.total):
            print(self.line(done, scalars), file=self.file or sys.stdout, flush=True)

    def line(self, done: int, scalars: Mapping[str, float]) -> str:
        words = [f"iteration {done:>{len(str(self.total))}}/{self.total}"]
        for title, prefix in _LINE.items():
            values = [value for name, value in scalars.items() if name.startswith(prefix)]
            if values:
                words.append(f"{title} {sum(values) / len(values):.4g}")
        return "  ".join(words)


class TensorBoard:
    """Every scalar under its name, and contact sheets; `accvideo[train]` brings the package. Nothing is written before the first.

    start  iterations done before: what an interrupted run wrote beyond them is hidden
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("TensorBoard's files need", "tensorboard", "train", ", or say --no-tensorboard") from error
        self._open = functools.partial(SummaryWriter, str(folder), purge_step=start + 1)

    @functools.cached_property
    def _writer(self) -> Any:
        return self._open()

    def __call__(self, done: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, done)

    def image(self, name: str, image: NDArray[np.uint8], done: int) -> None:
        """An image (H, W, 3)."""
        self._writer.add_image(name, image, done, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
