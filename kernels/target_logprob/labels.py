"""Raw labels of a packed batch, shifted where they are used (teacher forcing)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """Instead of ``targets [M, 1]``: row m's target is ``labels[rows[m] + shift]``, if that is in its own sequence.

    The last ``shift`` rows of each sequence have none (as target -1). With ``shift=0`` labels are targets.

    Args:
        labels: ``[T]`` int64, one for each token of the batch, -1 where nothing is to be learnt.
        cu_seqlens: ``[n + 1]`` int32 on the same device, rising or level from 0 to T, n >= 1.
        rows: ``[M]`` int64, the batch's row of each row of x, where x holds only some; None: all T, in order.
        shift: how many tokens ahead a row predicts.
    """

    labels: Tensor
    cu_seqlens: Tensor
    rows: Tensor | None = None
    shift: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for another shape, dtype or device."""
        for name, t, dtype in (("labels", self.labels, torch.int64), ("cu_seqlens", self.cu_seqlens, torch.int32)):
            if t.dim() != 1 or t.dtype is not dtype or t.device != self.labels.device or not t.is_contiguous():
                raise ValueError(
                    f"{name}: expected contiguous {dtype} of one dimension on {self.labels.device}, got {t.dtype} "
                    f"{list(t.shape)} on {t.device} (Labels)"
                )
        if len(self.cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens: expected at least 2 bounds, got {len(self.cu_seqlens)} (Labels)")
        if self.rows is not None and (self.rows.dim() != 1 or self.rows.dtype is not torch.int64):
            raise ValueError(f"rows: expected torch.int64 [M], got {self.rows.dtype} {list(self.rows.shape)} (Labels)")
        if self.shift < 0:
            raise ValueError(f"shift: expected 0 or more, got {self.shift} (Labels)")

    def __len__(self) -> int:
        return len(self.labels if self.rows is None else self.rows)

    def __getitem__(self, part: slice) -> Labels:
        """The same for some of the rows of x."""
        rows = torch.arange(len(self.labels), device=self.labels.device) if self.rows is None else self.rows
        return Labels(self.labels, self.cu_seqlens, rows[part], self.shift)

    def targets(self) -> Tensor:
        """``[M, 1]`` int64, -1 where a row has none. Waits for no device."""
        device, last = self.labels.device, len(self.labels) - 1
        rows = torch.arange(len(self.labels), device=device) if self.rows is None else self.rows
        ends = self.cu_seqlens[1:].to(torch.int64)
        sequence = torch.searchsorted(ends, rows, right=True).clamp(max=len(ends) - 1)
        at = rows + self.shift
        found = self.labels[at.clamp(max=max(last, 0))] if last >= 0 else rows
        return torch.where(at < ends[sequence], found, -1)[:, None]


def resolve(targets: Tensor | Labels) -> Tensor:
    """``[M, K]`` int64, contiguous."""
    return (targets.targets() if isinstance(targets, Labels) else targets).contiguous()
