"""The issue's targets against what was measured: value, limit, met or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# tokens/s: at first, then (45 / 55 / 60 % of a Hopper's 989 TFLOP/s)
TOKENS = {"0.6b": (100_000, 158_000), "4b": (26_000, 31_000), "8b": (15_000, 19_000)}
FASTER = {"peft": 3.0, "liger": 1.5}
MEMORY = 0.6
DECODE = (("at first", 0.4), ("then", 0.6))  # of the time to read weights and cache once

Target = tuple[str, float | None, str, float]  # what, value, "at least" or "at most", limit


def verdicts(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of each target whose parts are there. What was not measured (in a dry run: all) is neither met nor missed."""
    found = {}
    for what, value, direction, limit in _targets(parts):
        met = None if value is None else bool(value >= limit if direction == "at least" else value <= limit)
        found[what] = {"value": value, "target": f"{direction} {limit:g}", "met": met}
    return found


def _targets(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[Target]:
    for part, rows in parts.items():
        kind, _, rest = part.partition("-")
        model, _, peer = rest.partition("-")
        if kind == "step" and peer in FASTER and "ours" in rows:
            mine, other = rows["ours"], rows[peer]
            if peer == "peft":
                for when, limit in zip(("at first", "then"), TOKENS.get(model, ()), strict=False):
                    yield f"{model}: tokens/s, {when}", mine["tokens_per_s"], "at least", limit
            yield f"{model}: speed over {peer}", _ratio(other, "ms", mine, "ms"), "at least", FASTER[peer]
            yield f"{model}: memory of {peer}'s", _ratio(mine, "peak_gib", other, "peak_gib"), "at most", MEMORY
    if "ours" in (rows := parts.get("step-256", {})):
        yield "256 tokens: ms", rows["ours"]["ms"], "at most", 3.0
    for name, row in parts.get("products", {}).items():
        if isinstance(row, Mapping):
            yield f"{name}: bordered over bare", row["ratio"], "at most", 1.06
            yield f"{name}: bordered over bare, backward", row["backward_ratio"], "at most", 1.06
    if "ms" in (rows := parts.get("loss", {})):
        yield "loss: over the floor of two products", rows["over_floor"], "at most", 1.35
        for name, took in rows["peers_ms"].items():
            yield f"loss: time of {name}'s", _ratio(rows, "ms", {"ms": took}, "ms"), "at most", 1.0
    for name, row in parts.get("ops", {}).items():
        if isinstance(row, Mapping) and row["bound"] == "memory":
            yield f"{name}: of copy bandwidth", row["of_floor"], "at least", 0.8
    for part, rows in parts.items():
        for name, row in rows.items() if part.startswith("decode-") else ():
            if isinstance(row, Mapping) and "of_floor" in row:
                who = f"{part.removeprefix('decode-')}: decode, {name}"
                for when, limit in DECODE:
                    yield f"{who}, of the floor, {when}", row["of_floor"], "at least", limit
                yield f"{who}, with an adapter", row["adapter_speed"], "at least", 0.95
    if "speed" in (rows := parts.get("adapters", {})):
        yield "eight adapters: speed of one's", rows["speed"], "at least", 0.9


def _ratio(above: Mapping[str, Any], this: str, below: Mapping[str, Any], that: str) -> float | None:
    values = above.get(this), below.get(that)
    return None if None in values or not values[1] else values[0] / values[1]
