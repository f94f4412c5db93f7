"""Attention kernels: each equals SDPA within the error it declares, or refuses in a sentence.

No GPU is needed: packages for GPUs are stood in for by files with their signatures that compute what those would, hazards
included, and keep what they were given; the CPU is made to look like the GPU they want. SDPA is real here; FlexAttention, which
takes a compiler and its time, is played by what its block masks mean.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from accvideo_core import cli
from accvideo_core.dit import Conditioning, DiTConfig, HunyuanVideoDiT
from accvideo_core.dit.attention import AUTO, KERNELS, NAMES, Call, attention, check, forget, settle, usable
from accvideo_core.errors import AccVideoError, InvalidValueError, KernelError
from tests.networks import random_weights
from tests.peak import Peak

package = importlib.import_module("accvideo_core.dit.attention")
choice = importlib.import_module("accvideo_core.dit.attention.choice")
kernels = importlib.import_module("accvideo_core.dit.attention.kernels")

CPU = torch.device("cpu")
HOPPER, ADA, AMPERE, RTX30, TURING = (9, 0), (8, 9), (8, 0), (8, 6), (7, 5)
BF16 = torch.bfloat16
TRIALS, SHORT = choice.TRIALS, choice.TRIALS[:3]

# What the packages are to a caller: their functions' signatures, what they ask of tensors, and where they write.
FLASH = """
import torch
from torch.nn.functional import scaled_dot_product_attention
calls = []
def flash_attn_func(q, k, v, {more}softmax_scale=None, causal=False, **others):
    assert not causal and not others
    for x in (q, k, v):
        assert x.ndim == 4 and x.stride(-1) == 1 and x.dtype in (torch.float16, torch.bfloat16)
    assert k.shape == v.shape and q.shape[2:] == k.shape[2:], "tokens go before heads"
    calls.append((q, k, v))
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=softmax_scale).transpose(1, 2)
    return {gives}
"""
SAGE = """
import torch
from torch.nn.functional import pad
calls = []
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, {more}**kwargs):
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16) and tensor_layout == "HND"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.shape[-1] in {dims} and not is_causal
    calls.append(dict(q=q, k=k, v=v, kwargs=kwargs))
    mean = k.mean(dim=2, keepdim=True)
    {smooth}
    def quantised(x, block):
        parts = pad(x.float(), (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
        scale = parts.abs().amax((3, 4), keepdim=True) / 127 + 1e-7
        return ((parts / scale).round() * scale).flatten(2, 3)
    keys = quantised(smooth, 64)
    if {masks}:
        keys = keys[:, :, :k.shape[2]]
    values = pad(v.float(), (0, 0, 0, keys.shape[2] - v.shape[2]))
    scores = quantised(q, 128)[:, :, :q.shape[2]] @ keys.mT * (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    return (scores.softmax(-1) @ values).to(q.dtype)
"""
SAGE1 = SAGE.format(
    more="smooth_k=True, ",
    dims=[64, 96, 128],
    smooth="if smooth_k: k -= mean\n    smooth = k",  # in place
    masks=False,  # keys beyond the last are zeros that the softmax counts
)
SAGE2 = SAGE.format(more="return_lse=False, ", dims="range(1, 129)", smooth="smooth = k - mean", masks=True)
SAGE2 += "\nsageattn_qk_int8_pv_fp16_cuda = sageattn\n"
FLASH2 = FLASH.format(more="dropout_p=0.0, ", gives="out")
FLASH3 = FLASH.format(more="", gives="out")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choice, "TRIALS", SHORT)  # the longer ones take their time in 16 bits on a CPU
    forget()
    yield
    kernels._found.clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`gpu((9, 0))`: the CPU passes for a GPU of that compute capability; None for AMD's."""

    def look_like(capability: tuple[int, int] | None) -> None:
        forget()

        @functools.lru_cache
        def machine(device: torch.device) -> Any:
            return choice.Machine("rocm" if capability is None else "cuda", "a stand-in", capability)

        for module in (package, choice):
            monkeypatch.setattr(module, "machine", machine)

    yield look_like
    monkeypatch.undo()
    forget()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """`install("flash_attn", source)` puts a package where Python finds it."""
    made = []

    def put(name: str, source: str) -> None:
        forget()
        kernels._found.clear()
        (tmp_path / "packages").mkdir(exist_ok=True)
        (tmp_path / "packages" / f"{name}.py").write_text(source)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        made.append(name)

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    yield put
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def everything(install: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[SDPBackend]]:
    """All packages but SageAttention 2, which has the name of 1, and PyTorch's GPU kernels played by the CPU's; gives the
    backends that were asked for."""
    for name, source in (("flash_attn", FLASH2), ("flash_attn_interface", FLASH3), ("sageattention", SAGE1)):
        install(name, source)
    asked: list[SDPBackend] = []

    @contextlib.contextmanager
    def backend(wanted: SDPBackend) -> Iterator[None]:
        asked.append(wanted)
        yield

    monkeypatch.setattr(kernels, "sdpa_kernel", backend)
    monkeypatch.setitem(kernels._found, "flex", flex_attention)
    return lambda: asked


def flex_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, block_mask: Any) -> torch.Tensor:
    """Whole blocks are attended to unasked, blocks in part where the mask's function allows it, and no others."""
    rows, _, tall, _ = block_mask.kv_indices.shape
    mask = torch.zeros(rows, 1, tall * 128, k.shape[2], dtype=torch.bool)
    lists = (
        (block_mask.kv_num_blocks, block_mask.kv_indices, True),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, False),
    )
    for numbers, indices, asked in lists:
        for row in range(rows):
            for high in range(tall):
                for block in indices[row, 0, high, : numbers[row, 0, high]].tolist():
                    keys = torch.arange(block * 128, min(block * 128 + 128, k.shape[2]))
                    allowed = block_mask.mask_mod(row, 0, 0, keys) if asked else True
                    mask[row, 0, high * 128 : high * 128 + 128, keys] = allowed
    return scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :, : q.shape[2]], scale=scale)


