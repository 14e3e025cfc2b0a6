"""Our own GEMM: every instruction set, both layouts, odd sizes, strides, threads, and independence of the company."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
import torch
from check import ISAS, normal, poisoned, strided, surroundings_untouched, within_budget

from mint_engine.kernels import op
from mint_engine.kernels.gemm import mm

# M, N, K: dot-product rows, tiles with rows and columns left over, an odd k (half a bf16 pair), several blocks of k, a
# k that is cut into pieces (csrc/gemm_long.h)
SHAPES = [
    (1, 1, 1), (1, 70, 33), (8, 50, 65), (9, 47, 64), (9, 97, 1), (17, 49, 257), (40, 130, 2101), (63, 200, 530),
    (13, 50, 17001),
]  # fmt: skip


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = op.native.isa()
    op.native.set_isa(request.param)
    yield request.param
    op.native.set_isa(before)


@pytest.fixture(params=["nt", "nn"])
def layout(request: pytest.FixtureRequest) -> str:
    """A weight [N, K] used transposed, or a row-major [K, N]."""
    return request.param


def operands(m: int, n: int, k: int, layout: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B amid NaN."""
    a, b = normal(m, k, seed=1, dtype=dtype), normal(k, n, seed=2, dtype=dtype, scale=max(k, 1) ** -0.5)
    return strided(a), strided(b.T).T if layout == "nt" else strided(b)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_match_float64(isa: str, dtype: torch.dtype, layout: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = operands(m, n, k, layout, dtype)
    bias, out = normal(n, seed=3, dtype=dtype), poisoned(m, n, dtype)
    assert mm(a, b, bias=bias, scale=0.75, out=out) is out
    exact = 0.75 * (a.double() @ b.double()) + bias.double()
    plain = 0.75 * (a.float() @ b.float()) + bias.float()  # bf16 is held to one rounding of fp32 sums
    within_budget("out", out, exact, plain.to(dtype))
    assert surroundings_untouched(out)


def test_a_long_sum_of_more_columns_than_a_block_holds(isa: str) -> None:
    a, b = operands(3, 1300, 21000, "nn", torch.bfloat16)
    within_budget("out", mm(a, b), a.double() @ b.double(), (a.float() @ b.float()).to(torch.bfloat16))


def test_an_empty_sum_is_the_bias_and_no_rows_are_nothing(isa: str, dtype: torch.dtype, layout: str) -> None:
    for m in (3, 20):
        a, b = operands(m, 5, 0, layout, dtype)
        assert torch.equal(mm(a, b, bias=torch.ones(5, dtype=dtype)), torch.ones(m, 5, dtype=dtype))
    a, b = operands(0, 5, 4, layout, dtype)
    assert mm(a, b).shape == (0, 5)


@pytest.mark.parametrize("shape", [(70, 300, 600), (1030, 60, 40), (16, 10, 3000), (20, 70, 16500)])
def test_threads_do_not_change_a_bit(isa: str, dtype: torch.dtype, layout: str, shape: tuple[int, int, int]) -> None:
    a, b = operands(*shape, layout, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mm(a, b))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_row_does_not_depend_on_its_company(isa: str, dtype: torch.dtype, layout: str) -> None:
    """From 9 rows on the bits of a row are the same in any batch (fewer meet a transposed weight as dot products)."""
    a, b = operands(600, 100, 700, layout, dtype)
    whole = mm(a, b)
    for start, stop in ((0, 9), (5, 22), (100, 163), (88, 600)):
        assert torch.equal(mm(a[start:stop], b), whole[start:stop])


@pytest.fixture
def tiles() -> Iterator[None]:
    if "amx" not in ISAS:
        pytest.skip("this CPU has no tiles")
    before = op.native.isa()
    op.native.set_isa("amx")
    yield
    op.native.set_isa(before)


@pytest.mark.parametrize("k", [64, 70, 33, 2100])
@pytest.mark.parametrize("bf16", [0, 32, 3000])
def test_in_tiles_a_row_is_the_same_bits_alone(tiles: None, dtype: torch.dtype, k: int, bf16: int) -> None:
    """Also in few rows, and whether the weight is packed or read where it lies (gemm_turned of csrc/gemm.h); its first
    `bf16` elements are bf16 in any dtype."""
    a, b = operands(100, 150, k, "nt", dtype)
    b[:bf16] = b[:bf16].to(torch.bfloat16).to(dtype)
    whole, packed = mm(a, b), mm(a, b.contiguous())
    assert torch.equal(whole, packed)
    for start, stop in ((0, 1), (7, 15), (40, 100), (99, 100)):
        assert torch.equal(mm(a[start:stop], b), whole[start:stop])
        assert torch.equal(mm(a[start:stop], b.contiguous()), whole[start:stop])


@pytest.mark.parametrize("m", [3, 40, 300])
def test_in_tiles_the_other_columns_precision_changes_no_bit(tiles: None, layout: str, m: int) -> None:
    """Where a block of columns is bf16, fewer products are made of it (csrc/split_panels.h)."""
    a, b = operands(m, 150, 700, layout, torch.float32)
    b.copy_(b.to(torch.bfloat16))
    exact = mm(a, b)
    for some in (slice(500, None), slice(None, 40), slice(None)):  # of k
        mixed = b.clone(memory_format=torch.preserve_format)
        mixed[some, 7::32] += 1e-3
        others = [j for j in range(150) if j % 32 != 7]
        assert torch.equal(mm(a, mixed)[:, others], exact[:, others])
        assert not torch.equal(mm(a, mixed), exact)


def test_in_tiles_float32_is_as_exact_as_without(tiles: None, layout: str) -> None:
    a, b = operands(50, 150, 3000, layout, torch.float32)
    b *= torch.logspace(-12, 12, 150)
    exact = a.double() @ b.double()
    errors = {}
    for isa in ("amx", "avx512"):
        op.native.set_isa(isa)
        errors[isa] = ((mm(a, b) - exact) / exact.std(0)).pow(2).mean().sqrt()
    assert errors["amx"] < errors["avx512"]  # 1.0e-7 and 2.2e-7


NAN_OF_ONES = struct.unpack("<f", b"\xff\xff\xff\x7f")[0]  # rounded up as a number it would be -0.0


@pytest.mark.parametrize("value", [float("nan"), NAN_OF_ONES, float("inf")], ids=["nan", "nan of ones", "inf"])
def test_what_is_not_finite_stays_in_its_row(isa: str, dtype: torch.dtype, layout: str, value: float) -> None:
    a, b = operands(20, 60, 33, layout, dtype)
    a[7, 32] = value
    out = mm(a, b)
    assert not out[7].isfinite().any()
    assert out[[i for i in range(20) if i != 7]].isfinite().all()


def test_strides_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"b: expected a row stride of at least 9, got 4 \(matmul\)"):
        op.native.matmul(0, 0, 9, 0, 4, 1, 0, 0, 6, 2, 6, 9, 1.0)
    with pytest.raises(ValueError, match=r"out: expected a row stride of at least 6, got 3 \(matmul\)"):
        op.native.matmul(0, 0, 9, 0, 9, 1, 0, 0, 3, 2, 6, 9, 1.0)


def test_the_peak_counts_its_flop(isa: str, dtype: torch.dtype) -> None:
    flop, sink = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=dtype)
    for rounds in (10, 30):
        op.native.peak(op.NATIVE_DTYPES[dtype], sink.data_ptr(), rounds, flop.data_ptr())
    per_round = flop.item() / 40 / torch.get_num_threads()
    assert per_round > 0
    assert per_round == int(per_round)
    assert sink.isfinite().all()
