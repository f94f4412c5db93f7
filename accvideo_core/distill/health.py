"""What can go wrong with adversarial training, noticed and named: NaN, saturated logits, a head that always wins."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping

from ..errors import AccVideoWarning, TrainingError

SATURATED = 15.0  # a logit beyond which float32 knows no difference to certainty in half of a sigmoid's gradient
WINNING = 0.99  # share of its tokens that a head gets right


class Health:
    """Counts, for every head, iterations in a row in which something is wrong; after `patience` of them it is said, once, and
    once more by a run that goes on.

    A run goes on: whether a head that wins is a fault or the student's last weakness only its user can see.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._rows: Counter[str] = Counter()
        self._said: set[str] = set()

    def look(self, iteration: int, scalars: Mapping[str, float]) -> list[str]:
        """Warnings of this iteration, each also given as an AccVideoWarning. `scalars` as the trainer reports them."""
        found = {}
        for name, value in scalars.items():
            what, _, key = name.rpartition("/")
            if what in ("logits/real", "logits/fake"):
                found[f"{key}: {what} saturated"] = abs(value) > SATURATED
            elif what == "heads/right":
                found[f"{key}: its head always wins"] = value > WINNING
        messages = []
        for name, wrong in found.items():
            self._rows[name] = self._rows[name] + 1 if wrong else 0
            if not wrong:
                self._said.discard(name)
            elif self._rows[name] >= self.patience and name not in self._said:
                self._said.add(name)
                messages.append(f"iteration {iteration}: {name} for {self._rows[name]} iterations; {_CURE}")
                warnings.warn(messages[-1], AccVideoWarning, stacklevel=2)
        return messages

    def state(self) -> dict[str, int]:
        return dict(self._rows)

    def restore(self, state: Mapping[str, int]) -> None:
        self._rows = Counter(state)


_CURE = (
    "the student learns little from it: lower --head-lr, set --r1-weight (100, say), or look whether the student's clips have "
    "collapsed"
)


def check_finite(norm: float, what: str, iteration: int, key: int) -> None:
    """TrainingError, before a broken step is taken, unless a gradient's norm is finite."""
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient of the {what} became {norm} at iteration {iteration}, key {key}; no weight was changed by it. Go on "
            "from the last checkpoint with a lower --lr or --head-lr, or in --precision float32"
        )
