"""A parked model waits on the disk, unseen, until somebody goes on with it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from store_helpers import RUN, Place, move_clock, note

from mint_engine.errors import UserError
from mint_engine.store import Store


def files(store: Store) -> list[Path]:
    return [path for path in (store.home / "parked").glob("*/*") if path.is_dir()]


def test_what_was_parked_comes_back_with_its_note_also_after_a_restart(place: Place, store: Store) -> None:
    store.park(RUN, note("state"), {"next_seq": 5, "deep": [1, {"a": None}]})
    store.park("s-1:sample:3", note("sampler"), {})
    again = place.open()
    parked = again.parked(RUN)
    assert (parked.directory / "note.txt").read_text() == "state"
    assert parked.note == {"next_seq": 5, "deep": [1, {"a": None}]}
    assert (again.parked("s-1:sample:3").directory / "note.txt").read_text() == "sampler"
    again.unpark(RUN)
    assert store.parked(RUN) is None
    assert len(files(store)) == 1
    store.unpark(RUN)


def test_parked_models_are_in_no_list(store: Store) -> None:
    store.park(RUN, note("state"), {})
    assert store.list_user_checkpoints().checkpoints == []
    assert store.disk_usage() == 0


def test_what_is_parked_of_a_session_longest_ago_first(store: Store) -> None:
    for identifier in ("s_1:sample:10", "s_1:sample:9", "s_1:train:0", "sx1:sample:0", "s_1:sample:x:sample:0"):
        store.park(identifier, note(identifier), {})
    store.park("s_1:sample:10", note("again"), {})
    assert store.parked_ids("s_1", "sample")[-2:] == ["s_1:sample:x:sample:0", "s_1:sample:10"]
    assert store.parked_ids("s_1", "train") == ["s_1:train:0"]
    assert store.parked_ids("s", "sample") == []


def test_parking_again_replaces(store: Store) -> None:
    for i in range(3):
        store.park(RUN, note(str(i)), {"i": i})
    assert store.parked(RUN).note == {"i": 2}
    assert len(files(store)) == 1


def test_a_failure_keeps_what_was_parked_before(store: Store) -> None:
    store.park(RUN, note("old"), {"i": 1})

    def fail(directory: Path) -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        store.park(RUN, fail, {"i": 2})
    assert (store.parked(RUN).directory / "note.txt").read_text() == "old"
    assert len(files(store)) == 1


def test_a_process_killed_while_parking_leaves_nothing_half_parked(
    place: Place, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = place.run(f"""
store.park({RUN!r}, note("whole"), {{"i": 1}})
def writer(directory):
    note("half")(directory)
    die()
store.park({RUN!r}, writer, {{"i": 2}})
""")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (store.parked(RUN).directory / "note.txt").read_text() == "whole"
    assert len(files(store)) == 2
    move_clock(monkeypatch, hours=1)
    store.purge_expired()
    assert [path.parent for path in files(store)] == [store.parked(RUN).directory.parent]
    assert (store.parked(RUN).directory / "note.txt").read_text() == "whole"


def test_a_model_nobody_comes_back_to_is_removed_after_a_month(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.park(RUN, note("state"), {})
    move_clock(monkeypatch, days=29)
    store.purge_expired()
    assert store.parked(RUN) is not None
    move_clock(monkeypatch, days=2)
    store.purge_expired()
    assert store.parked(RUN) is None
    assert files(store) == []
