"""What the scheduler moves about: samples being decoded, and tokens whose keys and values are still to be computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

import numpy as np

from mint_engine.adapters import Adapter
from mint_engine.kv_cache import BLOCK_TOKENS, CachedSequence
from mint_engine.prompt_scores import PromptScorer
from mint_engine.requests import Request
from mint_engine.sampling import UniformStream
from mint_engine.speculation import PromptLookup


@dataclass(eq=False)
class Row:
    """One sample. Its last token is not in ``cache`` yet: the next step puts it there and draws another."""

    request: Request
    index: int
    stream: UniformStream
    max_tokens: int
    cache: CachedSequence = field(default_factory=CachedSequence)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[list[tuple[int, float]] | None] = field(default_factory=list)
    lookup: PromptLookup | None = None  # made when something is to be proposed

    @property
    def age(self) -> tuple[int, int]:
        """The smaller came first."""
        return self.request.order, self.index

    @property
    def longest(self) -> int:
        """Tokens it may ever have in the cache."""
        return len(self.request.prompt) + self.max_tokens


@dataclass(eq=False)
class Job:
    """``tokens`` whose keys and values ``rows`` need before they go on: a new prompt, or what a preempted row had.

    The first ``prompt`` tokens are the request's prompt; the rest were sampled. ``rows`` is empty where only the prompt
    is scored.
    """

    request: Request
    rows: list[Row]
    tokens: np.ndarray
    cache: CachedSequence = field(default_factory=CachedSequence)
    scorer: PromptScorer | None = None
    cached: bool = True  # False: to be scored without the cache, which is too small for it

    @classmethod
    def of_request(cls, request: Request, max_tokens: int) -> Job:
        streams = [UniformStream(request.params.seed, i) for i in range(request.num_samples)]
        return cls(request, [Row(request, i, s, max_tokens) for i, s in enumerate(streams)], request.prompt)

    @classmethod
    def of_row(cls, row: Row) -> Job:
        """For a row that gave its blocks back: all it had, to be computed again. Nothing is sampled anew."""
        tokens = np.concatenate([row.request.prompt, np.array(row.tokens, dtype=np.int64)])
        return cls(row.request, [row], tokens)

    @property
    def resumes(self) -> bool:
        return len(self.tokens) > len(self.request.prompt)

    @property
    def age(self) -> tuple[int, int]:
        return self.request.order, self.rows[0].index if self.rows else 0

    @property
    def remaining(self) -> int:
        """Tokens not computed yet."""
        return len(self.tokens) - self.cache.length

    @property
    def reusable(self) -> int:
        """How many of the first tokens may come out of the cache: rows that are read must be computed."""
        read = len(self.tokens) - 1
        if self.request.query and not self.resumes:
            read = min(read, self.request.query.first_row(len(self.tokens)))
        return read

    @cached_property
    def keys(self) -> list[bytes]:
        return block_keys(self.request, self.tokens)

    def begin(self) -> None:
        """For the first time or again."""
        if self.request.query and not self.resumes:
            self.scorer = PromptScorer(self.request)


def block_keys(request: Request, tokens: np.ndarray) -> list[bytes]:
    """A key for each whole block of ``tokens`` int64 [n]: equal only where keys and values are, to the last bit.

    It says whose tokens they are, which version of which adapter saw them, all tokens up to the block's end, and which
    of them were prompt: a prompt and a decode step may round differently, so what was sampled is found again by the
    sample that is resumed, not by a later prompt that contains it. Owners share nothing: a hit, or its speed, would
    tell one what another has asked.
    """
    key = blake2b(repr((request.owner, adapter_identity(request.adapter))).encode(), digest_size=16).digest()
    keys: list[bytes] = []
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        sampled = max(0, min(BLOCK_TOKENS, end - len(request.prompt)))
        block = np.ascontiguousarray(tokens[end - BLOCK_TOKENS : end], dtype=np.int64)
        key = blake2b(key + bytes([sampled]) + block.tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys


def adapter_identity(adapter: Adapter | None) -> tuple[int, int] | None:
    return None if adapter is None else (adapter.uid, adapter.version)


def adapter_order(adapter: Adapter | None) -> int:
    """Rows of one adapter lie together, those of the base model first."""
    return -1 if adapter is None else adapter.uid
