"""Everybody sees their own things only, and what others have published."""

from __future__ import annotations

import pytest
from store_helpers import META, RUN, adapter_of, save, text_of

from mint_engine.errors import NotFoundError, UserError
from mint_engine.store import Store


@pytest.fixture
def theirs(store: Store) -> Store:
    """Another owner, with a session, a run and a checkpoint of their own; `s-1`'s owner has a sampler too."""
    other = store.as_owner("key-2")
    other.create_session("s-2")
    other.create_run("s-2:train:0", session_id="s-2", **META)
    save(other, "b", "theirs", run="s-2:train:0")
    store.add_sampler("s-1", "s-1:sample:0", base_model="tiny")
    return other


def test_another_owners_things_do_not_exist(store: Store, theirs: Store) -> None:
    path = save(store, "a")
    for call in (
        lambda: theirs.get_session("s-1"),
        lambda: theirs.update_session("s-1", project_id="x"),
        lambda: theirs.finish_session("s-1", "success"),
        lambda: theirs.get_sampler("s-1:sample:0"),
        lambda: theirs.add_sampler("s-1", "s-1:sample:1", base_model="tiny"),
        lambda: theirs.create_run("s-1:train:5", session_id="s-1", **META),
        lambda: theirs.get_run(RUN),
        lambda: theirs.get_run(RUN, "accessible"),
        lambda: theirs.list_checkpoints(RUN, "accessible"),
        lambda: save(theirs, "x", run=RUN),
        lambda: theirs.resolve(path),
        lambda: theirs.resolve("a"),
        lambda: theirs.weights_info(path),
        lambda: theirs.archive(path),
        lambda: theirs.publish(path),
        lambda: theirs.set_ttl(path, 5),
        lambda: theirs.delete_checkpoint(path),
        lambda: theirs.copy_checkpoint(path),
    ):
        with pytest.raises(NotFoundError) as caught:
            call()
        assert "there is: weights/a" not in str(caught.value)
        assert "there is: s-1" not in str(caught.value)
    assert store.list_sessions().sessions == ["s-1"]
    assert text_of(store, path) == "x"


@pytest.mark.parametrize("scope", ["owned", "accessible"])
def test_lists_hold_ones_own_things_only(store: Store, theirs: Store, scope: str) -> None:
    save(store, "a", "four")
    assert theirs.list_sessions(access_scope=scope).sessions == ["s-2"]
    assert [run.training_run_id for run in theirs.list_runs(access_scope=scope).training_runs] == ["s-2:train:0"]
    assert [c.checkpoint_id for c in theirs.list_user_checkpoints(access_scope=scope).checkpoints] == ["weights/b"]
    assert [s.session_id for s in theirs.search_sessions({"owner": {"type": "accessible"}}).sessions] == ["s-2"]
    assert (store.disk_usage(), theirs.disk_usage()) == (4, 6)
    assert theirs.get_run("s-2:train:0").model_owner == "key-2"


def test_a_published_checkpoint_can_be_read_by_all_and_changed_by_its_owner_only(store: Store, theirs: Store) -> None:
    path = store.write_checkpoint(RUN, "weights", "a", adapter_of(1), **META)
    private = save(store, "private")
    store.publish(path)
    assert theirs.resolve(path).record.owner == "local"
    assert theirs.weights_info(path).lora_rank == 2
    assert theirs.archive(path).startswith("file://")
    for change in (theirs.delete_checkpoint, theirs.unpublish, theirs.publish, lambda p: theirs.set_ttl(p, 1)):
        with pytest.raises(NotFoundError):
            change(path)
    with pytest.raises(NotFoundError):
        theirs.resolve(private)
    store.unpublish(path)
    with pytest.raises(NotFoundError):
        theirs.resolve(path)


def test_a_run_with_a_published_checkpoint_is_accessible(store: Store, theirs: Store) -> None:
    store.publish(save(store, "a"))
    save(store, "newer and private")
    assert theirs.list_runs().cursor.total_count == 1
    runs = theirs.list_runs(access_scope="accessible")
    assert {run.training_run_id for run in runs.training_runs} == {RUN, "s-2:train:0"}
    assert runs.cursor.total_count == 2
    run = theirs.get_run(RUN, "accessible")
    assert (run.model_owner, run.last_checkpoint.checkpoint_id) == ("local", "weights/a")
    assert run.user_metadata is None, "a published checkpoint does not publish the notes on its run"
    assert [c.checkpoint_id for c in theirs.list_checkpoints(RUN, "accessible").checkpoints] == ["weights/a"]
    listed = theirs.list_user_checkpoints(access_scope="accessible")
    assert [c.checkpoint_id for c in listed.checkpoints] == ["weights/a", "weights/b"]
    with pytest.raises(NotFoundError):
        theirs.get_run(RUN)
    with pytest.raises(UserError, match="access_scope"):
        theirs.list_runs(access_scope="all")


def test_the_engine_can_ask_whose_a_session_is(store: Store, theirs: Store) -> None:
    assert (store.session_owner("s-2"), theirs.session_owner("s-1")) == ("key-2", "local")
