"""Reads and writes one element past the end of a tensor, in every way a kernel can.

`make sanitize` runs this first, and it fails unless the sanitizer stops each.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from itertools import product

import torch

from mint_engine.kernels.op import NATIVE_DTYPES, native

TENSORS = ("a", "b", "bias", "out")
# The second is a range whose beginning is in order.
STOPPED = re.compile("AddressSanitizer: (heap-buffer-overflow|unknown-crash)")
SIZES = ((8, 40), (40, 64))  # few rows and masked edges; many rows, whole vectors and tiles in place


def matmul(dtype: torch.dtype, m: int, n: int, short: str) -> None:
    """out [m, n] = a [m, n] @ b [n, n]ᵀ + bias [n], with the last element of ``short`` missing."""
    sizes = zip(TENSORS, (m * n, n * n, n, m * n), strict=True)
    a, b, bias, out = (torch.zeros(size - (name == short), dtype=dtype) for name, size in sizes)
    pointers = (a.data_ptr(), n, b.data_ptr(), n, 1, bias.data_ptr(), out.data_ptr(), n)
    native.matmul(NATIVE_DTYPES[dtype], *pointers, m, n, n, 1.0)


def report(isa: str, dtype: torch.dtype, m: int, n: int, short: str) -> str | None:
    """What the sanitizer says when a child of this process does that; None when it went through."""
    with tempfile.TemporaryFile() as said:
        if (child := os.fork()) == 0:
            os.dup2(said.fileno(), sys.stderr.fileno())
            native.set_isa(isa)
            matmul(dtype, m, n, short)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return said.read().decode() if status else None


def main() -> None:
    seen = 0
    for isa, dtype, (m, n) in product(native.isas(), (torch.float32, torch.bfloat16), SIZES):
        if (fault := report(isa, dtype, m, n, "nothing")) is not None:
            sys.exit(f"{isa} {dtype} {m} x {n}: {fault}")
        for short in TENSORS:
            fault = report(isa, dtype, m, n, short)
            if fault is None or not STOPPED.search(fault):
                sys.exit(f"{isa} {dtype} {m} x {n}: nobody saw that {short} ends too early ({fault})")
            seen += 1
    print(f"the sanitizer saw all of {seen} accesses past the end")


if __name__ == "__main__":
    main()
