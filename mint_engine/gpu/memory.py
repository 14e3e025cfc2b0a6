"""How much of a call fits into one pass, from the table of activations (DESIGN.md 2.3 and 4), and what is kept of it.

The ladder: keep all that the backward needs but norm outputs, ``silu(gate) * up`` and q, k before RoPE, which are
recomputed in passing; where so few tokens fit that a pass would be small, keep each layer's input only and compute the
layer again in the backward, half as much arithmetic more (DESIGN.md 2.3). The sums are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mint_engine.models.decoder import Decoder

ENOUGH = 4096  # tokens that fill a GPU: a longer pass is hardly faster per token
LARGEST = 1 << 16  # tokens of a pass, however much memory there is
SHARE = 0.8  # of the free memory: fragments, and what the allocator rounds up
CPU_BYTES = 4 << 30


@dataclass(frozen=True)
class Plan:
    """``max_tokens`` of a pass; ``checkpoint``: keep only the layers' inputs."""

    max_tokens: int
    checkpoint: bool


def kept_bytes(decoder: Decoder, *, checkpoint: bool) -> int:
    """Bytes per token that a pass holds at its peak: what all layers keep, and one layer at work."""
    c, size = decoder.config, decoder.dtype.itemsize
    layer = decoder.activation_bytes_per_token // c.num_layers
    # Beside what is kept: the MLP's gradient buffers, x, the stream and its gradients, the rotated q and k, and theirs.
    working = size * (4 * c.intermediate_size + 8 * c.hidden_size + 3 * (c.num_heads + c.num_kv_heads) * c.head_dim)
    if not checkpoint:
        return c.num_layers * layer + working
    return c.num_layers * c.hidden_size * size + layer + working


def plan(decoder: Decoder, total: int, longest: int, budget: int | None = None) -> Plan:
    """What to do with a call of ``total`` tokens in sequences of at most ``longest``; ``budget`` in bytes."""
    if budget is None:
        budget = free_bytes(decoder.device)
    keeping = budget // kept_bytes(decoder, checkpoint=False)
    if keeping >= max(min(total, ENOUGH), longest):
        return Plan(max(1, min(keeping, LARGEST)), False)
    fewer = budget // kept_bytes(decoder, checkpoint=True)
    return Plan(max(1, longest, min(fewer, LARGEST)), True)


def free_bytes(device: torch.device) -> int:
    """Memory that activations may take: what is free on a GPU, that which earlier passes let go of included."""
    if device.type != "cuda":
        return CPU_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(SHARE * (torch.cuda.mem_get_info(device)[0] + unused))
