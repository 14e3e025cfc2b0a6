"""Idle OpenMP threads sleep soon in a process that has imported us; what the machine's owner says is left alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from mint_engine.openmp import SPINS


def python(code: str, **environment: str) -> str:
    """What a new process that runs ``code`` writes to stderr."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, check=True, capture_output=True, text=True
    )
    return done.stderr


def test_torchs_threads_spin_briefly() -> None:
    said = python("import mint, torch", OMP_DISPLAY_ENV="verbose")
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said)) == {str(SPINS)}


@pytest.mark.parametrize("choice", [{"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "passive"}])
def test_the_owners_choice_is_left_alone(choice: dict[str, str]) -> None:
    python(
        f"import os, mint_engine; assert os.environ.get('GOMP_SPINCOUNT') == {choice.get('GOMP_SPINCOUNT')!r}", **choice
    )


def test_where_torch_is_loaded_already_nothing_is_set() -> None:
    python("import torch, os, mint_engine; assert 'GOMP_SPINCOUNT' not in os.environ")
