"""Every available face, and every instruction set this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from check import FACES, TRITON

from mint_engine.kernels import op

if TRITON and not torch.cuda.is_available():
    from interpreter import repair

    repair()


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "reference", "triton", or "cpu" with one of the ISAs in use."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield name
        return
    before = op.native.isa()
    op.native.set_isa(isa)
    yield name
    op.native.set_isa(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The working dtypes."""
    return request.param
