"""The one check every op's test goes through: each face against float64, within a budget, from hostile memory.

Inputs are views into wider buffers whose other columns are NaN (a read outside the view poisons the result), outputs
are views filled with NaN (an element never written shows), and what surrounds an output must still be NaN afterwards.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from mint_engine.kernels import op

ISAS = [] if op.native is None else list(op.native.isas())
# Where there is no GPU, tests/conftest.py has Triton's interpreter run the triton faces.
TRITON = [] if find_spec("triton") is None else ["triton"]
FACES = ["reference", *(f"cpu-{isa}" for isa in ISAS), *TRITON]

# Two computations that round at the same places differ by about the error of one of them; three times covers
# another order of summation.
FACTOR = 3.0


def strided(t: torch.Tensor, pad: int = 5) -> torch.Tensor:
    """A copy of a 2-D ``t`` as a view into a wider buffer that is NaN elsewhere; its row stride is wider than a row."""
    wide = torch.full((t.shape[0], t.shape[1] + pad), float("nan"), dtype=t.dtype)
    view = wide[:, : t.shape[1]]
    view.copy_(t)
    return view


def poisoned(rows: int, columns: int, dtype: torch.dtype, pad: int = 3) -> torch.Tensor:
    """An output view ``[rows, columns]``, all NaN, inside a wider NaN buffer."""
    return torch.full((rows, columns + pad), float("nan"), dtype=dtype)[:, :columns]


def surroundings_untouched(view: torch.Tensor) -> bool:
    """Whether the columns beside a ``poisoned`` view are still NaN."""
    base = view._base
    assert base is not None
    return bool(base[:, view.shape[1] :].isnan().all())


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference, in float64."""
    if exact.numel() == 0:
        return 0.0
    return float((got.double() - exact.double()).abs().max())


def within_budget(name: str, got: torch.Tensor, exact: torch.Tensor, *plain: torch.Tensor) -> None:
    """``got`` is finite, and its error at most FACTOR times that of ``plain``: the same in plain torch, working dtype.
    Of several (other orders of summation), the one furthest off.

    Where plain torch happens to be nearly exact (few elements), the floor is half an ulp of the largest value for
    bfloat16, the rounding of the output itself; an ulp for fp32, where the inner steps round as coarsely.
    """
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}"
    assert bool(got.isfinite().all()), f"{name}: not finite"
    if exact.numel() == 0:
        return
    ulps = 0.5 if got.dtype is torch.bfloat16 else 1.0
    floor = float(exact.abs().max()) * torch.finfo(got.dtype).eps * ulps
    allowed = FACTOR * max(floor, *(error(p, exact) for p in plain))
    assert error(got, exact) <= allowed, f"{name}: error {error(got, exact):.3e}, allowed {allowed:.3e}"


def chained(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x @ w.T``, each sum a chain in fp32, rounded once: a plain product without vectors. Libraries may be closer."""
    sums = torch.zeros(len(x), len(w))
    for k in range(x.shape[1]):
        sums += x[:, k, None].float() * w[:, k].float()
    return sums.to(x.dtype)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Reproducible normal values, rounded to ``dtype``, on the default device (conftest.py)."""
    values = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu") * scale
    return values.to(torch.get_default_device(), dtype)
