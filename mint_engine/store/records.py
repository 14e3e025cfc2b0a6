"""What the store hands out: checkpoints, parked models, keys, ledger entries."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mint_engine.types import Checkpoint, CheckpointKind, LoraConfig, ParsedCheckpointTinkerPath
from mint_engine.types.base import ResponseModel

LedgerStatus: TypeAlias = Literal["done", "failed", "refused"]
SCOPE = ":req:"  # in a request's id, between what it was about (a model, a sampler) and its random part


class CheckpointRecord(ResponseModel):
    run_id: str
    owner: str
    kind: CheckpointKind
    name: str
    time: datetime
    size_bytes: int
    base_model: str
    lora: LoraConfig
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None
    public: bool = False

    @property
    def tinker_path(self) -> str:
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"

    def public_view(self) -> Checkpoint:
        """The record as the API shows it."""
        path = ParsedCheckpointTinkerPath.from_tinker_path(self.tinker_path)
        return Checkpoint(
            checkpoint_id=path.checkpoint_id,
            checkpoint_type=path.checkpoint_type,
            time=self.time,
            tinker_path=path.tinker_path,
            size_bytes=self.size_bytes,
            public=self.public,
            user_metadata=self.user_metadata,
            expires_at=self.expires_at,
        )


class ResolvedCheckpoint(ParsedCheckpointTinkerPath):
    """A checkpoint that exists: the parts of its path, its directory, and what is recorded about it.

    The directory stays readable for `GRACE_SECONDS` after it was resolved, whatever happens to the checkpoint.
    """

    directory: Path
    record: CheckpointRecord


@dataclass(frozen=True)
class Parked:
    """A model that was put aside: where its state is, and what was noted about it."""

    directory: Path
    note: dict[str, Any]


@dataclass(frozen=True)
class KeyLimits:
    """What a key may use; None is the server's default."""

    max_request_bytes: int | None = None
    max_concurrent_requests: int | None = None
    max_resident_models: int | None = None
    max_disk_bytes: int | None = None


@dataclass(frozen=True)
class KeyRecord:
    """A key as it is stored: `prefix` is its first characters, to recognise it by. The secret is not here."""

    key_id: str
    name: str
    prefix: str
    created: datetime
    revoked: datetime | None = None
    last_used: datetime | None = None
    limits: KeyLimits = KeyLimits()


@dataclass(frozen=True)
class LedgerEntry:
    """One request: who asked for what, when, and how it ended."""

    request_id: str
    owner: str
    kind: str
    status: LedgerStatus
    accepted: datetime
    model_id: str | None = None
    seq_id: int | None = None
    finished: datetime | None = None
    tokens: int = 0
    error: str | None = None
