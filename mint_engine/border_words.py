"""B of sampled adapters in words (`kernels.decode_words`), beside the words of the weights that they go on with.

In the border a B lies at the end of the weight's rows: a decode step that reads words would touch all of the weight's
pages for it, and nothing else of them. A copy is made when an adapter's version is first sampled. Those used last stay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mint_engine.borders import BorderedWeight, Segment
from mint_engine.kernels import Arena, Words, decode_words

KEPT_BYTES = 256 << 20  # beyond, adapters that are not in the step are forgotten
LARGE_BYTES = 8 << 20  # of an adapter from which on it gets large pages of its own


@dataclass(frozen=True)
class _Copy:
    version: int
    words: tuple[Words | None, ...]  # of each weight
    addresses: np.ndarray  # int64 [weights, 2]
    nbytes: int


class BorderWords:
    """Of one base model. ``weights``: in the order of `kernels.StepAdapters`, each with its words."""

    def __init__(self, weights: Sequence[BorderedWeight]) -> None:
        self._weights = weights
        self._copies: OrderedDict[int, _Copy] = OrderedDict()  # by the adapter's uid
        self.nbytes = 0  # of the copies: counted, as every decode step asks

    def of(self, segments: Sequence[Segment]) -> np.ndarray:
        """`StepAdapters.words` of the adapters, which sit in the borders."""
        found = []
        for s in segments:
            copy = self._copies.pop(s.adapter.uid, None)
            if copy is not None and copy.version != s.adapter.version:
                self.nbytes -= copy.nbytes
                copy = None
            if copy is None:
                copy = self._made(s)
                self.nbytes += copy.nbytes
            self._copies[s.adapter.uid] = copy
            found.append(copy.addresses)
        while self.nbytes > KEPT_BYTES and len(self._copies) > len(segments):
            self.nbytes -= self._copies.popitem(last=False)[1].nbytes
        return np.stack(found)

    def _made(self, s: Segment) -> _Copy:
        most = sum(w.n * w.m * s.adapter.rank * w.buf.itemsize for w in self._weights)
        words, arena = [], Arena() if most >= LARGE_BYTES else None
        for w in self._weights:
            start, width = w.k + w.m * s.offset, w.m * s.adapter.rank
            trained = w.words is not None and w.group.name in s.adapter.factors
            parts = len(w.words.parts) if w.words is not None else 1
            words.append(decode_words(w.buf[: w.n, start : start + width], parts, arena) if trained else None)
        addresses = [
            (0, 0) if found is None else (found.parts[0].data_ptr(), found.parts[-1].data_ptr()) for found in words
        ]
        size = sum(found.nbytes for found in words if found is not None)
        return _Copy(s.adapter.version, tuple(words), np.array(addresses, dtype=np.int64), size)
