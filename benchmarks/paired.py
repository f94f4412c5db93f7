"""What paired measurements have in common: the interval of a median, without assumptions on how times are spread."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence


def bootstrap(values: Sequence[float], draws: int = 4000) -> tuple[float, float]:
    """95 % interval of the median, drawn from a fixed seed."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]
