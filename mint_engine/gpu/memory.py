"""How much of a call fits into one pass, from the table of activations (DESIGN.md 2.3 and 4), and what is kept of it.

The ladder: keep all that the backward needs but norm outputs, ``silu(gate) * up`` and q, k before RoPE, which are
recomputed in passing; where so few tokens fit that a pass would be small, keep each layer's input only and compute the
layer again in the backward, half as much arithmetic more (DESIGN.md 2.3). The sums are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mint_engine.gpu.buckets import STEPS
from mint_engine.models.decoder import Decoder

ENOUGH = 4096  # tokens that fill a GPU: a longer pass is hardly faster per token
LARGEST = 1 << 16  # tokens of a pass, however much memory there is
SHARE = 0.6  # of the memory that is free once base and KV cache are there; the rest is for adapters and logits


@dataclass(frozen=True)
class Plan:
    """``max_tokens`` of a pass; ``checkpoint``: keep only the layers' inputs."""

    max_tokens: int
    checkpoint: bool


def kept_bytes(decoder: Decoder, rank: int, *, checkpoint: bool) -> int:
    """Bytes per token that a pass writes: what all layers keep, or their inputs and what one keeps; and one at work.

    ``rank``: of the adapters' the highest.
    """
    if not checkpoint:
        return decoder.activation_bytes_per_token(rank)
    c = decoder.config
    return decoder.activation_bytes_of(1, rank) + c.num_layers * c.hidden_size * decoder.dtype.itemsize


def plan(decoder: Decoder, total: int, longest: int, rank: int, *, company: bool = False) -> Plan:
    """What ``decoder.activation_bytes`` allow of a call of ``total`` tokens in sequences of at most ``longest``.

    ``rank``: of the adapters' the highest. A pass's rows are rounded up (`layout.seat_shape`): in ``company`` to as
    many again, else by an eighth.
    """

    def fit(checkpoint: bool) -> int:
        rows = decoder.activation_bytes // kept_bytes(decoder, rank, checkpoint=checkpoint)
        return min(rows // 2 if company else rows * STEPS // (STEPS + 1), LARGEST)

    keeping = fit(False)
    if keeping >= max(min(total, ENOUGH), longest):
        return Plan(keeping, False)
    return Plan(max(1, longest, fit(True)), True)


def free_bytes(device: torch.device) -> int:
    """What a pass may take of a GPU's memory, once the weights are there: what is free, less a reserve."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(SHARE * (torch.cuda.mem_get_info(device)[0] + unused))
