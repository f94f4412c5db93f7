"""From a prompt file to the samples it asks for: which seeds, which ids. The same wherever they are captured or planned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import InvalidValueError
from .manifest import check_same
from .plan import Plan, prompt_seed
from .prompts import Prompt
from .store import sample_id


@dataclass(frozen=True)
class Wanted:
    """A sample that a prompt file asks for."""

    id: str
    prompt: str
    seed: int


def own_seed(prompt: Prompt, run: int = 0, copy: int = 0) -> int:
    """The seed its file gives a prompt, else `prompt_seed`'s."""
    return prompt_seed(prompt.text, run, copy) if prompt.seed is None else prompt.seed


def wanted_samples(prompts: Iterable[Prompt], shape: Sequence[int], copies: int = 1, run: int = 0) -> list[Wanted]:
    """The samples of latent shape (C, T, H, W) in the prompts' order; a prompt that names its seed has one alone.

    copies  samples of each other prompt
    run     another number gives all of those other noise
    Raises InvalidValueError for fewer copies than one, or several of a prompt whose file gives it an id.
    """
    if copies < 1:
        raise InvalidValueError(f"seeds is {copies}; it must be at least 1")
    found = []
    for prompt in prompts:
        number = copies if prompt.seed is None else 1
        if prompt.id is not None and number > 1:
            raise InvalidValueError(f"the prompt with id {prompt.id!r} can have one sample alone; leave out its id, or the seeds")
        for copy in range(number):
            seed = own_seed(prompt, run, copy)
            found.append(Wanted(prompt.id or sample_id(prompt.text, seed, shape), prompt.text, seed))
    return found


def lacking(plan: Plan, samples: Iterable[Wanted], shape: Sequence[int]) -> list[Wanted]:
    """Those of latent shape (C, T, H, W) that a plan does not have, or whose encoding it has lost. SynVidError for an id that it
    has for another sample."""
    found, lost = [], plan.lost()
    for sample in samples:
        there = plan.items.get(sample.id)
        if there is not None:
            check_same(sample.id, there.origin, (sample.prompt, sample.seed, tuple(shape)), plan.path)
        if there is None or sample.id in lost:
            found.append(sample)
    return found


def put_into(plan: Plan, sample: Wanted, shape: Sequence[int], text: Tensor, pooled: Tensor | None) -> None:
    """Add one of `lacking` with its encoding, as of `Plan.add`, or put that there again."""
    if sample.id in plan.items:
        plan.restore(plan.items[sample.id], text, pooled)
    else:
        plan.add(sample.prompt, text, pooled, sample.seed, shape, sample.id)
