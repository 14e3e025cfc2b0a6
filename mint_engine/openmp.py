"""How long torch's OpenMP threads (libgomp's, which the C++ kernels share) spin before they sleep."""

from __future__ import annotations

import os
import sys

SPINS = 2000  # of libgomp's loop: some 40 us, about what it takes to wake a thread that sleeps


def spin_briefly() -> None:
    """Set GOMP_SPINCOUNT, unless torch is loaded (libgomp reads it once) or the machine's owner has chosen.

    libgomp's own 300000 are milliseconds, in which a thread keeps the core that the one it waits for may need: beside
    two busy processes a training step took 3.5 s, with this 0.8. On a quiet machine it cost nothing (NOTES.md).
    Processes that this one starts inherit it.
    """
    chosen = "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ
    if not chosen and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
