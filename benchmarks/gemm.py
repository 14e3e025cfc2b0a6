"""The large products of a training step: our GEMM (csrc/gemm.h) against torch.mm, and both against the FMA peak.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.gemm [--rows 64 320] [--threads 1] [--seconds 0.5] [--save]

Weights are cycled through more memory than the caches hold, as in a step, and have a row stride of their own, as in
a border. With one thread the clock is the thread's CPU time, which a busy machine disturbs least. kernels/plans/ is
chosen from this table. --isa: as on an older CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from benchmarks.timing import add_isa, as_on, fma_peak, medians, report
from mint_engine.kernels.gemm import mm

SHAPES = {  # K x N of the stacked linears: qkv, o, gate and up, down
    "SmolLM2-135M": [(576, 960), (576, 576), (576, 3072), (1536, 576)],
    "Qwen3-0.6B": [(1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024)],
    "Qwen3-1.7B": [(2048, 4096), (2048, 2048), (2048, 12288), (6144, 2048)],
    "Qwen3-4B": [(2560, 6144), (4096, 2560), (2560, 19456), (9728, 2560)],
}
ROWS = [64, 128, 320, 512, 1024, 4096]
BORDER = 48  # columns of room beside a weight


def weights(rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    """Views into wider buffers, together larger than the caches."""
    count = min(20, max(1, (96 << 20) // (rows * columns * dtype.itemsize)))
    return [torch.randn(rows, columns + BORDER).to(dtype)[:, :columns] for _ in range(count)]


def rates(a: Tensor, bs: list[Tensor], seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Median FLOP/s of each contender at ``a @ b``, interleaved, ``b`` taken from ``bs`` in turn."""
    contenders: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": mm, "torch": torch.mm}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    calls, end = 0, time.perf_counter() + seconds
    while calls < 8 or time.perf_counter() < end:
        for name, multiply in contenders.items():
            b = bs[calls % len(bs)]
            start = clock()
            multiply(a, b)
            times[name].append(clock() - start)
            calls += 1
    return {name: 2 * a.shape[0] * b.numel() / took for name, took in medians(times).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="for each shape")
    add_isa(parser)
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    as_on(args.isa)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    table = []
    for dtype in (torch.float32, torch.bfloat16):
        peak = fma_peak(dtype, clock)
        machine = f"{dtype}, {args.isa}, {args.threads} threads, FMA peak {peak / 1e9:.0f} GFLOP/s"
        print(f"{machine}; fractions of it, ours / torch")
        for model, layout, m in product(args.models, ("forward", "backward"), args.rows):
            cells = []
            for k, n in SHAPES[model]:
                bs = weights(n, k, dtype)
                bs = [b.T for b in bs] if layout == "forward" else bs
                a = torch.randn(m, bs[0].shape[0] + BORDER).to(dtype)[:, :-BORDER]
                rate = {who: r / peak for who, r in rates(a, bs, args.seconds, clock).items()}
                cells.append(f"{k}x{n} {rate['ours']:4.0%} /{rate['torch']:4.0%}")
                table.append({
                    "dtype": str(dtype), "layout": layout, "m": m, "k": k, "n": n,
                    **{who: round(r, 3) for who, r in rate.items()},
                })  # fmt: skip
            print(f"  {model:13s} {layout:8s} M {m:4d}  " + "   ".join(cells), flush=True)
    report("gemm", {"threads": args.threads, "isa": args.isa, "fraction_of_peak": table}, args.save)


if __name__ == "__main__":
    main()
