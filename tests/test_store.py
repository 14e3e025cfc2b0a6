"""The store: complete or absent, kept across processes, and clear about what is not there."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mint_engine import durable
from mint_engine.checkpoint import read_adapter, write_adapter
from mint_engine.errors import CheckpointError, NotFoundError, StorageError, UserError
from mint_engine.store import Store
from mint_engine.types import LoraConfig

LORA = LoraConfig(rank=2, train_mlp=False)
META = {"base_model": "tiny", "lora": LORA}
RUN = "s-1:train:0"


def note(text: str):
    return lambda directory: (directory / "note.txt").write_text(text)


def adapter_of(values: int, width: int = 4):
    name = "base_model.model.lm_head.lora_{}.weight"
    tensors = {name.format("A"): torch.full((2, width), float(values)), name.format("B"): torch.zeros(width, 2)}
    return lambda directory: write_adapter(
        directory, tensors, base_model="tiny", rank=2, alpha=32, target_modules=["lm_head"], tied=False
    )


def text_of(store: Store, path: str) -> str:
    return (store.resolve(path).directory / "note.txt").read_text()


def everything(store: Store) -> list[str]:
    return sorted(str(path.relative_to(store.home)) for path in (store.home / "runs").rglob("*"))


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "home")
    store.create_session("s-1", tags=["a"], user_metadata={"who": "me"}, project_id="p")
    store.create_run(RUN, session_id="s-1", base_model="tiny", lora=LORA, user_metadata={"k": "v"})
    return store


# --- complete or absent


def test_a_checkpoint_appears_under_its_path_with_its_record(store):
    path = store.write_checkpoint(RUN, "weights", "step 1", note("x"), **META, user_metadata={"loss": "0.5"})
    assert path == "tinker://s-1:train:0/weights/step 1"
    found = store.resolve(path)
    assert found.directory == store.home / "runs" / "s-1.train.0" / "weights" / "step 1"
    assert (found.training_run_id, found.checkpoint_id, found.record.lora) == (RUN, "weights/step 1", LORA)
    (listed,) = store.list_checkpoints(RUN).checkpoints
    assert (listed.checkpoint_type, listed.size_bytes, listed.user_metadata) == ("training", 1, {"loss": "0.5"})
    assert abs(listed.time - datetime.now(UTC)) < timedelta(minutes=1)


FAILURES = [OSError(errno.ENOSPC, "No space left on device"), UserError("bad"), KeyboardInterrupt()]


@pytest.mark.parametrize("failure", FAILURES, ids=["disk full", "user error", "interrupt"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_everything_as_it_was(store, failure, existing):
    if existing:
        store.write_checkpoint(RUN, "weights", "a", note("old"), **META)
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
    assert [path for path in everything(store) if path != "runs/s-1.train.0/weights"] == [
        path for path in before if path != "runs/s-1.train.0/weights"
    ]
    if existing:
        assert text_of(store, f"{RUN}/weights/a") == "old"


@pytest.mark.parametrize("limit", [0, 100, 600, 5000])
def test_a_disk_that_fills_up_while_saving_harms_nothing(store, limit):
    """The operating system itself refuses, at the first byte, in the config, and inside the safetensors file."""
    path = store.write_checkpoint(RUN, "sampler_weights", "a", adapter_of(1, width=1000), **META)
    before = everything(store)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails with EFBIG, as with ENOSPC
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        with pytest.raises(StorageError, match=r"File too large"):
            store.write_checkpoint(RUN, "sampler_weights", "a", adapter_of(2, 1000), **META, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert everything(store) == before
    assert read_adapter(store.resolve(path).directory)[1]["base_model.model.lm_head.lora_A.weight"][0, 0] == 1.0
    store.write_checkpoint(RUN, "sampler_weights", "a", adapter_of(2, 1000), **META, overwrite=True)


def test_the_old_checkpoint_stays_until_the_new_one_is_complete(store):
    path = store.write_checkpoint(RUN, "weights", "a", note("old"), **META)

    def writer(directory: Path) -> None:
        note("new")(directory)
        assert text_of(store, path) == "old"

    store.write_checkpoint(RUN, "weights", "a", writer, **META, overwrite=True)
    assert text_of(store, path) == "new"
    assert [p.name for p in (store.home / "runs/s-1.train.0/weights").iterdir()] == ["a"]


def test_an_existing_name_is_refused_unless_overwrite_is_asked_for(store):
    path = store.write_checkpoint(RUN, "weights", "a", note("old"), **META)
    with pytest.raises(UserError, match=r"'a' already exists.*overwrite=True"):
        store.write_checkpoint(RUN, "weights", "a", note("new"), **META)
    assert text_of(store, path) == "old"
    store.write_checkpoint(RUN, "sampler_weights", "a", note("other kind"), **META)


@pytest.mark.parametrize("moment", ["before the swap", "inside the swap"])
def test_a_process_killed_while_overwriting_loses_nothing(store, moment, monkeypatch):
    path = store.write_checkpoint(RUN, "weights", "a", note("old"), **META)
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    inside = "pathlib.Path.rename = lambda self, to, real=pathlib.Path.rename: (real(self, to), die())"
    program = f"""
