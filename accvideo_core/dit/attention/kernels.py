"""The kernels by name, and what each declares. docs/attention.md has the same as a table for people.

Each takes q, k, v (B, h, N, d) in any strides with the last dimension dense, and returns (B, h, N, d). Packages are imported
when they are first asked for. Declared errors: exact kernels differ by the rounding of their dtype, measured on a CPU over 1 to
4 096 tokens and doubled or more; the lossy ones' are told beside them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...devices import multiplies_bf16
from ...errors import KernelError
from .choice import Call, Kernel, Machine, Refusal, ragged

Lengths = tuple[int, ...]


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one, where Triton launches its kernels whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def dense(x: Tensor) -> Tensor:
    """With the last dimension contiguous, which every kernel of another package asks for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _module(name: str, package: str) -> Any:
    """A package of the user's; ImportError with a sentence that says how to get it, or what it lacks."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise ImportError(f"the package {package} is not installed; install it, or choose auto or sdpa")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a build for another torch fails in any way: undefined symbols, assertions
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ImportError(f"the package {package} cannot be imported ({said}); install one built for this torch") from error


# Found once and kept, so that a compiled network meets a plain function.
_found: dict[str, Callable[..., Any]] = {}


def _keep(name: str, find: Callable[[], Callable[..., Any]]) -> Callable[[], None]:
    def found() -> None:
        if name not in _found:
            _found[name] = find()

    return found


# ---- PyTorch's own ---------------------------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, lengths: Lengths | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _sdpa_by(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, lengths: Lengths | None) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, scale=scale)

    return run


# ---- matrix products ----------------------------------------------------------------------------------------------------

_SCORES = 1 << 19  # that exist at a time: they stay in a core's cache
_QUERIES = 512


def _products(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, lengths: Lengths | None, over: bool = False
) -> Tensor:
    """Scores are rounded to the tensors' dtype before the softmax, which SDPA's kernels avoid: the error grows with them. Queries
    are done with tile by tile, so with `over` the result takes their place."""
    shape, keys = q.shape, k.shape[2]
    scale = shape[3] ** -0.5 if scale is None else scale
    q, k, v = q.flatten(0, 1), k.flatten(0, 1).mT, v.flatten(0, 1)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return ((q * scale) @ k).softmax(-1).bmm(v).view(shape)
    out = q if over else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = min(_QUERIES, shape[2])
    heads = min(max(1, _SCORES // (rows * keys)), len(q))
    room = q.new_empty(heads * rows * keys)  # for one tile after another
    for first in range(0, len(q), heads):
        some = slice(first, first + heads)
        for start in range(0, shape[2], rows):
            part = q[some, start : start + rows]
            scores = room[: part.shape[0] * part.shape[1] * keys].view(*part.shape[:2], keys)
            torch.baddbmm(scores, part, k[some], beta=0, alpha=scale, out=scores)  # beta of 0: what was there goes unread
            torch.softmax(scores, -1, out=scores)
            torch.bmm(scores, v[some], out=out[some, start : start + rows])
    return out.unflatten(0, shape[:2])


def _no_bfloat16(call: Call, found: Machine) -> Refusal | None:
    """PyTorch's own CPU kernel knows AMX and float32's instructions; those that multiply bf16 without AMX it leaves unused."""
    if multiplies_bf16() == "avx512":
        return None
    said = "attention kernel products is for CPUs that multiply bfloat16 by AVX-512 and have no AMX"
    return Refusal("device", f"{said}, which this one is not; choose auto or sdpa")


# ---- FlashAttention --------------------------------------------------------------------------------------------------


def _flash(name: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, lengths: Lengths | None) -> Tensor:
        # Tokens before heads; strides are its own affair, so nothing is copied.
        out = _found[name](*(dense(x.transpose(1, 2)) for x in (q, k, v)), softmax_scale=scale)
        out = out[0] if isinstance(out, tuple) else out  # FlashAttention 3 gave (out, log-sum-exp) until late 2025
        heads_first: Tensor = out.transpose(1, 2)
        return heads_first

    return run


def _find_flash2() -> Callable[..., Any]:
    module = _module("flash_attn", "flash-attn")
    if not hasattr(module, "flash_attn_func"):  # 1 has other functions, 4 lives in a folder of the same name
        raise ImportError("the package flash_attn has no flash_attn_func; install flash-attn 2, or choose auto or sdpa")
    function: Callable[..., Any] = module.flash_attn_func
    return function


def _find_flash3() -> Callable[..., Any]:
    where = "flash_attn_interface"
    if importlib.util.find_spec(where) is None and importlib.util.find_spec("flash_attn_3") is not None:
        where = "flash_attn_3.flash_attn_interface"
    function: Callable[..., Any] = _module(where, "flash_attn_interface (FlashAttention 3)").flash_attn_func
    return function


# ---- SageAttention ---------------------------------------------------------------------------------------------------


def _sage1(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, lengths: Lengths | None) -> Tensor:
    # It would subtract the keys' mean in place; the softmax does not see a common shift, so it is given keys without one.
    k = k - k.mean(dim=2, keepdim=True)
    with on_device(q.device):
        out: Tensor = _found["sage1"](
            dense(q), dense(k), dense(v), tensor_layout="HND", is_causal=False, sm_scale=scale, smooth_k=False
        )
    return out


def _sage2(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, lengths: Lengths | None) -> Tensor:
    with on_device(q.device):  # it sets the device itself, and never back
        out: Tensor = _found["sage2"](dense(q), dense(k), dense(v), tensor_layout="HND", is_causal=False, sm_scale=scale)
    return out


def _find_sage(version: int) -> Callable[[], Callable[..., Any]]:
    def find() -> Callable[..., Any]:
        module = _module("sageattention", f"sageattention {version}")
        installed = 2 if hasattr(module, "sageattn_qk_int8_pv_fp16_cuda") else 1
        if installed != version:
            raise ImportError(
                f"the installed sageattention is version {installed}; choose sage{installed}, or install version {version}"
            )
        function: Callable[..., Any] = module.sageattn
        return function

    return find


def _sage1_elements(call: Call, found: Machine) -> Refusal | None:
    if call.elements < 1 << 31:
        return None
    return Refusal(
        "size",
        f"attention kernel sage1 counts elements in 32 bits, and q or k has {call.elements}; use a smaller batch, or choose auto",
    )


def _sage2_ragged(call: Call, found: Machine) -> Refusal | None:
    """On 8.6 it runs a Triton kernel that did not mask the rest of a block before 2.2."""
    unmasked = found.capability == (8, 6) and call.keys % 64
    return ragged(KERNELS["sage2"], call.keys, 64) if unmasked else None


# ---- FlexAttention ---------------------------------------------------------------------------------------------------

_BLOCK = 128


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, lengths: Lengths | None) -> Tensor:
    rows = (k.shape[2],) * k.shape[0] if lengths is None else lengths
    blocks = key_blocks(rows, q.shape[2], k.shape[2], q.device)
    try:
        out: Tensor = _found["flex"](q, k, v, scale=scale, block_mask=blocks)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # it is compiled for each kind of shape, and on CPUs some do not compile (one head, several rows)
        said = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
        raise KernelError(
            f"attention kernel flex does not compile for q {tuple(q.shape)} and {k.shape[2]} keys ({said}); choose auto or sdpa"
        ) from error
    return out


@functools.lru_cache(maxsize=8)
def key_blocks(lengths: Lengths, queries: int, keys: int, device: torch.device) -> Any:
    """Which blocks of keys each row attends to, from its number of valid keys; no mask over queries x keys is made. Blocks past
    the last valid key are never visited."""
    from torch.nn.attention.flex_attention import BlockMask

    valid = torch.tensor(lengths, dtype=torch.int32, device=device)
    wide, tall = -(-keys // _BLOCK), -(-queries // _BLOCK)
    whole, parts = valid // _BLOCK, (valid % _BLOCK > 0).to(torch.int32)

    def spread(x: Tensor) -> Tensor:
        """(B, ...) to (B, 1, blocks of queries, ...)."""
        return x[:, None, None].expand(-1, 1, tall, *x.shape[1:]).contiguous()

    order = torch.arange(wide, dtype=torch.int32, device=device).expand(len(lengths), wide)
    from_part = (order + whole[:, None]) % wide  # a row's one block that is valid in part comes first
    return BlockMask.from_kv_blocks(
        spread(parts),
        spread(from_part),
        spread(whole),
        spread(order),
        BLOCK_SIZE=_BLOCK,
        mask_mod=lambda row, head, query, key: key < valid[row],
        seq_lengths=(queries, keys),
    )


def _find_flex() -> Callable[..., Any]:
    """Compiled: as it is, FlexAttention computes all N x N scores at once."""
    from torch.nn.attention.flex_attention import flex_attention

    # Without fullgraph a shape too many would fall back to that in silence.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _flex_compiler(call: Call, found: Machine) -> Refusal | None:
    lacks = None
    if found.kind == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        lacks = "a C++ compiler"
    if found.kind != "cpu" and importlib.util.find_spec("triton") is None:
        lacks = "the package triton"
    cure = "install it, or choose auto or sdpa"
    return None if lacks is None else Refusal("compiler", f"attention kernel flex is compiled and needs {lacks}; {cure}")


# ---- the table -------------------------------------------------------------------------------------------------------

_HALF = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
_EIGHTS = range(8, 257, 8)

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("sdpa", _sdpa, {torch.float32: 1e-5, torch.float64: 1e-5, **_HALF}, masks=True),
        Kernel("products", _products, {torch.bfloat16: 1e-2}, kinds=("cpu",), overwrites=True, further=_no_bfloat16),
        Kernel(
            "sdpa-cudnn",
            _sdpa_by(SDPBackend.CUDNN_ATTENTION),
            _HALF,
            kinds=("cuda",),
            capability_from=(8, 0),
            head_dims=range(8, 129, 8),
            least=2,
        ),
        Kernel(
            "sdpa-flash",
            _sdpa_by(SDPBackend.FLASH_ATTENTION),
            _HALF,
            kinds=("cuda", "rocm"),
            capability_from=(8, 0),
            head_dims=_EIGHTS,
        ),
        Kernel(
            "flash2",
            _flash("flash2"),
            _HALF,
            kinds=("cuda", "rocm"),
            capability_from=(8, 0),
            head_dims=_EIGHTS,
            package="flash-attn",
            find=_keep("flash2", _find_flash2),
        ),
        Kernel(
            "flash3",
            _flash("flash3"),
            _HALF,
            kinds=("cuda",),
            capabilities=((9, 0),),
            head_dims=_EIGHTS,
            package="flash_attn_interface (FlashAttention 3)",
            find=_keep("flash3", _find_flash3),
        ),
        Kernel(
            "flex",
            _flex,
            {torch.float32: 1e-5, **_HALF},
            kinds=("cpu", "cuda", "rocm"),
            head_dims=range(16, 257, 16),
            ragged=True,
            differentiable=False,
            find=_keep("flex", _find_flex),
            further=_flex_compiler,
        ),
        Kernel(
            "sage1",
            _sage1,
            {torch.bfloat16: 0.03, torch.float16: 0.03},
            lossy=True,
            kinds=("cuda",),
            capability_from=(8, 0),
            head_dims=range(64, 129, 32),
            key_multiple=64,
            ragged_from=16_384,
            differentiable=False,
            package="sageattention 1",
            find=_keep("sage1", _find_sage(1)),
            further=_sage1_elements,
        ),
        Kernel(
            "sage2",
            _sage2,
            {torch.bfloat16: 0.08, torch.float16: 0.08},
            lossy=True,
            kinds=("cuda",),
            capabilities=((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)),
            head_dims=range(8, 129, 8),
            differentiable=False,
            package="sageattention 2",
            find=_keep("sage2", _find_sage(2)),
            further=_sage2_ragged,
        ),
    )
}


def exact_order(found: Machine) -> tuple[str, ...]:
    """What `auto` tries on a machine, the fastest first: exact kernels alone, and `sdpa`, which runs everywhere, last."""
    if found.kind == "cpu":
        return ("products", "sdpa")
    if found.kind == "rocm":
        return ("flash2", "sdpa-flash", "sdpa")
    if found.capability is None:
        return ("sdpa",)
    if found.capability >= (9, 0):
        return ("flash3", "sdpa-cudnn", "flash2", "sdpa-flash", "sdpa")
    return ("flash2", "sdpa-flash", "sdpa-cudnn", "sdpa")
