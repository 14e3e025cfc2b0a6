"""Prompt-lookup speculation: a guess of the next tokens from what is there already, checked in one decode step.

The last few tokens of a sample may have occurred before, in its prompt or in itself; then what followed them is
proposed. The step computes the proposed tokens as if they had been sampled, and every position's token is drawn from
its own distribution with its own random number, as ever. As long as the drawn token is the proposed one, the next
position's numbers are those it would have got later; the first that differs is the sample's next token, and what was
computed behind it is forgotten. So the distribution does not change, and where a row's numbers do not depend on the
number of rows beside it (docs/sampling.md) no token changes either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mint_engine.kv_cache import BLOCK_TOKENS

if TYPE_CHECKING:
    from mint_engine.sampling_rows import Row

MATCH = 3  # tokens that must have occurred before
# Rows of a decode step that proposals may fill up. So many cost little more than one: reading the weights is the time.
MOST_ROWS = 8


class PromptLookup:
    """The tokens of one sample, and after which three of them which position came last."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._width = MATCH  # tokens worth proposing
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if len(self._tokens) >= MATCH:
                self._after[tuple(self._tokens[-MATCH:])] = len(self._tokens)
            self._tokens.append(token)

    def propose(self, most: int) -> list[int]:
        """At most ``most`` tokens that may come next; a repetition is taken to go on."""
        start = self._after.get(tuple(self._tokens[-MATCH:]))
        if start is None:
            return []
        period = len(self._tokens) - start
        return [self._tokens[start + i % period] for i in range(min(most, self._width))]

    def learn(self, proposed: int, accepted: int) -> None:
        """How a proposal did: the next is longer if all of it was right, else about as long as what was."""
        if proposed:
            self._width = 2 * proposed if accepted == proposed else accepted + 1


def drafts(rows: Sequence[Row], most: int) -> list[list[int]]:
    """What each row proposes: at most ``most`` tokens, within the blocks it holds and the rows that cost little."""
    free = MOST_ROWS - len(rows)
    if most == 0 or free <= 0:
        return [[] for _ in rows]
    out = []
    for left, row in zip(range(len(rows), 0, -1), rows, strict=True):
        if row.lookup is None:
            row.lookup = PromptLookup(row.request.prompt.tolist())
        row.lookup.extend(row.tokens[len(row.lookup) - len(row.request.prompt) :])
        cells = len(row.cache.blocks) * BLOCK_TOKENS - row.cache.length - 1
        draft = row.lookup.propose(min(most, -(-free // left), cells, row.max_tokens - len(row.tokens) - 1))
        free -= len(draft)
        out.append(draft)
    return out
