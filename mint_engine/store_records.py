"""The JSON records of the store: sessions, runs and checkpoints."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from mint_engine.types import Checkpoint, CheckpointKind, LoraConfig, ParsedCheckpointTinkerPath
from mint_engine.types.base import ResponseModel

CHECKPOINT_RECORD = "checkpoint.json"


class SessionRecord(ResponseModel):
    session_id: str
    created: datetime
    tags: list[str]
    user_metadata: dict[str, str] | None = None
    project_id: str | None = None
    display_name: str | None = None


class RunRecord(ResponseModel):
    run_id: str
    session_id: str
    created: datetime
    base_model: str
    lora: LoraConfig
    user_metadata: dict[str, str] | None = None


class CheckpointRecord(ResponseModel):
    run_id: str
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

    def expired(self, now: datetime) -> bool:
        return self.expires_at is not None and self.expires_at <= now

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
    """A checkpoint that exists: the parts of its path, its directory, and what is recorded about it."""

    directory: Path
    record: CheckpointRecord
