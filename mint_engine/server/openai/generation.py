"""Running one request in the engine, and following its samples."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mint_engine.errors import SampleCancelledError
from mint_engine.feed import Feed
from mint_engine.server.openai.choice import Choice, Piece, Token
from mint_engine.server.openai.vocabulary import Vocabulary
from mint_engine.types import ModelInput, SampledSequence, SampleResponse, SamplingParams

if TYPE_CHECKING:
    from mint_engine.engine import Engine


@dataclass(frozen=True)
class Prompt:
    """``text``: what the prompt says, where that matters (echo, offsets)."""

    tokens: list[int]
    text: str = ""


@dataclass(frozen=True)
class Job:
    """What is to be sampled. ``samples`` of each prompt; ``topk`` alternatives of each token."""

    prompts: Sequence[Prompt]
    samples: int
    params: SamplingParams
    max_tokens: int | None
    topk: int = 0
    score_prompt: bool = False


class Generation:
    """A job in the engine. Choice i * samples + j is sample j of prompt i.

    ``live``: tokens are followed while they are sampled. Otherwise they come when a prompt's samples are all there,
    with what the engine tells only then: alternatives, and the scores of the prompt.
    """

    def __init__(
        self, engine: Engine, sampler_id: str, job: Job, vocabulary: Vocabulary, eos: frozenset[int], *, live: bool
    ) -> None:
        self.job, self.live, self._engine = job, live, engine
        self.choices = [
            Choice(vocabulary.stream(p.tokens), len(p.text), job.params.stop_strings, eos, job.max_tokens)
            for p in job.prompts
            for _ in range(job.samples)
        ]
        self._feed: Feed[tuple[int, int, Token]] | None = Feed() if live else None
        self._begun = False
        self._withdrawn: Exception | None = None
        self._futures: list[Future[SampleResponse]] = []
        try:
            for i, prompt in enumerate(job.prompts):
                self._futures.append(self._submit(sampler_id, i, prompt))
        except BaseException:
            self.cancel()
            raise
        for future in self._futures:
            future.add_done_callback(self._answered)

    async def responses(self) -> list[SampleResponse]:
        """The engine's answers, one a prompt. Raises the first failure, and gives up the others."""
        try:
            return list(await asyncio.gather(*(_result(future) for future in self._futures)))
        except SampleCancelledError:
            if self._withdrawn is not None:
                raise self._withdrawn from None
            raise
        finally:
            self.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(choice, what is new of it), until every choice has ended."""
        if self._feed is not None:
            async for prompt, sample, token in self._feed:
                choice = prompt * self.job.samples + sample
                if self.choices[choice].finished and all(c.finished for c in self.choices):
                    return  # the engine goes on where we saw a stop string: it is told by `cancel`
                if piece := self.choices[choice].push(token):
                    yield choice, piece
            if all(c.finished for c in self.choices):
                return
        responses = await self.responses()
        for i, response in enumerate(responses):
            for j in range(self.job.samples):
                choice = i * self.job.samples + j
                sequence = response.sequences[j] if response.sequences else _nothing()
                tokens = _tokens(sequence) if self._feed is None else []
                for piece in self._rest(choice, tokens, sequence):
                    yield choice, piece

    def cancel(self) -> None:
        """Give up what is not there yet; nobody waits for it any more."""
        for future in self._futures:
            if not future.done():
                self._engine.cancel_sample(future)

    def withdraw(self, reason: Exception) -> None:
        """Fail with ``reason``, unless the first token has been sampled."""
        if not self._begun:
            self._withdrawn = reason
            self.cancel()

    @property
    def completion_tokens(self) -> int:
        return sum(choice.count for choice in self.choices)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.job.prompts)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts the engine had in its cache; 0 where it has not said so."""
        answered = [f for f in self._futures if f.done() and not f.cancelled() and f.exception() is None]
        return sum(future.result().prompt_cache_hit_tokens for future in answered)

    def _submit(self, sampler_id: str, index: int, prompt: Prompt) -> Future[SampleResponse]:
        job = self.job
        scoring_only = job.max_tokens == 0
        return self._engine.sample(
            sampler_id, ModelInput.from_ints(prompt.tokens), 0 if scoring_only else job.samples, job.params,
            include_prompt_logprobs=job.score_prompt or scoring_only,
            topk_prompt_logprobs=job.topk if job.score_prompt else 0,
            topk_sample_logprobs=job.topk,
            on_token=partial(self._on_token, index),
        )  # fmt: skip

    def _on_token(self, prompt: int, sample: int, token: int, logprob: float) -> None:
        self._begun = True
        if self._feed is not None:
            self._feed.put((prompt, sample, Token(token, logprob)))

    def _answered(self, future: Future[SampleResponse]) -> None:
        failed = future.cancelled() or future.exception() is not None
        if self._feed is not None and (failed or all(f.done() for f in self._futures)):
            self._feed.close()

    def _rest(self, choice: int, tokens: Sequence[Token], sequence: SampledSequence) -> list[Piece]:
        pieces = [self.choices[choice].push(token) for token in tokens]
        pieces.append(self.choices[choice].finish(sequence.stop_reason))
        return [piece for piece in pieces if piece]


async def _result(future: Future[SampleResponse]) -> SampleResponse:
    waiting = asyncio.wrap_future(future)
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may be that nobody else looks
    return await asyncio.shield(waiting)  # so that giving up the wait does not cancel it behind the engine's back


def _tokens(sequence: SampledSequence) -> list[Token]:
    logprobs: Sequence[float | None] = sequence.logprobs or [None] * len(sequence.tokens)
    top = sequence.topk_logprobs or [None] * len(sequence.tokens)
    return [
        Token(token, logprob, alternatives or ())
        for token, logprob, alternatives in zip(sequence.tokens, logprobs, top, strict=True)
    ]


def _nothing() -> SampledSequence:
    """The sample of a prompt that is only scored."""
    return SampledSequence(stop_reason="length", tokens=[])
