"""What the store's tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch

from mint_engine.checkpoint import write_adapter
from mint_engine.store import Store, names
from mint_engine.types import LoraConfig

LORA = LoraConfig(rank=2, train_mlp=False)
META = {"base_model": "tiny", "lora": LORA}
RUN = "s-1:train:0"
IMPORTS = """
import os, signal, sys
from pathlib import Path
from mint_engine.store import Store
from mint_engine.types import LoraConfig
"""


@dataclass(frozen=True)
class Place:
    """Where a store is; stores opened there share it, as processes do."""

    home: Path
    url: str | None

    def open(self, owner: str = "local") -> Store:
        return Store(self.home, database_url=self.url, owner=owner)

    def script(self, body: str) -> str:
        """A program with a `store` of this place."""
        start = f"""{IMPORTS}
LORA = LoraConfig(rank=2, train_mlp=False)
def note(text):
    return lambda directory: (directory / "note.txt").write_text(text)
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def save(store, run, kind, name, writer, **more):
    return store.write_checkpoint(run, kind, name, writer, base_model="tiny", lora=LORA, **more)
store = Store(Path({str(self.home)!r}), database_url={self.url!r})
"""
        return start + body

    def python(self, body: str) -> list[str]:
        """The command of a process that runs `script(body)`."""
        return [sys.executable, "-c", self.script(body)]

    def run(self, body: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.python(body), env=os.environ, check=False, capture_output=True, text=True)


def note(text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / "note.txt").write_text(text)


def save(store: Store, name: str, text: str = "x", *, run: str = RUN, kind: str = "weights", **more: object) -> str:
    return store.write_checkpoint(run, kind, name, note(text), **META, **more)


def adapter_of(values: int, width: int = 4) -> Callable[[Path], None]:
    name = "base_model.model.lm_head.lora_{}.weight"
    tensors = {name.format("A"): torch.full((2, width), float(values)), name.format("B"): torch.zeros(width, 2)}
    return lambda directory: write_adapter(
        directory, tensors, base_model="tiny", rank=2, alpha=32, target_modules=["lm_head"], tied=False
    )


def text_of(store: Store, path: str) -> str:
    return (store.resolve(path).directory / "note.txt").read_text()


def everything(store: Store) -> list[str]:
    """All files and directories of checkpoints."""
    return sorted(str(path.relative_to(store.home)) for path in (store.home / "runs").glob("*/*/**/*"))


def versions(store: Store, kind: str = "weights") -> list[str]:
    """The directories of the first run's checkpoints, seen or unseen."""
    folder = store.home / "runs" / "s-1.train.0" / kind
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def move_clock(monkeypatch: pytest.MonkeyPatch, **ahead: float) -> None:
    """Let the store believe that so much time has passed."""
    from mint_engine.store import artifacts

    delta, now, clock = timedelta(**ahead), names.now, artifacts.time.time

    def later() -> datetime:
        return now() + delta

    for module in [m for name, m in sys.modules.items() if name.startswith("mint_engine.store.") and hasattr(m, "now")]:
        monkeypatch.setattr(module, "now", later)
    monkeypatch.setattr("time.time", lambda: clock() + delta.total_seconds())