def calls_of(name: str) -> list[Any]:
    return sys.modules[name].calls


def random_qkv(dtype: torch.dtype, queries: int, keys: int, rows: int = 2, heads: int = 2, d: int = 128) -> tuple[Any, Any, Any]:
    """As the network lays them out: three views of one projection."""
    generator = torch.Generator().manual_seed(queries * 5000 + keys)
    qkv = torch.randn(rows, max(queries, keys), 3, heads, d, generator=generator).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...] | None = None) -> torch.Tensor:
    """In float32, row by row, each over its own keys."""
    lengths = lengths or (k.shape[2],) * k.shape[0]
    rows = [
        scaled_dot_product_attention(q[i : i + 1].float(), k[i : i + 1, :, :n].float(), v[i : i + 1, :, :n].float())
        for i, n in enumerate(lengths)
    ]
    return torch.cat(rows).transpose(1, 2).flatten(2)


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.float() - reference).norm() / reference.norm())


LENGTHS = (1, 2, 63, 64, 65, 100, 127, 128, 129, 1000, 2047, 2048, 4095, 4096)
TESTED = [(name, dtype) for name, kernel in KERNELS.items() for dtype in kernel.errors if dtype != torch.float64]


@pytest.mark.parametrize(("name", "dtype"), TESTED, ids=lambda x: str(x).removeprefix("torch."))
def test_every_kernel_equals_sdpa_within_its_error_or_refuses(name, dtype, gpu, everything, install, monkeypatch) -> None:
    """Keys of 1 to 4096, all of them or another number in each row."""
    kernel = KERNELS[name]
    if name == "sage2":
        install("sageattention", SAGE2)
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda: "avx512")
    if name not in ("sdpa", "products", "flex"):
        gpu(HOPPER)
    with torch.inference_mode():
        for keys in LENGTHS if dtype != torch.float16 else LENGTHS[::3]:  # a CPU computes in it slowly
            q, k, v = random_qkv(dtype, min(keys, 17), keys, heads=1)
            before = [x.clone() for x in (q, k, v)]
            for lengths in (None, (keys, keys), (keys, (keys + 1) // 2), (max(1, keys - 1), keys)):
                if name == "sage1" and any(n % 64 for n in lengths or (keys,)):
                    with pytest.raises(InvalidValueError, match="multiple of 64"):
                        attention(q, k, v, lengths, name)
                    continue
                if name == "sdpa-cudnn" and min(q.shape[2], *(lengths or (keys,))) < 2:
                    with pytest.raises(InvalidValueError, match="at least 2 queries and keys"):
                        attention(q, k, v, lengths, name)
                    continue
                out = attention(q, k, v, lengths, name)
                assert out.dtype == dtype and out.shape == (2, q.shape[2], 128)
                assert error(out, exact(q, k, v, lengths)) <= kernel.errors[dtype], (keys, lengths)
                assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True)), "an input was changed"


