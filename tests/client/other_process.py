"""What a test lets another process do: light to import."""

from __future__ import annotations

import mint
from mint import types


def sampled(client: mint.SamplingClient) -> list[tuple[list[int], list[float] | None]]:
    answer = client.sample([1, 2, 3], 2, types.SamplingParams(max_tokens=6, seed=1), True, 2, 2)
    return [(sequence.tokens, sequence.logprobs) for sequence in answer.sequences]
