"""attention where a sequence's first tokens have keys but no queries: a prompt computed in chunks."""

from __future__ import annotations

import pytest
import torch
from check import normal, poisoned, strided, surroundings_untouched, within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import bounds, plain
from torch import Tensor

from mint_engine.kernels import attention

# (keys, queries, n_q, n_kv, d): whole sequences beside tails, single queries, no queries, tails longer than a tile.
LAYOUTS = [
    ([30, 24, 7], [6, 24, 1], 9, 3, 64),
    ([0, 130, 5, 99], [0, 3, 0, 98], 2, 1, 16),
    ([500], [333], 6, 2, 34),
    ([97, 1], [96, 1], 3, 3, 128),
]


def tails(x: Tensor, keys: list[int], queries: list[int]) -> Tensor:
    """The last rows of each sequence."""
    parts = x.split(keys)
    return torch.cat([part[len(part) - n :] for part, n in zip(parts, queries, strict=True)])


@pytest.mark.parametrize(("keys", "queries", "n_q", "n_kv", "d"), LAYOUTS)
def test_the_queries_are_the_last_tokens(
    face: str, dtype: torch.dtype, keys: list[int], queries: list[int], n_q: int, n_kv: int, d: int
) -> None:
    q, k, v = (normal(sum(keys), n * d, seed=i, dtype=dtype) for i, n in enumerate((n_q, n_kv, n_kv)))
    own = tails(q, keys, queries)
    out = poisoned(len(own), n_q * d, dtype)
    heads = n_q, n_kv, d**-0.5
    o, lse = attention(
        strided(own), strided(k), strided(v), bounds(queries), *heads, cu_keys=bounds(keys), out=out, face=face
    )
    assert o is out
    assert surroundings_untouched(out)
    exact, exact_lse = plain(q.double(), k.double(), v.double(), keys, *heads)
    own_error, own_lse = plain(q, k, v, keys, *heads)[0], plain(q.float(), k.float(), v.float(), keys, *heads)[1]
    within_budget("o", o, tails(exact, keys, queries), tails(own_error, keys, queries))
    within_budget("lse", lse.T, tails(exact_lse.T, keys, queries), tails(own_lse.T, keys, queries))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(1, 260), group=st.sampled_from([1, 3]), data=st.data())
def test_a_row_has_the_same_bits_however_its_sequence_is_cut(
    dtype: torch.dtype, length: int, group: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, length))
    q, k, v = (normal(length, n * 16, seed=i, dtype=dtype) for i, n in enumerate((2 * group, 2, 2)))
    heads = 2 * group, 2, 0.25
    whole, lse = attention(q, k, v, bounds([length]), *heads, face="cpu")
    first, _ = attention(q[:cut], k[:cut], v[:cut], bounds([cut]), *heads, face="cpu")
    then, then_lse = attention(q[cut:], k, v, bounds([length - cut]), *heads, cu_keys=bounds([length]), face="cpu")
    assert torch.equal(torch.cat([first, then]), whole)
    assert torch.equal(then_lse, lse[:, cut:])


def test_keys_that_do_not_fit_are_named(face: str) -> None:
    q, k = torch.zeros(5, 8), torch.zeros(9, 8)
    with pytest.raises(ValueError, match=r"cu_keys: expected at least 3 keys, got 2 \(attention, sequence 1\)"):
        attention(q, k, k, bounds([2, 3]), 1, 1, 1.0, cu_keys=bounds([7, 2]), face=face)
    with pytest.raises(ValueError, match=r"cu_keys: expected bounds that rise from 0 to 9 \(attention\)"):
        attention(q, k, k, bounds([5]), 1, 1, 1.0, cu_keys=bounds([8]), face=face)
    with pytest.raises(ValueError, match=r"cu_keys: expected torch.int32 \[2\], got torch.int32 \[3\] \(attention\)"):
        attention(q, k, k, bounds([5]), 1, 1, 1.0, cu_keys=bounds([5, 4]), face=face)
    with pytest.raises(ValueError, match=r"cu_keys: expected torch.int32 \[n_seqs \+ 1\] on the CPU"):
        attention(q, k, k, bounds([5]), 1, 1, 1.0, cu_keys=bounds([9]).long(), face=face)
