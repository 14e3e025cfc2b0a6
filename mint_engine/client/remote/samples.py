"""Samples from a server: thousands may be asked for at once; so many as the server wants are under way."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

from mint_engine.client.remote.background import Background
from mint_engine.client.remote.failures import LostPromiseError
from mint_engine.client.remote.promises import Promise, retrieve
from mint_engine.client.remote.transport import Transport
from mint_engine.errors import MintError, TransportError
from mint_engine.types import ModelInput, SampleResponse, SamplingParams, TensorData
from mint_engine.wire import parse_sample_response

SHADOW_BLOCK = 10**9  # numbers of a copy of a client start at a random multiple of this (wire-protocol 2.5)
TRIES = 10  # of a sample whose request a server forgot: it may be restarted that often meanwhile


class Numbers:
    """The numbers (`seq_id`) of a sampler's requests: a server answers a number it has seen with what it said then."""

    def __init__(self) -> None:
        self._of: dict[str, Iterator[int]] = {}

    def start(self, sampler_id: str) -> None:
        """A sampler that was just made, and that only we know."""
        self._of[sampler_id] = itertools.count()

    def forget(self, sampler_id: str) -> None:
        self._of.pop(sampler_id, None)

    def next(self, sampler_id: str) -> int:
        numbers = self._of.get(sampler_id)
        if numbers is None:  # somebody else's sampler, perhaps in use there: a block that nobody else is likely to have
            numbers = itertools.count(random.SystemRandom().randint(1, SHADOW_BLOCK) * SHADOW_BLOCK)
            numbers = self._of.setdefault(sampler_id, numbers)
        return next(numbers)


def request_body(
    sampler_id: str, seq: int, prompt: ModelInput, num_samples: int, params: SamplingParams,
    *, include_prompt_logprobs: bool, topk_prompt_logprobs: int, topk_sample_logprobs: int,
    target_prompt_logprobs: TensorData | None, prompt_alt_tokens_k: int, prompt_logprobs_last_n: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The body of `asample`. What was not asked for is left out, so that older servers understand it."""
    body = {
        "sampling_session_id": sampler_id, "seq_id": seq, "num_samples": num_samples,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt.to_ints()}]},
        "sampling_params": params.model_dump(exclude_none=True),
        "prompt_logprobs": include_prompt_logprobs, "topk_prompt_logprobs": topk_prompt_logprobs, "type": "sample",
    }  # fmt: skip
    more = {
        "topk_sample_logprobs": topk_sample_logprobs or None,
        "target_prompt_logprobs": None if target_prompt_logprobs is None else target_prompt_logprobs.to_dict(),
        "prompt_alt_tokens_k": prompt_alt_tokens_k or None,
        "prompt_logprobs_last_n": prompt_logprobs_last_n,
    }
    return body | {name: value for name, value in more.items() if value is not None}


async def sample(
    transport: Transport, background: Background, slots: asyncio.Semaphore, body: dict[str, Any]
) -> SampleResponse:
    """One `asample` and its result. Cancelling this tells the server to stop."""
    async with slots:
        for _ in range(TRIES):
            response = await transport.post("asample", body, headers={"X-Tinker-Sampling-Backpressure": "1"})
            promise = Promise.of(response, "Sample")
            try:
                answer = await retrieve(transport, promise)
            except LostPromiseError as error:
                lost = error
                continue
            except asyncio.CancelledError:
                background.spawn(_cancel(transport, promise))
                raise
            return parse_sample_response(answer.content, promise.sequence_ids)
        raise TransportError(f"Sample: the server lost this request {TRIES} times: {lost}")


async def _cancel(transport: Transport, promise: Promise) -> None:
    with contextlib.suppress(MintError):
        await transport.post("cancel_future", {"request_id": promise.request_id}, retries=0)
