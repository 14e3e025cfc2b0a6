"""Names of checkpoints, and every way to write a path."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_helpers import LORA, META, RUN, everything, note, save

from mint_engine.errors import NotFoundError, UserError
from mint_engine.store import Store, base, checkpoints, names
from mint_engine.types import ParsedCheckpointTinkerPath


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "a\\b", "a\nb", "a\0b", "x" * 201, "é" * 101, None, 3]
)
def test_names_that_are_no_file_names_are_refused(store: Store, name: str) -> None:
    before = everything(store)
    with pytest.raises(UserError, match="name: expected"):
        save(store, name)
    assert everything(store) == before


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=20) | st.text(st.characters(codec="ascii"), min_size=199, max_size=201))
def test_every_accepted_name_round_trips_and_stays_inside_its_run(store: Store, name: str) -> None:
    try:
        path = save(store, name, overwrite=True)
    except UserError:
        return
    found = store.resolve(path)
    assert found.directory.resolve().parent == (store.home / "runs/s-1.train.0/weights").resolve()
    assert found.name == name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_no_text_is_more_than_a_users_mistake(store: Store, text: str) -> None:
    """Ids and paths from outside: not found or refused, whatever they hold; never an error of the database."""
    for path in (text, f"{RUN}/weights/{text}", f"{text}/weights/a", f"{RUN}/{text}"):
        with pytest.raises(UserError):
            store.resolve(path)
    for lookup in (store.get_run, store.get_session, store.get_sampler, store.list_checkpoints, store.keys.revoke):
        with pytest.raises(NotFoundError):
            lookup(text)
    assert store.keys.find(text) is None
    assert store.ledger.entries(model_id=text) == []
    for write in (
        lambda: store.create_session("s-x", project_id=f"\0{text}"),
        lambda: store.update_session("s-1", display_name=f"\ud800{text}"),
        lambda: store.add_sampler("s-1", "x", base_model=f"{text}\0"),
    ):
        with pytest.raises(UserError, match="NUL"):
            write()
    store.create_session(f"x-{len(store.list_sessions(9999).sessions)}", user_metadata={text: f"\0\ud800{text}"})


@pytest.mark.parametrize(
    "path",
    [
        "tinker://s-1:train:0/weights/a", "mint://s-1:train:0/weights/a", "s-1:train:0/weights/a", "mint://s-1:train:0/a",
        "s-1:train:0/a", "a",
    ],
)  # fmt: skip
def test_a_checkpoint_is_found_under_every_form_of_its_path(store: Store, path: str) -> None:
    save(store, "a")
    assert store.resolve(path).tinker_path == "tinker://s-1:train:0/weights/a"


@pytest.mark.parametrize(
    ("kind", "type_"), [("weights", "training"), ("sampler_weights", "sampler"), ("external_weights", "external")]
)
def test_every_kind_has_its_paths(store: Store, kind: str, type_: str) -> None:
    path = save(store, "a", kind=kind)
    assert path == f"tinker://{RUN}/{kind}/a"
    found = store.resolve(path)
    assert (found.kind, found.name, found.checkpoint_type, found.checkpoint_id) == (kind, "a", type_, f"{kind}/a")
    assert ParsedCheckpointTinkerPath.from_tinker_path(f"mint://{RUN}/{kind}/a").tinker_path == path


def test_an_ambiguous_short_path_names_the_candidates(store: Store) -> None:
    for kind in ("weights", "sampler_weights"):
        save(store, "a", kind=kind)
    with pytest.raises(UserError, match=r"fits several.*/weights/a.*") as caught:
        store.resolve("a")
    assert "/sampler_weights/a" in str(caught.value)
    assert store.resolve("a", prefer="sampler_weights").kind == "sampler_weights"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"tinker://{RUN}/weights/chekpoint", r"no checkpoint .*/weights/chekpoint; there is: weights/checkpoint"),
        ("tinker://s-2:train:0/weights/a", r"no training run 's-2:train:0'; there is: s-1:train:0"),
        ("nothing", r"no checkpoint 'nothing'; there is: tinker://s-1:train:0/weights/checkpoint"),
        ("tinker://../weights/a", r"run_id: expected letters"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(store: Store, path: str, message: str) -> None:
    save(store, "checkpoint")
    with pytest.raises(NotFoundError, match=message):
        store.resolve(path)


@pytest.mark.parametrize(
    "lookup",
    [
        lambda store: store.get_run("s-1:train:1000"),
        lambda store: store.resolve(f"tinker://{RUN}/weights/v-1000"),
        lambda store: store.resolve("v-1000"),
        lambda store: store.publish(f"tinker://{RUN}/weights/v-1000"),
    ],
)
def test_what_was_meant_is_looked_for_behind_the_transaction_and_not_for_long(
    store: Store, monkeypatch: pytest.MonkeyPatch, lookup: Callable[[Store], object]
) -> None:
    """Comparing a name with a thousand takes 150 ms, and a write transaction keeps every other writer waiting."""
    for module in (names, base, checkpoints):
        monkeypatch.setattr(module, "SEARCHED", 3)
    for i in range(8):
        save(store, f"v-{i}")
        store.create_run(f"s-1:train:{i + 1}", session_id="s-1", base_model="tiny", lora=LORA)
    searches = []

    def search(wanted: str, known: list[str], **options: Any) -> list[str]:
        searches.append((len(known), store._database._engine.pool.checkedout()))
        return get_close_matches(wanted, known, **options)

    monkeypatch.setattr(names, "get_close_matches", search)
    with pytest.raises(NotFoundError, match=r"; there is: .*(train:8|v-7).* \(and more\)$"):
        lookup(store)
    assert searches == [(3, 0)], "three names, and no connection in use"


@pytest.mark.parametrize(
    "path", [f"tinker://{RUN}/weights/..", f"{RUN}/weights/.tmp-x", f"{RUN}/other/a", "a/b/c/d", 3]
)
def test_malformed_paths_are_refused(store: Store, path: str) -> None:
    with pytest.raises(UserError, match="expected"):
        store.resolve(path)


@pytest.mark.parametrize(
    "bad",
    [{"limit": -1}, {"offset": -1}, {"limit": 2**63}, {"offset": 2**80}],
    ids=lambda bad: str(next(iter(bad.items()))),
)
def test_pages_out_of_range_are_refused(store: Store, bad: dict[str, int]) -> None:
    for listing in (store.list_runs, store.list_sessions, store.list_user_checkpoints, store.ledger.entries):
        with pytest.raises(UserError, match="limit"):
            listing(**bad)


def test_an_unknown_kind_is_refused(store: Store) -> None:
    with pytest.raises(UserError, match=r"kind: expected one of weights, .*, got '\.\.'"):
        store.write_checkpoint(RUN, "..", "a", note("x"), **META)
