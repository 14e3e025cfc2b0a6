"""The first tables."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

from mint_engine.store.schema import UtcDateTime

revision = "0001"
down_revision = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    store = op.create_table(
        "store",
        sa.Column("store_id", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("store_id", name="pk_store"),
    )
    op.bulk_insert(store, [{"store_id": uuid.uuid4().hex}])
    op.create_table(
        "keys",
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("prefix", sa.String(32), nullable=False),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("revoked", UtcDateTime),
        sa.Column("last_used", UtcDateTime),
        sa.Column("max_request_bytes", sa.BigInteger),
        sa.Column("max_concurrent_requests", sa.BigInteger),
        sa.Column("max_resident_models", sa.BigInteger),
        sa.Column("max_disk_bytes", sa.BigInteger),
        sa.PrimaryKeyConstraint("key_id", name="pk_keys"),
        sa.UniqueConstraint("secret_hash", name="uq_keys_secret_hash"),
    )
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.String(200), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("user_metadata", sa.JSON),
        sa.Column("project_id", sa.Text),
        sa.Column("display_name", sa.Text),
        sa.Column("finished", sa.String(16)),
        sa.Column("finish_detail", sa.Text),
        sa.PrimaryKeyConstraint("session_id", name="pk_sessions"),
    )
    op.create_index("ix_sessions_owner_created", "sessions", ["owner", "created"])
    op.create_table(
        "runs",
        sa.Column("run_id", sa.String(200), nullable=False),
        sa.Column("session_id", sa.String(200)),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("lora", sa.JSON, nullable=False),
        sa.Column("user_metadata", sa.JSON),
        sa.Column("project_id", sa.Text),
        sa.Column("last_used", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("run_id", name="pk_runs"),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.session_id"], name="fk_runs_session_id"),
    )
    op.create_index("ix_runs_session_id", "runs", ["session_id"])
    op.create_index("ix_runs_owner_last_used", "runs", ["owner", "last_used"])
    op.create_table(
        "checkpoints",
        sa.Column("id", _SERIAL, nullable=False),
        sa.Column("run_id", sa.String(200), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("time", UtcDateTime, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("lora", sa.JSON, nullable=False),
        sa.Column("user_metadata", sa.JSON),
        sa.Column("expires_at", UtcDateTime),
        sa.Column("public", sa.Boolean, nullable=False),
        sa.Column("directory", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoints"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_checkpoints_run_id"),
        sa.UniqueConstraint("run_id", "kind", "name", name="uq_checkpoints_run_id_kind_name"),
    )
    op.create_index("ix_checkpoints_expires_at", "checkpoints", ["expires_at"])
    op.create_index("ix_checkpoints_owner_time", "checkpoints", ["owner", "time"])
    op.create_table(
        "samplers",
        sa.Column("sampler_id", sa.String(200), nullable=False),
        sa.Column("session_id", sa.String(200), nullable=False),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("base_model", sa.Text, nullable=False),
        sa.Column("model_path", sa.Text),
        sa.Column("ephemeral", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("sampler_id", name="pk_samplers"),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.session_id"], name="fk_samplers_session_id"),
    )
    op.create_index("ix_samplers_session_id", "samplers", ["session_id"])
    op.create_table(
        "parked",
        sa.Column("model_id", sa.String(200), nullable=False),
        sa.Column("created", UtcDateTime, nullable=False),
        sa.Column("note", sa.JSON, nullable=False),
        sa.Column("directory", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("model_id", name="pk_parked"),
    )
    op.create_table(
        "ledger",
        sa.Column("id", _SERIAL, nullable=False),
        sa.Column("request_id", sa.String(200), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("model_id", sa.String(200)),
        sa.Column("seq_id", sa.BigInteger),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("accepted", UtcDateTime, nullable=False),
        sa.Column("finished", UtcDateTime),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("error", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_ledger"),
    )
    op.create_index("ix_ledger_finished", "ledger", ["finished"])
    op.create_index("ix_ledger_model_id_id", "ledger", ["model_id", "id"])
    op.create_index("ix_ledger_owner_id", "ledger", ["owner", "id"])


def downgrade() -> None:
    for table in ("ledger", "parked", "samplers", "checkpoints", "runs", "sessions", "keys", "store"):
        op.drop_table(table)
