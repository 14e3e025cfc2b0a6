"""What parts are given: the device, sizes, a clock, and the measured ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # several times the L2 of a Hopper


@dataclass
class Bench:
    """``rows``: tokens of a pass; ``peaks``: {"copy_gbs", "matmul_tflops"} of this device, once they are measured."""

    device: torch.device
    dtype: torch.dtype
    dry: bool
    rows: int
    rounds: int
    peaks: dict[str, float] = field(default_factory=dict)
    write_plans: bool = False
    _flush: Tensor | None = None

    @property
    def face(self) -> str | None:
        """The face under test: Triton's, which on a CPU must be asked for."""
        return "triton" if self.dry else None

    def normal(self, *shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(*shape, generator=generator, device=self.device) * scale
        return values.to(self.dtype if dtype is None else dtype)

    def interleaved(self, contenders: Mapping[str, Callable[[], Any]], rounds: int | None = None) -> dict[str, float]:
        """Median ms of each contender, A B C A B C ..., the L2 flushed before each, by events on the device."""
        times: dict[str, list[float]] = {name: [] for name in contenders}
        warmup = 0 if self.dry else 2
        for i in range(warmup + (1 if self.dry else rounds or self.rounds)):
            for name, run in contenders.items():
                self._flush_cache()
                took = self._timed(run)
                if i >= warmup:
                    times[name].append(took)
        return {name: statistics.median(values) for name, values in times.items()}

    def walls(self, contenders: Mapping[str, Callable[[], Any]], rounds: int | None = None) -> dict[str, float]:
        """Median ms of things that read their result on the host, such as whole steps: A B A B ..."""
        times: dict[str, list[float]] = {name: [] for name in contenders}
        rounds, warmup = (1, 0) if self.dry else (rounds or self.rounds, 3)
        for i in range(warmup + rounds):
            for name, run in contenders.items():
                self.synchronize()
                start = time.perf_counter()
                run()
                self.synchronize()
                if i >= warmup:
                    times[name].append((time.perf_counter() - start) * 1e3)
        return {name: statistics.median(values) for name, values in times.items()}

    def reserved(self) -> int:
        """Bytes that torch has of the device, without what it only keeps for later; 0 on a CPU."""
        self.free()
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def peak_above(self, before: int, run: Callable[[], Any]) -> int:
        """Bytes taken at the peak while ``run`` ran, above ``before``; 0 on a CPU, where it does not run.

        Reserved bytes, not allocated ones: what a recorded graph keeps for its replays counts.
        """
        if self.device.type != "cuda":
            return 0
        self.free()
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return int(torch.cuda.max_memory_reserved(self.device)) - before

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give back what the last contender left."""
        import gc

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def floor(self, *, moved: float = 0.0, flop: float = 0.0) -> float:
        """ms that no version can go below: the larger of bytes at copy bandwidth and FLOP at the matmul peak."""
        return max(moved / self.peaks["copy_gbs"] / 1e6, flop / self.peaks["matmul_tflops"] / 1e9)

    def _flush_cache(self) -> None:
        if self.device.type == "cuda":
            if self._flush is None:
                self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
            self._flush.zero_()

    def _timed(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def peaks(bench: Bench) -> dict[str, Any]:
    """Copy bandwidth (bytes read plus written) and the rate of a large matrix product, on this device, now."""
    n, k = (1 << 30, 8192) if not bench.dry else (1 << 16, 64)
    source, x = torch.ones(n // 4, device=bench.device), bench.normal(k, k, seed=1)
    target, w = torch.empty_like(source), bench.normal(k, k, seed=2)
    ms = bench.interleaved({"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(x, w)})
    return {"copy_gbs": 2 * n / ms["copy"] / 1e6, "matmul_tflops": 2.0 * k**3 / ms["matmul"] / 1e9}
