"""Copied and uploaded checkpoints are complete, owned by who made them, and independent of where they came from."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from store_helpers import LORA, RUN, adapter_of, everything, save, text_of

from mint_engine.checkpoint import read_adapter
from mint_engine.errors import NotFoundError, StorageError, UserError
from mint_engine.store import Store, copies


@pytest.mark.parametrize("kind", ["weights", "sampler_weights", "external_weights"])
def test_a_copy_outlives_its_source(store: Store, kind: str) -> None:
    path = save(store, "a", "text", kind=kind, user_metadata={"k": "v"}, ttl_seconds=100)
    copy = store.copy_checkpoint(path)
    store.delete_checkpoint(path, at_once=True)
    assert text_of(store, copy) == "text"
    record = store.resolve(copy).record
    assert (record.kind, record.name, record.base_model, record.lora) == (kind, "a", "tiny", LORA)
    assert (record.user_metadata, record.expires_at, record.public) == ({"k": "v"}, None, False)


def test_a_copy_belongs_to_who_made_it(store: Store) -> None:
    path = save(store, "a")
    other = store.as_owner("key-2")
    with pytest.raises(NotFoundError):
        other.copy_checkpoint(path)
    with_their_leave = other.copy_checkpoint(path, reader=store, ttl_seconds=100)
    assert other.resolve(with_their_leave).record.expires_at is not None
    store.publish(path)
    other.copy_checkpoint(path)
    assert other.disk_usage() == 2
    assert len(store.list_user_checkpoints().checkpoints) == 1
    with pytest.raises(NotFoundError):
        store.resolve(with_their_leave)


def test_a_copy_goes_into_a_session_or_a_project(store: Store) -> None:
    path = save(store, "a")
    assert store.copy_checkpoint(path, session_id="s-1", model_seq_id=7) == "tinker://s-1:train:7/weights/a"
    assert store.get_session("s-1").training_run_ids == [RUN, "s-1:train:7"]
    projects = store.copy_checkpoint(path, project_id="q")
    (run,) = store.list_runs(project_id="q").training_runs
    assert run.last_checkpoint.tinker_path == projects
    before = everything(store)
    with pytest.raises(UserError, match="'s-1:train:7' already exists"):
        store.copy_checkpoint(path, session_id="s-1", model_seq_id=7)
    with pytest.raises(NotFoundError, match="s-9"):
        store.copy_checkpoint(path, session_id="s-9", model_seq_id=0)
    with pytest.raises(UserError, match="one of them"):
        store.copy_checkpoint(path, session_id="s-1")
    assert everything(store) == before


def test_a_copy_that_fails_leaves_no_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(store, "a")

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(copies.shutil, "copyfile", refuse)
    with pytest.raises(StorageError, match="No space left"):
        store.copy_checkpoint(path)
    assert store.list_runs().cursor.total_count == 1


def test_an_imported_adapter_can_be_sampled_and_trained_on(store: Store, tmp_path: Path) -> None:
    (tmp_path / "upload").mkdir()
    adapter_of(3)(tmp_path / "upload")
    path = store.import_checkpoint(tmp_path / "upload", base_model="tiny", lora=LORA, name="mine")
    found = store.resolve(path)
    assert (found.kind, found.name, store.weights_info(path).lora_rank) == ("sampler_weights", "mine", 2)
    assert read_adapter(found.directory)[1]["base_model.model.lm_head.lora_A.weight"][0, 0] == 3.0
    run = store.get_run(found.training_run_id)
    assert (run.base_model, run.last_sampler_checkpoint.tinker_path) == ("tiny", path)
    again = store.import_checkpoint(tmp_path / "upload", base_model="tiny", lora=LORA, name="mine")
    assert again != path, "each has a run of its own"


def test_only_plain_files_are_imported(store: Store, tmp_path: Path) -> None:
    (tmp_path / "upload").mkdir()
    (tmp_path / "upload" / "adapter_config.json").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"plain files only, got 'adapter_config\.json'"):
        store.import_checkpoint(tmp_path / "upload", base_model="tiny", lora=LORA)
    with pytest.raises(UserError, match="name: expected"):
        store.import_checkpoint(tmp_path / "upload", base_model="tiny", lora=LORA, name="../x")
    assert store.list_runs().cursor.total_count == 1


def test_a_copy_of_a_version_being_replaced_is_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody overwrites the source after it was resolved and before it is read."""
    path = save(store, "a", "old")
    resolve = Store.resolve

    def resolve_then_lose(self: Store, *args: object) -> object:
        found = resolve(self, *args)
        save(store, "a", "new", overwrite=True)
        return found

    monkeypatch.setattr(Store, "resolve", resolve_then_lose)
    copy = store.copy_checkpoint(path)
    monkeypatch.undo()
    assert (text_of(store, copy), text_of(store, path)) == ("old", "new")
