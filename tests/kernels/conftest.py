"""Every available face, and every instruction set this CPU has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from check import FACES, TRITON

from mint_engine.kernels import op

if TRITON and not torch.cuda.is_available():
    from interpreter import repair

    repair()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of ``face`` runs on every face its op has: the op of test_<op>.py."""
    if "face" in metafunc.fixturenames:
        folder = Path(op.__file__).parent / metafunc.module.__name__.removeprefix("test_")
        lacking = TRITON if folder.exists() and not (folder / "triton.py").exists() else []
        metafunc.parametrize("face", [f for f in FACES if f not in lacking], indirect=True)


@pytest.fixture
def for_triton() -> Iterator[None]:
    """What a test makes goes to the GPU (not yet run on one); interpreted, memory that no kernel wrote is NaN."""
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    else:
        torch.use_deterministic_algorithms(True)  # torch.empty gives NaN then
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_device(None)


@pytest.fixture
def face(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "reference", "triton", or "cpu" with one of the ISAs in use."""
    name, _, isa = request.param.partition("-")
    if not isa:
        if name == "triton":
            request.getfixturevalue("for_triton")
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