class TestProducts:
    @pytest.fixture(autouse=True)
    def fast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "multiplies_bf16", lambda: "avx512")

    @pytest.mark.parametrize(("queries", "keys", "heads"), [(1300, 1300, 3), (513, 70, 2), (40, 3000, 5), (512, 1024, 1)])
    def test_slices_of_queries_and_heads_are_joined(self, queries, keys, heads) -> None:
        q, k, v = random_qkv(BF16, queries, keys, heads=heads)
        with torch.no_grad():
            assert error(attention(q, k, v, None, "products"), exact(q, k, v)) < 1e-2

    @pytest.mark.parametrize(("tokens", "rows"), [(1300, 1), (70, 1), (70, 3)])
    def test_queries_that_are_nobody_elses_are_written_over(self, tokens, rows) -> None:
        """As they lie between keys and values in a layer's result, of which then nothing is copied but those of several rows."""
        given = torch.randn(rows, tokens, 3, 2, 64).bfloat16()
        q, k, v = given.permute(2, 0, 3, 1, 4)
        with torch.inference_mode():
            due, own = attention(q, k, v, None, "products"), given.clone()
            q, k, v = own.permute(2, 0, 3, 1, 4)
            with Peak([own]) as peak:
                out = attention(q, k, v, None, "products", over=True)
        assert error(out, due.float()) < 5e-3 and torch.equal(own[:, :, 1:], given[:, :, 1:])
        tile = min(2 * rows, max(1, 2**19 // (min(512, tokens) * tokens))) * min(512, tokens) * tokens
        if rows == 1:
            assert out.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() and peak.peak == 2 * tile

    def test_gradients_are_sdpas(self) -> None:
        given = [x.detach().requires_grad_() for x in random_qkv(BF16, 70, 90)]
        got = torch.autograd.grad(attention(*given, None, "products").float().square().sum(), given)
        floats = [x.detach().float().requires_grad_() for x in given]
        due = torch.autograd.grad(exact(*floats).square().sum(), floats)
        assert all(error(a, b) < 2e-2 for a, b in zip(got, due, strict=True))

    def test_another_dtype_or_cpu_is_refused(self, monkeypatch) -> None:
        with pytest.raises(InvalidValueError, match="products takes bfloat16, not float32"):
            attention(*random_qkv(torch.float32, 9, 9), None, "products")
        monkeypatch.setattr(kernels, "multiplies_bf16", lambda: "amx")
        forget()
        with pytest.raises(InvalidValueError, match="products is for CPUs that multiply bfloat16 by AVX-512 and have no AMX"):
            attention(*random_qkv(BF16, 9, 9), None, "products")


class TestWhatAKernelIsGiven:
    """Shapes, layout, dtype, which device is current, and how often it is called."""

    @pytest.mark.parametrize(("name", "module"), [("flash2", "flash_attn"), ("flash3", "flash_attn_interface")])
    def test_flash_attention_has_tokens_before_heads_and_nothing_copied(self, name, module, gpu, everything) -> None:
        gpu(HOPPER)
        q, k, v = random_qkv(BF16, 33, 50)
        attention(q, k, v, None, name)
        for mine, theirs in zip((q, k, v), calls_of(module)[-1], strict=True):
            assert theirs.shape == (2, mine.shape[2], 2, 128) and theirs.data_ptr() == mine.data_ptr()

    def test_older_flash_attention_3_gives_a_pair(self, gpu, install) -> None:
        gpu(HOPPER)
        install("flash_attn_interface", FLASH.format(more="", gives="(out, out[..., 0])"))
        q, k, v = random_qkv(BF16, 33, 50)
        assert error(attention(q, k, v, None, "flash3"), exact(q, k, v)) < 0.01

    def test_sage_1_never_sees_our_keys(self, gpu, install, monkeypatch) -> None:
        """It gets keys without their mean, in memory of their own, with smoothing off, on the device of the tensors."""
        gpu(ADA)
        install("sageattention", SAGE1)
        current: list[torch.device] = []

        @contextlib.contextmanager
        def on_device(device: torch.device) -> Iterator[None]:
            seen = len(calls_of("sageattention"))
            yield
            assert len(calls_of("sageattention")) == seen + 1, "not called while the device was current"
            current.append(device)

        monkeypatch.setattr(kernels, "on_device", on_device)
        q, k, v = random_qkv(BF16, 33, 128)
        k = k + 3  # a mean worth subtracting
        kept = k.clone()
        with torch.inference_mode():
            out = attention(q, k, v, None, "sage1")
        given = calls_of("sageattention")[-1]
        assert given["k"].data_ptr() != k.data_ptr() and torch.equal(k, kept)
        assert given["k"].float().mean(2).abs().max() < 0.05
        assert current and set(current) == {CPU} and given["kwargs"] == {}
        assert error(out, exact(q, k, v)) < 0.03

    def test_the_last_dimension_is_made_dense(self, gpu, everything) -> None:
        gpu(HOPPER)
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in random_qkv(BF16, 64, 64))
        assert q.stride(-1) != 1
        for name in ("flash2", "sage1"):
            with torch.inference_mode():
                assert error(attention(q, k, v, None, name), exact(q, k, v)) <= KERNELS[name].errors[BF16]

    @pytest.mark.parametrize("name", ["flash2", "sage1"])
    def test_a_row_at_a_time_over_its_own_keys_where_there_is_no_mask(self, name, gpu, everything) -> None:
        gpu(HOPPER)
        module = {"flash2": "flash_attn", "sage1": "sageattention"}[name]
        q, k, v = random_qkv(BF16, 20, 256)
        with torch.inference_mode():
            settle(name, Call(CPU, BF16, 128, 20, 256), (128, 192))  # its self-test
            calls_of(module).clear()
            attention(q, k, v, (128, 192), name)
        seen = [call["k"].shape[2] if name == "sage1" else call[1].shape[1] for call in calls_of(module)]
        assert seen == [128, 192]

    def test_pytorchs_kernels_are_asked_for_one_by_one(self, gpu, everything) -> None:
        gpu(HOPPER)
        q, k, v = random_qkv(BF16, 20, 20)
        for name, backend in (("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION), ("sdpa-flash", SDPBackend.FLASH_ATTENTION)):
            attention(q, k, v, None, name)
            assert everything()[-1] == backend

    def test_flash_attention_passes_gradients_on(self, gpu, everything) -> None:
        gpu(AMPERE)
        q, k, v = (x.detach().clone().requires_grad_() for x in random_qkv(BF16, 20, 20))
        attention(q, k, v, None, "flash2").float().square().sum().backward()
        assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, k, v))

    def test_flex_visits_no_block_past_the_last_valid_key(self) -> None:
        blocks = kernels.key_blocks((300, 128, 1), 200, 513, CPU)
        assert blocks.full_kv_num_blocks.tolist() == [[[2, 2]], [[1, 1]], [[0, 0]]]
        assert blocks.kv_num_blocks.tolist() == [[[1, 1]], [[0, 0]], [[1, 1]]]
        assert blocks.kv_indices[:, 0, 0, 0].tolist() == [2, 1, 0]


class TestRefusals:
    """One sentence with the value and the cure, before anything runs."""

    CASES = (
        ("sage1", HOPPER, {"keys": 1040}, ("multiple of 64", "16384", "1040")),
        ("sage1", HOPPER, {"keys": 65}, ("65", "choose auto")),
        ("sage1", HOPPER, {"head_dim": 80}, ("64, 96, 128", "80")),
        ("sage1", HOPPER, {"dtype": torch.float32}, ("bfloat16 or float16", "float32")),
        ("sage1", HOPPER, {"masked": True}, ("no mask", "choose sdpa")),
        ("sage1", HOPPER, {"gradients": True}, ("no backward pass", "no_grad")),
        ("sage1", HOPPER, {"elements": 1 << 31}, ("32 bits", str(1 << 31), "smaller batch")),
        ("sage1", TURING, {}, ("8.0 or newer", "7.5")),
        ("sage2", RTX30, {"keys": 65}, ("multiple of 64", "65")),
        ("sage2", (10, 0), {}, ("8.0, 8.6, 8.9, 9.0, 12.0, 12.1", "10.0")),
        ("flash3", ADA, {}, ("needs compute capability 9.0", "8.9")),
        ("flash3", None, {}, ("NVIDIA GPUs", "rocm")),
        ("flash2", TURING, {}, ("8.0 or newer", "7.5")),
        ("flash2", HOPPER, {"head_dim": 100}, ("multiples of 8 up to 256", "100")),
        ("flash2", HOPPER, {"dtype": torch.float32}, ("float32", "load the network in bfloat16")),
        ("sdpa-cudnn", None, {}, ("NVIDIA GPUs", "rocm")),
        ("sdpa-cudnn", HOPPER, {"head_dim": 192}, ("up to 128", "192")),
        ("sdpa", HOPPER, {"keys": 0}, ("0 keys", "at least one")),
    )

    @pytest.mark.parametrize(("name", "capability", "changed", "said"), CASES)
    def test_what_a_kernel_does_not_take(self, name, capability, changed, said, gpu, everything, install) -> None:
        if name == "sage2":
            install("sageattention", SAGE2)
        gpu(capability)
        call = Call(CPU, BF16, 128, 128, 128)
        if capability in (HOPPER, ADA):
            assert choice.refusal(KERNELS[name], call) is None or not changed  # it is this that it refuses
        with pytest.raises(InvalidValueError) as caught:
            settle(name, call._replace(**changed))
        sentence = str(caught.value)
        assert all(part in sentence for part in said), sentence
        assert "\n" not in sentence and ";" in sentence

    def test_long_ragged_keys_pass_where_the_error_drowns(self, gpu, install, monkeypatch) -> None:
        monkeypatch.setattr(choice, "TRIALS", TRIALS)  # the whole self-test, which goes that far
        gpu(HOPPER)
        install("sageattention", SAGE1)
        q, k, v = random_qkv(BF16, 8, 16_385, rows=1, heads=1)
        with torch.inference_mode():
            assert error(attention(q, k, v, None, "sage1"), exact(q, k, v)) <= KERNELS["sage1"].errors[BF16]

    @pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.kinds and "cpu" not in kernel.kinds])
    def test_no_gpu(self, name) -> None:
        with pytest.raises(InvalidValueError, match=f"{name} runs on .*GPUs.*, not on cpu; choose auto or sdpa"):
            attention(*random_qkv(BF16, 64, 64), None, name)

    @pytest.mark.parametrize("name", ["flash2", "flash3", "sage1", "sage2"])
    def test_a_package_that_is_not_there(self, name, gpu, monkeypatch) -> None:
        gpu(HOPPER)
        for module in ("flash_attn", "flash_attn_interface", "flash_attn_3", "sageattention"):
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
        with pytest.raises(InvalidValueError, match="is not installed; install it, or choose auto or sdpa"):
            check(name, CPU)

    def test_a_package_built_for_another_torch(self, gpu, install) -> None:
        gpu(HOPPER)
        install("flash_attn", "raise OSError('libcudart.so.11: undefined symbol\\nand more')")
        with pytest.raises(InvalidValueError, match=r"flash-attn cannot be imported \(libcudart.so.11: undefined symbol\)"):
            check("flash2", CPU)

    @pytest.mark.parametrize(("asked", "installed", "source"), [("sage1", 2, SAGE2), ("sage2", 1, SAGE1)])
    def test_the_other_version_of_a_package(self, asked, installed, source, gpu, install) -> None:
        gpu(HOPPER)
        install("sageattention", source)
        with pytest.raises(InvalidValueError, match=f"sageattention is version {installed}; choose sage{installed}"):
            check(asked, CPU)

    def test_a_package_of_that_name_without_the_function(self, gpu, install) -> None:
        gpu(HOPPER)
        install("flash_attn", "")
        with pytest.raises(InvalidValueError, match="has no flash_attn_func; install flash-attn 2"):
            check("flash2", CPU)

    def test_flex_without_a_compiler(self, monkeypatch) -> None:
        monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
        with pytest.raises(InvalidValueError, match="needs a C\\+\\+ compiler; install it"):
            check("flex", CPU)


