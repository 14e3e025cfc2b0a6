"""The results as lines of text: what, how long, the floor, the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.store import DRY


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    if document["dry_run"]:
        yield f"*** {DRY} ***"
    yield f"{document['device']}, torch {document['torch']}, triton {document['triton']}, commit {document['commit']}"
    yield "\ntargets"
    for what, row in document["targets"].items():
        said = {None: "not measured", True: "met", False: "MISSED"}[row["met"]]
        yield f"  {what}: {_shown(row['value'])}, {row['target']}: {said}"
    for part, results in document["parts"].items():
        yield f"\n{part}"
        yield from _rows(results, 1)


def _rows(results: Mapping[str, Any], depth: int) -> Iterator[str]:
    plain = {k: v for k, v in results.items() if not isinstance(v, Mapping)}
    if plain:
        yield "  " * depth + "   ".join(f"{name} {_shown(value)}" for name, value in plain.items())
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield "  " * depth + name
            yield from _rows(value, depth + 1)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list):
        return " | ".join(str(v) for v in value)
    return str(value)
