"""What the step has to reach, and whether a measured document reaches it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

OURS, OURS_FP32, PEFT_FP32 = "ours bf16", "ours float32", "PEFT float32"
# Workload -> least speed-up over PEFT float32 / over the best of PEFT's bf16 variants; the same in float32 mode.
SPEEDUPS = {"demo": (5.5, 2.8), "long": (6.5, 2.8), "qwen": (5.5, 2.8)}
FLOAT32 = {"demo": 3.0, "long": 2.8}
LONG = ("long", "qwen")
PEAK_SHARE = 0.60
MEMORY_SHARE = 0.20


@dataclass(frozen=True)
class Target:
    """``at_least`` or else at most ``limit``."""

    what: str
    got: float
    limit: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.got >= self.limit if self.at_least else self.got <= self.limit

    @property
    def document(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}

    def __str__(self) -> str:
        sign = "at least" if self.at_least else "at most"
        return f"{'met ' if self.met else 'MISS'}  {self.what}: {self.got:.2f}, {sign} {self.limit:g}"


def best_bf16(contenders: dict[str, Any]) -> str | None:
    """The fastest of PEFT's bf16 variants that ran, compiled ones included."""
    found = [name for name in contenders if name.startswith("PEFT") and "bf16" in name]
    return min(found, key=lambda name: contenders[name]["median_ms"], default=None)


def targets(document: dict[str, Any]) -> list[Target]:
    """Of everything in the document that has a target: what was left out of a run has none."""
    found = [target for name, work in document["workloads"].items() for target in _of(name, work)]
    for name, case in document.get("clients", {}).items():
        if "ratio" in case:
            what = f"clients at once, {name} tokens, of the time one after the other"
            found.append(Target(what, case["ratio"], case["at_most"], at_least=False))
        else:
            found.append(Target(f"{name}, of the speed of one", case["speed"], case["at_least"]))
    return found


def _of(name: str, work: dict[str, Any]) -> list[Target]:
    found, rows = [], work["contenders"]

    def speedup(ours: str, theirs: str, least: float) -> None:
        if ours in rows and theirs in rows:
            ratio = rows[theirs]["median_ms"] / rows[ours]["median_ms"]
            found.append(Target(f"{name}: {ours} against {theirs}", round(ratio, 3), least))

    if name in SPEEDUPS:
        speedup(OURS, PEFT_FP32, SPEEDUPS[name][0])
        speedup(OURS, best_bf16(rows) or "", SPEEDUPS[name][1])
    if name in FLOAT32:
        speedup(OURS_FP32, PEFT_FP32, FLOAT32[name])
    if name in LONG and OURS in rows:
        found.append(Target(f"{name}: share of the bf16 peak", rows[OURS]["peak_share"], PEAK_SHARE))
        if PEFT_FP32 in rows:
            share = rows[OURS]["above_weights_mb"] / rows[PEFT_FP32]["above_weights_mb"]
            found.append(Target(f"{name}: memory above the weights, of PEFT's", round(share, 3), MEMORY_SHARE, False))
    return found