BROKEN = {
    "gives wrong values": ("out = out * 1.05", "its error for .* is 0.05, above the 0.01 it declares"),
    "gives wrong values on ragged lengths": ("out[:, :, :, 0] += k.shape[1] % 64", "its error for 1 queries and 1 keys"),
    "gives NaN": ("out = out * float('nan')", "its error for .* is nan"),
    "fails": (
        "raise RuntimeError('no kernel image is available\\nsecond line')",
        r"\(RuntimeError: no kernel image is available\)",
    ),
    "changes its inputs": ("k.add_(1)", "changes the tensors it is given"),
    "gives another dtype": ("out = out.float()", "returns float32"),
    "gives another shape": ("out = out[:, :, :1]", "returns bfloat16"),
}


class TestSelfTest:
    @pytest.mark.parametrize("how", BROKEN)
    def test_a_broken_kernel_is_refused_by_name_and_passed_over_by_auto(self, how, gpu, install, everything, caplog) -> None:
        gpu(HOPPER)
        fault, said = BROKEN[how]
        install("flash_attn_interface", FLASH3.replace("    return out", f"    {fault}\n    return out"))
        q, k, v = random_qkv(BF16, 20, 20)
        with pytest.raises(KernelError, match=f"flash3 failed its test on a stand-in in bfloat16: .*{said}.*; choose auto"):
            attention(q, k, v, None, "flash3")
        caplog.clear()
        for _ in range(3):
            assert error(attention(q, k, v, None, AUTO), exact(q, k, v)) < 0.01
        warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warned) == 1 and "auto passes over flash3" in warned[0]
        assert settle(AUTO, Call(CPU, BF16, 128, 20, 20)) == "sdpa-cudnn"

    def test_it_runs_once_for_a_device_dtype_and_head(self, gpu, install) -> None:
        gpu(HOPPER)
        install("flash_attn", FLASH2)
        counts = []
        for keys in (20, 30, 40):
            attention(*random_qkv(BF16, keys, keys), None, "flash2")
            counts.append(len(calls_of("flash_attn")))
        assert counts == [len(SHORT) + 1, len(SHORT) + 2, len(SHORT) + 3]
        attention(*random_qkv(torch.float16, 20, 20), None, "flash2")
        assert len(calls_of("flash_attn")) == 2 * len(SHORT) + 4

    def test_it_leaves_randomness_alone(self, gpu, install) -> None:
        gpu(HOPPER)
        install("flash_attn", FLASH2)
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        check("flash2", CPU, BF16)
        assert torch.equal(torch.rand(3), expected)

    def test_out_of_memory_says_nothing_of_the_kernel(self, gpu, install) -> None:
        gpu(HOPPER)
        install("flash_attn", FLASH2.replace("    return out", "    raise torch.OutOfMemoryError('full')"))
        with pytest.raises(torch.OutOfMemoryError):
            check("flash2", CPU, BF16)


