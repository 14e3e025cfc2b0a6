"""Training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import ColumnElement, Connection, Row, and_, func, insert, or_, select

from mint_engine.store import schema
from mint_engine.store.base import StoreBase, record_of, unique
from mint_engine.store.names import check_id, check_page, check_scope, check_text, is_id, now
from mint_engine.types import AccessScope, Cursor, LoraConfig, TrainingRun, TrainingRunsResponse

_runs, _checkpoints, _sessions = schema.runs, schema.checkpoints, schema.sessions


class Runs(StoreBase):
    def create_run(
        self,
        run_id: str,
        *,
        session_id: str,
        base_model: str,
        lora: LoraConfig,
        user_metadata: Mapping[str, str] | None = None,
    ) -> None:
        with unique("run_id", run_id), self._database.write(f"creating run {run_id}") as connection:
            self._session(connection, session_id)
            self._insert_run(
                connection,
                run_id,
                session_id=session_id,
                base_model=base_model,
                lora=lora,
                user_metadata=user_metadata,
            )

    def list_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        project_id: str | None = None,
        access_scope: AccessScope = "owned",
    ) -> TrainingRunsResponse:
        """Training runs (of a project, if one is given), those used last first.

        "accessible" adds the runs of others that have a published checkpoint.
        """
        check_page(limit, offset)
        check_text(project_id, "project_id")
        accessible = check_scope(access_scope)
        wanted: ColumnElement[bool] = _runs.c.owner == self.owner
        if accessible:
            published = select(_checkpoints.c.run_id).where(_checkpoints.c.public, self._visible(True))
            wanted = or_(wanted, _runs.c.run_id.in_(published))
        if project_id is not None:
            wanted = and_(wanted, func.coalesce(_sessions.c.project_id, _runs.c.project_id) == project_id)
        joined = _runs.outerjoin(_sessions, _sessions.c.session_id == _runs.c.session_id)
        page = select(_runs).select_from(joined).where(wanted)
        page = page.order_by(_runs.c.last_used.desc(), _runs.c.run_id.desc())
        with self._database.read() as connection:
            total = connection.execute(select(func.count()).select_from(joined).where(wanted)).scalar_one()
            rows = connection.execute(page.limit(limit).offset(offset)).all()
            found = self._training_runs(connection, rows, accessible)
        return TrainingRunsResponse(training_runs=found, cursor=Cursor(offset=offset, limit=limit, total_count=total))

    def has_run(self, run_id: str) -> bool:
        """Whether there is such a run of one's own. Quicker than `get_run`, most of all if there is not."""
        if not is_id(run_id):
            return False
        mine = and_(_runs.c.run_id == run_id, _runs.c.owner == self.owner)
        with self._database.read() as connection:
            return connection.execute(select(_runs.c.run_id).where(mine)).first() is not None

    def get_run(self, run_id: str, access_scope: AccessScope = "owned") -> TrainingRun:
        """A run of one's own, or with "accessible" also another's that has a published checkpoint."""
        accessible = check_scope(access_scope)
        with self._database.read() as connection:
            row = self._readable_run(connection, run_id, accessible)
            return self._training_runs(connection, [row], accessible)[0]

    def _readable_run(self, connection: Connection, run_id: str, accessible: bool) -> Row:
        check_id(run_id, "run_id")
        if accessible:
            published = select(_checkpoints.c.id).where(_checkpoints.c.run_id == run_id, self._visible(True))
            row = connection.execute(select(_runs).where(_runs.c.run_id == run_id, published.exists())).one_or_none()
            if row is not None:
                return row
        return self._run(connection, run_id)

    def _training_runs(self, connection: Connection, rows: Sequence[Row], accessible: bool) -> list[TrainingRun]:
        """The rows as the API shows them: each with its newest checkpoints."""
        of: ColumnElement[bool] = _checkpoints.c.run_id.in_([row.run_id for row in rows])
        rank = func.row_number().over(
            partition_by=(_checkpoints.c.run_id, _checkpoints.c.kind),
            order_by=(_checkpoints.c.time.desc(), _checkpoints.c.id.desc()),
        )
        ranked = select(_checkpoints, rank.label("rank")).where(of, self._visible(accessible)).subquery()
        newest = connection.execute(select(ranked).where(ranked.c.rank == 1)).all() if rows else []
        records = {(row.run_id, row.kind): record_of(row).public_view() for row in newest}
        found = []
        for row in rows:
            training = records.get((row.run_id, "weights"))
            sampler = records.get((row.run_id, "sampler_weights"))
            found.append(
                TrainingRun(
                    training_run_id=row.run_id,
                    base_model=row.base_model,
                    model_owner=row.owner,
                    is_lora=True,
                    lora_rank=LoraConfig.model_validate(row.lora).rank,
                    last_request_time=row.last_used,
                    last_checkpoint=training,
                    last_sampler_checkpoint=sampler,
                    # What others published is a checkpoint, not their notes on the run.
                    user_metadata=row.user_metadata if row.owner == self.owner else None,
                )
            )
        return found

    def _insert_run(
        self,
        connection: Connection,
        run_id: str,
        *,
        session_id: str | None,
        base_model: str,
        lora: LoraConfig,
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
    ) -> None:
        check_id(run_id, "run_id")
        check_text(base_model, "base_model")
        check_text(project_id, "project_id")
        time = now()
        row = {
            "run_id": run_id,
            "session_id": session_id,
            "owner": self.owner,
            "created": time,
            "last_used": time,
            "base_model": base_model,
            "lora": lora.model_dump(mode="json"),
            "user_metadata": None if user_metadata is None else dict(user_metadata),
            "project_id": project_id,
        }
        connection.execute(insert(_runs).values(row))
