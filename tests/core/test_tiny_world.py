"""The tiny world's generator, prompts and oracle, by themselves and against the independent reference where it is present.

The reference (`world.py`) is not part of this repository; ACCVIDEO_EXAM names its folder, else the folder
`shared/exam` beside the checkout is tried.
"""

import importlib.util
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from accvideo_core import cli
from accvideo_core.errors import AccVideoWarning, PromptError
from accvideo_core.studies.exam import read_plan
from accvideo_core.studies.plans import drawn_plan
from accvideo_core.synvid.prompts import read_prompts
from accvideo_core.tiny import clips, oracle
from accvideo_core.tiny.prompts import SYNONYMS, open_some, read_prompt, write_prompt
from accvideo_core.tiny.text import MAX_TOKENS, tokenize

EXAM = Path(os.environ.get("ACCVIDEO_EXAM") or Path(__file__).parents[3] / "shared" / "exam")
needs_exam = pytest.mark.skipif(not (EXAM / "world.py").is_file(), reason=f"no reference world in {EXAM} (set ACCVIDEO_EXAM)")


@pytest.fixture(scope="module")
def world():
    spec = importlib.util.spec_from_file_location("exam_world", EXAM / "world.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scenes_and_clips(count, key="test"):
    scenes = clips.sample_scenes(count, clips.keyed_generator(0, key))
    return scenes, clips.render(scenes).double().numpy()


def damaged(clip, kind, rng):
    """One way a generated clip goes wrong."""
    if kind == "blur":
        sigma = rng.uniform(1, 4)
        k = np.exp(-0.5 * (np.arange(-8, 9) / sigma) ** 2)
        k /= k.sum()
        padded = np.pad(clip, ((0, 0), (8, 8), (8, 8), (0, 0)), mode="edge")
        down = sum(w * padded[:, i : i + 64] for i, w in enumerate(k))
        return sum(w * down[:, :, i : i + 64] for i, w in enumerate(k))
    if kind == "noise":
        return np.clip(clip + rng.normal(0, rng.uniform(0.02, 0.25), clip.shape), 0, 1)
    other = clips.render(clips.sample_scenes(1, clips.keyed_generator(1, int(rng.integers(1 << 30)))))[0].double().numpy()
    if kind == "blend":
        share = rng.uniform(0.1, 0.9)
        return share * clip + (1 - share) * other
    if kind == "two objects":
        ground = np.median(other[:, :3].reshape(-1, 3), 0)
        return np.where((np.abs(other - ground).max(-1) > 0.1)[..., None], other, clip)
    assert kind == "vanishing"
    ground = np.median(clip[:, :3].reshape(-1, 3), 0)
    fade = np.linspace(1, rng.uniform(0, 0.6), 17)[:, None, None, None]
    return ground + (clip - ground) * fade


@needs_exam
def test_generator_draws_the_same_clip_as_the_reference(world):
    rng = np.random.default_rng(3)
    scenes = [world.sample(rng) for _ in range(60)]
    ours = clips.render(clips.Scenes.of(scenes)).numpy()
    worst = max(np.abs(o - world.render(s)).max() for o, s in zip(ours, scenes, strict=True))
    assert worst <= 1 / 255


@needs_exam
@pytest.mark.parametrize("kind", ["clean", "blur", "noise", "blend", "two objects", "vanishing"])
def test_oracle_agrees_with_the_reference(world, kind):
    rng = np.random.default_rng(7)
    count = 500 if kind == "clean" else 100
    _, frames = scenes_and_clips(count, kind)
    same = []
    for clip in frames:
        clip = clip if kind == "clean" else damaged(clip, kind, rng)
        ours, theirs = oracle.read(clip), world.read(clip)
        same += [tuple(ours[k]) == tuple(theirs[k]) for k in clips.CLASSES]
    assert np.mean(same) >= 0.97


@needs_exam
def test_prompts_of_the_held_out_plan_are_understood():
    rows = [json.loads(line) for line in (EXAM / "heldout.jsonl").read_text().splitlines()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(tokenize(row["prompt"]) for row in rows)
    assert all(read_prompt(row["prompt"]) == row["named"] for row in rows)


def test_oracle_reads_every_clean_clip_right():
    scenes, frames = scenes_and_clips(200)
    verdicts = [oracle.read(f) for f in frames]
    right = [all(v[k] == (scenes.names(i)[k], True) for k in clips.CLASSES) for i, v in enumerate(verdicts)]
    assert np.mean(right) == 1.0


def test_oracle_calls_damage_unclean():
    """A clip with an object that vanishes, or of nothing at all, is no clean shape."""
    _, frames = scenes_and_clips(20)
    rng = np.random.default_rng(0)
    assert not any(oracle.read(damaged(f, "vanishing", rng))["shape"].clean for f in frames)
    assert oracle.read(np.full((17, 64, 64, 3), 0.3))["motion"] == ("right", False)


def test_uint8_and_float_read_alike():
    _, frames = scenes_and_clips(10)
    for f in frames:
        assert oracle.read(np.round(f * 255).astype(np.uint8)) == oracle.read(f)


def test_scenes_depend_on_their_key_alone_and_stay_inside():
    a, b = (clips.sample_scenes(64, clips.keyed_generator(5, "x")) for _ in range(2))
    assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("colour", "radius", "centre"))
    cover = clips.coverage(clips.sample_scenes(400, clips.keyed_generator(6)))
    edge = torch.cat([cover[:, :, 0].flatten(), cover[:, :, -1].flatten(), cover[..., 0].flatten(), cover[..., -1].flatten()])
    assert float(edge.max()) < 0.5  # the outline stays inside; a corner may touch a border pixel


def test_naming_an_attribute_fixes_it_and_leaves_the_others_uniform():
    scenes = clips.sample_scenes(2000, clips.keyed_generator(7), {"colour": "purple"})
    assert {scenes.names(i)["colour"] for i in range(50)} == {"purple"}
    assert torch.bincount(scenes.motion).min() > 400


def test_a_written_prompt_reads_back():
    generator = clips.keyed_generator(8)
    scenes = clips.sample_scenes(300, generator)
    for i in range(300):
        named = open_some(scenes.names(i), generator)
        assert read_prompt(write_prompt(named, generator)) == named


def test_every_synonym_is_a_known_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for phrases in SYNONYMS.values():
            for phrase in phrases:
                assert len(tokenize(f"a thing {phrase}")) == len(phrase.split()) + 3


def test_other_forms_of_a_word_are_the_word():
    assert tokenize("A red ball moves right.") == tokenize("a red ball moving right")
    assert read_prompt("a box that falls, on a grey background") == {"shape": "square", "motion": "down", "background": "grey"}


def test_unknown_words_are_named_and_hopeless_prompts_refused():
    with pytest.warns(AccVideoWarning, match="'shiny'"):
        assert tokenize("a shiny red ball") == tokenize("a red ball")
    with pytest.raises(PromptError, match="colour: red, green"):
        tokenize("on the road to nowhere")
    assert len(tokenize("")) == 1
    with pytest.warns(AccVideoWarning, match="left out: falling"):
        assert len(tokenize("red ball " * 15 + "moving falling")) == MAX_TOKENS
    with pytest.warns(AccVideoWarning, match="'2', 'ball3'"):
        tokenize("2 red ball3")
    with pytest.warns(AccVideoWarning, match=r"more than one colour \(red, blue\)"):
        tokenize("a red blue ball")


def test_a_written_plan_is_judged_and_captured_by(tmp_path):
    path = tmp_path / "plan.jsonl"
    assert cli.main(["tiny", "prompts", "40", "-o", str(path), "--seed", "3"]) == 0
    rows = read_plan(path)
    assert rows == drawn_plan(60, seed=3)[:40] and rows != drawn_plan(40, seed=4)
    assert all(read_prompt(row.prompt) == row.named for row in rows)
    assert [(prompt.text, prompt.seed) for prompt in read_prompts(path)] == [(row.prompt, row.seed) for row in rows]
    before = path.read_bytes()
    assert cli.main(["tiny", "prompts", "1", "-o", str(path)]) == 2 and path.read_bytes() == before
