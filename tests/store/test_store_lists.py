"""Lists, expiry, publishing, deletion, archives."""

from __future__ import annotations

import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from store_helpers import LORA, META, RUN, Place, adapter_of, move_clock, save, versions

from mint_engine.checkpoint import read_adapter
from mint_engine.errors import NotFoundError, UserError
from mint_engine.store import Store


def test_lists_are_paged_newest_first(store: Store) -> None:
    store.create_run("s-1:train:1", session_id="s-1", base_model="tiny", lora=LORA)
    for i in range(5):
        save(store, str(i), run=f"s-1:train:{i % 2}")
    names = [c.checkpoint_id for c in store.list_user_checkpoints().checkpoints]
    assert names == [f"weights/{i}" for i in (4, 3, 2, 1, 0)]
    page = store.list_user_checkpoints(limit=2, offset=1)
    assert [c.checkpoint_id for c in page.checkpoints] == ["weights/3", "weights/2"]
    assert (page.cursor.offset, page.cursor.limit, page.cursor.total_count) == (1, 2, 5)
    assert [c.checkpoint_id for c in store.list_checkpoints(RUN).checkpoints] == ["weights/4", "weights/2", "weights/0"]


def test_runs_are_listed_by_last_use_with_their_newest_checkpoints(store: Store) -> None:
    store.create_run("s-1:train:1", session_id="s-1", base_model="tiny", lora=LORA)
    for name in ("a", "b"):
        save(store, name)
    save(store, "s", kind="sampler_weights")
    runs = store.list_runs()
    assert [run.training_run_id for run in runs.training_runs] == [RUN, "s-1:train:1"]
    first = runs.training_runs[0]
    assert first.last_checkpoint.checkpoint_id == "weights/b"
    assert first.last_sampler_checkpoint.checkpoint_id == "sampler_weights/s"
    assert first.last_request_time == first.last_sampler_checkpoint.time
    assert (first.lora_rank, first.user_metadata, first.model_owner) == (2, {"k": "v"}, "local")
    assert first == store.get_run(RUN)
    assert runs.training_runs[1].last_checkpoint is None
    page = store.list_runs(limit=1, offset=1)
    assert [run.training_run_id for run in page.training_runs] == ["s-1:train:1"]
    assert page.cursor.total_count == 2


def test_runs_are_listed_by_their_sessions_project(store: Store) -> None:
    store.create_session("s-2", project_id="q")
    store.create_run("s-2:train:0", session_id="s-2", base_model="tiny", lora=LORA)
    assert [run.training_run_id for run in store.list_runs(project_id="q").training_runs] == ["s-2:train:0"]
    store.update_session("s-1", project_id="q")
    found = store.list_runs(project_id="q")
    assert [run.training_run_id for run in found.training_runs] == ["s-2:train:0", RUN]
    assert found.cursor.total_count == 2
    assert store.list_runs(project_id="p").training_runs == []


def test_kinds_can_be_left_out_of_lists(store: Store) -> None:
    """Old clients do not know external checkpoints; pages must be full without them."""
    for i in range(3):
        for kind in ("weights", "sampler_weights", "external_weights"):
            save(store, str(i), kind=kind)
    known = ("weights", "sampler_weights")
    page = store.list_user_checkpoints(limit=4, kinds=known)
    assert ({c.checkpoint_type for c in page.checkpoints}, page.cursor.total_count) == ({"training", "sampler"}, 6)
    assert len(page.checkpoints) == 4
    assert len(store.list_checkpoints(RUN, kinds=known).checkpoints) == 6
    assert len(store.list_checkpoints(RUN).checkpoints) == 9


def test_an_expired_checkpoint_is_gone_everywhere(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(store, "a", ttl_seconds=100)
    kept = save(store, "b", ttl_seconds=100)
    store.set_ttl(kept, None)
    assert store.list_checkpoints(RUN).checkpoints[-1].expires_at - datetime.now(UTC) < timedelta(seconds=101)
    move_clock(monkeypatch, seconds=101)
    assert [c.tinker_path for c in store.list_user_checkpoints().checkpoints] == [kept]
    assert [c.tinker_path for c in store.list_checkpoints(RUN).checkpoints] == [kept]
    assert store.get_run(RUN).last_checkpoint.tinker_path == kept
    assert store.disk_usage() == 1
    for use in (store.resolve, store.weights_info, store.publish, store.delete_checkpoint, store.archive):
        with pytest.raises(NotFoundError):
            use(path)
    assert (store.purge_expired(), store.purge_expired()) == (1, 0)
    assert len(versions(store)) == 1
    save(store, "a", "again")


def test_the_name_of_an_expired_checkpoint_is_free(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, "a", ttl_seconds=100)
    move_clock(monkeypatch, seconds=101)
    save(store, "a", "again")
    assert len(versions(store)) == 1
    assert store.purge_expired() == 0


@pytest.mark.parametrize("ttl", [0, -5, True, "1", 10**12, float("nan")])
def test_a_ttl_is_a_positive_number(store: Store, ttl: int) -> None:
    path = save(store, "a")
    with pytest.raises(UserError, match="ttl_seconds"):
        store.set_ttl(path, ttl)
    with pytest.raises(UserError, match="ttl_seconds"):
        save(store, "b", ttl_seconds=ttl)


def test_publishing_and_deleting(place: Place, store: Store) -> None:
    path = save(store, "a")
    for change, public in [(store.publish, True), (store.unpublish, False)]:
        change(path)
        assert place.open().get_run(RUN).last_checkpoint.public is public
    assert store.disk_usage() == 1
    store.delete_checkpoint(path)
    assert store.list_checkpoints(RUN).checkpoints == []
    assert store.disk_usage() == 0
    assert versions(store) == []
    with pytest.raises(NotFoundError):
        store.delete_checkpoint(path)


def test_weights_info_describes_the_adapter(store: Store) -> None:
    info = store.weights_info(save(store, "a"))
    assert (info.base_model, info.is_lora, info.lora_rank) == ("tiny", True, 2)
    assert (info.train_attn, info.train_mlp, info.train_unembed) == (True, False, True)


def unpack(url: str, out: Path) -> Path:
    assert urlparse(url).scheme == "file"
    with tarfile.open(unquote(urlparse(url).path)) as tar:
        tar.extractall(out, filter="data")
    return out


def test_an_archive_holds_the_peft_adapter(store: Store, tmp_path: Path) -> None:
    path = store.write_checkpoint(RUN, "sampler_weights", "a b", adapter_of(7), **META)
    out = unpack(store.archive(path), tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "checkpoint_complete",
    ]  # fmt: skip
    assert read_adapter(out)[1]["base_model.model.lm_head.lora_A.weight"][0, 0] == 7.0
    assert store.archive(path) == store.archive(path), "made once for a version"
    store.write_checkpoint(RUN, "sampler_weights", "a b", adapter_of(8), **META, overwrite=True)
    out = unpack(store.archive(path), tmp_path / "new")
    assert read_adapter(out)[1]["base_model.model.lm_head.lora_A.weight"][0, 0] == 8.0


def test_an_archive_of_external_weights_holds_all_their_files(store: Store, tmp_path: Path) -> None:
    out = unpack(store.archive(save(store, "a", kind="external_weights")), tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint_complete", "note.txt"]


def test_archives_are_kept_for_a_day(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        store.write_checkpoint(RUN, "sampler_weights", name, adapter_of(7), **META)
    file = store.archive_file(f"{RUN}/a")
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    move_clock(monkeypatch, hours=25)
    store.archive(f"{RUN}/b")
    assert not file.exists()
