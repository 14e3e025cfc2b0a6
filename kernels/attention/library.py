"""Attention kernels of installed libraries, for packed sequences on a GPU: which one runs, and how it is called.

A row of `kernels/plans` may name one, for the forward and for the backward: ``python -m benchmarks.gpu`` times them
and keeps what is right and fastest. Without (0), and where the named one is not installed, the first of `LIBRARIES`
that is runs; where there is none, and for what they cannot take (heads over 256, float32, sequences with more keys than
queries), our own Triton kernels. Chosen once for each kind of GPU; `mint-engine doctor` says what and why. All of them
attend from the last query backwards, as this op does, give ``lse [n_q, M]`` and take grouped heads as they are, so a
forward of one serves the backward of another.

Ours is deterministic. So are flash-attn's as called here; torch's backward adds up dq in no fixed order.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mint_engine.kernels.attention import sdpa
from mint_engine.kernels.attention.bounds import Bounds
from mint_engine.kernels.gpu_plan import Row, Tunable

# q, k, v [M, heads, d], bounds on the device, longest sequence, scale -> o [M, n_q, d], lse [n_q, M]
Forward = Callable[[Any, Tensor, Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]
# the module, do, q, k, v, o, lse, bounds, longest, scale, (dq, dk, dv) to write into
Backward = Callable[..., None]


@dataclass(frozen=True)
class Library:
    """``module`` is what must be importable; ``needs`` the functions it must have, with these parameters.

    ``backward``: None where it has none that takes o and lse. ``on_host``: its bounds must be known when launched.
    """

    name: str
    module: str
    needs: dict[str, tuple[str, ...]]
    oldest: int  # compute capability
    newest: int
    forward: Forward
    backward: Backward | None
    on_host: bool = False


def _fa3_forward(m: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> Any:
    o, lse, *_ = m._flash_attn_forward(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, softmax_scale=scale,
        causal=True,
    )  # fmt: skip
    return o, lse


def _fa3_backward(
    m: Any, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu: Tensor, longest: int,
    scale: float, grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    dq, dk, dv = grads
    m._flash_attn_backward(
        do, q, k, v, o, lse, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, dq=dq, dk=dk,
        dv=dv, softmax_scale=scale, is_causal=True, deterministic=True,
    )  # fmt: skip


def _fa2_forward(m: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> Any:
    o, lse, *_ = m._flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, dropout_p=0.0,
        softmax_scale=scale, causal=True,
    )  # fmt: skip
    return o, lse


def _fa2_backward(
    m: Any, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu: Tensor, longest: int,
    scale: float, grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    dq, dk, dv = grads
    m._flash_attn_varlen_backward(
        do, q, k, v, o, lse, dq=dq, dk=dk, dv=dv, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest,
        max_seqlen_k=longest, dropout_p=0.0, softmax_scale=scale, causal=True, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=True,
    )  # fmt: skip


def _torch_forward(m: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> Any:
    """What torch.nn.attention.varlen calls, without its wrapper."""
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, 0.0, True, False, scale=scale
    )
    return o, lse


def _torch_backward(
    m: Any, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu: Tensor, longest: int,
    scale: float, grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    made = torch.ops.aten._flash_attention_backward(
        do, q, k, v, o, lse, cu, cu, longest, longest, 0.0, True, state, unused, scale=scale
    )
    for out, grad in zip(grads, made, strict=True):
        out.copy_(grad)


_FA3 = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale")
_FA2 = (*_FA3, "dropout_p", "causal", "window_size_left", "window_size_right", "softcap", "alibi_slopes")
LIBRARIES = (
    Library(
        "flash-attn 3", "flash_attn_interface",
        {"_flash_attn_forward": (*_FA3, "causal"), "_flash_attn_backward": (*_FA3, "dq", "is_causal", "deterministic")},
        90, 90, _fa3_forward, _fa3_backward,
    ),
    Library(
        "flash-attn 2", "flash_attn.flash_attn_interface",
        {"_flash_attn_varlen_forward": _FA2, "_flash_attn_varlen_backward": (*_FA2, "dq", "deterministic")},
        80, 120, _fa2_forward, _fa2_backward,
    ),
    Library(
        "torch.nn.attention.varlen", "torch.nn.attention.varlen", {"varlen_attn": ("cu_seq_q", "max_q")}, 80, 120,
        _torch_forward, _torch_backward,
    ),
)  # fmt: skip

# What only a row can name: behind our own kernels, until somebody has measured otherwise.
MEASURED = (
    *LIBRARIES,
    Library(
        "cuDNN (SDPA)", "torch.backends.cudnn", {}, 80, 120, sdpa.sdpa_forward, sdpa.sdpa_backward, on_host=True
    ),
    Library(
        "FlexAttention", "torch.nn.attention.flex_attention",
        {"flex_attention": ("block_mask", "enable_gqa", "return_aux"), "create_block_mask": ("Q_LEN", "device")},
        80, 120, sdpa.flex_forward, None,
    ),
)  # fmt: skip
OURS = len(MEASURED) + 1


def _lacking(row: Row, arch: int) -> str | None:
    use = row["use"]
    found = None if use in (0, OURS) else lacks(MEASURED[use - 1], arch)
    return found if isinstance(found, str) else None


def _tunable(name: str, *, backward: bool) -> Tunable:
    """``use``: 0 for the first of `LIBRARIES` that is installed, 1 and on for one of `MEASURED`, `OURS`."""
    named = [i for i, library in enumerate(MEASURED, 1) if library.backward is not None or not backward]
    return Tunable(name, {"use": (0, *named, OURS)}, cases=(64, 128, 256), lacking=_lacking)


FORWARD = _tunable("attention.library", backward=False)
BACKWARD = _tunable("attention.library_backward", backward=True)


def lacks(library: Library, arch: int) -> ModuleType | str:
    """The library's module, or why it cannot be used on a GPU of compute capability ``arch``."""
    if not library.oldest <= arch <= library.newest:
        return f"for compute capability {library.oldest / 10:.1f} to {library.newest / 10:.1f}"
    try:
        module = importlib.import_module(library.module)
    except ImportError as error:  # also one whose binary does not load
        found = isinstance(error, ModuleNotFoundError) and library.module.startswith(str(error.name))
        return "not installed" if found else f"cannot be loaded: {error}"
    for function, parameters in library.needs.items():
        if not hasattr(module, function):
            return f"a version without {function}"
        present = _parameters(getattr(module, function))
        missing = [p for p in parameters if p not in present]
        if missing:
            return f"a version whose {function} has no {missing[0]}"
    return module


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    """Also of a function that torch.library.custom_op has wrapped, as flash-attn's are: a wrapper takes anything."""
    return inspect.signature(getattr(function, "_init_fn", function)).parameters


