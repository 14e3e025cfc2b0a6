"""Decoding: all samples of all calls, of all adapters, advance together, one token a step (DESIGN.md 2.7).

The decoder's own layers run here with the adapters in the border, as in training, so a log-probability reported while
sampling is the one the trainer computes. Requests join and leave at any step; prompts are computed in chunks between
the steps. Who is next, and who holds which blocks of the cache, is ``schedule.py``'s to say.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import accumulate, groupby, islice

import numpy as np
import torch
from torch import Tensor

from mint_engine.batch import pack
from mint_engine.borders import Seating
from mint_engine.device import memory_bytes
from mint_engine.errors import NonFiniteError, SampleCancelledError, UserError
from mint_engine.interruption import Interruption
from mint_engine.kernels import plan
from mint_engine.kv_cache import KVCache, blocks_for
from mint_engine.models.decoder import Decoder
from mint_engine.requests import MAX_VALUES, Request, check_product
from mint_engine.sampling import alternatives, sample
from mint_engine.sampling_pass import Piece, decode, decode_steps, draw_at_once, prefill, steps_in_a_call
from mint_engine.sampling_rows import Job, Row, adapter_order
from mint_engine.schedule import MAX_ALL_ROWS, MAX_ROWS, Schedule
from mint_engine.settling import settle
from mint_engine.speculation import drafts
from mint_engine.types import SampledSequence, StopReason

__all__ = ["MAX_ALL_ROWS", "MAX_ROWS", "Sampler"]

# Prompt tokens computed between two decode steps. While samples are being decoded they wait for it (256 tokens of
# SmolLM2-135M take about five decode steps on two cores); while none is, it bounds the memory of a pass.
CHUNK_BESIDE_ROWS = 256
CHUNK_ALONE = 4096
# Steps of one call on a CPU, and after how long no further one is begun: nobody sees their tokens before the call ends.
STEPS_AT_ONCE, SECONDS_AT_ONCE = 32, 0.05
STOPS_AT_ONCE = 16  # tokens that may end a row in such a call: each is compared, for every row


class Sampler:
    """Continuous batching over one base model. ``submit`` and ``cancel`` from any thread; ``step`` on the device's.

    ``tokens_sampled`` and ``tokens_prefilled`` count since the beginning; the device thread alone changes them.
    ``chunk_beside_rows`` and ``chunk_alone``: tokens of a prompt pass, with samples being decoded and without.
    ``speculation``: tokens a sample may propose per step (`speculation.py`); 0 for none.
    ``interruption``: raised by who wants the device, too. With it ``step`` may compute several tokens of every sample,
    where nobody is to see each; without it one.
    ``max_ranks``: of the adapters that are computed for at a time; by default what makes borders of at most an eighth
    of the memory, and at least 256.
    """

    def __init__(
        self, decoder: Decoder, max_cache_bytes: int, wake: Callable[[], None], *,
        chunk_beside_rows: int = CHUNK_BESIDE_ROWS, chunk_alone: int = CHUNK_ALONE,
        speculation: int = 0, interruption: Interruption | None = None, max_ranks: int | None = None,
    ) -> None:  # fmt: skip
        self._decoder = decoder
        self._cache = KVCache(decoder.config, decoder.dtype, max_cache_bytes, decoder.device)
        max_ranks = max_ranks or decoder.borders.ranks_within(memory_bytes(decoder.device) // 8)
        self._schedule = Schedule(self._cache, max_ranks)
        self._wake = wake
        self._chunk_beside_rows, self._chunk_alone = chunk_beside_rows, chunk_alone
        self._speculation, self._interruption = speculation, interruption
        self._open: dict[Future, Request] = {}  # accepted and not answered yet
        self._accepting = threading.Lock()  # a request that fails is open and queued, or neither
        self.tokens_sampled = self.tokens_prefilled = 0
        self._closed: BaseException | None = None

    def submit(self, request: Request) -> Future:
        """Queue a request; its future gets a SampleResponse.

        Raises:
            UserError: it could never end, as one of its samples needs more KV cache than the whole pool; or its answer
                would be too large.
        """
        limit = self._decoder.config.max_context_length
        if request.num_samples and len(request.prompt) >= limit:
            raise UserError(f"prompt: {len(request.prompt)} tokens leave no room to sample in a context of {limit}")
        most = self._max_tokens(request)
        total = len(request.prompt) + max(1, most)
        if request.num_samples and (most < 1 or blocks_for(total) > self._cache.num_blocks):
            raise UserError(
                f"sample: {request.num_samples} samples of up to {total} tokens do not fit the KV cache of "
                f"{self._cache.capacity} tokens; ask for fewer, or give the engine more (MINT_KV_CACHE_BYTES)"
            )
        topk = min(request.topk, self._decoder.config.vocab_size)
        check_product(MAX_VALUES, "topk_sample_logprobs", samples=request.num_samples, tokens=most, alternatives=topk)
        if self._closed is not None:
            raise self._closed
        job = Job.of_request(request, most)
        job.cached = blocks_for(len(job.tokens)) <= self._cache.num_blocks
        with self._accepting:
            self._open[request.future] = request
            self._schedule.append(job)
        if self._closed is not None:  # meanwhile
            self._drop(request, self._closed)
        request.future.add_done_callback(self._answered)
        self._wake()
        return request.future

    def _answered(self, future: Future) -> None:
        request = self._open.pop(future, None)
        if request is not None and future.cancelled():  # by its owner, while it waited
            self._schedule.withdraw(request)

    def cancel(self, future: Future) -> bool:
        """Give up a request: its future fails with SampleCancelledError now, its memory is free after the next step.

        False if the request is not one of this sampler's, or has been answered already.
        """
        request = self._open.get(future)
        if request is None:
            return False
        self._schedule.withdraw(request)
        error = SampleCancelledError("sample: cancelled")
        settle(future, error=error)
        self._wake()
        return not future.cancelled() and future.exception() is error

    def load(self, owner: str | None = None) -> tuple[int, int]:
        """(requests that wait to be admitted, their prompt tokens), all or an owner's."""
        waiting = [len(r.prompt) for r in self._schedule.waiting() if owner in (None, r.owner)]
        return len(waiting), sum(waiting)

    @property
    def running(self) -> int:
        """Requests admitted and not answered yet."""
        return max(0, len(self._open) - len(self._schedule.waiting()))

    @property
    def busy(self) -> bool:
        """Whether a request has not been answered."""
        return bool(self._open)

    @property
    def cache(self) -> KVCache:
        return self._cache

    @property
    def preemptions(self) -> int:
        """How often a sequence has given its blocks back, to be computed again."""
        return self._schedule.preemptions

    @property
    def _rows(self) -> list[Row]:
        return self._schedule.rows

    def fail(self, error: BaseException) -> None:
        """Every running and waiting request gets ``error``."""
        with self._accepting:
            requests = list(self._open.values())
        for request in requests:
            self._drop(request, error)

    def close(self, error: BaseException) -> None:
        """The same, and every later request is refused with ``error``."""
        self._closed = error
        self.fail(error)

    def step(self) -> bool:
        """Compute a chunk of waiting prompts, then the next token, or several, of every running sample.

        False if there was nothing.
        """
        freed = self._schedule.leave(_answered)
        prefilled = self._prefill()
        # Again: one that was cancelled while its prompt was computed has no token to go on from.
        freed = self._schedule.leave(_answered) or freed
        rows = self._schedule.make_room()
        if rows:
            self._guarded([row.request for row in rows], lambda: self._decode(rows, alone=not prefilled))
        return bool(freed or prefilled or rows)

    def _guarded(self, requests: list[Request], work: Callable[[], None]) -> None:
        """An error in a batch reaches the requests of that batch; their memory is given back, the others go on."""
        try:
            work()
        except BaseException as error:
            for request in requests:
                self._drop(request, error)

    def _drop(self, request: Request, error: BaseException) -> None:
        self._schedule.withdraw(request)
        self._schedule.leave(lambda other: other is request)
        if not request.future.done():
            settle(request.future, error=error)

    def _max_tokens(self, request: Request) -> int:
        """Tokens a sample may have: what was asked for, else its share of the cache, cut at the context's end."""
        if request.num_samples == 0:
            return 0
        n, asked = len(request.prompt), request.params.max_tokens
        if asked is None:
            asked = self._cache.longest(n, request.num_samples) - n
        return min(asked, self._decoder.config.max_context_length - n)

    def _prefill(self) -> bool:
        """Run the next chunk of the prompts, score it where asked, draw the first tokens of those that are complete."""
        budget = self._chunk_beside_rows if self._rows else self._chunk_alone
        chunks: list[tuple[Job, int, int]] = []
        uncached: list[Job] = []
        published: list[int] = []
        for job in self._schedule.next_jobs():
            if not job.cached:
                uncached.append(job)
                budget -= len(job.tokens)
                if budget <= 0:
                    break
                continue
            start = job.cache.length
            stop = min(len(job.tokens), start + budget)
            budget -= stop - start
            # What comes in later in this pass may already build on these blocks: a layer stores before it attends.
            published += self._cache.publish(job.cache, job.keys, start, stop)
            job.cache.length = stop
            chunks.append((job, start, stop))
            if budget <= 0:
                break
        if not chunks and not uncached:
            return False
        chunks.sort(key=lambda chunk: adapter_order(chunk[0].request.adapter))
        with plan.own_products():  # a row, in the layers and the head, has the same bits in any company
            if chunks:
                requests = [job.request for job, _, _ in chunks]
                self._guarded(requests, lambda: self._compute_chunks(chunks, published))
            for job in uncached:
                self._guarded([job.request], lambda job=job: self._score_whole(job))  # type: ignore[misc]
        return True

    def _compute_chunks(self, chunks: list[tuple[Job, int, int]], published: list[int]) -> None:
        prompts: list[tuple[Job, Piece]] = []
        sampled: list[tuple[Job, Piece]] = []
        for job, start, stop in chunks:
            end = min(stop, len(job.request.prompt))
            for pieces, a, b in ((prompts, start, end), (sampled, max(start, end), stop)):
                if a < b:
                    pieces.append((job, Piece(job.request.adapter, job.cache, job.tokens[a:b], a)))
        ends: dict[Job, Tensor] = {}
        try:
            for _, group in groupby(prompts, key=lambda item: adapter_order(item[1].adapter)):
                ends |= self._compute_prompts(list(group))
            if sampled:
                last = [n - 1 for n in accumulate(len(piece.tokens) for _, piece in sampled)]
                self.tokens_prefilled += last[-1] + 1
                logits = decode(self._decoder, self._cache, [piece for _, piece in sampled], last)
                ends |= {job: row for (job, _), row in zip(sampled, logits, strict=True)}
        except BaseException:
            self._cache.retract(published)
            raise
        self._finish_jobs([job for job, _, _ in chunks if not job.remaining], ends)

    def _compute_prompts(self, pieces: list[tuple[Job, Piece]]) -> dict[Job, Tensor]:
        """Compute and score prompts of one adapter; the logits that the first tokens are drawn from."""
        row, last = 0, {}
        scored: list[tuple[Job, range, int]] = []  # rows of a prompt that are read, and where they are in the pass
        wanted: set[int] = set()
        for job, piece in pieces:
            if job.scorer is not None and (read := job.scorer.rows(piece.start, piece.stop)):
                scored.append((job, read, row + read.start - piece.start))
                wanted.update(range(scored[-1][2], scored[-1][2] + len(read)))
            row += len(piece.tokens)
            if job.rows and not job.remaining:
                last[job] = row - 1
        wanted.update(last.values())
        chosen = torch.tensor(sorted(wanted or {row - 1}))
        h, seating = prefill(self._decoder, self._cache, [piece for _, piece in pieces], chosen)
        self.tokens_prefilled += row
        for job, read, first in scored:
            at = int(torch.searchsorted(chosen, first))
            self._score(job, read, h, seating, at)
        places = torch.searchsorted(chosen, torch.tensor(list(last.values()), dtype=torch.int64)).tolist()
        return self._logits(dict(zip(last, places, strict=True)), h, seating)

    def _logits(self, rows: dict[Job, int], h: Tensor, seating: Seating) -> dict[Job, Tensor]:
        """The logits [V] of these rows, on the device, where tokens are drawn."""
        if not rows:
            return {}
        at = torch.tensor(list(rows.values()))
        own = seating.select(at)
        x = self._decoder.head_input(h[at], own)
        return dict(zip(rows, self._decoder.logits(x, own), strict=True))

    def _score(self, job: Job, read: range, h: Tensor, seating: Seating, at: int) -> None:
        """Score the rows of a prompt that are ``read``; they lie in ``h`` from row ``at`` on."""
        assert job.scorer is not None
        own = seating.select(torch.arange(at, at + len(read)))
        x = self._decoder.head_input(h[at : at + len(read)], own)
        job.scorer.add(self._decoder, x, own, read.start)

    def _finish_jobs(self, jobs: list[Job], ends: dict[Job, Tensor]) -> None:
        """Answer what was only to be scored; draw the next token of every other job's rows from its last logits."""
        for job in jobs:
            if job.scorer is not None:
                job.request.scores = job.scorer.result()
            self._schedule.finish_job(job)
            if not job.rows:
                settle(job.request.future, job.request.response)
        rows = [(row, ends[job]) for job in jobs for row in job.rows]
        if rows:
            self._extend([row for row, _ in rows], torch.stack([logits for _, logits in rows]))

    def _score_whole(self, job: Job) -> None:
        """Score a prompt that is longer than the whole cache: in one pass that keeps nothing."""
        batch = pack([job.tokens])
        seating = self._decoder.borders.seat([(job.request.adapter, 0, len(job.tokens))])
        attend = self._decoder.packed_attend(batch)
        h, _ = self._decoder.hidden(batch.tokens, batch.positions, seating, attend)
        self.tokens_prefilled += len(h)
        if job.scorer is not None and (read := job.scorer.rows(0, len(h))):
            self._score(job, read, h, seating, read.start)
        job.cache.length = len(job.tokens)
        self._finish_jobs([job], self._logits({job: len(h) - 1}, h, seating) if job.rows else {})

    def _decode(self, rows: list[Row], *, alone: bool) -> None:
        """The next token of every running row, whatever its adapter, and more where a proposal was right.

        ``alone``: no prompts are being computed beside them.
        """
        pieces, proposed = [], drafts(rows, self._speculation)
        topk = any(row.request.topk for row in rows)
        if not (topk or any(proposed)) and steps_in_a_call(self._decoder, self._cache):
            self._decode_at_once(rows, self._steps_at_once(rows) if alone else 1)
            return
        for row, draft in zip(rows, proposed, strict=True):
            tokens = np.array([row.tokens[-1], *draft], dtype=np.int64)
            pieces.append(Piece(row.request.adapter, row.cache, tokens, row.cache.length))
            row.cache.length += 1  # the proposed ones count when they have been drawn
        self._extend(rows, pieces, proposed)

    def _steps_at_once(self, rows: list[Row]) -> int:
        """How many tokens every row may get, and has room for, before anybody looks at them."""
        if self._interruption is None or self._interruption.wanted or self._speculation:
            return 1
        if any(row.request.on_token is not None or row.request.stop.strings for row in rows):
            return 1
        if any(len(row.request.stop.token_ids) > STOPS_AT_ONCE for row in rows):
            return 1
        left = min(row.max_tokens - len(row.tokens) for row in rows)
        return self._schedule.make_more_room(min(left, STEPS_AT_ONCE))

    def _decode_at_once(self, rows: list[Row], steps: int) -> None:
        """Up to so many tokens of every row, drawn where they are computed. It ends with the first row that does."""
        pieces = [
            Piece(row.request.adapter, row.cache, np.array(row.tokens[-1:], dtype=np.int64), row.cache.length)
            for row in rows
        ]
        draws = [row.request.draw for row in rows]
        stops = [row.request.stop.token_ids if steps > 1 else frozenset[int]() for row in rows]
        uniforms = np.array([row.stream.peek(steps) for row in rows]).T
        interrupted = None if self._interruption is None else self._interruption.flag
        found = decode_steps(
            self._decoder, self._cache, pieces, draws, stops, uniforms, interrupted, SECONDS_AT_ONCE
        )  # fmt: skip
        for row, tokens, logprobs in zip(rows, *(t.T.tolist() for t in found), strict=True):
            row.cache.length += len(tokens)
            self._give(row, tokens, logprobs)

    def _extend(
        self, rows: list[Row], source: Tensor | list[Piece], proposed: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Draw each row's next token from logits fp32 [R, V], or those of the pieces; finished rows leave.

        Behind a row's own logits are those of the tokens it ``proposed``, one after the other.
        """
        proposed = [()] * len(rows) if proposed is None else proposed
        draws, uniforms = [], []
        for row, draft in zip(rows, proposed, strict=True):
            draws += [row.request.draw] * (1 + len(draft))
            uniforms += row.stream.peek(1 + len(draft))
        found, each = None, None  # tokens with log-probabilities; logits
        if isinstance(source, list) and not any(row.request.topk for row in rows):
            found = draw_at_once(self._decoder, self._cache, source, draws, uniforms)
        if found is None:
            each = source if isinstance(source, Tensor) else decode(self._decoder, self._cache, source)
            found = sample(each, draws, uniforms)
        tokens, logprobs = (t.tolist() for t in found)
        looked_at = each if any(row.request.topk for row in rows) else None
        drawn = zip(tokens, logprobs, [None] * len(draws) if looked_at is None else looked_at, strict=True)
        for row, draft in zip(rows, proposed, strict=True):
            self._take(row, draft, list(islice(drawn, 1 + len(draft))))

    def _take(self, row: Row, draft: Sequence[int], drawn: Sequence[tuple[int, float, Tensor | None]]) -> None:
        """Give a row its next token, and the one after that while what it proposed is what was drawn."""
        accepted = 0
        for i, (token, logprob, logits) in enumerate(drawn):
            if not self._give(row, [token], [logprob], logits):
                return
            if i == len(draft) or token != draft[i]:
                break
            row.cache.length += 1
            accepted += 1
        if row.lookup is not None:
            row.lookup.learn(len(draft), accepted)

    def _give(self, row: Row, tokens: list[int], logprobs: list[float], logits: Tensor | None = None) -> bool:
        """A row's next tokens, of which only the last may end it. False if it goes on no further.

        ``logits`` [V]: of the one token, where alternatives to it were asked for.
        """
        broken = not math.isfinite(logprobs[-1])
        if broken:
            self._cache.retract(row.cache.blocks)  # whoever asks again shall not find these numbers
        if row.request.future.done():
            return False  # another sample of the same call has just failed, or the call was cancelled
        try:
            if broken:
                raise NonFiniteError("logits: not finite; the adapter or the base model is broken")
            row.stream.take(len(tokens))
            if row.request.topk and logits is not None:
                row.topk += alternatives(logits[None], [row.request.draw], row.request.topk)
            self._append(row, tokens, logprobs)
        except BaseException as error:  # the caller's own code runs here: SystemExit, asyncio's CancelledError
            self._drop(row.request, error)
            return False
        return row.index not in row.request.finished

    def _append(self, row: Row, tokens: list[int], logprobs: list[float]) -> None:
        """Give a row its next tokens, and end it if the last of them was its last."""
        row.tokens += tokens
        row.logprobs += logprobs
        self.tokens_sampled += len(tokens)
        if row.request.on_token is not None:
            for token, logprob in zip(tokens, logprobs, strict=True):
                row.request.on_token(row.index, token, logprob)
        if row.request.stop.reached(row.tokens):
            self._finish(row, "stop")
        elif len(row.tokens) >= row.max_tokens:
            self._finish(row, "length")

    def _finish(self, row: Row, reason: StopReason) -> None:
        request = row.request
        self._schedule.remove(row)
        request.finished[row.index] = SampledSequence(
            stop_reason=reason, tokens=row.tokens, logprobs=row.logprobs,
            topk_logprobs=row.topk if request.topk else None, sequence_id=request.sequence_ids[row.index],
        )  # fmt: skip
        if len(request.finished) == request.num_samples:
            settle(request.future, request.response)


def _answered(request: Request) -> bool:
    return request.future.done()
