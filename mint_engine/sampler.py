"""Decoding: all samples of all calls, of all adapters, advance together, one token a step (DESIGN.md 2.7).

The decoder's own layers run here with the adapters in the border, as in training, so a log-probability reported while
sampling is the one the trainer computes. Requests join and leave at any step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mint_engine import kernels
from mint_engine.adapters import Adapter
from mint_engine.batch import pack
from mint_engine.borders import Seating
from mint_engine.errors import NonFiniteError, SampleCancelledError, UserError
from mint_engine.executor import settle
from mint_engine.kv_cache import CachedSequence, KVCache
from mint_engine.models.decoder import Decoder
from mint_engine.models.layer import Attend
from mint_engine.prompt_scores import score_prompt
from mint_engine.requests import MAX_SAMPLES, MAX_VALUES, Request, check_product
from mint_engine.sampling import UniformStream, choose, tempered_logprobs
from mint_engine.turns import Turns
from mint_engine.types import SampledSequence, StopReason

MAX_PREFILL_TOKENS = 4096  # bounds how long running samples wait for new prompts
MAX_ROWS = MAX_SAMPLES  # sequences of one owner that are decoded together; more wait
MAX_ALL_ROWS = 4 * MAX_ROWS


@dataclass(eq=False)
class _Row:
    """One sample being decoded."""

    request: Request
    index: int
    cache: CachedSequence
    stream: UniformStream
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[list[tuple[int, float]] | None] = field(default_factory=list)


class Sampler:
    """Continuous batching over one base model. ``submit`` and ``cancel`` from any thread; ``step`` on the device's.

    ``tokens_sampled`` and ``tokens_prefilled`` count since the beginning; the device thread alone changes them.
    """

    def __init__(self, decoder: Decoder, max_cache_bytes: int, wake: Callable[[], None]) -> None:
        self._decoder = decoder
        self._cache = KVCache(decoder.config, decoder.dtype, max_cache_bytes)
        self._owners: set[str] = set()  # seen so far
        self._wake = wake
        self._lock = threading.Lock()
        self._waiting: Turns[Request] = Turns()
        self._rows: list[_Row] = []
        self._open: dict[Future, Request] = {}  # accepted and not answered yet
        self.tokens_sampled = self.tokens_prefilled = 0
        self._closed: BaseException | None = None

    def submit(self, request: Request) -> Future:
        """Queue a request; its future gets a SampleResponse.

        Raises:
            UserError: it could never be admitted, as it needs more KV cache than the whole pool; or its answer would
                be too large.
        """
        limit = self._decoder.config.max_context_length
        if request.num_samples and len(request.prompt) >= limit:
            raise UserError(f"prompt: {len(request.prompt)} tokens leave no room to sample in a context of {limit}")
        most = self._max_tokens(request)
        if request.num_samples and (most < 1 or self._blocks(request) > self._cache.num_blocks):
            total = len(request.prompt) + max(1, most)
            raise UserError(
                f"sample: {request.num_samples} samples of up to {total} tokens do not fit the KV cache of "
                f"{self._cache.capacity} tokens; ask for fewer, or give the engine more (MINT_KV_CACHE_BYTES)"
            )
        topk = min(request.topk, self._decoder.config.vocab_size)
        check_product(MAX_VALUES, "topk_sample_logprobs", samples=request.num_samples, tokens=most, alternatives=topk)
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._open[request.future] = request
            self._owners.add(request.owner)
            self._waiting.append(request.owner, request)
        request.future.add_done_callback(self._answered)
        self._wake()
        return request.future

    def _answered(self, future: Future) -> None:
        request = self._open.pop(future, None)
        if request is not None and future.cancelled():  # by its owner, while it waited
            self._withdraw(request)

    def _withdraw(self, request: Request) -> None:
        with self._lock:
            self._waiting.discard(request.owner, request)

    def cancel(self, future: Future) -> bool:
        """Give up a request: its future fails with SampleCancelledError now, its memory is free after the next step.

        False if the request is not one of this sampler's, or has been answered already.
        """
        request = self._open.get(future)
        if request is None:
            return False
        self._withdraw(request)
        error = SampleCancelledError("sample: cancelled")
        settle(future, error=error)
        self._wake()
        return not future.cancelled() and future.exception() is error

    def load(self, owner: str | None = None) -> tuple[int, int]:
        """(requests that wait to be admitted, their prompt tokens), all or an owner's."""
        with self._lock:
            waiting = [len(r.prompt) for r in self._waiting if owner in (None, r.owner)]
        return len(waiting), sum(waiting)

    @property
    def running(self) -> int:
        """Requests admitted and not answered yet."""
        return max(0, len(self._open) - len(self._waiting))

    @property
    def cache(self) -> KVCache:
        return self._cache

    def fail(self, error: BaseException) -> None:
        """Every running and waiting request gets ``error``."""
        with self._lock:
            requests = [*self._waiting, *(row.request for row in self._rows)]
            self._waiting.clear()
        for request in requests:
            self._drop(request, error)

    def close(self, error: BaseException) -> None:
        """The same, and every later request is refused with ``error``."""
        with self._lock:
            self._closed = error
        self.fail(error)

    def step(self) -> bool:
        """Admit and prefill what fits, then decode one token of every running sample. False if there was nothing."""
        freed = self._leave_abandoned()
        admitted = self._admit()
        if admitted:
            self._guarded(admitted, lambda: self._prefill(admitted))
        running = [row.request for row in self._rows]
        if running:
            self._guarded(running, self._decode)
        return bool(freed or admitted or running)

    def _leave_abandoned(self) -> bool:
        """Free the rows of requests whose future somebody else has settled: they were cancelled."""
        kept: list[_Row] = []
        for row in self._rows:
            if row.request.future.done():
                self._cache.close(row.cache)
            else:
                kept.append(row)
        freed = len(kept) < len(self._rows)
        self._rows = kept
        return freed

    def _guarded(self, requests: list[Request], work: Callable[[], None]) -> None:
        """An error in a batch reaches the requests of that batch; their memory is given back, the others go on."""
        try:
            work()
        except Exception as error:
            for request in requests:
                self._drop(request, error)

    def _drop(self, request: Request, error: BaseException) -> None:
        for row in [r for r in self._rows if r.request is request]:
            self._cache.close(row.cache)
            self._rows.remove(row)
        if not request.future.done():
            settle(request.future, error=error)

    def _max_tokens(self, request: Request) -> int:
        """Tokens a sample may have: what was asked for, else what the cache holds, cut at the context's end."""
        if request.num_samples == 0:
            return 0
        n, asked = len(request.prompt), request.params.max_tokens
        if asked is None:
            asked = self._cache.longest(n, request.num_samples) - n
        return min(asked, self._decoder.config.max_context_length - n)

    def _blocks(self, request: Request) -> int:
        """Cache blocks the request needs at worst."""
        if request.num_samples == 0:
            return 0
        n = len(request.prompt)
        return self._cache.blocks_needed(n, n + self._max_tokens(request), request.num_samples)

    def _admit(self) -> list[Request]:
        """Take waiting requests, of every owner in turn, as long as cache, rows and the prefill budget last.

        Who has many rows or much of the cache already waits until some of it is free again, and others come first.
        """
        admitted: list[Request] = []
        tokens, blocks, rows = 0, self._cache.blocks_available, len(self._rows)
        with self._lock:
            held = self._held() if self._waiting else {}
            share = self._cache.num_blocks * (4 if len(self._owners) == 1 else 3) // 4
            passed: set[str] = set()
            while len(passed) < self._waiting.owners:
                request = self._waiting.first()
                owner, n, needed = request.owner, len(request.prompt), self._blocks(request)
                own_rows, own_blocks = held.get(owner, (0, 0))
                if owner in passed or own_rows + request.num_samples > MAX_ROWS or (
                    own_blocks and own_blocks + needed > share
                ):  # fmt: skip
                    passed.add(owner)
                    self._waiting.skip()
                    continue
                full = needed > blocks or rows + request.num_samples > MAX_ALL_ROWS
                if full or (admitted and tokens + n > MAX_PREFILL_TOKENS):
                    break
                self._waiting.pop()
                if request.future.set_running_or_notify_cancel():
                    request.begun = time.perf_counter()
                    admitted.append(request)
                    tokens, blocks, rows = tokens + n, blocks - needed, rows + request.num_samples
                    held[owner] = own_rows + request.num_samples, own_blocks + needed
        return sorted(admitted, key=lambda r: _adapter_key(r.adapter))

    def _held(self) -> dict[str, tuple[int, int]]:
        """Owner -> (rows, cache blocks at worst) of what is running."""
        held: dict[str, tuple[int, int]] = {}
        for request in {id(row.request): row.request for row in self._rows}.values():
            rows, blocks = held.get(request.owner, (0, 0))
            held[request.owner] = rows + request.num_samples, blocks + self._blocks(request)
        return held

    def _prefill(self, requests: list[Request]) -> None:
        """Run the prompts as one packed batch, score them where asked, and draw every sample's first token."""
        batch = pack([r.prompt for r in requests])
        bounds = batch.cu_seqlens.tolist()
        seating = self._decoder.borders.seat([(r.adapter, bounds[i], bounds[i + 1]) for i, r in enumerate(requests)])
        caches = {i: self._cache.open(self._blocks(r)) for i, r in enumerate(requests) if r.num_samples}
        try:
            slots = {i: self._cache.extend(cache, len(requests[i].prompt)) for i, cache in caches.items()}
            rows = [row for i in caches for row in range(bounds[i], bounds[i + 1])]
            attend = self._prefill_attend(
                self._decoder.packed_attend(batch), rows, [s for group in slots.values() for s in group]
            )
            h, _ = self._decoder.hidden(batch.tokens, batch.positions, seating, attend)
            self.tokens_prefilled += batch.num_tokens
            self._score(requests, h, bounds, seating)
            if not caches:
                return
            last = torch.tensor([bounds[i + 1] - 1 for i in caches])
            x = self._decoder.head_input(h[last], seating.select(last))
            logits = self._decoder.logits(x, seating.select(last))
        except BaseException:
            for cache in caches.values():
                self._cache.close(cache)
            raise
        new = [row for i, cache in caches.items() for row in self._open_rows(requests[i], cache)]
        self._rows = sorted([*self._rows, *new], key=lambda row: _adapter_key(row.request.adapter))
        copies = torch.tensor([requests[i].num_samples for i in caches])
        self._extend(new, logits.repeat_interleave(copies, dim=0))

    def _score(self, requests: list[Request], h: Tensor, bounds: list[int], seating: Seating) -> None:
        for i, request in enumerate(requests):
            if request.query:
                rows = torch.arange(bounds[i], bounds[i + 1])
                own = seating.select(rows)
                x = self._decoder.head_input(h[rows], own)
                request.scores = score_prompt(
                    self._decoder, x, own, request.prompt, request.query, request.draw, request.params.seed
                )
            if request.num_samples == 0:
                settle(request.future, request.response)

    def _prefill_attend(self, packed: Attend, rows: list[int], slots: list[int]) -> Attend:
        """Attention within each prompt; K and V of the prompts that will be continued are kept."""
        if not rows:
            return packed
        kept, where = torch.tensor(rows), torch.tensor(slots)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor | None:
            self._cache.write(layer, where, k[kept], v[kept])
            return packed(layer, q, k, v, out)

        return attend

    def _open_rows(self, request: Request, prompt: CachedSequence) -> list[_Row]:
        """One row per sample: forks of the prompt's sequence, and the sequence itself for the last."""
        n, most = len(request.prompt), self._max_tokens(request)
        own_blocks = self._cache.blocks_needed(n, n + most, 2) - self._cache.blocks_needed(n, n + most, 1)
        caches = [self._cache.fork(prompt, own_blocks) for _ in range(request.num_samples - 1)] + [prompt]
        return [_Row(request, i, cache, UniformStream(request.params.seed, i), most) for i, cache in enumerate(caches)]

    def _decode(self) -> None:
        """One token for every running row, whatever its adapter."""
        rows, config = self._rows, self._decoder.config
        positions = torch.tensor([row.cache.length for row in rows])
        slots = torch.tensor([self._cache.extend(row.cache, 1)[0] for row in rows])
        table, lengths = self._cache.table([row.cache for row in rows])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
            self._cache.write(layer, slots, k, v)
            pools = self._cache.k[layer], self._cache.v[layer]
            shape = config.num_heads, config.num_kv_heads, config.head_dim**-0.5
            kernels.paged_attention(q, *pools, table, lengths, *shape, out=out)

        seating = self._decoder.borders.seat([(row.request.adapter, i, i + 1) for i, row in enumerate(rows)])
        tokens = torch.tensor([row.tokens[-1] for row in rows])
        h, _ = self._decoder.hidden(tokens, positions, seating, attend)
        self._extend(rows, self._decoder.logits(self._decoder.head_input(h, seating), seating))

    def _extend(self, rows: list[_Row], logits: Tensor) -> None:
        """Draw each row's next token from ``logits`` fp32 [R, V]; finished rows leave."""
        finite = torch.isfinite(logits.amax(1)).tolist()  # NaN and +inf both show in the maximum
        if not all(finite):
            for row, fine in zip(rows, finite, strict=True):
                if not fine:
                    self._drop(
                        row.request, NonFiniteError("logits: not finite; the adapter or the base model is broken")
                    )
            alive = [i for i, row in enumerate(rows) if not row.request.future.done()]
            rows, logits = [rows[i] for i in alive], logits[alive]
        draws = [row.request.draw for row in rows]
        logprobs = tempered_logprobs(logits, draws)
        tokens = choose(logprobs, draws, [row.stream.next() for row in rows])
        chosen = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
        for i, (row, token, logprob) in enumerate(zip(rows, tokens.tolist(), chosen, strict=True)):
            if row.request.future.done():
                continue  # another sample of the same call has just failed, or the call was cancelled
            try:
                self._append(row, token, logprob, logprobs[i])
            except Exception as error:
                self._drop(row.request, error)

    def _append(self, row: _Row, token: int, logprob: float, distribution: Tensor) -> None:
        """Give a row its next token, and end it if that was the last."""
        row.tokens.append(token)
        row.logprobs.append(logprob)
        self.tokens_sampled += 1
        if row.request.topk:
            values, ids = distribution.topk(min(row.request.topk, distribution.numel()))
            row.topk.append(list(zip(ids.tolist(), values.tolist(), strict=True)))
        if row.request.on_token is not None:
            row.request.on_token(row.index, token, logprob)
        if row.request.stop.reached(row.tokens):
            self._finish(row, "stop")
        elif len(row.tokens) >= row.max_tokens:
            self._finish(row, "length")

    def _finish(self, row: _Row, reason: StopReason) -> None:
        request = row.request
        self._cache.close(row.cache)
        self._rows = [r for r in self._rows if r is not row]
        request.finished[row.index] = SampledSequence(
            stop_reason=reason, tokens=row.tokens, logprobs=row.logprobs,
            topk_logprobs=row.topk if request.topk else None, sequence_id=request.sequence_ids[row.index],
        )  # fmt: skip
        if len(request.finished) == request.num_samples:
            settle(request.future, request.response)


def _adapter_key(adapter: Adapter | None) -> int:
    """Rows of one adapter lie together, those of the base model first."""
    return -1 if adapter is None else adapter.uid
