"""The tables. `migrations/` builds the same step by step; a test compares the two.

Changing a table: change it here, add `migrations/versions/<number>_<what>.py` that does the same to an existing
database, and set HEAD to its number.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

HEAD = "0001"
"""The newest migration. A new database is made from the tables below and marked with it."""

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """Moments with a time zone in Python, in UTC in the database. SQLite has no zones: it gets them without."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# SQLite counts up by itself only in a column of exactly this type.
_Serial = BigInteger().with_variant(Integer(), "sqlite")
_Json = JSON(none_as_null=True)


# One row: home directories note which database they belong to.
store = Table("store", metadata, Column("store_id", String(32), primary_key=True))

# Every id of an owner in the other tables is a key_id of this one, or "local": whoever needed no key.
keys = Table(
    "keys",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("prefix", String(32), nullable=False),
    Column("secret_hash", String(64), nullable=False, unique=True),
    Column("created", UtcDateTime, nullable=False),
    Column("revoked", UtcDateTime),
    Column("last_used", UtcDateTime),
    Column("max_request_bytes", BigInteger),
    Column("max_concurrent_requests", BigInteger),
    Column("max_resident_models", BigInteger),
    Column("max_disk_bytes", BigInteger),
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", String(200), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("tags", _Json, nullable=False),
    Column("user_metadata", _Json),
    Column("project_id", Text),
    Column("display_name", Text),
    Column("finished", String(16)),  # success, errored or interrupted; NULL: not yet
    Column("finish_detail", Text),
    Index(None, "owner", "created"),
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", String(200), primary_key=True),
    Column("session_id", ForeignKey("sessions.session_id"), index=True),  # NULL: made by copying or importing
    Column("owner", String(64), nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("lora", _Json, nullable=False),
    Column("user_metadata", _Json),
    Column("project_id", Text),  # of a run without session; others have their session's
    Column("last_used", UtcDateTime, nullable=False),  # made, or a checkpoint saved
    Index(None, "owner", "last_used"),
)

# The row makes the checkpoint: it is written when the directory is complete and on the disk, and removed first.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("run_id", ForeignKey("runs.run_id"), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("name", String(200), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("time", UtcDateTime, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("lora", _Json, nullable=False),
    Column("user_metadata", _Json),
    Column("expires_at", UtcDateTime, index=True),
    Column("public", Boolean, nullable=False),
    Column("directory", Text, nullable=False),  # below the home directory
    UniqueConstraint("run_id", "kind", "name"),
    Index(None, "owner", "time"),
)

samplers = Table(
    "samplers",
    metadata,
    Column("sampler_id", String(200), primary_key=True),
    Column("session_id", ForeignKey("sessions.session_id"), nullable=False, index=True),
    Column("created", UtcDateTime, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("model_path", Text),
    Column("ephemeral", Boolean, nullable=False),  # its weights were never saved: only memory, or parking, has them
)

parked = Table(
    "parked",
    metadata,
    Column("model_id", String(200), primary_key=True),
    Column("created", UtcDateTime, nullable=False),
    Column("note", _Json, nullable=False),
    Column("directory", Text, nullable=False),
)

ledger = Table(
    "ledger",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("request_id", String(200), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("model_id", String(200)),
    Column("seq_id", BigInteger),
    Column("kind", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("accepted", UtcDateTime, nullable=False),
    Column("finished", UtcDateTime, index=True),
    Column("tokens", BigInteger, nullable=False),
    Column("error", Text),
    Index(None, "model_id", "id"),
    Index(None, "owner", "id"),
)
