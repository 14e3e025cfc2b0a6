"""The grid of shapes that passes are rounded up to, so that few programs serve all batches."""

from __future__ import annotations

SMALLEST = 64
STEPS = 8  # sizes between a power of two and the next: at most an eighth of the rows is padding


def bucket(n: int, smallest: int = SMALLEST) -> int:
    """The smallest size of the grid that is at least ``n``: 64, 72, 80, ..., 128, 144, ..."""
    if n <= smallest:
        return smallest
    step = max(1, (1 << ((n - 1).bit_length() - 1)) // STEPS)
    return -(-n // step) * step


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()
