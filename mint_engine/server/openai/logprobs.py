"""Log-probabilities in the two formats of OpenAI's API.

They are the engine's: the natural logarithm of the probability under softmax(logits / temperature), over the whole
vocabulary, before `top_p` and `top_k` cut it. At temperature 0 (greedy) and for the tokens of an echoed prompt they are
those of temperature 1. OpenAI does not say which distribution its own refer to; at temperature 1 the two agree, at any
other ask with temperature 0 or 1 to compare. They are the very numbers that `sample` of the SDK protocol reports, hence
what importance sampling needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mint_engine.server.openai.choice import PlacedToken
from mint_engine.server.openai.vocabulary import Vocabulary

_LEAST = -9999.0  # OpenAI's for "next to impossible"; JSON has no infinity


def chat_logprobs(tokens: Sequence[PlacedToken], vocabulary: Vocabulary) -> dict[str, Any]:
    """`choices[].logprobs` of chat completions: one entry a token, with its bytes and its alternatives."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = vocabulary.token_bytes(token)
        return {
            "token": vocabulary.token_string(token),
            "logprob": _finite(logprob),
            "bytes": None if raw is None else list(raw),
        }

    content = [
        entry(placed.token.id, placed.token.logprob) | {"top_logprobs": [entry(*top) for top in placed.token.top]}
        for placed in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[PlacedToken], vocabulary: Vocabulary, *, alternatives: bool) -> dict[str, Any]:
    """`choices[].logprobs` of completions: parallel lists. Offsets count from the beginning of the prompt."""

    def name(token: int) -> str:
        return vocabulary.token_string(token, prefix="bytes:")

    def top(placed: PlacedToken) -> dict[str, float] | None:
        if placed.token.logprob is None:
            return None
        entries: dict[str, float] = {}
        for token, logprob in placed.token.top:
            entries.setdefault(name(token), max(logprob, _LEAST))  # of tokens of one spelling the most likely
        entries[name(placed.token.id)] = max(placed.token.logprob, _LEAST)
        return entries

    return {
        "tokens": [name(placed.token.id) for placed in tokens],
        "token_logprobs": [_finite(placed.token.logprob) for placed in tokens],
        "top_logprobs": [top(placed) for placed in tokens] if alternatives else None,
        "text_offset": [placed.offset for placed in tokens],
    }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST)
