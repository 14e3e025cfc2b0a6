"""Decode steps one after the other, with the draws between them, in one call: ``decode_step`` and ``sample_rows``.

    repeat: logits = decode_step(tokens, lengths);  tokens = sample_rows(logits);  lengths += 1

Between two steps nothing is to be decided while no row has ended and nobody else wants the device. Then a step costs
what its kernels cost. Tokens, log-probabilities and the cache are those of the two ops in turn, to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mint_engine.kernels import args
from mint_engine.kernels.decode_step import StepAdapters, StepModel, check_step
from mint_engine.kernels.op import Op

__all__ = ["StepDraws", "decode_steps"]

_op = Op("decode_steps")


@dataclass(frozen=True)
class StepDraws:
    """How the tokens of M rows are drawn, in at most n steps.

    ``temperature, top_k, top_p`` ``[M]``: as in ``sample_rows``. ``uniforms``: ``[n, M]`` float64 in [0, 1), n at least
    1. ``stops``: ``[M, s]`` int64, the tokens that end a row; -1 is none.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    uniforms: Tensor
    stops: Tensor


def decode_steps(
    model: StepModel,
    tokens: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    draws: StepDraws,
    *,
    adapters: StepAdapters | None = None,
    interrupted: Tensor | None = None,
    seconds: float = math.inf,
    face: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Up to n steps over M rows, at least one. The last is that in which a row ends: it draws one of its stops, or its
    logits are no distribution.

    Args:
        model, tokens, cos, sin, k_pool, v_pool, scale, adapters: as in ``decode_step``, of the first step.
        block_table, lengths: the same; ``block_table`` and ``cos`` have room for n - 1 tokens more of every row.
        draws: how tokens are drawn, and how many.
        interrupted: ``[1]`` int32 or None; while it is not 0 no further step is begun. Others may write it meanwhile.
        seconds: after so long no further step is begun.
        face: run this face ("cpu", "reference") or raise.

    Returns:
        ``(tokens [k, M] int64, log-probabilities [k, M])`` of the k <= n steps that were done; as in ``sample_rows``.

    Raises:
        ValueError: an argument does not fit, or ``face`` cannot run.
    """
    op, rows = "decode_steps", len(tokens)
    check_step(op, model, tokens, cos, sin, k_pool, v_pool, block_table, lengths, adapters)
    args.tensor(op, "temperature", draws.temperature, (rows,), torch.float32)
    args.tensor(op, "top_k", draws.top_k, (rows,), torch.int64)
    args.tensor(op, "top_p", draws.top_p, (rows,), torch.float64)
    steps = args.matrix(op, "uniforms", draws.uniforms)[0]
    args.tensor(op, "uniforms", draws.uniforms, (max(steps, 1), rows), torch.float64)
    args.tensor(op, "stops", draws.stops, (rows, args.matrix(op, "stops", draws.stops)[1]), torch.int64)
    if interrupted is not None:
        args.tensor(op, "interrupted", interrupted, (1,), torch.int32)
    found: tuple[Tensor, Tensor] = _op.pick(face, model.norm, k_pool, v_pool, cos, sin).decode_steps(
        model, tokens, cos, sin, k_pool, v_pool, block_table.contiguous(), lengths, scale, draws, adapters,
        interrupted, seconds,
    )  # fmt: skip
    return found
