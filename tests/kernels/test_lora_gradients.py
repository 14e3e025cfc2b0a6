"""lora_gradients: dS, dA and dB of one bordered linear."""

from __future__ import annotations

import pytest
import torch
from check import normal, poisoned, strided, surroundings_untouched, within_budget

from mint_engine.kernels import lora_gradients

# M, N of each stacked module, K, rank
CASES = [
    (1, (1,), 1, 1),
    (7, (63,), 5, 16),
    (40, (96, 32, 33), 70, 3),
    (300, (100, 257), 63, 8),
    (1100, (48,), 130, 20),
]
SCALE = 0.5


def made(case: tuple, dtype: torch.dtype) -> tuple:
    m, ns, k, r = case
    dy, s = normal(m, sum(ns), seed=1, dtype=dtype), normal(m, len(ns) * r, seed=2, dtype=dtype)
    b = [normal(n, r, seed=3 + j, dtype=dtype, scale=0.1) for j, n in enumerate(ns)]
    return dy, s, b, normal(m, k, seed=9, dtype=dtype)


def plain(dy: torch.Tensor, s: torch.Tensor, b: list, ds: torch.Tensor | None = None) -> tuple:
    """(dS, dB) of the modules; with ``ds`` their dS is not computed."""
    r, parts = b[0].shape[1], dy.split([len(t) for t in b], 1)
    if ds is None:
        ds = torch.cat([SCALE * (part @ b_j) for part, b_j in zip(parts, b, strict=True)], 1)
    return ds, [part.T @ s[:, j * r : (j + 1) * r] for j, part in enumerate(parts)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_x", [True, False])
def test_matches_float64(face: str, dtype: torch.dtype, case: tuple, with_x: bool) -> None:
    m, ns, k, r = case
    dy, s, b, x = made(case, dtype)
    ds = poisoned(m, len(ns) * r, dtype)
    start = [normal(n, r, seed=20 + j) for j, n in enumerate(ns)]
    db, da_start = [strided(t) for t in start], normal(len(ns) * r, k, seed=30)
    da = strided(da_start)
    wide = {"x": strided(x), "da": da} if with_x else {}
    lora_gradients(strided(dy), strided(s), [strided(t) for t in b], SCALE, ds=ds, db=db, **wide, face=face)
    for out in (ds, *db, da):
        assert surroundings_untouched(out)
    exact_ds, exact_db = plain(dy.double(), s.double(), [t.double() for t in b])
    within_budget("ds", ds, exact_ds, plain(dy, s, b)[0])
    _, fp32_db = plain(dy.float(), s.float(), [t.float() for t in b], ds)
    for j, t in enumerate(start):
        within_budget(f"db[{j}]", db[j], t.double() + exact_db[j], t + fp32_db[j])
    if with_x:  # of the rounded dS: what rounding it costs is dS's own error
        within_budget("da", da, da_start.double() + ds.double().T @ x.double(), da_start + ds.float().T @ x.float())
    else:
        assert torch.equal(da, da_start)


@pytest.mark.parametrize("case", [*CASES, (50, (40, 100, 20), 9, 20), (300, (1100, 520, 600), 9, 16)])
def test_modules_in_one_border_are_those_apart(face: str, dtype: torch.dtype, case: tuple) -> None:
    """As the decoder has them: B the diagonal blocks of a border, dB one after the other in a flat buffer."""
    m, ns, _, r = case
    dy, s, b, _ = made(case, dtype)
    border, flat = poisoned(sum(ns), 4 + len(ns) * r, dtype)[:, 4:], normal(sum(ns) * r, seed=20)
    start, rows = flat.clone().view(-1, r).split(ns), border.split(ns)
    for j, (rows_j, b_j) in enumerate(zip(rows, b, strict=True)):
        rows_j[:, j * r : (j + 1) * r] = b_j
    placed = [rows_j[:, j * r : (j + 1) * r] for j, rows_j in enumerate(rows)]
    ds, db = poisoned(m, len(ns) * r, dtype), list(flat.view(-1, r).split(ns))
    lora_gradients(strided(dy), strided(s), placed, SCALE, ds=ds, db=db, face=face)
    assert surroundings_untouched(ds)
    exact_ds, exact_db = plain(dy.double(), s.double(), [t.double() for t in b])
    within_budget("ds", ds, exact_ds, plain(dy, s, b)[0])
    _, fp32_db = plain(dy.float(), s.float(), [t.float() for t in b], ds)
    for j, t in enumerate(start):
        within_budget(f"db[{j}]", db[j], t.double() + exact_db[j], t + fp32_db[j])


def test_a_nan_stays_in_its_row_of_ds(face: str, dtype: torch.dtype) -> None:
    dy, s, b, _ = made((40, (96, 32), 8, 16), dtype)
    dy[3, 5] = float("nan")
    ds = torch.empty(40, 32, dtype=dtype)
    lora_gradients(dy, s, b, SCALE, ds=ds, db=[torch.zeros(96, 16), torch.zeros(32, 16)], face=face)
    bad = ds.isnan()
    assert bad[3, :16].all()
    assert not bad[3, 16:].any()
    assert not bad[[i for i in range(40) if i != 3]].any()


def test_no_rows_add_nothing(face: str, dtype: torch.dtype) -> None:
    dy, s, b, x = made((0, (70,), 8, 3), dtype)
    db, da = torch.ones(70, 3), torch.ones(3, 8)
    lora_gradients(dy, s, b, SCALE, ds=torch.empty(0, 3, dtype=dtype), db=[db], x=x, da=da, face=face)
    assert (db == 1).all()
    assert (da == 1).all()


def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    dy, s, b, x = made((700, (513, 96), 200, 16), dtype)

    def run(threads: int) -> list[torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        ds, db, da = torch.empty(700, 32, dtype=dtype), [torch.zeros(n, 16) for n in (513, 96)], torch.zeros(32, 200)
        lora_gradients(dy, s, b, SCALE, ds=ds, db=db, x=x, da=da)
        torch.set_num_threads(before)
        return [ds, *db, da]

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


def test_what_does_not_fit_is_named() -> None:
    dy, s, b, x = made((4, (6, 2), 5, 3), torch.float32)
    ds, db = torch.empty(4, 6), [torch.zeros(6, 3), torch.zeros(2, 3)]
    with pytest.raises(ValueError, match=r"b: expected 8 rows in all, as many as dy has columns, got \[6\]"):
        lora_gradients(dy, s, b[:1], SCALE, ds=ds, db=db[:1])
    with pytest.raises(ValueError, match=r"db\[1\]: expected torch.float32 \[2, 3\], got torch.float32 \[6, 3\]"):
        lora_gradients(dy, s, b, SCALE, ds=ds, db=[db[0], db[0]])
    with pytest.raises(ValueError, match=r"db\[0\]: expected rows without gaps, got strides \[1, 6\]"):
        lora_gradients(dy, s, b, SCALE, ds=ds, db=[torch.zeros(3, 6).T, db[1]])
    with pytest.raises(ValueError, match=r"da: expected rows without gaps, got strides \[1, 6\] \(lora_gradients\)"):
        lora_gradients(dy, s, b, SCALE, ds=ds, db=db, x=x, da=torch.zeros(x.shape[1], 6).T)
    with pytest.raises(ValueError, match="da: expected x and da both given or both None"):
        lora_gradients(dy, s, b, SCALE, ds=ds, db=db, x=x)
