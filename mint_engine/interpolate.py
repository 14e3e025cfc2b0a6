"""Weighted sums of adapters: dW = sum c_i s_i B_i A_i, as one adapter of the largest rank among them.

Adding the factors would be wrong: B and A are only defined up to an invertible matrix between them. The sum itself has
exact factors of rank sum r_i, the sources' side by side: B = [c_1 s_1 B_1 | c_2 s_2 B_2 | ...], A = [A_1; A_2; ...].
With B = Q_b R_b and A^T = Q_a R_a, the singular values of dW are those of the small matrix R_b R_a^T; the largest
max(r_i) of them are kept. So the result is the best approximation of that rank, and exact where the sum has no higher
rank: for one source, or for versions of one adapter whose updates share directions. All in float64; stored in float32.

Module by module, so that only one module's factors are in float64 at a time.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mint_engine.checkpoint import AdapterMeta
from mint_engine.errors import UserError
from mint_engine.types import LORA_ALPHA

_A, _B = ".lora_A.weight", ".lora_B.weight"


MAX_RANKS = 1024
"""Of all sources together: the time grows with the square."""


@dataclass(frozen=True)
class Source:
    """An adapter as `checkpoint.read_adapter` or `checkpoint.open_adapter` gives it. ``path``: its name in errors."""

    path: str
    meta: AdapterMeta
    tensors: Mapping[str, Tensor]
    read: Callable[[str], Tensor] | None = None

    def factor(self, name: str) -> Tensor:
        """A tensor with its values, float64."""
        return (self.tensors[name] if self.read is None else self.read(name)).double()


def check_coefficients(paths: Sequence[str], coefficients: Sequence[float]) -> list[float]:
    """The coefficients, one finite number a path, of any sum. Raises UserError."""
    if not paths:
        raise UserError("source_paths: expected at least one checkpoint, got none")
    if len(coefficients) != len(paths):
        raise UserError(f"coefficients: expected {len(paths)} to match source_paths, got {len(coefficients)}")
    for i, c in enumerate(coefficients):
        if isinstance(c, bool) or not isinstance(c, numbers.Real) or not math.isfinite(c):
            raise UserError(f"coefficients: expected finite numbers, got {c!r} at index {i}")
    return [float(c) for c in coefficients]


def check_size(sources: Sequence[Source], most_bytes: int) -> None:
    """Raises UserError if the sum has too many ranks, or would take more than ``most_bytes`` of memory."""
    ranks = sum(source.meta.rank for source in sources)
    if ranks > MAX_RANKS:
        raise UserError(
            f"source_paths: expected checkpoints with at most {MAX_RANKS} ranks together, got {ranks} in {len(sources)}"
        )
    if (needed := needed_bytes(sources)) > most_bytes:
        raise UserError(
            f"source_paths: expected a sum that takes at most {most_bytes:,} bytes of memory, got {len(sources)} "
            f"checkpoints with {ranks} ranks together that take {needed:,}"
        )


def needed_bytes(sources: Sequence[Source]) -> int:
    """What `combine` and `write_adapter` take, to within a fifth. The sources are taken to be alike."""
    ranks, rank = sum(source.meta.rank for source in sources), max(source.meta.rank for source in sources)
    tensors = sources[0].tensors
    sides = [
        tensors[name].shape[1] + tensors[name.removesuffix(_A) + _B].shape[0] for name in tensors if name.endswith(_A)
    ]
    # Of a module: the factors side by side, their Q, and what QR works on; R twice, and the SVD's. Of all modules: the
    # new factors, and a copy of them that is written.
    return 8 * (3 * ranks * max(sides) + 6 * ranks**2) + 2 * 4 * rank * sum(sides)


def combine(sources: Sequence[Source], coefficients: Sequence[float]) -> tuple[AdapterMeta, dict[str, Tensor]]:
    """The weighted sum, as what `checkpoint.write_adapter` takes.

    Raises:
        UserError: base models, target modules or shapes differ; names the source.
    """
    first = sources[0]
    for source in sources[1:]:
        _check_alike(first, source)
    rank = max(source.meta.rank for source in sources)
    scale = LORA_ALPHA / rank
    factors = [c * source.meta.scale / scale for c, source in zip(coefficients, sources, strict=True)]
    out: dict[str, Tensor] = {}
    for name in first.tensors:
        if not name.endswith(_A):
            continue
        module = name.removesuffix(_A)
        a = torch.cat([source.factor(module + _A) for source in sources])
        b = torch.cat([f * source.factor(module + _B) for f, source in zip(factors, sources, strict=True)], 1)
        out[module + _A], out[module + _B] = _truncate(a, b, rank)
    return replace(first.meta, rank=rank, alpha=LORA_ALPHA), out


def _truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """fp32 (A [rank, K], B [N, rank]) whose product is the best approximation of ``b @ a``."""
    q_a, r_a = torch.linalg.qr(a.T)
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    # A small model may have fewer dimensions than the adapter has ranks: the others stay zero.
    new_a, new_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    new_a[:kept] = root[:, None] * (vh[:kept] @ q_a.T)
    new_b[:, :kept] = (q_b @ u[:, :kept]) * root
    return new_a.float(), new_b.float()


def _check_alike(first: Source, other: Source) -> None:
    if other.meta.base_model != first.meta.base_model:
        raise UserError(
            f"source_paths: {first.path} was trained on {first.meta.base_model!r}, {other.path} on "
            f"{other.meta.base_model!r}"
        )
    ours, theirs = ({n.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for n in s.tensors} for s in (first, other))
    if ours != theirs or first.tensors.keys() != other.tensors.keys():
        raise UserError(
            f"source_paths: {first.path} adapts {', '.join(sorted(ours))}, {other.path} {', '.join(sorted(theirs))}"
        )
    for name, tensor in first.tensors.items():
        side = 1 if name.endswith(_A) else 0
        if tensor.shape[side] != other.tensors[name].shape[side]:
            raise UserError(
                f"source_paths: {name} is {list(tensor.shape)} in {first.path}, {list(other.tensors[name].shape)} in "
                f"{other.path}"
            )
