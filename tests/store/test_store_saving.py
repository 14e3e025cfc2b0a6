"""A checkpoint is complete or it is not there."""

from __future__ import annotations

import errno
import resource
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from store_helpers import LORA, META, RUN, Place, adapter_of, everything, note, save, text_of, versions

from mint_engine import durable
from mint_engine.checkpoint import read_adapter
from mint_engine.errors import StorageError, UserError
from mint_engine.store import Store
from mint_engine.store.database import Database


def test_a_checkpoint_appears_under_its_path_with_its_record(store: Store) -> None:
    path = save(store, "step 1", user_metadata={"loss": "0.5"})
    assert path == "tinker://s-1:train:0/weights/step 1"
    found = store.resolve(path)
    assert found.directory.parent == store.home / "runs" / "s-1.train.0" / "weights"
    assert found.directory.name.startswith("step 1.")
    assert (found.training_run_id, found.checkpoint_id, found.record.lora) == (RUN, "weights/step 1", LORA)
    (listed,) = store.list_checkpoints(RUN).checkpoints
    assert (listed.checkpoint_type, listed.size_bytes, listed.user_metadata) == ("training", 1, {"loss": "0.5"})
    assert abs(listed.time - datetime.now(UTC)) < timedelta(minutes=1)


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), UserError("bad"), KeyboardInterrupt()]


@pytest.mark.parametrize("failure", FAILURES, ids=["disk full", "user error", "interrupt"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_everything_as_it_was(store: Store, failure: BaseException, existing: bool) -> None:
    if existing:
        save(store, "a", "old")
    before = everything(store)

    def writer(directory: Path) -> None:
        (directory / "note.txt").write_text("half")
        raise failure

    expected = StorageError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected) as caught:
        store.write_checkpoint(RUN, "weights", "a", writer, **META, overwrite=True)
    if expected is StorageError:
        assert caught.value.errno == errno.ENOSPC
        assert "saving checkpoint 'a' failed: No space left on device" in str(caught.value)
    assert everything(store) == before
    if existing:
        assert text_of(store, f"{RUN}/weights/a") == "old"


@pytest.mark.parametrize("limit", [0, 100, 600, 5000])
def test_a_disk_that_fills_up_while_saving_harms_nothing(store: Store, limit: int) -> None:
    """The operating system itself refuses, at the first byte, in the config, and inside the safetensors file."""
    path = store.write_checkpoint(RUN, "sampler_weights", "a", adapter_of(1, width=1000), **META)
    before = everything(store)
    with _files_of_at_most(limit), pytest.raises(StorageError, match=r"File too large"):
        store.write_checkpoint(RUN, "sampler_weights", "a", adapter_of(2, 1000), **META, overwrite=True)
    assert everything(store) == before
    assert read_adapter(store.resolve(path).directory)[1]["base_model.model.lm_head.lora_A.weight"][0, 0] == 1.0
    store.write_checkpoint(RUN, "sampler_weights", "a", adapter_of(2, 1000), **META, overwrite=True)


def test_a_disk_too_full_for_the_database_is_a_storage_error(tmp_path: Path) -> None:
    """The files fit, the row does not: the checkpoint does not exist, and the next save works."""
    store = Store(tmp_path)
    store.create_session("s-1")
    store.create_run(RUN, session_id="s-1", **META)
    with _files_of_at_most(2000), pytest.raises(StorageError, match=r"saving checkpoint 'a' failed: the database says"):
        save(store, "a")
    assert store.list_checkpoints(RUN).checkpoints == []
    assert text_of(store, save(store, "a", "now")) == "now"


class _files_of_at_most:
    """Writing more fails with EFBIG, as a full disk does with ENOSPC."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.limits[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_the_old_checkpoint_stays_until_the_new_one_is_complete(store: Store) -> None:
    path = save(store, "a", "old")
    seen = []

    def writer(directory: Path) -> None:
        note("new")(directory)
        seen.append(text_of(store, path))

    store.write_checkpoint(RUN, "weights", "a", writer, **META, overwrite=True)
    assert seen == ["old"]
    assert text_of(store, path) == "new"
    assert len(store.list_checkpoints(RUN).checkpoints) == 1


def test_an_overwritten_version_nobody_resolved_is_removed_at_once(store: Store) -> None:
    for i in range(5):
        save(store, "latest", str(i), overwrite=True)
    assert len(versions(store)) == 1


def test_an_existing_name_is_refused_unless_overwrite_is_asked_for(store: Store) -> None:
    path = save(store, "a", "old")
    with pytest.raises(UserError, match=r"'a' already exists.*overwrite=True"):
        save(store, "a", "new")
    assert text_of(store, path) == "old"
    save(store, "a", "other kind", kind="sampler_weights")
    save(store, "a", "another kind", kind="external_weights")


MOMENTS = {
    "while writing": ("note('half')(directory); die()", "", "old"),
    "before the row": ("note('new')(directory)", "Database.write = lambda *a: die()", "old"),
    "after the row": ("note('new')(directory)", "artifacts.discard = lambda *a, **k: die()", "new"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_process_killed_while_overwriting_loses_nothing(place: Place, store: Store, moment: str) -> None:
    writing, then, expected = MOMENTS[moment]
    path = save(store, "a", "old")
    done = place.run(f"""
from mint_engine.store import artifacts
from mint_engine.store.database import Database
def writer(directory):
    {writing}
{then}
save(store, {RUN!r}, "weights", "a", writer, overwrite=True)
""")
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = place.open()
    assert text_of(again, path) == expected
    assert [c.tinker_path for c in again.list_checkpoints(RUN).checkpoints] == [path]


def test_every_file_and_directory_is_flushed_before_its_row_is_committed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Path | str] = []
    fsync, write = durable.fsync, Database.write
    monkeypatch.setattr(durable, "fsync", lambda path: (events.append(path), fsync(path)))
    monkeypatch.setattr(Database, "write", lambda self, action: (events.append("row"), write(self, action))[1])

    def writer(directory: Path) -> None:
        note("x")(directory)
        (directory / "sub").mkdir()
        note("y")(directory / "sub")

    store.write_checkpoint(RUN, "weights", "a", writer, **META)
    directory = store.resolve(f"{RUN}/weights/a").directory
    flushed = set(events[: events.index("row")])
    assert {directory, directory / "note.txt", directory / "sub", directory / "sub/note.txt"} <= flushed
    assert {directory.parents[i] for i in range(3)} <= flushed, "the entries of new directories too"


def test_a_checkpoint_whose_files_are_gone_says_so(store: Store) -> None:
    path = save(store, "a")
    directory = store.resolve(path).directory
    directory.rename(directory.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"weights/a: its files are missing: .*weights/a\."):
        store.resolve(path)
