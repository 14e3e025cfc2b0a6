"""AdamW in Triton: one pass over the flat buffers, and over the places its result goes to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mint_engine.kernels.adamw.places import BLOCK, Places

# Their results go to the host, which waits for them whoever adds up: plain torch. (`gpu/stepper.py` has its own.)
from mint_engine.kernels.adamw.reference import adamw_largest, adamw_norm  # noqa: F401
from mint_engine.kernels.gpu_plan import Tunable
from mint_engine.kernels.triton_common import architecture, triton_reason

STEP = Tunable("adamw.step", {"BLOCK": (512, 1024, 2048, 4096), "warps": (4, 8), "stages": (1,)})
PLACES = Tunable("adamw.places", {"warps": (4, 8), "stages": (1,)})
WRITE = Tunable("adamw.write", {"warps": (4, 8), "stages": (1,)})
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def supports(param: torch.Tensor, *rest: torch.Tensor) -> str | None:
    """Why this face cannot run on these tensors, or None."""
    return triton_reason(param, *rest)


@triton.jit
def _update(param, grad, exp_avg, exp_avg_sq, at, inside, grad_scale, keep, new1, beta2, new2, root, eps, rate):
    """Updates the elements ``at`` and returns the new parameters."""
    g = tl.load(grad + at, mask=inside, other=0.0) * grad_scale
    p = tl.load(param + at, mask=inside, other=0.0) * keep
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    m += new1 * (g - m)
    v = beta2 * v + new2 * g * g
    p -= rate * tl.div_rn(m, tl.sqrt_rn(v) * root + eps)
    tl.store(param + at, p, mask=inside)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    return p


@triton.jit
def _step(
    param, grad, exp_avg, exp_avg_sq, n, grad_scale, keep, new1, beta2, new2, root, eps, rate, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _update(param, grad, exp_avg, exp_avg_sq, at, at < n, grad_scale, keep, new1, beta2, new2, root, eps, rate)


@triton.jit
def _to_place(values, row, at, inside, TYPE: tl.constexpr):
    """The values of the elements ``at`` into the view of their piece, whose ``row`` of the table this is."""
    origin, columns, stride, address = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    place = at - origin
    where = address.to(tl.pointer_type(TYPE)) + place // columns * stride + place % columns
    tl.store(where, values.to(TYPE), mask=inside & (address != 0))


@triton.jit
def _places(param, grad, exp_avg, exp_avg_sq, hyper, table, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    row = table + tl.program_id(0) * 6
    first, end = tl.load(row), tl.load(row + 1)
    at = first + tl.arange(0, BLOCK)
    inside = at < end
    what = tl.load(hyper + 8).to(tl.int32)
    step = inside & (what > 0)
    p = _update(
        param, grad, exp_avg, exp_avg_sq, at, step, tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2),
        tl.load(hyper + 3), tl.load(hyper + 4), tl.load(hyper + 5), tl.load(hyper + 6), tl.load(hyper + 7),
    )  # fmt: skip
    _to_place(p, row, at, step, TYPE)
    tl.store(grad + at, 0.0, mask=inside & (what != 0))


@triton.jit
def _write(param, table, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    row = table + tl.program_id(0) * 6
    at = tl.load(row) + tl.arange(0, BLOCK)
    inside = at < tl.load(row + 1)
    _to_place(tl.load(param + at, mask=inside, other=0.0), row, at, inside, TYPE)


def adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    n = param.numel()
    if n:
        meta = STEP.meta(architecture())
        # Differences near 1 are formed here, in float64, and rounded to fp32 once.
        _step[(triton.cdiv(n, meta["BLOCK"]),)](
            param, grad, exp_avg, exp_avg_sq, n, float(grad_scale), 1.0 - lr * weight_decay, 1.0 - beta1,
            float(beta2), 1.0 - beta2, (1.0 - beta2**step) ** -0.5, float(eps), lr / (1.0 - beta1**step),
            **meta,
        )  # fmt: skip


def adamw_places_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    hyper: torch.Tensor,
    places: Places,
) -> None:
    if len(places.table):
        _places[(len(places.table),)](
            param, grad, exp_avg, exp_avg_sq, hyper, places.table, BLOCK=BLOCK, TYPE=TYPES[places.dtype],
            **PLACES.meta(architecture()),
        )  # fmt: skip


def write_places_(param: torch.Tensor, places: Places) -> None:
    if len(places.table):
        _write[(len(places.table),)](
            param, places.table, BLOCK=BLOCK, TYPE=TYPES[places.dtype], **WRITE.meta(architecture())
        )
