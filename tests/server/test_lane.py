"""The order of one model's operations, as data: whatever the order of arrival, each runs once and in its place."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_engine.errors import UserError
from mint_engine.server.lane import REMEMBERED, Lane, Operation
from mint_engine.server.promises import Promise


def op(seq_id: int | None, name: str = "") -> Operation:
    return Operation(Promise(name or f"r{seq_id}", "OptimStep", "a", "m", seq_id=seq_id), Future)


def out(lane: Lane) -> list[int | None]:
    return [operation.promise.seq_id for operation in lane.ready()]


def test_chunks_two_and_three_before_one() -> None:
    lane = Lane("m", "a")
    for seq_id in (2, 3):
        lane.add(op(seq_id))
        assert out(lane) == []
    assert lane.missing == 1
    lane.add(op(1))
    assert out(lane) == [1, 2, 3]
    assert lane.missing is None


@given(st.permutations(range(1, 13)), st.sets(st.integers(1, 12)))
def test_any_order_of_arrival_is_the_same_order_of_execution(order: list[int], refused: set[int]) -> None:
    lane, ran = Lane("m", "a"), []
    for seq_id in order:
        if seq_id in refused:
            lane.refuse(seq_id)
        else:
            lane.check(seq_id)
            lane.add(op(seq_id))
        ran += out(lane)
    assert ran == [seq_id for seq_id in range(1, 13) if seq_id not in refused]
    assert lane.next_seq == 13
    assert lane.missing is None


def test_a_copy_is_recognised_before_and_after_it_ran() -> None:
    lane = Lane("m", "a")
    lane.add(op(2, "second"))
    assert lane.request_of(2) == "second"
    lane.add(op(1, "first"))
    out(lane)
    assert (lane.request_of(1), lane.request_of(2), lane.request_of(3)) == ("first", "second", None)


def test_a_refused_number_is_used_up() -> None:
    """forward_backward 422, then optim_step with the next number must run."""
    lane = Lane("m", "a")
    lane.refuse(1)
    lane.add(op(2))
    assert out(lane) == [2]
    with pytest.raises(UserError, match="seq_id: 1 of m is past"):
        lane.check(1)


def test_a_refused_number_ahead_of_a_gap_waits_its_turn() -> None:
    lane = Lane("m", "a")
    lane.refuse(2)
    lane.add(op(3))
    assert out(lane) == []
    lane.add(op(1))
    assert out(lane) == [1, 3]


def test_without_a_number_it_runs_after_everything_accepted() -> None:
    lane = Lane("m", "a")
    lane.add(op(1))
    assert out(lane) == [1]
    lane.add(op(None, "now"))
    assert [o.promise.request_id for o in lane.ready()] == ["now"]
    lane.add(op(3))
    lane.add(op(None, "after three"))
    lane.add(op(4))
    assert out(lane) == []
    lane.add(op(2))
    assert [o.promise.request_id for o in lane.ready()] == ["r2", "r3", "after three", "r4"]


def test_giving_up_frees_what_waits_and_goes_on_behind_it() -> None:
    lane = Lane("m", "a")
    for seq_id in (3, 5):
        lane.add(op(seq_id))
    lane.add(op(None, "n"))
    assert [o.promise.request_id for o in lane.give_up()] == ["r3", "r5", "n"]
    with pytest.raises(UserError, match="the next is 6"):
        lane.check(4)
    lane.add(op(6))
    assert out(lane) == [6]


def test_what_is_remembered_of_answers_is_bounded() -> None:
    lane = Lane("m", "a")
    for seq_id in range(1, REMEMBERED + 100):
        lane.add(op(seq_id))
        out(lane)
    assert REMEMBERED <= len(lane.answered) <= REMEMBERED + 1
    with pytest.raises(UserError, match="answered long ago"):
        lane.check(1)


def test_a_copy_of_one_that_waits_is_recognised_however_many_wait() -> None:
    lane = Lane("m", "a")
    for seq_id in range(2, REMEMBERED + 200):
        lane.add(op(seq_id))
    assert lane.request_of(5) == "r5"
