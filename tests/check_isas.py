"""Running the C++ kernels on each instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mint_engine.kernels import op

ISAS: list[str] = [] if op.native is None else list(op.native.isas())
WITH_WORDS = ("avx2", "avx512", "avx512_bf16", "amx")  # those that read kept words


@contextmanager
def using(isa: str, threads: int | None = None) -> Iterator[None]:
    """An instruction set, and a number of threads."""
    before = op.native.isa(), torch.get_num_threads()
    op.native.set_isa(isa)
    torch.set_num_threads(threads or before[1])
    try:
        yield
    finally:
        op.native.set_isa(before[0])
        torch.set_num_threads(before[1])
