"""Models put aside: their state on the disk, out of the memory, until somebody goes on with them. Never listed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, delete, insert, select

from mint_engine import durable
from mint_engine.store import artifacts, schema
from mint_engine.store.base import StoreBase
from mint_engine.store.names import check_id, file_name, now
from mint_engine.store.records import Parked

_parked = schema.parked


class Parking(StoreBase):
    """For the engine, which serves all owners: whose model it is does not matter here."""

    def park(self, model_id: str, writer: Callable[[Path], None], note: Mapping[str, Any]) -> None:
        """Let `writer(directory)` write a model's or a sampler's state; `note` (JSON) comes back with it.

        Replaces what was parked under this id. All or nothing, as for checkpoints.
        """
        action = f"parking {model_id}"
        replaced: list[str] = []

        def commit(directory: Path) -> None:
            row = {
                "model_id": model_id,
                "created": now(),
                "note": dict(note),
                "directory": directory.relative_to(self.home).as_posix(),
            }
            with self._database.write(action) as connection:
                replaced.extend(_take(connection, model_id))
                connection.execute(insert(_parked).values(row))

        with durable.storage_errors(action):
            folder = self.home / "parked" / file_name(model_id, "model_id")
            artifacts.write_version(folder, "state", writer, commit)
        self._remove(replaced)

    def parked(self, model_id: str) -> Parked | None:
        """What is parked under this id."""
        check_id(model_id, "model_id")
        with self._database.read() as connection:
            row = connection.execute(select(_parked).where(_parked.c.model_id == model_id)).one_or_none()
        return None if row is None else Parked(self.home / row.directory, row.note)

    def parked_ids(self, session_id: str, kind: Literal["train", "sample"]) -> list[str]:
        """The models or the samplers of a session that are parked, longest ago first."""
        check_id(session_id, "session_id")
        mine = _parked.c.model_id.startswith(f"{session_id}:{kind}:", autoescape=True)
        query = select(_parked.c.model_id).where(mine).order_by(_parked.c.created, _parked.c.model_id)
        with self._database.read() as connection:
            return list(connection.execute(query).scalars())

    def unpark(self, model_id: str) -> None:
        """Forget what is parked under this id, if anything: it is in memory again."""
        check_id(model_id, "model_id")
        with self._database.write(f"unparking {model_id}") as connection:
            directories = _take(connection, model_id)
        self._remove(directories)

    def _remove(self, directories: list[str]) -> None:
        for directory in directories:
            artifacts.discard(self.home / directory, at_once=True)


def _take(connection: Connection, model_id: str) -> list[str]:
    mine = _parked.c.model_id == model_id
    directories = list(connection.execute(select(_parked.c.directory).where(mine)).scalars())
    connection.execute(delete(_parked).where(mine))
    return directories
