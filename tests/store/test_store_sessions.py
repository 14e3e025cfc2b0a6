"""Sessions, runs and samplers, and searching them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from store_helpers import LORA, META, RUN, Place, note, save

from mint_engine.errors import NotFoundError, UserError
from mint_engine.store import Store, names


def test_sessions_runs_and_samplers_survive_a_restart(place: Place, store: Store) -> None:
    store.add_sampler("s-1", "s-1:sample:0", base_model="tiny", model_path="tinker://x")
    store.close()
    again = place.open()
    again.create_session("s-2")
    again.add_sampler("s-1", "s-1:sample:1", base_model="tiny")
    session = again.get_session("s-1")
    assert session.training_run_ids == [RUN]
    assert session.sampler_ids == ["s-1:sample:0", "s-1:sample:1"]
    assert session.user_metadata == {"who": "me"}
    again.update_session("s-1", display_name="first")
    again.update_session("s-1", project_id="q")
    again.update_session("s-1")
    assert again.get_session("s-1").display_name == "first"
    assert [run.training_run_id for run in again.list_runs(project_id="q").training_runs] == [RUN]
    assert again.get_sampler("s-1:sample:0").model_path == "tinker://x"
    assert again.list_sessions().sessions == ["s-2", "s-1"]
    assert again.list_sessions(limit=1, offset=1).sessions == ["s-1"]
    assert again.get_run(RUN).base_model == "tiny"


def test_a_session_is_finished_once_its_client_says_so(place: Place, store: Store) -> None:
    assert not store.session_finished("s-1")
    store.finish_session("s-1", "errored")
    assert place.open().session_finished("s-1")
    for view, session in ((store, "s-9"), (store.as_owner("key-2"), "s-1")):
        with pytest.raises(NotFoundError):
            view.session_finished(session)


def test_whether_a_run_exists_is_answered_without_a_search(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*arguments: Any, **options: Any) -> list[str]:
        raise AssertionError("a search")

    monkeypatch.setattr(names, "get_close_matches", search)
    assert store.has_run(RUN)
    assert not store.as_owner("key-2").has_run(RUN)
    for unknown in ("s-9:train:0", "", "../\0"):
        assert not store.has_run(unknown)


def test_unknown_sessions_samplers_and_runs_are_named(store: Store) -> None:
    for call in (
        lambda: store.get_session("s-9"),
        lambda: store.session_owner("s-9"),
        lambda: store.update_session("s-9", project_id="x"),
        lambda: store.finish_session("s-9", "success"),
        lambda: store.get_sampler("s-9:sample:0"),
        lambda: store.get_run("s-9:train:0"),
        lambda: store.list_checkpoints("s-9:train:0"),
        lambda: store.create_run("s-9:train:0", session_id="s-9", **META),
        lambda: store.add_sampler("s-9", "s-9:sample:0", base_model="tiny"),
        lambda: store.write_checkpoint("s-9:train:0", "weights", "a", note("x"), **META),
    ):
        with pytest.raises(NotFoundError, match="s-9"):
            call()


def test_identifiers_are_not_reused(store: Store) -> None:
    store.add_sampler("s-1", "s-1:sample:0", base_model="tiny")
    for again in (
        lambda: store.create_session("s-1"),
        lambda: store.create_run(RUN, session_id="s-1", base_model="tiny", lora=LORA),
        lambda: store.add_sampler("s-1", "s-1:sample:0", base_model="tiny"),
    ):
        with pytest.raises(UserError, match="already exists"):
            again()


@pytest.fixture
def several(store: Store) -> Store:
    """Ten sessions of many kinds, `s-1` first."""
    for i in range(2, 10):
        store.create_session(
            f"s-{i}",
            project_id="even" if i % 2 == 0 else None,
            user_metadata={"i": str(i), 'a"b.c': "x", "n": "\0"},
            display_name=f"Number {i} of the ÄPFEL",
        )
    store.finish_session("s-2", "success", "all done")
    store.finish_session("s-3", "errored")
    store.as_owner("somebody").create_session("s-10", display_name="Number 10")
    save(store, "a")
    save(store, "b", "xyz")
    return store


SEARCHES: list[tuple[Mapping[str, Any], str]] = [
    ({}, "9 8 7 6 5 4 3 2 1"),
    ({"limit": 2}, "9 8"),
    ({"session_id": "s-4"}, "4"),
    ({"session_id": "s-10"}, ""),
    ({"project_ids": ["even", "p"]}, "8 6 4 2 1"),
    ({"user_metadata": {"i": "7"}}, "7"),
    ({"user_metadata": {'a"b.c': "x", "i": "8", "n": "\0"}}, "8"),
    ({"user_metadata": {'a"b.c': "y"}}, ""),
    ({"display_name": "äpfel nUmb 6"}, "6"),
    ({"display_name": "  "}, ""),
    ({"display_name": "number 5", "session_id": "s-1"}, "5 1"),
    ({"owner": {"type": "accessible"}, "limit": 1}, "9"),
    ({"owner": {"type": "user", "owner_urns": ["local", "x"]}, "limit": 1}, "9"),
    ({"owner": {"type": "user", "owner_urns": ["somebody"]}}, ""),
    ({"statuses": [{"type": "client_finished"}]}, "3 2"),
    ({"statuses": [{"type": "client_finished", "reasons": ["errored"]}, {"type": "failed"}]}, "3"),
    ({"statuses": [{"type": "active"}], "project_ids": ["even"]}, "8 6 4"),
]


@pytest.mark.parametrize(("request_", "expected"), SEARCHES, ids=[str(s[0])[:50] for s in SEARCHES])
def test_a_search_finds_the_sessions_that_fit(several: Store, request_: Mapping[str, Any], expected: str) -> None:
    found = several.search_sessions(request_)
    assert [s.session_id.removeprefix("s-") for s in found.sessions] == expected.split()


def test_a_search_goes_on_where_the_page_ended(several: Store) -> None:
    pages, cursor = [], None
    while True:
        page = several.search_sessions({"limit": 2, "display_name": "number", "cursor": cursor})
        pages.append([s.session_id for s in page.sessions])
        cursor = page.next_cursor and page.next_cursor.model_dump(mode="json")
        if cursor is None:
            break
    assert pages == [["s-9", "s-8"], ["s-7", "s-6"], ["s-5", "s-4"], ["s-3", "s-2"]]


def test_a_found_session_is_described(several: Store) -> None:
    summaries = {s.session_id: s for s in several.search_sessions({}).sessions}
    finished, first = summaries["s-2"], summaries["s-1"]
    assert (finished.status.type, finished.status.reason.type) == ("client_finished", "success")
    assert (finished.status.detail, finished.owner, finished.project_id) == ("all done", "local", "even")
    assert (first.status.type, first.checkpoints_count, first.checkpoint_storage_bytes) == ("active", 2, 4)
    assert (finished.checkpoints_count, finished.display_name) == (0, "Number 2 of the ÄPFEL")


@pytest.mark.parametrize(
    ("request_", "where"),
    [({"limit": 0}, "limit"), ({"owner": {"type": "?"}}, "owner"), ({"cursor": {"last_created_at": "x"}}, "cursor")],
)
def test_a_search_that_makes_no_sense_is_a_users_mistake(store: Store, request_: Mapping[str, Any], where: str) -> None:
    with pytest.raises(UserError, match=where):
        store.search_sessions(request_)
