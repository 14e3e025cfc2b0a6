"""From logits to tokens: temperature, top-k, top-p, and the log-probability that is reported."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 256  # the cumulative sum is taken over block sums first, then inside one block: two short passes


@dataclass(frozen=True)
class Draw:
    """How one row is sampled: ``temperature`` 0 is greedy, ``top_k`` -1 and ``top_p`` 1 are off."""

    temperature: float
    top_k: int
    top_p: float


class UniformStream:
    """Uniform numbers in [0, 1) of one sample: Philox keyed by (seed, sample index), fresh entropy without a seed."""

    def __init__(self, seed: int | None, index: int) -> None:
        self._seed, self._index = seed, index
        self._generator: np.random.Generator | None = None  # made when needed: a call may wait, with many samples
        self._ahead: deque[float] = deque()

    def peek(self, count: int) -> list[float]:
        """The next ``count`` numbers, which stay."""
        if self._generator is None:
            key = None if self._seed is None else np.array([self._seed % 2**64, self._index], dtype=np.uint64)
            self._generator = np.random.Generator(np.random.Philox(key=key))
        while len(self._ahead) < count:
            self._ahead.append(float(self._generator.random()))
        return list(islice(self._ahead, count))

    def next(self) -> float:
        self.peek(1)
        return self._ahead.popleft()


def tempered_logprobs(logits: Tensor, draws: list[Draw]) -> Tensor:
    """fp32 [R, V]: log softmax(z / temperature) per row; at temperature 0 that of temperature 1, as greedy reports."""
    temperatures = torch.tensor([d.temperature or 1.0 for d in draws], dtype=torch.float32)
    if bool((temperatures == 1.0).all()):
        return F.log_softmax(logits, dim=-1)
    # The maximum goes first and the temperature stays a normal number: the quotient may be -inf, never NaN.
    below = logits - logits.amax(dim=-1, keepdim=True)
    return F.log_softmax(below / temperatures.clamp(min=1e-30)[:, None], dim=-1)


def choose(logprobs: Tensor, draws: list[Draw], uniforms: list[float]) -> Tensor:
    """One token id per row, int64 [R], from :func:`tempered_logprobs` [R, V].

    The distribution is that of the row after top-k, then top-p over what is left (the order of transformers). The
    inverse CDF turns one uniform number per row into a token, so a seed fixes the tokens.
    """
    tokens = torch.empty(len(draws), dtype=torch.int64)
    plain = [i for i, d in enumerate(draws) if d.temperature > 0 and d.top_k < 1 and d.top_p >= 1]
    greedy = [i for i, d in enumerate(draws) if d.temperature == 0]
    if greedy:
        tokens[greedy] = logprobs[greedy].argmax(-1)
    if plain:
        rows = logprobs if len(plain) == len(draws) else logprobs[plain]
        tokens[plain] = _inverse_cdf(rows.exp(), torch.tensor([uniforms[i] for i in plain], dtype=torch.float64))
    for i, d in enumerate(draws):
        if d.temperature > 0 and (d.top_k >= 1 or d.top_p < 1):
            tokens[i] = _filtered(logprobs[i], d, uniforms[i])
    return tokens


def _filtered(logprobs: Tensor, draw: Draw, uniform: float) -> Tensor:
    vocab = logprobs.numel()
    values, ids = logprobs.topk(min(draw.top_k, vocab)) if draw.top_k >= 1 else logprobs.sort(descending=True)
    p = F.softmax(values.double(), dim=-1)
    if draw.top_p < 1:
        # Keep the smallest set whose mass reaches top_p: a token stays while the mass before it is below.
        p = torch.where(p.cumsum(-1) - p < draw.top_p, p, 0.0)
    return ids[_inverse_cdf(p[None], torch.tensor([uniform], dtype=torch.float64))[0]]


def _inverse_cdf(p: Tensor, uniforms: Tensor) -> Tensor:
    """Index i per row with cumsum(p)[i-1] <= u * sum(p) < cumsum(p)[i]; zero-probability entries are never chosen."""
    rows, width = p.shape
    if width % _BLOCK:
        p = F.pad(p, (0, -width % _BLOCK))  # it copies also where there is nothing to add
    blocks = p.reshape(rows, -1, _BLOCK)
    # A block's sum rounds in fp32: shares move by 1e-7 of themselves, and nothing is converted first.
    sums = blocks.sum(-1).double().cumsum(-1)
    target = (uniforms * sums[:, -1])[:, None]
    block = _first_above(sums, target)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(rows), block.squeeze(1)].double().cumsum(-1)
    return (block * _BLOCK + _first_above(inside, target - before)).squeeze(1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    # Rounding may leave the target at or above the total: then the last entry that adds anything.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous(), right=False)
    return torch.minimum(torch.searchsorted(cumulative, target.contiguous(), right=True), last)
