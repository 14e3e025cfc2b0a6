"""How a sample is drawn: its parameters, its stream of uniform numbers, and the kernels with these."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from mint_engine import kernels
from mint_engine.device import upload


@dataclass(frozen=True)
class Draw:
    """How one row is sampled: ``temperature`` 0 is greedy, ``top_k`` -1 and ``top_p`` 1 are off."""

    temperature: float
    top_k: int
    top_p: float

    @property
    def plain(self) -> bool:
        """Whether the filters are off."""
        return self.top_k < 1 and self.top_p >= 1


_AT_ONCE = 32  # uniform numbers


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
        if len(self._ahead) < count:
            self._ahead.extend(self._generator.random(max(count, _AT_ONCE)).tolist())  # the numbers it gives one by one
        return list(islice(self._ahead, count))

    def take(self, count: int) -> list[float]:
        """The next ``count`` numbers, which have been used then."""
        self.peek(count)
        return [self._ahead.popleft() for _ in range(count)]


def sample(logits: Tensor, draws: Sequence[Draw], uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """One token per row of ``logits`` fp32 [R, V], and its tempered log-probability: see ``kernels.sample_rows``."""
    arguments = (*_parameters(tuple(draws), logits.shape[1]), _column(uniforms, np.float64))
    return kernels.sample_rows(logits, *(upload(a, logits.device) for a in arguments))


def step_draws(
    draws: Sequence[Draw], stops: Sequence[frozenset[int]], uniforms: np.ndarray, vocab: int
) -> kernels.StepDraws:
    """What ``kernels.decode_steps`` draws for these rows; ``uniforms`` float64 [steps, R]."""
    return kernels.StepDraws(*_parameters(tuple(draws), vocab), torch.from_numpy(uniforms), _stops(tuple(stops)))


def alternatives(logits: Tensor, draws: Sequence[Draw], k: int) -> list[list[tuple[int, float]]]:
    """The k likeliest tokens of every row (all, if there are fewer) with their tempered log-probabilities."""
    at = upload(_temperatures(draws), logits.device)
    tokens, logprobs = kernels.top_logprobs(logits, at, min(k, logits.shape[1]))
    return [list(zip(t, p, strict=True)) for t, p in zip(tokens.tolist(), logprobs.tolist(), strict=True)]


@lru_cache(maxsize=64)
def _parameters(draws: tuple[Draw, ...], vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Temperatures, top_k, top_p of each row: the same step after step, while nobody joins or leaves."""
    top_k = [min(d.top_k, vocab) for d in draws]  # which is as good as off; a larger one need not fit into an int64
    return _temperatures(draws), _column(top_k, np.int64), _column([d.top_p for d in draws], np.float64)


@lru_cache(maxsize=64)
def _stops(stops: tuple[frozenset[int], ...]) -> Tensor:
    """int64 [R, most], padded with -1."""
    most = max(len(tokens) for tokens in stops)
    padded = [[*tokens, *[-1] * (most - len(tokens))] for tokens in stops]
    return torch.from_numpy(np.array(padded, dtype=np.int64).reshape(len(stops), most))


def _temperatures(draws: Sequence[Draw]) -> Tensor:
    return _column([d.temperature for d in draws], np.float32)


def _column(values: Sequence[float], dtype: type) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=dtype))
