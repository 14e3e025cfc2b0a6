"""What a sampling call may ask about its prompt: log-probabilities at temperature 1, top-k, targets, alternatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mint_engine.borders import Seating
from mint_engine.models.decoder import Decoder
from mint_engine.sampling import Draw, UniformStream, choose, tempered_logprobs
from mint_engine.types import PromptAltTokens, TensorData

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


def score_prompt(
    decoder: Decoder, x: Tensor, seating: Seating, prompt: np.ndarray, query: PromptQuery, draw: Draw, seed: int | None
) -> dict[str, Any]:
    """The prompt fields of a SampleResponse. ``x`` [N, H + p] is the head input of the prompt's rows.

    The log-probability of token t comes from row t - 1; entry 0 of every per-position list is None.
    """
    n = len(prompt)
    first = 1 if query.last_n is None else max(1, n - query.last_n)
    tokens = torch.from_numpy(prompt[first:])
    rows = torch.arange(first - 1, n - 1)
    x, seating = x[rows], seating.select(rows)
    out: dict[str, Any] = {}
    missing: list[None] = [None] * min(first, n)
    if query.logprobs:
        scored = decoder.target_logprob(x, tokens[:, None], seating)[0][:, 0].tolist() if len(rows) else []
        out["prompt_logprobs"] = [*missing, *scored]
    if query.targets is not None:
        scores = np.zeros(query.targets.shape, dtype=np.float32)
        if len(rows):
            wanted = torch.from_numpy(query.targets[first - 1 :])
            scores[first - 1 :] = decoder.target_logprob(x, wanted, seating)[0].numpy()
        out["target_prompt_logprobs"] = TensorData.from_numpy(scores)
    if query.topk > 0 or query.alternatives > 0:
        out.update(_from_logits(decoder, x, seating, query, draw, seed, missing, n))
    return out


def _from_logits(
    decoder: Decoder, x: Tensor, seating: Seating, query: PromptQuery, draw: Draw, seed: int | None,
    missing: list[None], n: int,
) -> dict[str, Any]:  # fmt: skip
    topk: list[list[tuple[int, float]] | None] = list(missing)
    alt_tokens = np.zeros((n - 1, query.alternatives), dtype=np.int64)
    alt_logprobs = np.zeros((n - 1, query.alternatives), dtype=np.float32)
    streams = [UniformStream(seed, 2**32 + k) for k in range(query.alternatives)]
    at = n - 1 - len(x)
    for start in range(0, len(x), _ROWS):
        rows = torch.arange(start, min(start + _ROWS, len(x)))
        logits = decoder.logits(x[rows], seating.select(rows))
        if query.topk > 0:
            values, ids = torch.log_softmax(logits, -1).topk(min(query.topk, logits.shape[1]))
            topk += [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
        draws = [draw] * len(rows)
        tempered = tempered_logprobs(logits, draws) if streams else None
        for k, stream in enumerate(streams):
            assert tempered is not None
            chosen = choose(tempered, draws, [stream.next() for _ in rows])
            where = slice(at + start, at + start + len(rows))
            alt_tokens[where, k] = chosen.numpy()
            alt_logprobs[where, k] = tempered.gather(1, chosen[:, None])[:, 0].numpy()
    out: dict[str, Any] = {}
    if query.topk > 0:
        out["topk_prompt_logprobs"] = topk
    if query.alternatives > 0:
        out["prompt_alt_tokens"] = PromptAltTokens(
            tokens=TensorData.from_numpy(alt_tokens), logprobs=TensorData.from_numpy(alt_logprobs)
        )
    return out
