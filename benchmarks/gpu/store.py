"""Results on disk: one JSON per part, written whole as soon as it is known; what is there already is not done again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.verdicts import verdicts

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DRY = "dry run: not a measurement"


def identity(device: torch.device, *, dry: bool) -> dict[str, Any]:
    """What results must share to stand in one table: the sources, the device, the versions."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:
        described = ""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "commit": os.environ.get("MINT_COMMIT") or described or "unknown", "sources": _sources(), "device": name,
        "torch": torch.__version__, "triton": triton, "dry_run": dry,
    }  # fmt: skip


def _sources() -> str:
    """A hash of the code that is measured: the machine with the GPU may have no git."""
    found = hashlib.sha256()
    for folder in ("kernels", "mint_engine", "benchmarks/gpu"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json") and "__pycache__" not in path.parts:
                found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


class Store:
    """The parts measured in ``directory`` under one identity."""

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        """Raises ValueError for a dry run into the folder of results."""
        self._directory, self.identity = directory, identity
        if identity["dry_run"] and RESULTS.resolve() in (directory.resolve(), *directory.resolve().parents):
            raise ValueError(f"out: expected a folder outside of {RESULTS} for a dry run, got {directory}")
        directory.mkdir(parents=True, exist_ok=True)

    def read(self, part: str) -> dict[str, Any] | None:
        """The part's results if they were measured under this identity, else None."""
        path = self._directory / f"part-{part}.json"
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        same = isinstance(document, dict) and document.get("identity") == self.identity
        return document["results"] if same and "results" in document else None

    def write(self, part: str, results: dict[str, Any]) -> None:
        self._put(f"part-{part}.json", {"identity": self.identity, "part": part, "results": self._marked(results)})

    def merge(self, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """One document of all parts, written as ``gpu.json``; a part that was not reached says so."""
        marked = {name: self._marked(results) for name, results in parts.items()}
        document = {"benchmark": "gpu", **self.identity, "targets": verdicts(marked), "parts": marked}
        if self.identity["dry_run"]:
            document = {"note": DRY, **document}
        self._put("gpu.json", document)
        return document

    def text(self, name: str, text: str) -> None:
        self._put(name, text)

    def _marked(self, value: Any) -> Any:
        """In a dry run no measured number survives: every float becomes None."""
        if not self.identity["dry_run"]:
            return value
        if isinstance(value, dict):
            return {k: self._marked(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._marked(v) for v in value]
        return None if isinstance(value, float) else value

    def _put(self, name: str, content: Any) -> None:
        path = self._directory / name
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)
