"""Whatever a LoRA file holds, reading, describing and merging it ends in a result or in an error for a user, never otherwise.

Three sources of files: headers and tensors built from the words of all formats in wrong places, shapes and dtypes; good files
with bytes changed; and noise. ACCVIDEO_FUZZ_SECONDS=600 runs each for that long instead of for a few examples; what it finds is
kept in tests/corpus/lora and read again by every run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from accvideo_core.dit import DiTConfig
from accvideo_core.errors import AccVideoError, AccVideoWarning
from accvideo_core.lora import describe, read_lora
from tests.lora_files import FORMATS, write
from tests.networks import random_weights

SECONDS = float(os.environ.get("ACCVIDEO_FUZZ_SECONDS", "0"))
CORPUS = Path(__file__).resolve().parents[1] / "corpus" / "lora"
TINY = DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=1, text_dim=8, pooled_dim=8, refiner_depth=1)
LARGEST = 1 << 22  # no difference of these networks is larger


def consume(content: bytes) -> str:
    """Read the file, describe it, make every difference; "ok" or the error's text. Any other exception is a failure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AccVideoWarning)
                json.dumps(describe(path))
                with read_lora(path, allow_unmatched=True) as lora:
                    assert lora.modules
                    for module in lora.modules.values():
                        part = module.parts[0]
                        rows = max((p.rows[0] + p.rows[1]) if p.rows else p.shape[0] for p in module.parts)
                        if rows * part.shape[1] > LARGEST:
                            continue
                        shape = (rows, part.shape[1])
                        delta = module.delta(shape, torch.ones(shape) if module.needs_weight else None)
                        assert delta.shape == shape
                        if module.is_low_rank:
                            down, up, _ = module.stacked(rows)
                            assert (up.shape[0], down.shape[1]) == shape
            return "ok"
        except AccVideoError as error:
            assert "\n" not in str(error)
            return str(error)


# ---- files in the words of the formats -----------------------------------------------------------------------------

PREFIXES = ["", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_", "base_model.model.", "lora_te1_", "x."]
MODULES = [
    "double_blocks.0.img_attn_qkv",
    "double_blocks_0_img_attn_qkv",
    "transformer_blocks.0.attn.to_k",
    "single_transformer_blocks_0_proj_mlp",
    "single_blocks.999999.linear1",
    "norm_out.linear",
    "img_in.proj",
    "blocks.0.norm2",
    "blocks.0",
    "blocks.0.self_attn.q",
    "head.head",
    "final_layer.adaLN_modulation.1",
    "double_blocks..img_attn_qkv",
    "",
]
SUFFIXES = [
    *(".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora_up.weight", ".lora_mid.weight"),
    *(".lora_B.bias", ".lora_magnitude_vector", ".dora_scale", ".alpha", ".diff", ".diff_b", ".diff_m", ".set_weight", ".w_norm"),
    *(f".hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f".lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    ".weight",
    "",
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.float64]
VALUES = [0.0, 1.0, -3.5, 1e30, float("nan"), float("inf")]
names = st.builds(lambda p, m, s: p + m + s, st.sampled_from(PREFIXES), st.sampled_from(MODULES), st.sampled_from(SUFFIXES))
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16]), max_size=5)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    found = {}
    for name in draw(st.lists(names, max_size=8)):
        value, dtype = torch.full(draw(shapes), draw(st.sampled_from(VALUES))), draw(st.sampled_from(DTYPES))
        found[name] = (value if dtype.is_floating_point else value.nan_to_num(1, 1, 1)).to(dtype)
    # A whole pair, so that more than the first check is reached.
    if draw(st.booleans()):
        stem = draw(st.sampled_from(PREFIXES[:6])) + draw(st.sampled_from(MODULES[:7]))
        rank, rows, columns = (draw(st.sampled_from([1, 2, 4])) for _ in range(3))
        found |= {f"{stem}.lora_A.weight": torch.ones(rank, columns), f"{stem}.lora_B.weight": torch.ones(2 * rows, rank)}
    return found


