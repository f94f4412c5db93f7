"""From a prompt file to the samples it asks for: which seeds, which ids. The same wherever they are captured or planned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import InvalidValueError
from .plan import prompt_seed
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
