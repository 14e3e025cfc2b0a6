"""Checkpoints: written, found, listed, published, removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, func, insert, select, update

from mint_engine import durable
from mint_engine.errors import CheckpointError, UserError
from mint_engine.store import artifacts, schema
from mint_engine.store.base import KINDS, record_of, unique
from mint_engine.store.names import (
    SEARCHED,
    MissingError,
    check_name,
    check_page,
    check_scope,
    check_text,
    check_ttl,
    file_name,
    now,
)
from mint_engine.store.records import CheckpointRecord, ResolvedCheckpoint
from mint_engine.store.runs import Runs
from mint_engine.types import (
    AccessScope,
    CheckpointKind,
    CheckpointsListResponse,
    Cursor,
    LoraConfig,
    ParsedCheckpointTinkerPath,
    WeightsInfoResponse,
)
from mint_engine.types.records import strip_scheme

_checkpoints = schema.checkpoints


class Checkpoints(Runs):
    def write_checkpoint(
        self,
        run_id: str,
        kind: CheckpointKind,
        name: str,
        writer: Callable[[Path], None],
        *,
        base_model: str,
        lora: LoraConfig,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Let `writer(directory)` write a checkpoint, and return its path once it is complete and on the disk.

        The checkpoint appears under its name in one step. When anything fails nothing is left behind, and a checkpoint
        that was to be overwritten is still there.

        Raises:
            UserError: `name` cannot be a file name, or exists and `overwrite` is False.
            StorageError: the disk or the database is full or refuses. Whatever else `writer` raises.
        """
        check_ttl(ttl_seconds)
        record = self._new_record(run_id, kind, name, base_model, lora, user_metadata, ttl_seconds)
        with self._database.read() as connection:
            self._run(connection, run_id)
            if not overwrite:
                _refuse_existing(connection, record)
        self._write(record, writer, overwrite=overwrite)
        return record.tinker_path

    def resolve(self, path: str, prefer: CheckpointKind | None = None) -> ResolvedCheckpoint:
        """Find a checkpoint of one's own, or one that anybody has published.

        Accepts `tinker://<run>/<kind>/<name>`, the same with `mint://` or without a scheme, and for one's own the
        short forms `<run>/<name>` and `<name>` where only one checkpoint fits (`prefer` decides between the kinds).
        Its directory stays readable for a few minutes, even if the checkpoint is replaced or deleted meanwhile.

        Raises:
            NotFoundError: there is none; the message names what there is.
            UserError: a short form that fits several.
        """
        found = self._parse(path, prefer)
        gone = None
        while True:
            with self._database.read() as connection:
                row = self._row(connection, found)
            directory = self.home / row.directory
            if artifacts.use(directory):
                return ResolvedCheckpoint(**found.model_dump(), directory=directory, record=record_of(row))
            if directory == gone:  # not replaced or deleted while we looked: the row is there, its files are not
                raise CheckpointError(f"{found.tinker_path}: its files are missing: {row.directory}")
            gone = directory

    def list_checkpoints(
        self, run_id: str, access_scope: AccessScope = "owned", kinds: Sequence[CheckpointKind] = KINDS
    ) -> CheckpointsListResponse:
        """The checkpoints of a run, newest first. "accessible": also the published ones of another's run."""
        accessible = check_scope(access_scope)
        with self._database.read() as connection:
            self._readable_run(connection, run_id, accessible)
            wanted = and_(_checkpoints.c.run_id == run_id, _checkpoints.c.kind.in_(kinds), self._visible(accessible))
            rows = connection.execute(_newest_first().where(wanted)).all()
        return CheckpointsListResponse(checkpoints=[record_of(row).public_view() for row in rows])

    def list_user_checkpoints(
        self,
        limit: int = 100,
        offset: int = 0,
        access_scope: AccessScope = "owned",
        kinds: Sequence[CheckpointKind] = KINDS,
    ) -> CheckpointsListResponse:
        """The checkpoints of all runs, newest first. "accessible": also what others have published."""
        check_page(limit, offset)
        wanted = and_(_checkpoints.c.kind.in_(kinds), self._visible(check_scope(access_scope)))
        with self._database.read() as connection:
            total = connection.execute(select(func.count()).select_from(_checkpoints).where(wanted)).scalar_one()
            rows = connection.execute(_newest_first().where(wanted).limit(limit).offset(offset)).all()
        return CheckpointsListResponse(
            checkpoints=[record_of(row).public_view() for row in rows],
            cursor=Cursor(offset=offset, limit=limit, total_count=total),
        )

    def delete_checkpoint(self, path: str, *, at_once: bool = False) -> None:
        """It is gone for everybody when this returns.

        Its files follow now, or, if somebody resolved it minutes ago and may be reading, with a later purge.
        `at_once`: now in any case.
        """
        found = self._parse(path)
        with self._database.write(f"deleting {path}") as connection:
            row = self._row(connection, found, mine=True)
            connection.execute(delete(_checkpoints).where(_checkpoints.c.id == row.id))
        self._discard([row.directory], at_once=at_once)

    def set_ttl(self, path: str, ttl_seconds: int | None) -> None:
        """Let a checkpoint expire in `ttl_seconds`, counted from now, or never (None)."""
        check_ttl(ttl_seconds)
        self._update(path, expires_at=_expiry(now(), ttl_seconds))

    def publish(self, path: str) -> None:
        """Let every owner read it."""
        self._update(path, public=True)

    def unpublish(self, path: str) -> None:
        self._update(path, public=False)

    def weights_info(self, path: str) -> WeightsInfoResponse:
        """What a model needs to be like for this checkpoint to fit."""
        found = self._parse(path)
        with self._database.read() as connection:
            record = record_of(self._row(connection, found))
        lora = record.lora
        return WeightsInfoResponse(
            base_model=record.base_model,
            is_lora=True,
            lora_rank=lora.rank,
            train_unembed=lora.train_unembed,
            train_mlp=lora.train_mlp,
            train_attn=lora.train_attn,
        )

    def disk_usage(self) -> int:
        """Bytes of this owner's checkpoints."""
        mine = and_(_checkpoints.c.owner == self.owner, self._visible(False))
        with self._database.read() as connection:
            return int(connection.execute(select(func.sum(_checkpoints.c.size_bytes)).where(mine)).scalar() or 0)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _new_record(
        self,
        run_id: str,
        kind: CheckpointKind,
        name: str,
        base_model: str,
        lora: LoraConfig,
        user_metadata: Mapping[str, str] | None,
        ttl_seconds: int | None,
    ) -> CheckpointRecord:
        check_name(name)
        check_text(base_model, "base_model")
        if kind not in KINDS:
            raise UserError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        time = now()
        return CheckpointRecord(
            run_id=run_id,
            owner=self.owner,
            kind=kind,
            name=name,
            time=time,
            size_bytes=0,
            base_model=base_model,
            lora=lora,
            user_metadata=None if user_metadata is None else dict(user_metadata),
            expires_at=_expiry(time, ttl_seconds),
        )

    def _write(
        self,
        record: CheckpointRecord,
        writer: Callable[[Path], None],
        *,
        overwrite: bool = False,
        before: Callable[[Connection], None] = lambda connection: None,
    ) -> None:
        """Write the files, then the row. `before` runs first in the row's transaction."""
        action = f"saving checkpoint {record.name!r}"
        limit = None if self.disk_limit is None else self.disk_limit(self.owner)
        replaced: list[str] = []

        def commit(directory: Path) -> None:
            size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
            row = {
                **record.model_dump(exclude={"lora", "size_bytes"}),
                "lora": record.lora.model_dump(mode="json"),
                "size_bytes": size,
                "directory": directory.relative_to(self.home).as_posix(),
            }
            with unique("name", record.name), self._database.write(action) as connection:
                before(connection)
                self._run(connection, record.run_id, lock=True)
                if not overwrite:
                    _refuse_existing(connection, record)
                old = _named(record)
                replaced.extend(connection.execute(select(_checkpoints.c.directory).where(old)).scalars())
                connection.execute(delete(_checkpoints).where(old))
                if limit is not None:
                    self._check_room(connection, size, limit)
                connection.execute(insert(_checkpoints).values(row))
                run = schema.runs.c.run_id == record.run_id
                connection.execute(update(schema.runs).where(run).values(last_used=record.time))

        with durable.storage_errors(action):
            folder = self.home / "runs" / file_name(record.run_id, "run_id") / record.kind
            artifacts.write_version(folder, record.name, writer, commit)
        self._discard(replaced)
        self._saved()

    def _check_room(self, connection: Connection, size: int, limit: int) -> None:
        """However many are saved at once: each sees those before it."""
        mine = select(func.sum(_checkpoints.c.size_bytes)).where(_checkpoints.c.owner == self.owner)
        used = int(connection.execute(mine).scalar() or 0)
        if used + size > limit:
            raise UserError(
                f"checkpoints may take {limit:,} bytes here; there are {used:,}, and {size:,} more do not fit: delete "
                "some (RestClient.delete_checkpoint) or let them expire (ttl_seconds)"
            )

    def _parse(self, path: str, prefer: CheckpointKind | None = None) -> ParsedCheckpointTinkerPath:
        short = isinstance(path, str) and strip_scheme(path).count("/") < 2
        found = self._find_short(path, prefer) if short else ParsedCheckpointTinkerPath.from_tinker_path(path)
        check_name(found.name)
        return found

    def _find_short(self, path: str, prefer: CheckpointKind | None) -> ParsedCheckpointTinkerPath:
        run_id, _, name = strip_scheme(path).rpartition("/")
        mine = self._visible(False)
        check_text(name, "path")
        with self._database.read() as connection:
            if run_id:
                self._run(connection, run_id)
                mine = and_(mine, _checkpoints.c.run_id == run_id)
            query = _newest_first().where(mine)
            matches = [record_of(row) for row in connection.execute(query.where(_checkpoints.c.name == name))]
            if not matches:
                there = [record_of(row).tinker_path for row in connection.execute(query.limit(SEARCHED + 1))]
                raise MissingError(f"there is no checkpoint {path!r}", path, there)
        if prefer is not None and len(matches) > 1:
            matches = [record for record in matches if record.kind == prefer] or matches
        if len(matches) > 1:
            raise UserError(f"path: {path!r} fits several: {', '.join(record.tinker_path for record in matches)}")
        return ParsedCheckpointTinkerPath.from_tinker_path(matches[0].tinker_path)

    def _row(self, connection: Connection, path: ParsedCheckpointTinkerPath, *, mine: bool = False) -> Row:
        """The row of a checkpoint that this owner may read, or (`mine`) change."""
        of_run = _checkpoints.c.run_id == path.training_run_id
        named = and_(of_run, _checkpoints.c.kind == path.kind, _checkpoints.c.name == path.name)
        file_name(path.training_run_id, "run_id")
        row = connection.execute(select(_checkpoints).where(named, self._visible(not mine))).one_or_none()
        if row is None:
            self._run(connection, path.training_run_id)
            rows = connection.execute(_newest_first().where(of_run, self._visible(False)).limit(SEARCHED + 1))
            there = [f"{r.kind}/{r.name}" for r in rows]
            raise MissingError(f"there is no checkpoint {path.tinker_path}", path.checkpoint_id, there)
        return row

    def _update(self, path: str, **changes: Any) -> None:
        found = self._parse(path)
        with self._database.write(f"updating {path}") as connection:
            row = self._row(connection, found, mine=True)
            connection.execute(update(_checkpoints).where(_checkpoints.c.id == row.id).values(**changes))

    def _discard(self, directories: Sequence[str], *, at_once: bool = False) -> None:
        for directory in directories:
            artifacts.discard(self.home / directory, at_once=at_once)

    def _saved(self) -> None:
        """Called after every checkpoint that was saved."""


def _newest_first() -> Any:
    return select(_checkpoints).order_by(_checkpoints.c.time.desc(), _checkpoints.c.id.desc())


def _named(record: CheckpointRecord) -> Any:
    table = _checkpoints.c
    return and_(table.run_id == record.run_id, table.kind == record.kind, table.name == record.name)


def _refuse_existing(connection: Connection, record: CheckpointRecord) -> None:
    expires = connection.execute(select(_checkpoints.c.expires_at).where(_named(record))).all()
    if any(when is None or when > now() for (when,) in expires):
        raise UserError(f"name: {record.name!r} already exists; choose another name or pass overwrite=True")


def _expiry(start: datetime, ttl_seconds: int | None) -> datetime | None:
    return None if ttl_seconds is None else start + timedelta(seconds=ttl_seconds)
