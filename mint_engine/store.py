"""Sessions, training runs and checkpoints on disk: what was acknowledged is kept.

    <home>/sessions/<session>.json             who, when
    <home>/sessions/<session>.samplers.jsonl   one line a sampler, appended
    <home>/runs/<run>/run.json                 base model, adapter
    <home>/runs/<run>/weights/<name>/          a training checkpoint: the files of checkpoint.py, and checkpoint.json
    <home>/runs/<run>/sampler_weights/<name>/  a checkpoint for sampling
    <home>/archives/                           tar.gz files made on request, kept for a day

In file names `:` becomes `.`. Several threads and processes may use one home at the same time.
"""

from __future__ import annotations

import logging
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mint_engine import durable
from mint_engine.checkpoint import ADAPTER_CONFIG, ADAPTER_MODEL
from mint_engine.errors import CheckpointError, NotFoundError, UserError
from mint_engine.store_records import CHECKPOINT_RECORD, CheckpointRecord, ResolvedCheckpoint, RunRecord, SessionRecord
from mint_engine.types import (
    CheckpointKind,
    CheckpointsListResponse,
    Cursor,
    GetSamplerResponse,
    GetSessionResponse,
    ListSessionsResponse,
    LoraConfig,
    ParsedCheckpointTinkerPath,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from mint_engine.types.records import strip_scheme

log = logging.getLogger(__name__)

KINDS: tuple[CheckpointKind, ...] = ("weights", "sampler_weights")
ARCHIVE_SECONDS = 24 * 3600
MAX_TTL_SECONDS = 100 * 365 * 86400

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,199}")
_Record = TypeVar("_Record", bound=BaseModel)


