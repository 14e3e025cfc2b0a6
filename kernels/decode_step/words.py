"""A weight's words: a second copy of it, in the order in which products on a CPU read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Words:
    """Pairs of bfloat16 that are neighbours in k, of ``columns`` rows of the weight at a time: a pair of each row, the
    next of each and so on; with AMX up to a multiple of 16 pairs, zeros after the last.

    ``parts``: int32, of all rows; or of either half of them, where a step multiplies them side by side (gate and up).
    They lie end to end.
    """

    columns: int
    parts: tuple[Tensor, ...]

    def address_of_all(self, rows: int) -> int:
        """Where the words of all ``rows`` of the weight begin, if no part's last panel is padded; else 0."""
        whole = len(self.parts) == 1 or rows // len(self.parts) % self.columns == 0
        return self.parts[0].data_ptr() if whole else 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)
