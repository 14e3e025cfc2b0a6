"""embedding: rows of a table."""

from __future__ import annotations

import pytest
import torch
from check import TRITON, normal, poisoned, strided, surroundings_untouched

from mint_engine.kernels import embedding


@pytest.mark.parametrize("width", [1, 63, 100, 2000])
def test_rows_are_copied_bit_by_bit(face: str, dtype: torch.dtype, width: int) -> None:
    table, tokens = normal(7, width, seed=1, dtype=dtype), torch.tensor([6, 0, 0, 3, 5])
    out = poisoned(5, width, dtype)
    assert embedding(tokens, strided(table), out=out, face=face) is out
    assert torch.equal(out, table[[6, 0, 0, 3, 5]])
    assert surroundings_untouched(out)
    assert torch.equal(embedding(tokens, table, face=face), out)
    assert embedding(tokens[:0], table, face=face).shape == (0, width)


def test_a_token_outside_the_table_is_refused() -> None:
    for bad in (-1, 4):
        with pytest.raises(IndexError, match=r"tokens: expected 0 to 3, got .* \(embedding\)"):
            embedding(torch.tensor([1, bad]), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"tokens: expected torch.int64 \[M\], got torch.int32 \[1\]"):
        embedding(torch.zeros(1, dtype=torch.int32), torch.zeros(4, 2))


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
@pytest.mark.usefixtures("for_triton")
def test_where_it_cannot_be_refused_its_row_is_nan() -> None:
    from mint_engine.kernels.embedding.triton import embedding as gather

    out, table = torch.zeros(3, 2), torch.ones(4, 2)
    gather(torch.tensor([-1, 2, 4]), table, out)
    assert out[[0, 2]].isnan().all()
    assert (out[1] == 1).all()