class Store:
    """The metadata and the checkpoints under one home directory. Created if it does not exist.

    Paths of checkpoints are written as `tinker://<run>/weights/<name>` or `.../sampler_weights/<name>`; `resolve` says
    what is accepted. Methods raise NotFoundError for what does not exist and StorageError when the disk refuses.
    """

    def __init__(self, home: Path) -> None:
        self.home = Path(home)
        self._lock = self.home / ".lock"
        with durable.storage_errors(f"creating {home}"):
            for directory in ("sessions", "runs", "archives"):
                durable.make_directory(self.home / directory)

    # ---- sessions ------------------------------------------------------------------------------------------------

    def create_session(
        self,
        session_id: str,
        *,
        tags: Sequence[str] = (),
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
    ) -> None:
        record = SessionRecord(
            session_id=session_id,
            created=_now(),
            tags=list(tags),
            user_metadata=None if user_metadata is None else dict(user_metadata),
            project_id=project_id,
        )
        path = self._session_file(session_id)
        if path.exists():
            raise UserError(f"session_id: {session_id!r} already exists")
        self._write_record(path, record, f"creating session {session_id}")

    def update_session(
        self, session_id: str, *, project_id: str | None = None, display_name: str | None = None
    ) -> None:
        """Change what is given."""
        changes = {"project_id": project_id, "display_name": display_name}
        with durable.locked(self._lock):
            record = self._session(session_id).model_copy(update={k: v for k, v in changes.items() if v is not None})
            self._write_record(self._session_file(session_id), record, f"updating session {session_id}")

    def list_sessions(self, limit: int = 20, offset: int = 0) -> ListSessionsResponse:
        """Session ids, newest first."""
        records = self._records((self.home / "sessions").glob("*.json"), SessionRecord)
        ordered = sorted(records, key=lambda record: record.created, reverse=True)
        return ListSessionsResponse(sessions=[record.session_id for record in _page(ordered, limit, offset)])

    def get_session(self, session_id: str) -> GetSessionResponse:
        record = self._session(session_id)
        runs = [run.run_id for run in self._runs() if run.session_id == session_id]
        samplers = [sampler.sampler_id for sampler in self._samplers(session_id)]
        return GetSessionResponse(
            training_run_ids=runs,
            sampler_ids=samplers,
            user_metadata=record.user_metadata,
            display_name=record.display_name,
        )

    def add_sampler(self, session_id: str, sampler_id: str, *, base_model: str, model_path: str | None = None) -> None:
        record = GetSamplerResponse(sampler_id=sampler_id, base_model=base_model, model_path=model_path)
        path = self._session_file(session_id).with_suffix(".samplers.jsonl")
        self._session(session_id)
        with durable.storage_errors(f"recording sampler {sampler_id}"), durable.locked(self._lock):
            durable.append_line(path, record.model_dump_json().encode())

    def get_sampler(self, sampler_id: str) -> GetSamplerResponse:
        session_id = sampler_id.split(":")[0]
        for record in self._samplers(session_id):
            if record.sampler_id == sampler_id:
                return record
        raise NotFoundError(f"sampler_id: there is no sampler {sampler_id!r}")

    # ---- runs ----------------------------------------------------------------------------------------------------

    def create_run(
        self,
        run_id: str,
        *,
        session_id: str,
        base_model: str,
        lora: LoraConfig,
        user_metadata: Mapping[str, str] | None = None,
    ) -> None:
        record = RunRecord(
            run_id=run_id,
            session_id=session_id,
            created=_now(),
            base_model=base_model,
            lora=lora,
            user_metadata=None if user_metadata is None else dict(user_metadata),
        )
        directory = self._run_directory(run_id)
        if (directory / "run.json").exists():
            raise UserError(f"run_id: {run_id!r} already exists")
        with durable.storage_errors(f"creating run {run_id}"):
            durable.make_directory(directory)
        self._write_record(directory / "run.json", record, f"creating run {run_id}")

    def list_runs(self, limit: int = 20, offset: int = 0, project_id: str | None = None) -> TrainingRunsResponse:
        """Training runs (of a project, if one is given), those used last first."""
        records = self._runs()
        if project_id is not None:
            records = [r for r in records if self._session(r.session_id).project_id == project_id]
        runs = sorted(map(self._training_run, records), key=lambda run: run.last_request_time, reverse=True)
        page = _page(runs, limit, offset)
        return TrainingRunsResponse(training_runs=page, cursor=_cursor(limit, offset, len(runs)))

    def get_run(self, run_id: str) -> TrainingRun:
        return self._training_run(self._run(run_id))

    # ---- checkpoints ---------------------------------------------------------------------------------------------

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

        The directory appears under its name in one step. When anything fails nothing is left behind, and a checkpoint
        that was to be overwritten is still there.

        Raises:
            UserError: `name` cannot be a file name, or exists and `overwrite` is False.
            StorageError: the disk is full or refuses. Whatever else `writer` raises.
        """
        check_name(name)
        _check_ttl(ttl_seconds)
        if kind not in KINDS:
            raise UserError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        directory = self._run_directory(self._run(run_id).run_id) / kind / name
        created = _now()

        def fill(temporary: Path) -> None:
            writer(temporary)
            record = CheckpointRecord(
                run_id=run_id,
                kind=kind,
                name=name,
                time=created,
                size_bytes=sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file()),
                base_model=base_model,
                lora=lora,
                user_metadata=None if user_metadata is None else dict(user_metadata),
                expires_at=None if ttl_seconds is None else created + timedelta(seconds=ttl_seconds),
            )
            (temporary / CHECKPOINT_RECORD).write_text(record.model_dump_json(indent=2) + "\n")

        self._purge(run_id)
        with durable.storage_errors(f"saving checkpoint {name!r}"):
            durable.write_directory(directory, fill, overwrite=overwrite, lock=self._lock)
        return f"tinker://{run_id}/{kind}/{name}"

    def resolve(self, path: str, prefer: CheckpointKind | None = None) -> ResolvedCheckpoint:
        """Find a checkpoint.

        Accepts `tinker://<run>/<kind>/<name>`, the same with `mint://` or without a scheme, and the short forms
        `<run>/<name>` and `<name>` where only one checkpoint fits (`prefer` decides between the two kinds).

        Raises:
            NotFoundError: there is none; the message names what there is.
            UserError: a short form that fits several.
        """
        short = isinstance(path, str) and strip_scheme(path).count("/") < 2
        found = self._find_short(path, prefer) if short else ParsedCheckpointTinkerPath.from_tinker_path(path)
        check_name(found.name)
        self._run(found.training_run_id)
        self._purge(found.training_run_id)
        directory = self._run_directory(found.training_run_id) / found.kind / found.name
        if not directory.is_dir():
            raise NotFoundError(self._nothing_at(found))
        record = _read_record(directory / CHECKPOINT_RECORD, CheckpointRecord)
        if record is None:
            raise CheckpointError(f"{directory / CHECKPOINT_RECORD}: missing or damaged")
        return ResolvedCheckpoint(**found.model_dump(), directory=directory, record=record)

    def list_checkpoints(self, run_id: str) -> CheckpointsListResponse:
        """The checkpoints of a run, newest first."""
        self._run(run_id)
        return CheckpointsListResponse(checkpoints=[record.public_view() for record in self._checkpoints(run_id)])

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> CheckpointsListResponse:
        """The checkpoints of all runs, newest first."""
        records = [record for run in self._runs() for record in self._checkpoints(run.run_id)]
        records.sort(key=lambda record: record.time, reverse=True)
        page = [record.public_view() for record in _page(records, limit, offset)]
        return CheckpointsListResponse(checkpoints=page, cursor=_cursor(limit, offset, len(records)))

    def delete_checkpoint(self, path: str) -> None:
        checkpoint = self.resolve(path)
        with durable.storage_errors(f"deleting {path}"), durable.locked(self._lock):
            durable.remove_directory(checkpoint.directory)
        self._archive_file(checkpoint).unlink(missing_ok=True)

    def set_ttl(self, path: str, ttl_seconds: int | None) -> None:
        """Let a checkpoint expire in `ttl_seconds`, counted from now, or never (None)."""
        _check_ttl(ttl_seconds)
        self._update(path, expires_at=None if ttl_seconds is None else _now() + timedelta(seconds=ttl_seconds))

    def publish(self, path: str) -> None:
        self._update(path, public=True)

    def unpublish(self, path: str) -> None:
        self._update(path, public=False)

    def weights_info(self, path: str) -> WeightsInfoResponse:
        record = self.resolve(path).record
        lora = record.lora
        return WeightsInfoResponse(
            base_model=record.base_model,
            is_lora=True,
            lora_rank=lora.rank,
            train_unembed=lora.train_unembed,
            train_mlp=lora.train_mlp,
            train_attn=lora.train_attn,
        )

    def archive(self, path: str) -> str:
        """A `file://` URL of a tar.gz of the adapter as PEFT reads it. The file is kept for a day."""
        checkpoint = self.resolve(path, prefer="sampler_weights")
        target = self._archive_file(checkpoint)
        with durable.storage_errors(f"archiving {path}"):
            for old in (self.home / "archives").glob("*/*/*.tar.gz"):
                if time.time() - old.stat().st_mtime > ARCHIVE_SECONDS:
                    old.unlink(missing_ok=True)
            durable.make_directory(target.parent)
            with durable.replacing_file(target) as temporary, tarfile.open(temporary, "w:gz") as tar:
                for file in (ADAPTER_CONFIG, ADAPTER_MODEL):
                    tar.add(checkpoint.directory / file, arcname=file)
                tar.addfile(tarfile.TarInfo("checkpoint_complete"))
        return target.resolve().as_uri()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _session_file(self, session_id: str) -> Path:
        return self.home / "sessions" / f"{_file_name(session_id, 'session_id')}.json"

    def _run_directory(self, run_id: str) -> Path:
        return self.home / "runs" / _file_name(run_id, "run_id")

    def _session(self, session_id: str) -> SessionRecord:
        path = self._session_file(session_id)
        record = _read_record(path, SessionRecord) if path.exists() else None
        if record is None or record.session_id != session_id:
            raise NotFoundError(f"session_id: there is no session {session_id!r}")
        return record

    def _samplers(self, session_id: str) -> list[GetSamplerResponse]:
        path = self._session_file(session_id).with_suffix(".samplers.jsonl")
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        records = []
        for line in filter(None, lines):
            try:
                records.append(GetSamplerResponse.model_validate_json(line))
            except ValidationError:  # a killed process did not finish its line: that sampler was never acknowledged
                log.warning("%s: left out a damaged line", path)
        return records

    def _runs(self) -> list[RunRecord]:
        """All runs, oldest first."""
        records = self._records((self.home / "runs").glob("*/run.json"), RunRecord)
        return sorted(records, key=lambda record: record.created)

    def _run(self, run_id: str) -> RunRecord:
        path = self._run_directory(run_id) / "run.json"
        record = _read_record(path, RunRecord) if path.exists() else None
        if record is None or record.run_id != run_id:
            raise NotFoundError(
                f"there is no training run {run_id!r}; {_nearby(run_id, [r.run_id for r in self._runs()])}"
            )
        return record

    def _training_run(self, run: RunRecord) -> TrainingRun:
        records = self._checkpoints(run.run_id)
        last = {kind: next((r.public_view() for r in records if r.kind == kind), None) for kind in KINDS}
        return TrainingRun(
            training_run_id=run.run_id,
            base_model=run.base_model,
            model_owner="local",
            is_lora=True,
            lora_rank=run.lora.rank,
            last_request_time=max([run.created, *(record.time for record in records)]),
            last_checkpoint=last["weights"],
            last_sampler_checkpoint=last["sampler_weights"],
            user_metadata=run.user_metadata,
        )

    def _checkpoints(self, run_id: str) -> list[CheckpointRecord]:
        """The checkpoints of a run that have not expired, newest first."""
        self._purge(run_id)
        directory = self._run_directory(run_id)
        files = [path for kind in KINDS for path in (directory / kind).glob(f"[!.]*/{CHECKPOINT_RECORD}")]
        return sorted(self._records(files, CheckpointRecord), key=lambda record: record.time, reverse=True)

    def _purge(self, run_id: str) -> None:
        """Remove what has expired, and finish what a killed process left half done."""
        for kind in KINDS:
            directory = self._run_directory(run_id) / kind
            durable.recover(directory, lock=self._lock)
            for path in directory.glob(f"[!.]*/{CHECKPOINT_RECORD}"):
                record = _read_record(path, CheckpointRecord)
                if record is not None and record.expired(_now()):
                    with durable.locked(self._lock):
                        durable.remove_directory(path.parent)

    def _update(self, path: str, **changes: Any) -> None:
        checkpoint = self.resolve(path)
        file = checkpoint.directory / CHECKPOINT_RECORD
        with durable.storage_errors(f"updating {path}"), durable.locked(self._lock):
            record = CheckpointRecord.model_validate_json(file.read_text(encoding="utf-8"))
            updated = record.model_copy(update=changes)
            durable.write_file(file, updated.model_dump_json(indent=2).encode() + b"\n")

    def _archive_file(self, checkpoint: ResolvedCheckpoint) -> Path:
        run = _file_name(checkpoint.training_run_id, "run_id")
        return self.home / "archives" / run / checkpoint.kind / f"{checkpoint.name}.tar.gz"

    def _find_short(self, path: str, prefer: CheckpointKind | None) -> ParsedCheckpointTinkerPath:
        run_id, _, name = strip_scheme(path).rpartition("/")
        runs = [self._run(run_id)] if run_id else self._runs()
        records = [record for run in runs for record in self._checkpoints(run.run_id)]
        matches = [record for record in records if record.name == name]
        if prefer is not None and len(matches) > 1:
            matches = [record for record in matches if record.kind == prefer] or matches
        if not matches:
            raise NotFoundError(f"there is no checkpoint {path!r}; {_nearby(path, [r.tinker_path for r in records])}")
        if len(matches) > 1:
            raise UserError(f"path: {path!r} fits several: {', '.join(record.tinker_path for record in matches)}")
        return ParsedCheckpointTinkerPath.from_tinker_path(matches[0].tinker_path)

    def _nothing_at(self, path: ParsedCheckpointTinkerPath) -> str:
        others = [f"{r.kind}/{r.name}" for r in self._checkpoints(path.training_run_id)]
        return f"there is no checkpoint {path.tinker_path}; {_nearby(path.checkpoint_id, others)}"

    def _records(self, paths: Iterator[Path] | list[Path], kind: type[_Record]) -> list[_Record]:
        return [record for path in paths if (record := _read_record(path, kind)) is not None]

    def _write_record(self, path: Path, record: BaseModel, action: str) -> None:
        with durable.storage_errors(action):
            durable.write_file(path, record.model_dump_json(indent=2).encode() + b"\n")


def check_name(name: str) -> None:
    """Raises UserError unless `name` can name a checkpoint: one visible file name of at most 200 bytes."""
    if not isinstance(name, str):
        raise UserError(f"name: expected a string, got {type(name).__name__}")
    if not name or len(name.encode("utf-8", "replace")) > 200:
        raise UserError(f"name: expected 1 to 200 bytes, got {len(name.encode('utf-8', 'replace'))}")
    if name.startswith("."):
        raise UserError(f"name: expected no leading dot, got {name!r}")
    if "/" in name or "\\" in name or not name.isprintable():
        raise UserError(f"name: expected no slash, backslash or control character, got {name!r}")


def _check_ttl(ttl_seconds: int | None) -> None:
    if ttl_seconds is None:
        return
    number = isinstance(ttl_seconds, int | float) and not isinstance(ttl_seconds, bool)
    if not number or not 0 < ttl_seconds <= MAX_TTL_SECONDS:
        raise UserError(
            f"ttl_seconds: expected None or a positive number of seconds up to {MAX_TTL_SECONDS}, got {ttl_seconds!r}"
        )


def _file_name(identifier: str, what: str) -> str:
    if not isinstance(identifier, str) or not _ID.fullmatch(identifier):
        raise NotFoundError(f"{what}: expected letters, digits and _ . : -, got {identifier!r}")
    return identifier.replace(":", ".")


def _read_record(path: Path, kind: type[_Record]) -> _Record | None:
    """The record in a file; None if it has just been removed, or (with a warning) if it is damaged."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        log.warning("%s is damaged and left out: %s", path, error)
        return None


def _nearby(wanted: str, names: list[str]) -> str:
    if not names:
        return "there are none here"
    close = get_close_matches(wanted, names, n=5, cutoff=0.5) or names[:5]
    more = f" (and {len(names) - len(close)} more)" if len(names) > len(close) else ""
    return f"there is: {', '.join(close)}{more}"


def _now() -> datetime:
    return datetime.now(UTC)


def _page(items: list[Any], limit: int, offset: int) -> list[Any]:
    if limit < 0 or offset < 0:
        raise UserError(f"expected limit and offset of at least 0, got limit={limit}, offset={offset}")
    return items[offset : offset + limit]


def _cursor(limit: int, offset: int, total: int) -> Cursor:
    return Cursor(offset=offset, limit=limit, total_count=total)
