"""English of the tiny world: prompts for attributes, and attributes read back from prompts.

A prompt names some attributes and leaves the others open: "an azure box rising on a grey background".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from .clips import CLASSES

SYNONYMS = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green",),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "white": ("white", "snowy"),
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle", "pyramid"),
    "right": ("moving right", "going to the right", "drifting rightwards"),
    "left": ("moving left", "going to the left", "drifting leftwards"),
    "up": ("moving up", "rising", "drifting upwards"),
    "down": ("moving down", "falling", "drifting downwards"),
    "black": ("black",),
    "teal": ("teal",),
    "brown": ("brown",),
    "grey": ("grey", "gray"),
}
NOUNS = ("shape", "object", "thing")  # for an open shape
GLUE = ("a", "an", "on", "to", "the", "background", "moving", "going", "drifting")
# Words that name a class wherever they stand; a phrase is known by the word that tells it from the others.
MEANING = {phrase.split()[-1]: name for name, phrases in SYNONYMS.items() for phrase in phrases}
# Other forms people write, read as the word the models were trained on.
FORMS = {
    "moves": "moving",
    "goes": "going",
    "drifts": "drifting",
    "rises": "rising",
    "falls": "falling",
    "rightward": "rightwards",
    "leftward": "leftwards",
    "upward": "upwards",
    "downward": "downwards",
}
VOCABULARY = (*GLUE, *NOUNS, *MEANING)
_KIND = {name: kind for kind, classes in CLASSES.items() for name in classes}


def split_words(prompt: str) -> list[str]:
    """The prompt's words and numbers, lower case, without punctuation, in the form the vocabulary has."""
    return [FORMS.get(word, word) for word in re.findall(r"[^\W_]+", prompt.lower())]


def read_prompt(prompt: str) -> dict[str, str]:
    """Attributes a prompt names, as {"colour": "red", ...}; of two names for one attribute the first counts."""
    named: dict[str, str] = {}
    for word in split_words(prompt):
        if word in MEANING:
            named.setdefault(_KIND[MEANING[word]], MEANING[word])
    return named


def contradictions(words: list[str]) -> dict[str, list[str]]:
    """Attributes that the words name more than once, and as what: {"colour": ["red", "blue"]}."""
    named: dict[str, list[str]] = {}
    for word in words:
        if word in MEANING and MEANING[word] not in named.setdefault(_KIND[MEANING[word]], []):
            named[_KIND[MEANING[word]]].append(MEANING[word])
    return {kind: names for kind, names in named.items() if len(names) > 1}


def write_prompt(named: Mapping[str, str], generator: torch.Generator) -> str:
    """An English prompt for the named attributes, with synonyms drawn from the generator; the others stay open."""

    def pick(options: tuple[str, ...]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    said = {kind: pick(SYNONYMS[name]) for kind, name in named.items()}
    words = [said["colour"]] if "colour" in said else []
    words.append(said["shape"] if "shape" in said else pick(NOUNS))
    text = ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)
    if "motion" in said:
        text += f" {said['motion']}"
    if "background" in said:
        text += f" on a {said['background']} background"
    return text


def open_some(names: Mapping[str, str], generator: torch.Generator, empty: float = 0.02) -> dict[str, str]:
    """Keep a random part of a scene's attributes: how many is uniform from 1 to all, and rarely (`empty`) none."""
    kinds = list(names)
    if float(torch.rand((), generator=generator)) < empty:
        return {}
    count = 1 + int(torch.randint(len(kinds), (), generator=generator))
    keep = {kinds[int(i)] for i in torch.randperm(len(kinds), generator=generator)[:count]}
    return {kind: name for kind, name in names.items() if kind in keep}
