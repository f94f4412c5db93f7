"""AccVideoStudentLoader's model from every layout, in a real ComfyUI: the weights the file means, in memory near its size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from accvideo_core.checkpoint import expected_shapes
from accvideo_core.dit import DiTConfig
from tests.checkpoint_files import (
    HUNYUAN,
    HUNYUAN_WRITERS,
    WAN_I2V,
    WAN_T2V,
    WAN_WRITERS,
    diffusers_folder,
    is_linear,
    pytorch,
    random_state,
    scaled_fp8,
)
from tests.comfyui.load_worker import run_jobs
from tests.comfyui.server import no_comfyui, relative_error
from tests.comfyui.setup_envs import find_checkouts, prepare, python_of

# One of each kind of file; that every prefix and name opens to the same tensors is the library's to prove.
HUNYUAN_CASES = (
    "pt module",
    "tencent fp8",
    "plain fp8",
    "scaled fp8 native",
    "scaled fp8 prefixed",
    "scaled fp8 blocks only",
    "scaled fp8 by rows",
    "quantised fp8",
    "quantised fp8 in metadata",
    "quantised fp8 e5m2",
    "original ''",
    "native older scale",
    "diffusers shards",
)
WAN_CASES = ("original prefixed", "scaled fp8", "diffusers folder")
CASES = [
    *((f"hunyuan {name}", HUNYUAN, HUNYUAN_WRITERS[name]) for name in HUNYUAN_CASES),
    *((f"t2v {name}", WAN_T2V, WAN_WRITERS[name]) for name in WAN_CASES),
    *((f"i2v {name}", WAN_I2V, WAN_WRITERS[name]) for name in WAN_CASES[:2]),
]


class Loaded:
    """What the worker found in one file, beside the same values loaded from a plain file."""

    def __init__(self, folder: Path, name: str) -> None:
        self.told = told_of(folder / f"{name}.out")
        self.output = load_file(folder / f"{name}.out").get("denoised")
        self.reference = load_file(folder / f"{name}.plain.out").get("denoised")


def told_of(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["told"])


@pytest.fixture(scope="session", params=find_checkouts() or [None], ids=lambda path: path.name if path else "no ComfyUI")
def comfyui(request: pytest.FixtureRequest) -> Path:
    if request.param is None:
        no_comfyui()
    prepare(request.param)
    return request.param


@pytest.fixture(scope="session")
def loaded(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """Every case in one process: the layout by our loader, and its values, in float32, by ComfyUI's."""
    folder, jobs = tmp_path_factory.mktemp(comfyui.name), []
    for name, config, writer in CASES:
        (folder / name).mkdir()
        written = writer(folder / name, random_state(config))
        exact = "by rows" in name or "by blocks" in name  # restored by us, and then bf16
        rounded = {k: t.bfloat16().float() if exact and is_linear(k, t) else t.float() for k, t in written.state.items()}
        save_file(rounded, folder / f"{name}.plain.safetensors")
        jobs.append({"file": str(written.path.relative_to(folder)), "output": f"{name}.out"})
        jobs.append({"file": f"{name}.plain.safetensors", "output": f"{name}.plain.out", "loader": "native"})
    run_jobs(comfyui, python_of(comfyui), folder, jobs)
    return {name: Loaded(folder, name) for name, _, _ in CASES}


@pytest.mark.parametrize("name", [name for name, _, _ in CASES])
def test_the_model_is_the_one_its_values_make(loaded: dict[str, Loaded], name: str) -> None:
    case = loaded[name]
    assert "error" not in case.told, case.told
    assert float(case.reference.std()) > 0.1
    # A bf16 file computes in bf16 where its float32 values compute in float32; the rest is exact.
    low = any(dtype in case.told["dtypes"] for dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2"))
    assert relative_error(case.output, case.reference) < (0.02 if low else 1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "family", "shift"),
    [
        ("hunyuan original ''", "HunyuanVideo", "tiny", 7.0),
        ("t2v original prefixed", "WAN21", "wan-t2v-14b", 5.0),
        ("i2v original prefixed", "WAN21", "wan-i2v-14b-480p", 3.0),
    ],
)
def test_it_is_native_with_its_familys_shift(loaded: dict[str, Loaded], name: str, kind: str, family: str, shift: float) -> None:
    told = loaded[name].told
    assert (told["kind"], told["family"], told["shift"]) == (kind, family, shift)


@pytest.mark.parametrize(
    "name", [n for n, _, _ in CASES if "hunyuan" in n and any(w in n for w in ("tencent", "scaled", "quantised"))]
)
def test_scaled_fp8_stays_fp8_in_the_model_and_only_that(loaded: dict[str, Loaded], name: str) -> None:
    dtypes = loaded[name].told["dtypes"]
    kind = "float8_e5m2" if "e5m2" in name else "float8_e4m3fn"
    if "by rows" in name or "by blocks" in name:
        assert "float8_e4m3fn" not in dtypes
        return
    everywhere = "blocks only" not in name and "tencent" not in name and "quantised" not in name
    state = random_state(HUNYUAN)
    linears = [k for k, t in state.items() if is_linear(k, t) and (everywhere or k.startswith(("double_b", "single_b")))]
    assert dtypes[kind] == len(linears)


class TestMemory:
    """A network of 200 MB of float32: what loading takes beyond the weights is a few tensors, not a second copy."""

    CONFIG = DiTConfig(hidden_size=768, num_heads=6, depth_double=2, depth_single=2, text_dim=64)

    @pytest.fixture(scope="class")
    def peaks(self, comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
        """Peak while loading, in units of the weights' size as they are kept."""
        folder = tmp_path_factory.mktemp("memory")
        state = {name: torch.full(shape, 0.01) for name, shape in expected_shapes(self.CONFIG).items()}
        writers = {
            "safetensors": lambda f, s: save_file(s, f / "m.safetensors") or f / "m.safetensors",
            "pt": lambda f, s: pytorch("module")(f, s).path,
            "shards": lambda f, s: diffusers_folder("100MB")(f, s).path,
            "scaled": lambda f, s: scaled_fp8()(f, s).path,
        }
        peaks = {}
        for name, write in writers.items():
            (folder / name).mkdir()
            path = write(folder / name, state)
            size = sum(t.numel() * (1 if name == "scaled" and is_linear(k, t) else 4) for k, t in state.items())
            job = {"file": str(path.relative_to(folder)), "output": f"{name}.out", "only_load": True}
            run_jobs(comfyui, python_of(comfyui), folder, [job])  # a process of its own: memory once used stays with it
            peaks[name] = told_of(folder / f"{name}.out")["peak"] / size
        return peaks

    @pytest.mark.parametrize("name", ["safetensors", "pt", "shards", "scaled"])
    def test_the_peak_is_near_the_weights(self, peaks: dict[str, float], name: str) -> None:
        # PyTorch's .pt is mapped: its pages count too, though the system takes them back when it needs memory.
        assert peaks[name] < (2.3 if name == "pt" else 1.35)
