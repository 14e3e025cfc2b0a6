"""Sampling in plain torch, one row at a time, by sorting: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_rows(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    logprobs = torch.full((len(logits),), torch.nan, dtype=logits.dtype, device=logits.device)
    for i, z in enumerate(_tempered(logits, temperature)):
        if z.isnan().any():
            continue
        if temperature[i] == 0:
            tokens[i] = z.sort(descending=True, stable=True).indices[0]
        else:
            tokens[i] = _draw(z.softmax(0), int(top_k[i]), float(top_p[i]), float(uniforms[i]))
        logprobs[i] = z[tokens[i]]
    return tokens, logprobs


def top_logprobs(logits: Tensor, temperature: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, tokens = _tempered(logits, temperature).sort(dim=1, descending=True, stable=True)
    broken = values.isnan().any(1, keepdim=True)
    return torch.where(broken, 0, tokens[:, :k]), torch.where(broken, torch.nan, values[:, :k]).to(logits.dtype)


def _tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    """log softmax(z / temperature) in float64; a row that is no distribution is NaN."""
    z = logits.double()
    # The maximum goes first and the temperature stays a normal number: the quotient may be -inf, never NaN.
    divisor = torch.where(temperature == 0, 1.0, temperature.double().clamp(min=1e-30))
    return torch.log_softmax((z - z.amax(1, keepdim=True)) / divisor[:, None], 1)


def _draw(p: Tensor, top_k: int, top_p: float, uniform: float) -> Tensor:
    mass, order = p.sort(descending=True, stable=True)
    kept = torch.arange(len(p), device=p.device) < (top_k if top_k >= 1 else len(p))
    if top_p < 1:
        before = (mass * kept).cumsum(0) - mass
        kept &= before < top_p * (mass * kept).sum()
        kept[0] = True
    cumulative = torch.zeros_like(p).scatter(0, order, mass * kept).cumsum(0)
    above = cumulative > uniform * cumulative[-1]
    return above.long().argmax() if bool(above.any()) else (cumulative == cumulative[-1]).long().argmax()
