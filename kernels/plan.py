"""Which library multiplies large matrices: rows of measurements, one JSON file per architecture under ``plans/``.

A row ``{"isa", "vendor", "amx", "dtype", "use"}`` says: on CPUs of this vendor (as /proc/cpuinfo spells it), with or
without AMX tiles, while the kernels use the instruction set ``isa``, products in ``dtype`` run in our own GEMM ("ours",
csrc/gemm.h) or in torch's library ("torch"). What nobody has measured has no row and stays with torch's. Rows are
chosen offline (``python -m benchmarks.gemm``), never at run time, and name no shapes: which sum a row of activations
gets must not depend on how many others share its product.
"""

from __future__ import annotations

import json
import platform
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from mint_engine.kernels.op import isa

PLANS = Path(__file__).parent / "plans"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """One line of a plan; ``use`` is "ours" or "torch"."""

    isa: str
    vendor: str
    amx: bool
    dtype: str
    use: str


def read(path: Path) -> list[Row]:
    """The rows of a plan file.

    Raises:
        ValueError: a row has other fields or a value of another kind, or two rows are about the same machine and dtype.
    """
    kinds = {"isa": str, "vendor": str, "amx": bool, "dtype": str, "use": str}
    rows: list[Row] = []
    for i, fields in enumerate(json.loads(path.read_text())):
        where = f"row {i} of {path.name}"
        if not isinstance(fields, Mapping) or fields.keys() != kinds.keys():
            raise ValueError(f"row: expected the fields {list(kinds)}, got {fields!r} ({where})")
        for name, kind in kinds.items():
            if not isinstance(fields[name], kind):
                raise ValueError(f"{name}: expected a {kind.__name__}, got {fields[name]!r} ({where})")
        for name, allowed in (("dtype", list(DTYPES)), ("use", ["ours", "torch"])):
            if fields[name] not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {fields[name]!r} ({where})")
        row = Row(**fields)
        if any((r.isa, r.vendor, r.amx, r.dtype) == (row.isa, row.vendor, row.amx, row.dtype) for r in rows):
            raise ValueError(f"row: expected one for each machine and dtype, got {row} again ({where})")
        rows.append(row)
    return rows


@cache
def _cpu() -> tuple[str, bool]:
    """(vendor, has AMX tiles) of this CPU; ("", False) where /proc/cpuinfo does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    return fields.get("vendor_id", ""), "amx_tile" in fields.get("flags", "").split()


@cache
def _ours(isa_in_use: str, dtype: torch.dtype) -> bool:
    path = PLANS / f"{'x86' if platform.machine().lower() in ('x86_64', 'amd64') else platform.machine().lower()}.json"
    vendor, amx = _cpu()
    rows = read(path) if path.exists() else []
    here = [r for r in rows if (r.isa, r.vendor, r.amx, DTYPES[r.dtype]) == (isa_in_use, vendor, amx, dtype)]
    return bool(here) and here[0].use == "ours"


def ours(dtype: torch.dtype) -> bool:
    """Whether large products in ``dtype`` run in our own GEMM on this machine."""
    return getattr(_own, "always", False) or _ours(isa(), dtype)


_own = threading.local()


@contextmanager
def own_products() -> Iterator[None]:
    """Until the block ends, this thread's products run in our own GEMM, whatever the plan says.

    There a row's sums do not depend on how many others share the product; torch's libraries do not promise that.
    """
    before, _own.always = getattr(_own, "always", False), True
    try:
        yield
    finally:
        _own.always = before