import pathlib
from mint_engine.store import Store
from mint_engine.types import LoraConfig
def die():
    {kill}
def writer(directory):
    (directory / "note.txt").write_text("new")
    {"die()" if moment == "before the swap" else inside}
Store({str(store.home)!r}).write_checkpoint({RUN!r}, "weights", "a", writer, base_model="tiny", lora=LoraConfig(),
    overwrite=True)
"""
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    folder = store.home / "runs/s-1.train.0/weights"
    assert (folder / "a").exists() == (moment == "before the swap")
    store = Store(store.home)
    assert text_of(store, path) == "old"
    assert [c.tinker_path for c in store.list_checkpoints(RUN).checkpoints] == [path]
    # The unfinished temporary could belong to a living process; once it is a day old it cannot.
    tomorrow = time.time() + 2 * 24 * 3600
    monkeypatch.setattr(time, "time", lambda: tomorrow)
    assert text_of(store, path) == "old"
    assert [p.name for p in folder.iterdir()] == ["a"]


def test_of_many_writers_of_one_name_exactly_one_wins(store):
    def save(i: int) -> bool:
        try:
            store.write_checkpoint(RUN, "weights", "a", note(str(i)), **META)
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        winners = [i for i, won in enumerate(pool.map(save, range(16))) if won]
    assert len(winners) == 1
    assert text_of(store, f"{RUN}/weights/a") == str(winners[0])
    assert len(list((store.home / "runs/s-1.train.0/weights").iterdir())) == 1


def test_concurrent_overwrites_leave_one_complete_version(store):
    def save(i: int) -> None:
        store.write_checkpoint(RUN, "weights", "a", note(str(i)), **META, overwrite=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(24)))
    assert text_of(store, f"{RUN}/weights/a") in map(str, range(24))
    assert [p.name for p in (store.home / "runs/s-1.train.0/weights").iterdir()] == ["a"]


def test_every_file_and_directory_is_flushed_before_its_name_appears(store, monkeypatch):
    events = []
    fsync, rename = durable.fsync, Path.rename
    monkeypatch.setattr(durable, "fsync", lambda path: (events.append(("fsync", path)), fsync(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(("rename", self)), rename(self, to)))

    def writer(directory: Path) -> None:
        note("x")(directory)
        (directory / "sub").mkdir()
        note("y")(directory / "sub")

    store.write_checkpoint(RUN, "weights", "a", writer, **META)
    (at,) = [i for i, (what, _) in enumerate(events) if what == "rename"]
    temporary = events[at][1]
    flushed = {str(path.relative_to(temporary)) for what, path in events[:at] if path.is_relative_to(temporary)}
    assert flushed == {".", "note.txt", "checkpoint.json", "sub", "sub/note.txt"}
    assert ("fsync", temporary.parent) in events[at:]


# --- names and paths


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "a\\b", "a\nb", "a\0b", "x" * 201, "é" * 101, None, 3]
)
def test_names_that_are_no_file_names_are_refused(store, name):
    before = everything(store)
    with pytest.raises(UserError, match="name: expected"):
        store.write_checkpoint(RUN, "weights", name, note("x"), **META)
    assert everything(store) == before


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.characters(codec="utf-8"), max_size=20))
def test_every_accepted_name_round_trips_and_stays_inside_its_run(store, name):
    try:
        path = store.write_checkpoint(RUN, "weights", name, note(name), **META, overwrite=True)
    except UserError:
        return
    found = store.resolve(path)
    assert found.directory.resolve().parent == (store.home / "runs/s-1.train.0/weights").resolve()
    assert found.name == name


@pytest.mark.parametrize(
    "path",
    [
        "tinker://s-1:train:0/weights/a", "mint://s-1:train:0/weights/a", "s-1:train:0/weights/a", "mint://s-1:train:0/a",
        "s-1:train:0/a", "a",
    ],
)  # fmt: skip
def test_a_checkpoint_is_found_under_every_form_of_its_path(store, path):
    store.write_checkpoint(RUN, "weights", "a", note("x"), **META)
    assert store.resolve(path).tinker_path == "tinker://s-1:train:0/weights/a"


def test_an_ambiguous_short_path_names_the_candidates(store):
    for kind in ("weights", "sampler_weights"):
        store.write_checkpoint(RUN, kind, "a", note(kind), **META)
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
def test_what_is_not_there_is_said_with_what_is(store, path, message):
    store.write_checkpoint(RUN, "weights", "checkpoint", note("x"), **META)
    with pytest.raises(NotFoundError, match=message):
        store.resolve(path)


@pytest.mark.parametrize(
    "path", [f"tinker://{RUN}/weights/..", f"{RUN}/weights/.tmp-x", f"{RUN}/other/a", "a/b/c/d", 3]
)
def test_malformed_paths_are_refused(store, path):
    with pytest.raises(UserError, match="expected"):
        store.resolve(path)


def test_a_damaged_record_is_named_when_asked_for_and_left_out_of_lists(store, caplog):
    path = store.write_checkpoint(RUN, "weights", "a", note("x"), **META)
    store.write_checkpoint(RUN, "weights", "b", note("x"), **META)
    (store.resolve(path).directory / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: missing or damaged"):
        store.resolve(path)
    assert [c.checkpoint_id for c in store.list_checkpoints(RUN).checkpoints] == ["weights/b"]
    assert "damaged" in caplog.text


# --- lists, expiry, publishing, deletion


def test_lists_are_paged_newest_first(store):
    store.create_run("s-1:train:1", session_id="s-1", base_model="tiny", lora=LORA)
    for i in range(5):
        store.write_checkpoint(f"s-1:train:{i % 2}", "weights", str(i), note("x"), **META)
    names = [c.checkpoint_id for c in store.list_user_checkpoints().checkpoints]
    assert names == [f"weights/{i}" for i in (4, 3, 2, 1, 0)]
    page = store.list_user_checkpoints(limit=2, offset=1)
    assert [c.checkpoint_id for c in page.checkpoints] == ["weights/3", "weights/2"]
    assert (page.cursor.offset, page.cursor.limit, page.cursor.total_count) == (1, 2, 5)
    assert [c.checkpoint_id for c in store.list_checkpoints(RUN).checkpoints] == ["weights/4", "weights/2", "weights/0"]
    runs = store.list_runs()
    assert [run.training_run_id for run in runs.training_runs] == ["s-1:train:0", "s-1:train:1"]
    assert runs.training_runs[0].last_checkpoint.checkpoint_id == "weights/4"
    assert runs.training_runs[0].last_sampler_checkpoint is None
    assert (runs.training_runs[0].lora_rank, runs.training_runs[0].user_metadata) == (2, {"k": "v"})
    store.create_session("s-2", project_id="q")
    store.create_run("s-2:train:0", session_id="s-2", base_model="tiny", lora=LORA)
    assert [run.training_run_id for run in store.list_runs(project_id="q").training_runs] == ["s-2:train:0"]
    with pytest.raises(UserError, match="limit"):
        store.list_runs(limit=-1)


def test_an_expired_checkpoint_is_gone_everywhere(store, monkeypatch):
    path = store.write_checkpoint(RUN, "weights", "a", note("x"), **META, ttl_seconds=100)
    kept = store.write_checkpoint(RUN, "weights", "b", note("x"), **META, ttl_seconds=100)
    store.set_ttl(kept, None)
    directory = store.resolve(path).directory
    assert store.list_checkpoints(RUN).checkpoints[-1].expires_at is not None
    later = datetime.now(UTC) + timedelta(seconds=101)
    monkeypatch.setattr("mint_engine.store._now", lambda: later)
    assert [c.tinker_path for c in store.list_user_checkpoints().checkpoints] == [kept]
    assert not directory.exists()
    with pytest.raises(NotFoundError):
        store.resolve(path)
    store.write_checkpoint(RUN, "weights", "a", note("again"), **META)


@pytest.mark.parametrize("ttl", [0, -5])
def test_a_ttl_is_positive(store, ttl):
    path = store.write_checkpoint(RUN, "weights", "a", note("x"), **META)
    with pytest.raises(UserError, match="ttl_seconds"):
        store.set_ttl(path, ttl)
    with pytest.raises(UserError, match="ttl_seconds"):
        store.write_checkpoint(RUN, "weights", "b", note("x"), **META, ttl_seconds=ttl)


def test_publishing_and_deleting(store):
    path = store.write_checkpoint(RUN, "weights", "a", note("x"), **META)
    for change, public in [(store.publish, True), (store.unpublish, False)]:
        change(path)
        assert Store(store.home).resolve(path).record.public is public
    store.delete_checkpoint(path)
    assert store.list_checkpoints(RUN).checkpoints == []
    with pytest.raises(NotFoundError):
        store.delete_checkpoint(path)
    assert list((store.home / "runs/s-1.train.0/weights").iterdir()) == []


def test_weights_info_describes_the_adapter(store):
    path = store.write_checkpoint(RUN, "weights", "a", note("x"), **META)
    info = store.weights_info(path)
    assert (info.base_model, info.is_lora, info.lora_rank) == ("tiny", True, 2)
    assert (info.train_attn, info.train_mlp, info.train_unembed) == (True, False, True)


def test_an_archive_holds_the_peft_adapter(store, tmp_path, monkeypatch):
    path = store.write_checkpoint(RUN, "sampler_weights", "a b", adapter_of(7), **META)
    url = urlparse(store.archive(path))
    file = Path(unquote(url.path))
    assert url.scheme == "file"
    with tarfile.open(file) as tar:
        tar.extractall(tmp_path / "out", filter="data")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "checkpoint_complete",
    ]  # fmt: skip
    assert read_adapter(tmp_path / "out")[1]["base_model.model.lm_head.lora_A.weight"][0, 0] == 7.0
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    store.write_checkpoint(RUN, "sampler_weights", "b", adapter_of(8), **META)
    tomorrow = time.time() + 25 * 3600
    monkeypatch.setattr("mint_engine.store.time.time", lambda: tomorrow)
    store.archive(f"{RUN}/b")
    assert not file.exists()


# --- sessions


def test_sessions_runs_and_samplers_survive_a_restart(store):
    store.add_sampler("s-1", "s-1:sample:0", base_model="tiny", model_path="tinker://x")
    with open(store.home / "sessions/s-1.samplers.jsonl", "a") as file:
        file.write('{"sampler_id": "cut sho')  # a process killed in the middle of a line
    again = Store(store.home)
    again.create_session("s-2")
    again.add_sampler("s-1", "s-1:sample:1", base_model="tiny")
    session = again.get_session("s-1")
    assert session.training_run_ids == [RUN]
    assert session.sampler_ids == ["s-1:sample:0", "s-1:sample:1"]
    assert session.user_metadata == {"who": "me"}
    again.update_session("s-1", display_name="first")
    again.update_session("s-1", project_id="q")
    assert again.get_session("s-1").display_name == "first"
    assert [run.training_run_id for run in again.list_runs(project_id="q").training_runs] == [RUN]
    assert again.get_sampler("s-1:sample:0").model_path == "tinker://x"
    assert again.list_sessions().sessions == ["s-2", "s-1"]
    assert again.list_sessions(limit=1, offset=1).sessions == ["s-1"]
    assert again.get_run(RUN).base_model == "tiny"


def test_unknown_sessions_samplers_and_runs_are_named(store):
    for call in (
        lambda: store.get_session("s-9"),
        lambda: store.get_sampler("s-9:sample:0"),
        lambda: store.get_run("s-9:train:0"),
        lambda: store.list_checkpoints("s-9:train:0"),
        lambda: store.add_sampler("s-9", "s-9:sample:0", base_model="tiny"),
        lambda: store.write_checkpoint("s-9:train:0", "weights", "a", note("x"), **META),
    ):
        with pytest.raises(NotFoundError, match="s-9"):
            call()


def test_identifiers_are_not_reused(store):
    with pytest.raises(UserError, match="already exists"):
        store.create_session("s-1")
    with pytest.raises(UserError, match="already exists"):
        store.create_run(RUN, session_id="s-1", base_model="tiny", lora=LORA)


def test_a_home_that_is_a_file_is_named(tmp_path):
    (tmp_path / "home").write_text("")
    with pytest.raises(StorageError, match="creating"):
        Store(tmp_path / "home")
