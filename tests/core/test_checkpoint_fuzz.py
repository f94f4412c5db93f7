"""Whatever a file holds, opening it gives a checkpoint or one of our errors. `tests/fuzz_checkpoints.py` looks for more."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accvideo_core.checkpoint import open_checkpoint
from accvideo_core.errors import CheckpointError
from tests.fuzz_checkpoints import CORPUS, few_tensors, seeds, try_to_open

pytest.importorskip("gguf")


@pytest.mark.parametrize("seed", seeds())
def test_a_seed_is_sound_before_it_is_damaged(tmp_path, seed):
    assert try_to_open(tmp_path, seed, []) == "opened"


@pytest.mark.parametrize("case", json.loads(CORPUS.read_text()), ids=lambda case: f"{case['seed']}: {case['why'][:40]}")
def test_what_was_once_found_is_handled(tmp_path, case):
    try_to_open(tmp_path, case["seed"], [tuple(edit) for edit in case["edits"]], case["keep"])


EDITS = st.lists(st.tuples(st.integers(-4096, 8192), st.binary(min_size=1, max_size=12).map(bytes.hex)), max_size=4)


@pytest.mark.parametrize("seed", seeds())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS, keep=st.sampled_from((1.0, 1.0, 1.0, 0.999, 0.5, 0.01)))
def test_damage_is_an_error_of_ours_or_other_values(tmp_path, seed, edits, keep):
    try_to_open(tmp_path, seed, edits, keep)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


class TestHostile:
    @pytest.mark.parametrize("legacy", [False, True])
    def test_code_in_a_pickle_is_named_and_not_run(self, tmp_path, legacy):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "proof",))

        torch.save({"module": few_tensors(), "evil": Evil()}, tmp_path / "f.pt", _use_new_zipfile_serialization=not legacy)
        message = refused(tmp_path / "f.pt")
        assert "code" in message and "was not run" in message and not (tmp_path / "proof").exists()

    def test_a_bare_pickle_with_code(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (print, ("run",))

        (tmp_path / "f.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
        assert "was not run" in refused(tmp_path / "f.pt")

    def test_a_zip_bomb_is_refused_before_it_is_unpacked(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "f.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
        assert (tmp_path / "f.pt").stat().st_size < 100_000
        assert "is packed" in refused(tmp_path / "f.pt")

    def test_one_value_repeated_for_ever_is_refused(self, tmp_path):
        torch.save({"module": {"img_in.proj.weight": torch.ones(1).expand(2**40)}}, tmp_path / "f.pt")
        assert "img_in.proj.weight" in refused(tmp_path / "f.pt") and "fewer bytes than values" in refused(tmp_path / "f.pt")

    @pytest.mark.parametrize(
        "value",
        [
            torch.ones(2, 2).to_sparse(),
            torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
            torch.empty(2, device="meta"),
        ],
    )
    def test_tensors_that_are_not_plain_are_refused(self, tmp_path, value):
        torch.save({"module": {"img_in.proj.weight": value}}, tmp_path / "f.pt")
        assert "img_in.proj.weight is no plain tensor" in refused(tmp_path / "f.pt")

    @pytest.mark.parametrize("content", [5, [torch.ones(1)], {}, {"module": {}}, {"epoch": 3}, {1: torch.ones(1)}, torch.ones(3)])
    def test_a_pt_file_that_is_no_checkpoint(self, tmp_path, content):
        torch.save(content, tmp_path / "f.pt")
        refused(tmp_path / "f.pt")

    def test_a_plain_zip_and_a_renamed_file(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "f.safetensors", "w") as archive:
            archive.writestr("readme.txt", "hello")
        assert "no PyTorch file" in refused(tmp_path / "f.safetensors")
        (tmp_path / "g.pt").write_bytes(seeds()["plain"]["plain"])
        with open_checkpoint(tmp_path / "g.pt", strict=False) as checkpoint:
            assert checkpoint.container == "safetensors"
