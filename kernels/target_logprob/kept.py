"""What a forward keeps of some rows' logits, so that their backward need not compute them again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Kept:
    """Room for ``exp(logit - maximum)`` of some rows of x; ``target_logprob`` fills it where its face can.

    Args:
        rows: ``[N]`` int64, ascending: which rows of the forward's x.
        values: ``[N, V]`` in the dtype of x, rows contiguous. A backward makes the gradient of the logits in its place.
    """

    rows: Tensor
    values: Tensor
    block: int = 0  # columns that share a maximum; 0: nothing is kept
    tops: Tensor | None = None  # [N, blocks] fp32: the maxima
    logprob: Tensor | None = None  # [M, K] fp32, of the forward

    def check(self, op: str, x: Tensor, vocab: int) -> None:
        """Raises ValueError if it has not room for these rows."""
        if self.rows.dim() != 1 or self.rows.dtype is not torch.int64:
            got = f"{self.rows.dtype} {list(self.rows.shape)}"
            raise ValueError(f"kept.rows: expected torch.int64 [N], got {got} ({op})")
        n, values = len(self.rows), self.values
        if values.shape != (n, vocab) or values.dtype is not x.dtype or (values.numel() and values.stride(1) != 1):
            raise ValueError(
                f"kept.values: expected {x.dtype} [{n}, {vocab}] with contiguous rows, got {values.dtype} "
                f"{list(values.shape)} ({op})"
            )
        if n and (int(self.rows[0]) < 0 or int(self.rows[-1]) >= len(x) or bool((self.rows.diff() <= 0).any())):
            first = self.rows[:8].tolist()
            raise ValueError(f"kept.rows: expected ascending rows in [0, {len(x)}), got {first} ({op})")

    def among(self, rows: Tensor) -> Tensor:
        """Of ``rows`` of x (int64, ascending) the leading ones that are kept: where they are in ``values``."""
        at = torch.searchsorted(self.rows, rows)
        found = self.rows[at.clamp(max=len(self.rows) - 1)] == rows if len(self.rows) else rows < 0
        return at[: int(found.to(torch.int8).cumprod(0).sum())]
