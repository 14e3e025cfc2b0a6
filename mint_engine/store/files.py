"""Homes from before there was a database: sessions, runs and checkpoints in JSON files beside the artifacts.

sessions/<session>.json, sessions/<session>.samplers.jsonl
runs/<run>/run.json, runs/<run>/<kind>/<name>/checkpoint.json
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, insert, select

from mint_engine.store import schema
from mint_engine.store.base import KINDS
from mint_engine.store.database import Database

log = logging.getLogger(__name__)

_OWNER = "local"


def adopt(home: Path, database: Database) -> None:
    """Give what the files of an old home describe its rows. The files stay where they are."""
    if not any((home / "sessions").glob("*.json")):
        return
    with database.write(f"adopting {home}") as connection:
        _insert(connection, schema.sessions, ["session_id"], _sessions(home))
        _insert(connection, schema.samplers, ["sampler_id"], _samplers(home))
        _insert(connection, schema.runs, ["run_id"], _runs(home))
        _insert(connection, schema.checkpoints, ["run_id", "kind", "name"], _checkpoints(home))


def _insert(connection: Connection, table: Table, key: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Those that fit: not what is there already (a crash came between), nor what refers to something lost."""
    there = {tuple(row) for row in connection.execute(select(*(table.c[name] for name in key)))}
    referred = {
        column.name: set(connection.execute(select(foreign.column)).scalars())
        for column in table.columns
        for foreign in column.foreign_keys
    }
    fitting = [
        row
        for row in rows
        if tuple(row[name] for name in key) not in there and all(row[name] in known for name, known in referred.items())
    ]
    if fitting:
        connection.execute(insert(table), fitting)


def _sessions(home: Path) -> Iterator[dict[str, Any]]:
    for record in _read((home / "sessions").glob("*.json")):
        names = ("session_id", "tags", "user_metadata", "project_id", "display_name")
        yield {"owner": _OWNER, "created": _time(record["created"]), **{name: record.get(name) for name in names}}


def _samplers(home: Path) -> Iterator[dict[str, Any]]:
    for path in (home / "sessions").glob("*.samplers.jsonl"):
        made = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
        for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
            try:
                record = json.loads(line)
            except ValueError:  # cut short by a crash
                continue
            session_id = record["sampler_id"].split(":")[0]
            # Without a path it was of a base model, or of weights in memory: nobody can say, so it stays away.
            ephemeral = record.get("model_path") is None
            yield {"session_id": session_id, "created": made, "model_path": None, "ephemeral": ephemeral, **record}


def _runs(home: Path) -> Iterator[dict[str, Any]]:
    for record in _read((home / "runs").glob("*/run.json")):
        names = ("run_id", "session_id", "base_model", "lora", "user_metadata")
        made = _time(record["created"])
        yield {"owner": _OWNER, "created": made, "last_used": made, **{name: record.get(name) for name in names}}


def _checkpoints(home: Path) -> Iterator[dict[str, Any]]:
    paths = [path for kind in KINDS for path in (home / "runs").glob(f"*/{kind}/[!.]*/checkpoint.json")]
    for path in paths:
        for record in _read([path]):
            expires = record.get("expires_at")
            yield {
                **record,
                "owner": _OWNER,
                "time": _time(record["time"]),
                "expires_at": None if expires is None else _time(expires),
                "directory": path.parent.relative_to(home).as_posix(),
            }


def _read(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        try:
            yield json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            log.warning("%s is damaged and left out: %s", path, error)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
