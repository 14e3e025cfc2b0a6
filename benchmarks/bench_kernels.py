"""Each op on the demo's shapes (SmolLM2-135M, 378 tokens, bf16): the face that is chosen against plain torch.

    OPENBLAS_NUM_THREADS=1 python -m pytest benchmarks/bench_kernels.py --benchmark-enable --benchmark-only \\
        --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

An op whose numbers are wrong is not timed: its row is an error. ``extra_info`` in the JSON (``--benchmark-json=FILE``)
holds the floor: FLOP or bytes at what this machine reaches, whichever takes longer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks import kernel_cases as small
from benchmarks import kernel_cases_heavy as heavy
from benchmarks.kernel_cases import Case, M, gate
from benchmarks.timing import copy_bandwidth, fma_peak

RAGGED = (2048, 16, 700, 128, 350)
CASES: dict[str, Callable[[], Case]] = {
    "bordered_linear, border 32": lambda: small.bordered(M, 32),
    "bordered_linear backward, border 32": lambda: small.bordered_backward(M, 32),
    "bordered_linear, 4096 rows": lambda: small.bordered(4096, 32),
    "bordered_linear, 1 row": lambda: small.bordered(1, 0),
    "bordered_linear, 8 rows": lambda: small.bordered(8, 0),
    "lora_gradients": small.lora_gradients,
    "rms_norm + residual": lambda: small.norm(0),
    "rms_norm + residual + S": lambda: small.norm(small.RANK),
    "rms_norm backward": small.norm_backward,
    "qk_norm_rope": small.qk_norm_rope,
    "qk_norm_rope backward": small.qk_norm_rope_backward,
    "swiglu": lambda: small.swiglu(0),
    "swiglu + S": lambda: small.swiglu(small.RANK),
    "swiglu backward": small.swiglu_backward,
    "attention, 16 x 24": lambda: heavy.attention([24] * 16),
    "attention backward, 16 x 24": lambda: heavy.attention_backward([24] * 16),
    "attention, 8 x 512": lambda: heavy.attention([512] * 8),
    "attention backward, 8 x 512": lambda: heavy.attention_backward([512] * 8),
    "attention, 16 to 2048": lambda: heavy.attention(RAGGED),
    "attention backward, 16 to 2048": lambda: heavy.attention_backward(RAGGED),
    "target_logprob": heavy.target_logprob,
    "target_logprob backward": heavy.target_logprob_backward,
    "adamw, 5M": heavy.adamw,
    "gather": heavy.gather,
}


@cache
def peaks() -> tuple[float, float]:
    """(FLOP/s of bf16 multiply-adds, bytes/s of a large copy), measured here."""
    return fma_peak(torch.bfloat16), copy_bandwidth()


@cache
def checked(name: str) -> Case:
    """The case, once its numbers have been found right."""
    case = CASES[name]()
    with torch.no_grad():
        gate(name, case)
    return case


@pytest.mark.parametrize("who", ["ours", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_kernel(benchmark: Any, name: str, who: str) -> None:
    case = checked(name)
    peak, bandwidth = peaks()
    benchmark.group = name
    benchmark.extra_info["floor_us"] = floor = round(max(case.flop / peak, case.moved / bandwidth) * 1e6, 1)
    benchmark.name = f"{who} (floor {floor:g} us)"
    with torch.no_grad():
        benchmark(case.ours if who == "ours" else case.torch, *case.inputs)
