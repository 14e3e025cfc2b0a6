"""Checkpoints that were not trained here: copies of others', and uploaded adapters. Each gets a run of its own."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection

from mint_engine.errors import UserError
from mint_engine.store.base import unique
from mint_engine.store.checkpoints import Checkpoints
from mint_engine.store.names import check_ttl
from mint_engine.store.records import CheckpointRecord
from mint_engine.types import LoraConfig


class Copies(Checkpoints):
    def copy_checkpoint(
        self,
        source: str,
        *,
        reader: Checkpoints | None = None,
        session_id: str | None = None,
        model_seq_id: int | None = None,
        project_id: str | None = None,
        ttl_seconds: int | None = None,
    ) -> str:
        """Copy a checkpoint of any kind into a new run of this owner, and return its path there.

        Args:
            reader: the store of who may read `source`; default this one.
            session_id, model_seq_id: the run becomes `<session>:train:<seq>`. Both or neither.
            project_id: of a run without session.
            ttl_seconds: of the copy. That of the source does not count.
        """
        check_ttl(ttl_seconds)
        if (session_id is None) != (model_seq_id is None):
            raise UserError("copy_checkpoint: expected session_id and model_seq_id, or neither; got one of them")
        run_id = f"copy-{uuid.uuid4().hex}" if session_id is None else f"{session_id}:train:{model_seq_id}"
        if session_id is not None:
            with self._database.read() as connection:
                self._session(connection, session_id)
        found = (reader or self).resolve(source)
        record = found.record
        copy = self._new_record(
            run_id, found.kind, found.name, record.base_model, record.lora, record.user_metadata, ttl_seconds
        )
        self._write_new_run(copy, _copier(found.directory), session_id=session_id, project_id=project_id)
        return copy.tinker_path

    def import_checkpoint(
        self,
        directory: Path,
        *,
        base_model: str,
        lora: LoraConfig,
        name: str | None = None,
        ttl_seconds: int | None = None,
    ) -> str:
        """Copy a PEFT adapter, already checked, into a new run of this owner, and return its path there.

        It can be sampled from, and loaded to train on, without an optimiser's state.
        """
        check_ttl(ttl_seconds)
        run_id = f"import-{uuid.uuid4().hex}"
        record = self._new_record(run_id, "sampler_weights", name or "imported", base_model, lora, None, ttl_seconds)
        self._write_new_run(record, _copier(directory))
        return record.tinker_path

    def _write_new_run(
        self,
        record: CheckpointRecord,
        writer: Callable[[Path], None],
        *,
        session_id: str | None = None,
        project_id: str | None = None,
    ) -> None:
        """The run appears together with its checkpoint, or not at all."""

        def create_run(connection: Connection) -> None:
            with unique("run", record.run_id):
                self._insert_run(
                    connection,
                    record.run_id,
                    session_id=session_id,
                    base_model=record.base_model,
                    lora=record.lora,
                    project_id=project_id,
                )

        self._write(record, writer, before=create_run)


def _copier(source: Path) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        for entry in source.iterdir():
            if entry.is_symlink() or not entry.is_file():
                raise UserError(f"expected plain files only, got {entry.name!r}")
            shutil.copyfile(entry, directory / entry.name)

    return write
