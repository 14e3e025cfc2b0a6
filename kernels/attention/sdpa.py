"""Two more kernels that come with torch, as `library.py` calls them: cuDNN's behind SDPA, and FlexAttention's.

Neither takes packed sequences as they are. SDPA is launched once a sequence, so its bounds must be known on the host;
of its backends cuDNN's is called, as the others are the kernels of torch.nn.attention.varlen with more launches, or
slower ones. FlexAttention takes a mask: of blocks that no sequence crosses, made from the bounds on the device at every
call. Its lse serves any backward; its own would compute the forward again, and does not exist on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def _sequences(cu: Tensor) -> Iterator[slice]:
    return (slice(a, b) for a, b in pairwise(cu.tolist()) if a < b)


def _dense(t: Tensor, rows: slice) -> Tensor:
    """[M, heads, d] -> [1, heads, rows, d]."""
    return t[rows].transpose(0, 1)[None]


def sdpa_forward(m: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> Any:
    """``cu`` on the host. On a CPU (for tests) the backend is torch's own for CPUs."""
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], len(q), dtype=torch.float32, device=q.device)
    for rows in _sequences(cu):
        heads = [_dense(t, rows) for t in (q, k, v)]
        if q.is_cpu:
            made, total = _aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True, scale=scale)
        else:
            made, total, *_ = _aten._scaled_dot_product_cudnn_attention(
                *heads, None, True, 0.0, True, False, scale=scale
            )
        o[rows] = made[0].transpose(0, 1)
        lse[:, rows] = total.view(lse[:, rows].shape)
    return o, lse


def sdpa_backward(
    m: Any, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu: Tensor, longest: int,
    scale: float, grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    for rows in _sequences(cu):
        heads, n = [_dense(t, rows) for t in (do, q, k, v, o)], rows.stop - rows.start
        total = lse[:, rows].contiguous()[None]
        if q.is_cpu:
            made = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads, total, 0.0, True, scale=scale)
        else:
            state = torch.zeros(2, dtype=torch.int64, device=q.device)  # of the dropout that there is none of
            made = _aten._scaled_dot_product_cudnn_attention_backward(
                *heads, total[..., None], state[0], state[1], None, None, None, n, n, 0.0, True, scale=scale
            )
        for out, grad in zip(grads, made, strict=True):
            out[rows] = grad[0].transpose(0, 1)


@cache
def _flex(compiled: bool) -> Callable[..., Any]:
    """Uncompiled, which is right and keeps all scores, where there is no GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    found: Callable[..., Any] = flex_attention
    return torch.compile(found, dynamic=False) if compiled else found


def flex_forward(m: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> Any:
    rows = len(q)
    sequence = torch.searchsorted(cu[1:], torch.arange(rows, device=q.device, dtype=cu.dtype), right=True)

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (sequence[query] == sequence[key]) & (query >= key)

    mask = m.create_block_mask(sees, None, None, rows, rows, device=q.device)
    every = slice(0, rows)
    o, kept = _flex(not q.is_cpu)(
        _dense(q, every), _dense(k, every), _dense(v, every), block_mask=mask, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1], return_aux=m.AuxRequest(lse=True),
    )  # fmt: skip
    return o[0].transpose(0, 1), kept.lse[0]
