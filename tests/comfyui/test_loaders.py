"""AccVideoStudentLoader's model from every layout, in a real ComfyUI: the weights the file means, in memory near its size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accvideo_core.checkpoint import expected_shapes
from accvideo_core.dit import DiTConfig
from tests.checkpoint_files import (
    HUNYUAN,
    HUNYUAN_WRITERS,
    WAN_I2V,
    WAN_T2V,
    WAN_WRITERS,
    Writer,
    diffusers_folder,
    is_linear,
    prefixed,
    pytorch,
    random_state,
    scaled_fp8,
)
from tests.comfyui.server import no_comfyui, relative_error
from tests.comfyui.setup_envs import find_checkouts, prepare, python_of
from tests.comfyui.worker import run_jobs, told_of

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
    "gguf F16",
    "gguf Q8_0",
    "gguf orig_shape",
)
WAN_CASES = ("original prefixed", "scaled fp8", "gguf Q8_0", "diffusers folder")
RESTORED = ("by rows", "gguf Q", "gguf orig_shape")  # what ComfyUI cannot use as it is stored
CASES = [
    *((f"hunyuan {name}", HUNYUAN, HUNYUAN_WRITERS[name]) for name in HUNYUAN_CASES),
    *((f"t2v {name}", WAN_T2V, WAN_WRITERS[name]) for name in WAN_CASES),
    *((f"i2v {name}", WAN_I2V, WAN_WRITERS[name]) for name in WAN_CASES[:3]),
]


class Loaded:
    """What the worker found in one file, beside the same values loaded from a plain file."""

    def __init__(self, folder: Path, name: str) -> None:
        self._stem, self.told = folder / name, told_of(folder / f"{name}.out")

    @property
    def output(self) -> torch.Tensor:
        return load_file(f"{self._stem}.out")["denoised"]

    @property
    def reference(self) -> torch.Tensor:
        return load_file(f"{self._stem}.plain.out")["denoised"]


@pytest.fixture(scope="session", params=find_checkouts() or [None], ids=lambda path: path.name if path else "no ComfyUI")
def comfyui(request: pytest.FixtureRequest) -> Path:
    if request.param is None:
        no_comfyui()
    prepare(request.param)
    return request.param


# A network of 200 MB of float32, by the memory its loading takes: {name: (writer, bytes kept of a weight, the largest peak)}.
LARGE = DiTConfig(hidden_size=768, num_heads=6, depth_double=2, depth_single=2, text_dim=64)
MEMORY_CASES: dict[str, tuple[Writer, int, float]] = {
    "safetensors": (prefixed(""), 4, 1.35),
    # PyTorch's .pt is mapped: its pages count too, though the system takes them back when it needs memory.
    "pt": (pytorch("module"), 4, 2.3),
    "shards": (diffusers_folder("100MB"), 4, 1.35),
    "scaled": (scaled_fp8(), 1, 1.35),
}


@pytest.fixture(scope="session")
def loaded(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """Every case in one process: the layout by our loader, and its values, in float32, by ComfyUI's; and the large network."""
    folder, jobs = tmp_path_factory.mktemp(comfyui.name), []
    large = {name: torch.full(shape, 0.01) for name, shape in expected_shapes(LARGE).items()}
    for name, (writer, _, _) in MEMORY_CASES.items():
        (folder / f"memory {name}").mkdir()
        path = writer(folder / f"memory {name}", large).path
        jobs.append({"file": str(path.relative_to(folder)), "output": f"memory {name}.out", "gives": []})
    for name, config, writer in CASES:
        (folder / name).mkdir()
        written = writer(folder / name, random_state(config))
        restored = any(word in name for word in RESTORED)  # and then rounded to bf16
        rounded = {k: t.bfloat16().float() if restored and is_linear(k, t) else t.float() for k, t in written.state.items()}
        save_file(rounded, folder / f"{name}.plain.safetensors")
        jobs.append({"file": str(written.path.relative_to(folder)), "output": f"{name}.out"})
        jobs.append({"file": f"{name}.plain.safetensors", "output": f"{name}.plain.out", "loader": "native"})
    jobs.append({"file": "hunyuan gguf Q8_0/model.gguf", "output": "no gguf.out", "without": "gguf"})
    run_jobs(comfyui, python_of(comfyui), folder, jobs)
    names = [*(name for name, _, _ in CASES), *(f"memory {name}" for name in MEMORY_CASES), "no gguf"]
    return {name: Loaded(folder, name) for name in names}


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
    if "by rows" in name:
        assert "float8_e4m3fn" not in dtypes
        return
    everywhere = "blocks only" not in name and "tencent" not in name and "quantised" not in name
    state = random_state(HUNYUAN)
    linears = [k for k, t in state.items() if is_linear(k, t) and (everywhere or k.startswith(("double_b", "single_b")))]
    assert dtypes[kind] == len(linears)


def test_gguf_without_its_package_says_what_to_install(loaded: dict[str, Loaded]) -> None:
    told = loaded["no gguf"].told
    assert told["error"].startswith("MissingExtraError: ") and "pip install gguf" in told["error"]


@pytest.mark.parametrize("name", MEMORY_CASES)
def test_loading_takes_the_weights_and_a_few_tensors_not_a_second_copy(loaded: dict[str, Loaded], name: str) -> None:
    _, kept, largest = MEMORY_CASES[name]
    shapes = {name: torch.empty(shape, device="meta") for name, shape in expected_shapes(LARGE).items()}
    size = sum(t.numel() * (kept if is_linear(k, t) else 4) for k, t in shapes.items())
    assert 0.7 < loaded[f"memory {name}"].told["peak"] / size < largest
