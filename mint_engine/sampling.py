"""How a sample is drawn: its parameters, its stream of uniform numbers, and the kernels with these."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
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


def sample(logits: Tensor, draws: Sequence[Draw], uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """One token per row of ``logits`` fp32 [R, V], and its tempered log-probability: see ``kernels.sample_rows``."""
    most = logits.shape[1]  # as good as off; a larger one need not fit into an int64
    arguments = (
        _temperatures(draws), torch.tensor([min(d.top_k, most) for d in draws]),
        torch.tensor([d.top_p for d in draws], dtype=torch.float64), torch.tensor(uniforms, dtype=torch.float64),
    )  # fmt: skip
    return kernels.sample_rows(logits, *(upload(a, logits.device) for a in arguments))


def alternatives(logits: Tensor, draws: Sequence[Draw], k: int) -> list[list[tuple[int, float]]]:
    """The k likeliest tokens of every row (all, if there are fewer) with their tempered log-probabilities."""
    at = upload(_temperatures(draws), logits.device)
    tokens, logprobs = kernels.top_logprobs(logits, at, min(k, logits.shape[1]))
    return [list(zip(t, p, strict=True)) for t, p in zip(tokens.tolist(), logprobs.tolist(), strict=True)]


def _temperatures(draws: Sequence[Draw]) -> Tensor:
    return torch.tensor([d.temperature for d in draws], dtype=torch.float32)
