"""Honest timing on a shared machine: contenders interleaved in one run, medians, the machine beside them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mint_engine.kernels.op import NATIVE_DTYPES, native

RESULTS = Path(__file__).parent / "results"
ONEDNN = {"avx512_bf16": "AVX512_CORE_BF16", "avx512": "AVX512_CORE", "avx2": "AVX2", "scalar": "SSE41"}


def add_isa(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--isa", default=native.isa(), choices=native.isas(),
        help="as on a CPU with nothing newer: our kernels, and oneDNN's, which torch multiplies with",
    )  # fmt: skip


def as_on(isa: str) -> None:
    """Ours, and oneDNN in this process and those it starts, use no newer instructions than ``isa``; with this CPU's
    newest, oneDNN is left alone.

    Before the first product: oneDNN looks once.
    """
    native.set_isa(isa)
    if isa != native.isas()[0]:
        os.environ["ONEDNN_MAX_CPU_ISA"] = ONEDNN[isa]


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    turn: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each round of each contender, run A B C A B C ... so that a noisy minute hits all of them.

    ``turn``: how often one runs before it is the next one's turn; the last time counts.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warmup + rounds):
        for name, run in contenders.items():
            for _ in range(turn - 1):
                run()
            start = clock()
            run()
            if i >= warmup:
                times[name].append(clock() - start)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def fma_peak(dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter, seconds: float = 0.5) -> float:
    """FLOP/s of independent multiply-adds on every thread (bf16 tiles or dots where the ISA has them): the roofline.

    The best round of ``seconds``: a new team of threads may share one core for its first hundredths, and then half of
    the peak was found.
    """
    best, per_round, end = 0.0, 200_000, time.perf_counter() + seconds
    flop, sink = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=dtype)
    while not best or time.perf_counter() < end:
        flop.zero_()
        start = clock()
        native.peak(NATIVE_DTYPES[dtype], sink.data_ptr(), per_round, flop.data_ptr())
        best = max(best, float(flop) / (clock() - start))
    return best


def copy_bandwidth(mebibytes: int = 256, rounds: int = 10) -> float:
    """Bytes/s read plus written by a copy larger than the caches."""
    source = torch.zeros(mebibytes << 18)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, rounds=rounds)["copy"]
    return 2 * source.numel() * 4 / min(times)


def read_bandwidth(mebibytes: int = 256, rounds: int = 10) -> float:
    """Bytes/s of summing a tensor larger than the caches: what a pass over the weights is set against."""
    source = torch.ones(mebibytes << 18)
    times = interleaved({"sum": source.sum}, rounds=rounds)["sum"]
    return source.numel() * 4 / min(times)


def machine() -> dict[str, Any]:
    """CPU, threads, versions and commit, for the JSON document."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {k.strip(): v.strip() for k, v in fields.items()}
        cpu = f"{fields.get('model name', cpu)} (family {fields.get('cpu family')}, model {fields.get('model')})"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "cpu": cpu,
        "isa": native.isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit,
    }


def write(name: str, document: dict[str, Any]) -> dict[str, Any]:
    """Keep the document, with the machine, under results/."""
    document = {"benchmark": name, **document, "machine": machine()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    return document


def report(name: str, document: dict[str, Any], save: bool) -> None:
    """Print the document as the last line, and keep it under results/ if asked."""
    print(json.dumps(write(name, document) if save else {"benchmark": name, **document, "machine": machine()}))
