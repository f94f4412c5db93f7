"""Both languages of the node pack: complete, and served by a real ComfyUI."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.comfyui.locales import as_text, node_definitions
from tests.comfyui.server import ROOT, Server


def texts(definitions: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in definitions.items():
        if isinstance(value, dict):
            yield from texts(value, (*path, key))
        else:
            yield (*path, key), value


def read(language: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def test_english_is_what_the_nodes_say(server: Server) -> None:
    said = node_definitions(server.ask(lambda comfy: comfy.node_types()))
    assert (ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8") == as_text(said), "run `make locales`"


def test_what_few_need_is_tucked_away(server: Server) -> None:
    """The front end shows what is marked as advanced when asked to."""
    tucked = {
        name: {
            key for group in node["input"].values() for key, given in group.items() if len(given) > 1 and given[1].get("advanced")
        }
        for name, node in server.ask(lambda comfy: comfy.node_types()).items()
        if name.startswith("AccVideo") and "Test" not in name
    }
    assert {name: keys for name, keys in tucked.items() if keys} == {
        "AccVideoSampler": {"cfg", "denoise"},
        "AccVideoTrajectorySampler": {"keys", "shift"},
        "AccVideoSynVidWriter": {"dtype", "store_noise"},
        "AccVideoVAEDecode": {"memory"},
        "AccVideoLoraApply": {"allow_unmatched"},
        "AccVideoLoraMerge": {"allow_unmatched"},
        "AccVideoLoraExtract": {"energy", "key_format", "lossy"},
    }


def test_chinese_has_every_text() -> None:
    english, chinese = dict(texts(read("en"))), dict(texts(read("zh")))
    assert set(english) == set(chinese)
    for path, text in chinese.items():
        if path[-1] in ("tooltip", "description"):
            assert any("\u4e00" <= letter <= "\u9fff" for letter in text), path
            assert len(text) * 4 > len(english[path]), f"{path} says less than the English"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_has_what_the_front_end_takes_for_a_placeholder(language: str) -> None:
    """vue-i18n reads {name}, @:link and | in a message as its own."""
    assert not [path for path, text in texts(read(language)) if set(text) & set("{}@|")]


def test_both_are_served(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/i18n") as answer:
        served = json.load(answer)
    for language in ("en", "zh"):
        nodes = {name: node for name, node in served[language]["nodeDefs"].items() if name.startswith("AccVideo")}
        assert nodes == read(language)