texts = st.dictionaries(
    st.sampled_from(["lora_adapter_metadata", "modelspec.architecture", "ss_base_model_version", "format"]),
    st.one_of(
        st.text(max_size=20),
        st.recursive(
            st.none() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["lora_alpha", "alpha_pattern", "transformer.lora_alpha", "r"]), inner, max_size=3
                )
            ),
            max_leaves=6,
        ).map(json.dumps),
    ),
    max_size=3,
)
files = st.builds(lambda t, m: save(t, m or None), tensors(), texts)


# ---- good files, damaged -------------------------------------------------------------------------------------------


def good_files() -> list[bytes]:
    state = random_weights(TINY)
    out = []
    for name in FORMATS:
        file = write(name, state, trained=r"double_blocks\.0\.img_attn_qkv|final_layer|linear1")
        small = {key: value.contiguous() for key, value in file.tensors.items()}
        out.append(save(small, file.metadata or None))
    return out


GOOD = good_files()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(st.sampled_from(GOOD)))
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(draw(st.integers(1, 6))):
        # The header is where meaning is; one change in four falls on the values.
        end = header if draw(st.integers(0, 3)) else len(content)
        place = draw(st.integers(0, min(end, len(content)) - 1))
        kind = draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        if kind == "set":
            content[place] = draw(st.integers(0, 255))
        elif kind == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=4))
        elif kind == "delete":
            del content[place : place + draw(st.integers(1, 8))]
        elif draw(st.integers(0, 9)) == 0:
            del content[place:]
        if not content:
            break
    return bytes(content)


def run(content: bytes, outcomes: set[str]) -> None:
    """Consume; a long run keeps what failed, and one small file for every outcome it has not seen."""
    try:
        outcome = re.sub(r"[\d\W]+|[a-z_]*blocks\w*", " ", re.sub(r"\(.*?\)|/\S+", "", consume(content)))
    except BaseException:
        if SECONDS:
            keep(content, content)
        raise
    if SECONDS and outcome not in outcomes and len(content) <= 4096:
        keep(content, outcome.encode())
    outcomes.add(outcome)


def keep(content: bytes, name: bytes) -> None:
    CORPUS.mkdir(parents=True, exist_ok=True)
    (CORPUS / f"{hashlib.sha256(name).hexdigest()[:16]}.bin").write_bytes(content)


def rounds() -> Iterator[int]:
    """One round of examples, or rounds until the time is over."""
    began = time.monotonic()
    yield 0
    number = 1
    while time.monotonic() - began < SECONDS:
        yield number
        number += 1


@pytest.mark.timeout(SECONDS * 2 + 600)
@pytest.mark.parametrize("source", ["words", "damaged", "noise"])
def test_nothing_but_results_and_errors_for_users(source: str) -> None:
    strategy = {"words": files, "damaged": damaged(), "noise": st.binary(max_size=300)}[source]
    examples = {"words": 80, "damaged": 25, "noise": 40}[source]
    count = 0
    outcomes: set[str] = set()
    for _ in rounds():
        options = settings(
            max_examples=examples if not SECONDS else 1000,
            deadline=None,
            derandomize=not SECONDS,
            database=None,
            suppress_health_check=list(HealthCheck),
        )

        @options
        @given(strategy)
        def check(content: bytes) -> None:
            nonlocal count
            count += 1
            run(content, outcomes)

        check()
    print(f"{source}: {count} files, {len(outcomes)} outcomes")
    assert count >= examples // 2


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.bin")), ids=lambda path: path.stem)
def test_what_was_found_before(path: Path) -> None:
    consume(path.read_bytes())


def test_the_fuzzer_reaches_what_it_is_for() -> None:
    """Good files pass through `consume` to the end: the damaged ones start from there."""
    assert {consume(content) for content in GOOD} == {"ok"}
