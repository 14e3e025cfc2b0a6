"""What a sampling call may ask about its prompt: log-probabilities at temperature 1, top-k, targets, alternatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mint_engine.borders import Seating
from mint_engine.models.decoder import Decoder
from mint_engine.sampling import Draw, UniformStream, alternatives, sample
from mint_engine.types import PromptAltTokens, TensorData

if TYPE_CHECKING:
    from mint_engine.requests import Request

_ROWS = 64  # rows of whole fp32 logits kept at once


@dataclass(frozen=True)
class PromptQuery:
    """``targets`` int64 [len(prompt) - 1, K], -1 = skip. ``last_n``: only the last n tokens are scored."""

    logprobs: bool = False
    topk: int = 0
    targets: np.ndarray | None = None
    alternatives: int = 0
    last_n: int | None = None

    def __bool__(self) -> bool:
        return self.logprobs or self.topk > 0 or self.targets is not None or self.alternatives > 0

    def first_row(self, prompt: int) -> int:
        """The first row that is read: the log-probability of token t comes from row t - 1."""
        return 0 if self.last_n is None else max(0, prompt - self.last_n - 1)


class PromptScorer:
    """Collects the prompt fields of a SampleResponse while the prompt is computed, in order, chunk by chunk.

    Entry 0 of every per-position list is None, and so is what ``last_n`` leaves out.
    """

    def __init__(self, request: Request) -> None:
        self._request, self._query = request, request.query
        n, k = len(request.prompt), request.query.alternatives
        self._begin, self._end = self._query.first_row(n), n - 1  # rows that are read
        missing = min(self._begin + 1, n)
        self._logprobs: list[float | None] = [None] * missing
        self._topk: list[list[tuple[int, float]] | None] = [None] * missing
        targets = self._query.targets
        self._targets = None if targets is None else np.zeros(targets.shape, dtype=np.float32)
        self._alt_tokens = np.zeros((n - 1, k), dtype=np.int64)
        self._alt_logprobs = np.zeros((n - 1, k), dtype=np.float32)
        self._streams = [UniformStream(request.params.seed, 2**32 + i) for i in range(k)]

    def rows(self, start: int, stop: int) -> range:
        """Which of the prompt's rows ``start:stop`` are read."""
        return range(max(start, self._begin), min(stop, self._end))

    def add(self, decoder: Decoder, x: Tensor, seating: Seating, start: int) -> None:
        """Score ``x`` [M, H + p], the head input of the rows ``start:start + M`` that are read."""
        query, stop = self._query, start + len(x)
        if query.logprobs:
            tokens = torch.from_numpy(self._request.prompt[start + 1 : stop + 1])
            self._logprobs += decoder.target_logprob(x, tokens[:, None], seating)[0][:, 0].tolist()
        if query.targets is not None:
            assert self._targets is not None
            wanted = torch.from_numpy(query.targets[start:stop])
            self._targets[start:stop] = decoder.target_logprob(x, wanted, seating)[0].cpu().numpy()
        if query.topk > 0 or query.alternatives > 0:
            for first in range(0, len(x), _ROWS):
                rows = torch.arange(first, min(first + _ROWS, len(x)))
                self._add_logits(decoder.logits(x[rows], seating.select(rows)).cpu(), start + first)

    def _add_logits(self, logits: Tensor, start: int) -> None:
        n = len(logits)
        if self._query.topk > 0:
            self._topk += alternatives(logits, [Draw(1.0, -1, 1.0)] * n, self._query.topk)
        draws = [self._request.draw] * n
        for k, stream in enumerate(self._streams):
            tokens, logprobs = sample(logits, draws, stream.take(n))
            self._alt_tokens[start : start + n, k] = tokens.cpu().numpy()
            self._alt_logprobs[start : start + n, k] = logprobs.cpu().numpy()

    def result(self) -> dict[str, Any]:
        """The fields that were asked for."""
        out: dict[str, Any] = {}
        if self._query.logprobs:
            out["prompt_logprobs"] = self._logprobs
        if self._targets is not None:
            out["target_prompt_logprobs"] = TensorData.from_numpy(self._targets)
        if self._query.topk > 0:
            out["topk_prompt_logprobs"] = self._topk
        if self._query.alternatives > 0:
            tokens, logprobs = TensorData.from_numpy(self._alt_tokens), TensorData.from_numpy(self._alt_logprobs)
            out["prompt_alt_tokens"] = PromptAltTokens(tokens=tokens, logprobs=logprobs)
        return out
