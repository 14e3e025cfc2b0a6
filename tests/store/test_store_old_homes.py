"""Homes of the version that kept JSON files go on with what they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from store_helpers import LORA, RUN, Place, move_clock, save, text_of

from mint_engine.errors import NotFoundError
from mint_engine.store import files

PATH = f"tinker://{RUN}/weights/a"


def write(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record if isinstance(record, str) else json.dumps(record))


@pytest.fixture
def old(place: Place) -> Place:
    """As version 0.1 wrote it, with a damaged record and a run whose session is lost."""
    home, created, lora = place.home, "2026-01-02T03:04:05.678900Z", LORA.model_dump()
    session = {"session_id": "s-1", "created": created, "tags": ["a"], "user_metadata": {"who": "me"}}
    write(home / "sessions/s-1.json", {**session, "project_id": "p", "display_name": None})
    sampler = {"sampler_id": "s-1:sample:0", "base_model": "tiny", "model_path": None}
    write(home / "sessions/s-1.samplers.jsonl", json.dumps(sampler) + '\n{"sampler_id": "cut sho')
    run = {"run_id": RUN, "session_id": "s-1", "created": created, "base_model": "tiny", "lora": lora}
    write(home / "runs/s-1.train.0/run.json", {**run, "user_metadata": {"k": "v"}})
    write(home / "runs/s-9.train.0/run.json", {**run, "run_id": "s-9:train:0", "session_id": "s-9"})
    checkpoint = {
        "run_id": RUN,
        "kind": "weights",
        "name": "a",
        "time": created,
        "size_bytes": 1,
        "base_model": "tiny",
        "lora": lora,
        "user_metadata": {"loss": "1"},
        "expires_at": None,
        "public": True,
    }
    for name in ("a", "damaged", ".tmp-x"):
        write(home / f"runs/s-1.train.0/weights/{name}/checkpoint.json", "{" if name == "damaged" else checkpoint)
        write(home / f"runs/s-1.train.0/weights/{name}/note.txt", "old")
    return place


def test_what_an_old_home_holds_is_still_there(old: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for store in (old.open(), old.open()):
        session = store.get_session("s-1")
        assert (session.training_run_ids, session.sampler_ids) == ([RUN], ["s-1:sample:0"])
        assert session.user_metadata == {"who": "me"}
        assert store.get_run(RUN).user_metadata == {"k": "v"}
        (listed,) = store.list_user_checkpoints().checkpoints
        assert (listed.tinker_path, listed.public, listed.user_metadata) == (PATH, True, {"loss": "1"})
        assert listed.time.isoformat() == "2026-01-02T03:04:05.678900+00:00"
        assert text_of(store, PATH) == "old"
        assert [run.training_run_id for run in store.list_runs(project_id="p").training_runs] == [RUN]
    move_clock(monkeypatch, days=2)
    store.purge_expired()
    assert text_of(store, PATH) == "old"
    save(store, "a", "new", overwrite=True)
    assert text_of(store, PATH) == "new"
    store.delete_checkpoint(PATH, at_once=True)
    with pytest.raises(NotFoundError):
        old.open().resolve(PATH)


def test_an_adoption_cut_short_is_repeated(old: Place) -> None:
    store = old.open()
    (old.home / "store-id").unlink()  # as if killed just before it was written
    files.adopt(old.home, store._database)
    assert [c.tinker_path for c in old.open().list_user_checkpoints().checkpoints] == [PATH]
