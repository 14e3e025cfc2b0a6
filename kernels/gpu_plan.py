"""Tile choices of the Triton kernels: validated rows, one JSON file per architecture under ``plans/``.

A row ``{"kernel", "case", parameters}`` says with which tiles, warps and stages a kernel runs where ``case`` (a padded
width: a head dimension, a rank; 0 where nothing distinguishes calls) is what it is called with. Rows are chosen
offline (``python -m benchmarks.gpu`` times the `candidates`), never at run time. A `Tunable` declares what a row of
its kernel may say; a file without a row for one of its cases is an error. Rows in upper case are the kernel's
constexprs, ``warps`` and ``stages`` the launch's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path

PLANS = Path(__file__).parent / "plans"
FUSED = {"enable_fp_fusion": True}  # of every launch: Triton 3.9 warns where nothing is said, 3.10 will leave it out
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of shared memory a program may have

Row = dict[str, int]
_tunables: dict[str, Tunable] = {}
_trials: dict[tuple[str, int], Row] = {}


class Tunable:
    """A kernel whose tiles come from a plan. Made where the kernel is; all of them: `tunables`."""

    def __init__(
        self, name: str, choices: Mapping[str, Sequence[int]], *, cases: Sequence[int] = (0,),
        shared: Callable[[Row, int], int] = lambda row, case: 0, oldest: int = 80,
        lacking: Callable[[Row, int], str | None] = lambda row, arch: None,
    ) -> None:  # fmt: skip
        """``choices``: parameter -> values a row may have. ``shared(row, case)``: about its bytes of memory.

        ``oldest``: the first architecture it runs on. ``lacking(row, arch)``: what a row needs and is not there.
        """
        self.name, self.choices, self.cases, self.shared = name, dict(choices), tuple(cases), shared
        self.oldest, self.lacking = oldest, lacking
        _tunables[name] = self

    def case(self, width: int) -> int:
        """The smallest case of at least ``width``, or the largest there is."""
        return next((c for c in self.cases if c >= width), self.cases[-1])

    def row(self, arch: int, width: int = 0) -> Row:
        """The parameters for a call of ``width`` on ``arch``, ``warps`` and ``stages`` among them."""
        key = self.name, self.case(width)
        return dict(_trials.get(key) or _rows(_file(arch))[key])

    def meta(self, arch: int, width: int = 0) -> Row:
        """The same as keyword arguments of a launch."""
        row = self.row(arch, width)
        warps, stages = row.pop("warps"), row.pop("stages")
        return {**row, "num_warps": warps, "num_stages": stages, **FUSED}

    def candidates(self, arch: int, case: int = 0) -> list[Row]:
        """Every row that may be tried: all combinations of the choices whose estimate fits into shared memory."""
        rows = [dict(zip(self.choices, values, strict=True)) for values in product(*self.choices.values())]
        return [row for row in rows if self.shared(row, case) <= SHARED[_file(arch)]]

    def check(self, row: Mapping[str, int], where: str) -> None:
        """Raise ValueError unless ``row`` has exactly this kernel's parameters, each with an allowed value."""
        if row.keys() != self.choices.keys():
            raise ValueError(f"row: expected the parameters {list(self.choices)}, got {list(row)} ({where})")
        for name, value in row.items():
            if value not in self.choices[name]:
                raise ValueError(f"{name}: expected one of {list(self.choices[name])}, got {value!r} ({where})")


def tunables() -> dict[str, Tunable]:
    """Name -> tunable, of every Triton kernel. Imports Triton."""
    from importlib import import_module

    for module in sorted(Path(__file__).parent.glob("*/triton.py")):
        import_module(f"mint_engine.kernels.{module.parent.name}.triton")
    return dict(sorted(_tunables.items()))


def read(path: Path) -> dict[tuple[str, int], Row]:
    """(kernel, case) -> parameters.

    Raises:
        ValueError: a row names no kernel that is loaded or has other parameters than its kernel's, or a kernel and
            case have two rows. Kernels that are not imported yet are not checked.
    """
    found: dict[tuple[str, int], Row] = {}
    for i, fields in enumerate(json.loads(path.read_text())):
        where, row = f"row {i} of {path.name}", dict(fields)
        try:
            key = row.pop("kernel"), row.pop("case")
        except KeyError as missing:
            raise ValueError(f"row: expected a field {missing}, got {fields} ({where})") from None
        if key in found:
            raise ValueError(f"row: expected one for each kernel and case, got {key} again ({where})")
        if (known := _tunables.get(key[0])) is not None:
            known.check(row, where)
            if key[1] not in known.cases:
                raise ValueError(f"case: expected one of {list(known.cases)}, got {key[1]!r} ({where})")
        found[key] = row
    return found


def write(arch: int, rows: Mapping[tuple[str, int], Row]) -> None:
    """Put ``rows`` in the place of the plan's own for ``arch`` (80, 90 or 100), after checking them."""
    path = PLANS / f"sm_{arch}.json"
    merged = {**(read(path) if path.exists() else {}), **rows}
    for (kernel, _), row in merged.items():
        tunables()[kernel].check(row, f"{kernel} for sm_{arch}")
    lines = [json.dumps({"kernel": k, "case": c, **row}) for (k, c), row in sorted(merged.items())]
    path.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n")
    _rows.cache_clear()


@contextmanager
def trial(kernel: str, case: int, row: Row) -> Iterator[None]:
    """Inside, ``kernel`` runs with ``row`` for ``case``: how a tuner times a candidate."""
    tunables()[kernel].check(row, f"{kernel} on trial")
    before = _trials.get((kernel, case))
    _trials[kernel, case] = row
    try:
        yield
    finally:
        _trials.pop((kernel, case))
        if before is not None:
            _trials[kernel, case] = before


def _file(arch: int) -> int:
    """The newest architecture with a plan that is not newer than ``arch``."""
    older = [known for known in SHARED if known <= arch]
    if not older:
        raise ValueError(f"arch: expected compute capability 8.0 or newer, got {arch / 10:.1f} (kernels/plans)")
    return max(older)


@cache
def _rows(arch: int) -> dict[tuple[str, int], Row]:
    return read(PLANS / f"sm_{arch}.json")