def test_flex_says_what_does_not_compile(monkeypatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("C++ compile error\nand the whole program")

    monkeypatch.setitem(kernels._found, "flex", fails)
    monkeypatch.setattr(choice, "fault", lambda *_: None)
    with pytest.raises(KernelError, match=r"flex does not compile for q \(2, 1, 9, 128\) and 9 keys \(RuntimeError: C.. comp"):
        attention(*random_qkv(BF16, 9, 9, heads=1), None, "flex")


class TestAuto:
    @pytest.mark.parametrize(
        ("capability", "chosen"),
        [(HOPPER, "flash3"), ((10, 0), "sdpa-cudnn"), (ADA, "flash2"), (AMPERE, "flash2"), (None, "flash2"), (TURING, "sdpa")],
    )
    def test_the_fastest_exact_kernel_of_a_machine(self, capability, chosen, gpu, everything) -> None:
        gpu(capability)
        assert settle(AUTO, Call(CPU, BF16, 128, 4096, 4096)) == chosen

    def test_without_packages_pytorchs_own(self, gpu, monkeypatch) -> None:
        for capability, chosen in ((HOPPER, "sdpa-cudnn"), (ADA, "sdpa-flash")):
            gpu(capability)
            monkeypatch.setattr(choice, "fault", lambda *_: None)
            monkeypatch.setattr(choice, "_missing", lambda kernel: choice.Refusal("package", "-") if kernel.package else None)
            assert settle(AUTO, Call(CPU, BF16, 128, 4096, 4096)) == chosen

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_what_only_sdpa_takes_goes_to_sdpa(self, dtype, gpu, everything) -> None:
        gpu(HOPPER)
        assert settle(AUTO, Call(CPU, dtype, 128, 4096, 4096)) == "sdpa"

    @pytest.mark.parametrize(("by", "chosen"), [(None, "sdpa"), ("amx", "sdpa"), ("avx512", "products")])
    def test_on_a_cpu_it_depends_on_what_multiplies_bf16(self, by, chosen, monkeypatch) -> None:
        monkeypatch.setattr(kernels, "multiplies_bf16", lambda: by)
        assert settle(AUTO, Call(CPU, BF16, 128, 4096, 4096)) == chosen
        assert settle(AUTO, Call(CPU, torch.float32, 128, 4096, 4096)) == "sdpa"

    def test_never_a_lossy_one(self) -> None:
        machines = [choice.Machine("cuda", "", c) for c in (TURING, AMPERE, RTX30, ADA, HOPPER, (10, 0), (12, 0))]
        for machine in [*machines, choice.Machine("rocm", ""), choice.Machine("cpu", ""), choice.Machine("mps", "")]:
            order = kernels.exact_order(machine)
            assert order[-1] == "sdpa" and not [name for name in order if KERNELS[name].lossy]

    def test_short_rows_of_several_lengths_take_one_masked_call(self, gpu, everything) -> None:
        gpu(HOPPER)
        assert settle(AUTO, Call(CPU, BF16, 128, 100, 100), (90, 100)) == "sdpa"
        assert settle(AUTO, Call(CPU, BF16, 128, 4096, 4096), (4000, 4096)) == "flash3"

    def test_what_runs_is_said_once(self, caplog) -> None:
        caplog.set_level(logging.INFO, "accvideo")
        for _ in range(3):
            attention(*random_qkv(torch.float32, 20, 20), None, AUTO)
        assert [r.getMessage() for r in caplog.records] == [
            "AccVideo: attention by sdpa (exact) on cpu, float32, head dimension 128"
        ]

    def test_a_lossy_kernel_says_so(self, gpu, install, caplog) -> None:
        gpu(HOPPER)
        install("sageattention", SAGE1)
        caplog.set_level(logging.INFO, "accvideo")
        with torch.inference_mode():
            attention(*random_qkv(BF16, 64, 64), None, "sage1")
        assert "sage1 (lossy, error up to 3 %)" in caplog.text


CONFIG = DiTConfig(hidden_size=256, num_heads=2, depth_double=1, depth_single=2, text_dim=24, pooled_dim=20)


@functools.cache
def network(dtype: torch.dtype) -> HunyuanVideoDiT:
    made = HunyuanVideoDiT(CONFIG, dtype=dtype)
    made.load_state_dict({name: t.to(dtype) for name, t in random_weights(CONFIG).items()})
    return made.eval().requires_grad_(False)


def inputs(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(rows, 5, 24, generator=generator)
    mask = torch.arange(5)[None] < torch.tensor([5, 3])[:rows, None]
    pooled = torch.randn(rows, 20, generator=generator)
    latent = torch.randn(rows, 16, 2, 4, 4, generator=generator)
    return latent, torch.full((rows,), 0.7), Conditioning(text, pooled, torch.full((rows,), 6.0), mask)


class TestNetwork:
    def test_its_blocks_use_the_kernel_and_the_refiner_does_not(self, gpu, install) -> None:
        gpu(ADA)
        install("flash_attn", FLASH2)
        net = network(BF16)
        with torch.inference_mode():
            net.attention_kernel = "sdpa"
            expected = net(*inputs()).float()
            net.attention_kernel = "flash2"
            check("flash2", CPU, BF16)
            calls_of("flash_attn").clear()
            out = net(*inputs()).float()
        assert net.attention_ran == "flash2" and error(out, expected) < 0.02
        lengths = [k.shape[1] for _, k, _ in calls_of("flash_attn")]
        assert lengths == [8 + 5, 8 + 3] * 3, "a row at a time in each of three blocks, and none over text alone"

    def test_a_kernel_that_refuses_stops_it_before_any_block(self, gpu, install) -> None:
        gpu(ADA)
        install("sageattention", SAGE1)
        net = network(BF16)
        net.attention_kernel = "sage1"
        try:
            with torch.inference_mode(), pytest.raises(InvalidValueError, match="multiple of 64 keys or at least 16384, not 11"):
                net(*inputs())
        finally:
            net.attention_kernel = "sdpa"

    def test_a_kernel_without_a_backward_pass_stops_compiled_blocks_too(self, gpu, install) -> None:
        """In a compiled block nothing is checked, and its gradients would be those of all else alone."""
        gpu(ADA)
        install("sageattention", SAGE1)
        net = copy.deepcopy(network(BF16)).requires_grad_(True)
        net.attention_kernel = "sage1"
        for name in net.block_names():
            net.get_submodule(name).compile(backend="eager")
        latent, sigma, told = inputs(1)
        with pytest.raises(InvalidValueError, match="sage1 has no backward pass"):
            net(latent, sigma, replace(told, text=torch.randn(1, 56, 24), text_mask=None))  # 64 tokens, which it takes

    def test_an_unknown_kernel(self) -> None:
        net = network(torch.float32)
        net.attention_kernel = "magic"
        try:
            with pytest.raises(InvalidValueError, match="unknown attention kernel 'magic'; known kernels: auto, sdpa, "):
                net(*inputs())
        finally:
            net.attention_kernel = "sdpa"


class TestSeen:
    def test_the_list_of_what_can_be_used(self, gpu, everything) -> None:
        gpu(ADA)
        told = usable(CPU, BF16)
        assert list(told) == list(KERNELS)
        assert told["flash2"] == "exact" and told["sage1"] == "lossy, error up to 3 %"
        assert told["flash3"].startswith("no: needs compute capability 9.0") and "version 1" in told["sage2"]

    def test_inspect_lists_them_and_says_what_a_step_used(self, tmp_path, capsys) -> None:
        from accvideo_core.checkpoint import save_original

        save_original(tmp_path / "model.safetensors", random_weights(CONFIG))
        assert cli.main(["inspect", str(tmp_path / "model.safetensors"), "--step", "--json"]) == 1  # random weights
        report = json.loads(capsys.readouterr().out)
        assert report["step"]["attention"] == "sdpa" and list(report["attention"]["kernels"]) == list(KERNELS)
        assert cli.main(["inspect", str(tmp_path / "model.safetensors")]) == 0
        text = capsys.readouterr().out
        if not torch.cuda.is_available():
            assert "attention   on cpu: sdpa (exact)" in text and "not flash3: runs on NVIDIA GPUs" in text
        assert cli.main(["inspect", str(tmp_path / "model.safetensors"), "--step", "--attention", "magic"]) == 2

    @pytest.mark.parametrize(
        "command",
        [
            ["generate", "a red ball", "--device", "cpu"],
            ["evaluate", "--plan", "{plan}", "--device", "cpu"],
            ["capture", "--plan", "{plan}", "-o", "{out}", "--device", "cpu"],
        ],
    )
    def test_a_command_refuses_before_it_works(self, command, tmp_path, capsys, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "plan.jsonl").write_text('{"prompt": "a red ball", "seed": 1, "named": {}}\n')
        plan = tmp_path / "plan.jsonl" if command[0] == "evaluate" else tmp_path
        words = [word.format(plan=plan, out=tmp_path / "out") for word in command]
        if command[0] == "capture":
            monkeypatch.setattr("accvideo_core.headless.capture.Plan", lambda path: None)
        for name, said in (("magic", "unknown attention kernel 'magic'"), ("flash3", "runs on NVIDIA GPUs, not on cpu")):
            assert cli.main([*words, "--attention", name]) == 2
            assert said in capsys.readouterr().err
        assert not (tmp_path / "out.mp4").exists() and not (tmp_path / "out").exists()

    def test_no_trajectory_is_captured_by_a_lossy_kernel(self, gpu, install, tmp_path, monkeypatch, capsys) -> None:
        gpu(HOPPER)
        install("sageattention", SAGE1)
        monkeypatch.setattr("accvideo_core.headless.capture.Plan", lambda path: None)
        words = ["capture", "--plan", str(tmp_path), "-o", str(tmp_path / "out"), "--device", "cpu", "--attention", "sage1"]
        assert cli.main(words) == 2
        assert "sage1 is lossy, error up to 3 %" in capsys.readouterr().err

    def test_every_error_is_the_librarys(self) -> None:
        assert issubclass(KernelError, AccVideoError) and NAMES[0] == AUTO and set(NAMES[1:]) == set(KERNELS)