@cache
def chosen(arch: int, use: int = 0) -> tuple[Library, ModuleType] | None:
    """What a row's ``use`` comes to here; None: our own kernels."""
    if use == OURS:
        return None
    for library in (*((MEASURED[use - 1],) if use else ()), *LIBRARIES):
        module = lacks(library, arch)
        if not isinstance(module, str):
            return library, module
    return None


def report(arch: int) -> str:
    """A line for people: what attention runs on, and why not on what stands before it."""
    named = [tunable.row(arch, 128)["use"] if arch >= 80 else 0 for tunable in (FORWARD, BACKWARD)]
    said = [_report(arch, use) for use in named]
    return said[0] if named[0] == named[1] else f"forward {said[0]}; backward {said[1]}"


def _report(arch: int, use: int) -> str:
    rejected, found = [], chosen(arch, use)
    if use == OURS:
        return "our own Triton kernels (by kernels/plans)"
    for library in (*((MEASURED[use - 1],) if use else ()), *LIBRARIES):
        module = lacks(library, arch)
        if not isinstance(module, str):
            break
        rejected.append(f"{library.name}: {module}")
    why = f" ({'; '.join(rejected)})" if rejected else ""
    return f"{'our own Triton kernels' if found is None else found[0].name}{why}"


def library_for(
    q: Tensor, d: int, cu_seqlens: Tensor | Bounds, cu_keys: Tensor | Bounds, *, backward: bool = False
) -> tuple[Library, ModuleType] | None:
    """What attends for this call, or None for our own kernels."""
    fits = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and d % 8 == 0 and d <= 256
    if not fits or cu_keys is not cu_seqlens or not len(q):
        return None
    major, minor = torch.cuda.get_device_capability(q.device)
    arch = 10 * major + minor
    if arch < 80:
        return None
    return usable(arch, (BACKWARD if backward else FORWARD).row(arch, d)["use"], cu_seqlens)


def usable(arch: int, use: int, cu_seqlens: Tensor | Bounds) -> tuple[Library, ModuleType] | None:
    """What a row's ``use`` comes to for these bounds: one that needs them on the host is not for captured passes."""
    found = chosen(arch, use)
    if found is not None and found[0].on_host and isinstance(cu_seqlens, Bounds):
        return chosen(arch)
    return found


@lru_cache(maxsize=64)
def _on_device(bounds: bytes, device: torch.device) -> tuple[Tensor, int]:
    cu = np.frombuffer(bounds, dtype=np.int32)
    return torch.tensor(cu, device=device), int(np.diff(cu).max(initial=0))


def _bounds(library: Library, cu_seqlens: Tensor | Bounds, device: torch.device) -> tuple[Tensor, int]:
    """The bounds, on the device or where the library wants them, and a length no sequence exceeds."""
    if library.on_host:
        assert isinstance(cu_seqlens, Tensor)
        return cu_seqlens, int(cu_seqlens.diff().max())
    if isinstance(cu_seqlens, Bounds):
        return cu_seqlens.device, cu_seqlens.rows
    return _on_device(cu_seqlens.numpy().tobytes(), device)


def _heads(t: Tensor, n: int) -> Tensor:
    return t.unflatten(1, (n, t.shape[1] // n))


def attention(
    use: tuple[Library, ModuleType], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | Bounds, n_q: int, n_kv: int,
    scale: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    library, module = use
    cu, longest = _bounds(library, cu_seqlens, q.device)
    heads = _heads(q, n_q), _heads(k, n_kv), _heads(v, n_kv)
    o, total = library.forward(module, *heads, cu, longest, scale)
    out.copy_(o.flatten(1))
    lse.copy_(total)


def attention_backward(
    use: tuple[Library, ModuleType], do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    cu_seqlens: Tensor | Bounds, n_q: int, n_kv: int, scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    library, module = use
    cu, longest = _bounds(library, cu_seqlens, q.device)
    grads = _heads(dq, n_q), _heads(dk, n_kv), _heads(dv, n_kv)
    heads = _heads(do, n_q), _heads(q, n_q), _heads(k, n_kv), _heads(v, n_kv), _heads(o, n_q)
    assert library.backward is not None  # no row names it for the backward
    library.backward(module, *heads, lse, cu, longest, scale, grads)
