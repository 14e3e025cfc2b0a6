"""tar.gz files of checkpoints, made on request and kept for a day."""

from __future__ import annotations

import os
import tarfile
import time
from pathlib import Path

from mint_engine import durable
from mint_engine.store.checkpoints import Checkpoints
from mint_engine.store.names import file_name
from mint_engine.store.records import ResolvedCheckpoint

ARCHIVE_SECONDS = 24 * 3600


class Archive(Checkpoints):
    def archive(self, path: str) -> str:
        """A `file://` URL of a tar.gz of the adapter as PEFT reads it. The file is kept for a day."""
        return self.archive_file(path).resolve().as_uri()

    def archive_file(self, path: str) -> Path:
        """The file that :meth:`archive` gives the URL of."""
        checkpoint = self.resolve(path, prefer="sampler_weights")
        target = self._archive_of(checkpoint)
        with durable.storage_errors(f"archiving {path}"):
            self._remove_old_archives()
            try:
                os.utime(target)  # made before, of the same version: kept for another day
            except FileNotFoundError:
                _pack(checkpoint, target)
        return target

    def is_archived(self, checkpoint: ResolvedCheckpoint) -> bool:
        """Whether :meth:`archive_file` would be quick."""
        return self._archive_of(checkpoint).exists()

    def _archive_of(self, checkpoint: ResolvedCheckpoint) -> Path:
        run = file_name(checkpoint.training_run_id, "run_id")
        return self.home / "archives" / run / checkpoint.kind / f"{checkpoint.directory.name}.tar.gz"

    def _remove_old_archives(self) -> None:
        folder = self.home / "archives"
        for old in (*folder.glob("*/*/*.tar.gz"), *folder.glob("traces/*.json")):
            try:
                if time.time() - old.stat().st_mtime > ARCHIVE_SECONDS:
                    old.unlink()
            except FileNotFoundError:
                continue  # somebody else was quicker


def _pack(checkpoint: ResolvedCheckpoint, target: Path) -> None:
    from mint_engine.checkpoint import ADAPTER_CONFIG, ADAPTER_MODEL  # imports torch

    names = [ADAPTER_CONFIG, ADAPTER_MODEL]
    if checkpoint.kind == "external_weights":  # perhaps encrypted, under names of their own
        names = sorted(entry.name for entry in checkpoint.directory.iterdir())
    durable.make_directory(target.parent)
    with durable.replacing_file(target) as temporary, tarfile.open(temporary, "w:gz") as tar:
        for name in names:
            tar.add(checkpoint.directory / name, arcname=name)
        tar.addfile(tarfile.TarInfo("checkpoint_complete"))
