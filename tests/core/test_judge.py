"""`accvideo tiny judge`: the oracle's verdicts on captured clips, and weights that keep what is shown as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from accvideo_core import cli
from accvideo_core.sampling import make_noise
from accvideo_core.studies.judge import HEAVIEST, LIGHTEST, weights
from accvideo_core.synvid import Header, SampleInfo, SynVidStore, sample_id
from accvideo_core.synvid.verdicts import read_verdicts
from accvideo_core.tiny import load_vae, weights_folder
from accvideo_core.tiny.clips import coverage, keyed_generator, paint, sample_scenes
from accvideo_core.tiny.tasks.common import to_network
from accvideo_core.tiny.vae import LATENT_SCALE
from tests.synvid_data import dataset

LATENT = (16, 5, 8, 8)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bool]]:
    """A dataset that ends in eight true clips, every other one with a prompt that asks for another colour; {id: as asked}."""
    scenes = sample_scenes(8, keyed_generator("judge", 0, 0))
    with torch.inference_mode():
        latents = load_vae().encode(to_network(paint(scenes, coverage(scenes)), torch.device("cpu"))) * LATENT_SCALE
    folder = tmp_path_factory.mktemp("drawn") / "data"
    store = SynVidStore(folder, Header.of("tiny", "f" * 64, steps=4, segments=2), "first")
    text, asked, infos = store.put_text(torch.zeros(1, 8), torch.zeros(6)), {}, []
    for number in range(8):
        own = scenes.names(number)["colour"]
        prompt = f"a {own if number % 2 else {'red': 'blue'}.get(own, 'red')} thing"
        name = sample_id(prompt, number, LATENT)
        asked[name] = bool(number % 2)
        infos.append(SampleInfo(name, prompt, text, number, 0.5, None))
    store.commit([latents, torch.randn_like(latents)], infos, make_noise(latents.shape, [info.seed for info in infos]))
    return folder, asked


def test_a_clip_is_accepted_if_it_is_clean_and_as_asked(
    drawn: tuple[Path, dict[str, bool]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, asked = drawn
    out = tmp_path / "verdicts.jsonl"
    assert cli.main(["tiny", "judge", str(folder), "-o", str(out), "--batch", "3", "--device", "cpu", "--json"]) == 0
    verdicts = read_verdicts(out)
    assert {name: verdict.accepted for name, verdict in verdicts.items()} == asked
    assert json.loads(capsys.readouterr().out) == {"verdicts": str(out), "accepted": 4, "rejected": 4}
    for accepted in (True, False):
        found = [verdict.weight for verdict in verdicts.values() if verdict.accepted is accepted]
        assert sum(found) == pytest.approx(4, abs=1e-3)
    against = tmp_path / "against.jsonl"
    student = weights_folder() / "student.safetensors"
    assert cli.main(f"tiny judge {folder} -o {against} --student {student} --device cpu".split()) == 0
    others = read_verdicts(against)
    assert {name: verdict.accepted for name, verdict in others.items()} == asked
    assert [others[name] == verdicts[name] for name, yes in asked.items() if yes] == [True] * 4
    assert any(others[name].weight != verdicts[name].weight for name, yes in asked.items() if not yes)
    leant = tmp_path / "leant.jsonl"
    assert cli.main(f"tiny judge {folder} -o {leant} --student {student} --lean 1 --device cpu".split()) == 0
    assert any(read_verdicts(leant)[name].weight != verdicts[name].weight for name, yes in asked.items() if yes)
    before = out.read_bytes()
    assert cli.main(["tiny", "judge", str(folder), "-o", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err and out.read_bytes() == before


def test_another_familys_dataset_and_a_bad_batch_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset(tmp_path / "wan", 2, header=replace(Header.of("wan-t2v-14b", "f" * 64, steps=4, segments=2)))
    dataset(tmp_path / "small", 2)
    out = str(tmp_path / "verdicts.jsonl")
    for command, code, said in (
        ([str(tmp_path / "wan"), "-o", out], 1, "the oracle knows the tiny world alone"),
        ([str(tmp_path / "wan"), "-o", out, "--batch", "0"], 2, "batch is 0"),
        ([str(tmp_path / "wan"), "-o", out, "--lean", "1"], 2, "lean is 1.0; it must be at least 0, and needs a student"),
        ([str(tmp_path / "none"), "-o", out], 1, "none"),
        ([str(tmp_path / "small"), "-o", out], 1, "shape (4, 2, 4, 6), and the oracle knows clips of 17 x 64 x 64"),
    ):
        assert cli.main(["tiny", "judge", *command]) == code
        assert said in capsys.readouterr().err and not Path(out).exists()


def test_weights_give_accepted_and_rejected_the_shares_of_the_whole() -> None:
    generator = np.random.default_rng(0)
    told = [
        (str(a), str(b) if a else None)
        for a, b in zip(generator.integers(0, 2, 4000), generator.integers(0, 2, 4000), strict=True)
    ]
    accepted = np.array([generator.random() < 0.9 - 0.2 * int(a) - 0.2 * int(b or 0) for a, b in told])
    found = weights(told, accepted)
    for place in (0, 1):
        has = np.array([row[place] is not None for row in told])
        values = np.array([row[place] for row in told])
        for value in ("0", "1"):
            whole = (values[has] == value).mean()
            for group in (accepted & has, ~accepted & has):
                assert abs((values[group] == value).mean() - whole) > 0.02  # or there would be nothing to weigh
                assert found[group][values[group] == value].sum() / found[group].sum() == pytest.approx(whole, abs=1e-3)
    assert found[accepted].mean() == pytest.approx(1) == found[~accepted].mean()


def test_the_rejected_can_be_weighed_to_what_others_show() -> None:
    told = [("a",)] * 60 + [("b",)] * 40 + [(None,)] * 20
    accepted = np.array([True, False] * 60)
    found = weights(told, accepted, [("a",)] * 30 + [("b",)] * 10 + [("c",)] * 10 + [(None,)] * 50)
    values = np.array([row[0] for row in told])

    def share(value: str, group: np.ndarray) -> float:
        return float(found[group & (values == value)].sum() / found[group & (values != None)].sum())  # noqa: E711

    assert share("a", accepted) == pytest.approx(0.6, abs=1e-3) and share("a", ~accepted) == pytest.approx(0.75, abs=1e-3)

    found = weights(told, accepted, [("a",)] * 30 + [("b",)] * 10 + [("c",)] * 10, lean=2)  # b: 0.4 / 0.2, a: 0.6 / 0.6
    assert share("a", accepted) == pytest.approx(0.6 / (0.6 + 0.4 * 4), abs=1e-3)
    assert share("a", ~accepted) == pytest.approx(0.6 / (0.6 + 0.2 / 4), abs=1e-3)  # c, of the others alone, has nothing to weigh


def test_weights_have_bounds_and_what_a_group_lacks_stays_missing() -> None:
    told = [("rare",)] + [("usual",)] * 99 + [("never accepted",)] * 100
    accepted = np.array([True] * 100 + [False] * 100)
    found = weights(told, accepted)
    assert np.isfinite(found).all() and found.min() >= LIGHTEST - 1e-9 and found.max() <= HEAVIEST + 1e-9
    assert found[~accepted] == pytest.approx(np.ones(100)) and (weights(told, np.array([True] * 200)) == 1).all()
