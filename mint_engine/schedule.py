"""Who is computed next: waiting requests, prompts in work, samples being decoded, and the blocks they all hold.

Blocks are taken as sequences grow. When there are none, the youngest sequence gives its own back and is computed again
later; the oldest always goes on, so everything that was accepted ends. Owners take turns, and where there are several
none keeps more than three quarters of the cache.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator

from mint_engine.kv_cache import BLOCK_TOKENS, CachedSequence, KVCache, blocks_for
from mint_engine.requests import MAX_SAMPLES, Request
from mint_engine.sampling_rows import Job, Row, adapter_order
from mint_engine.turns import Turns

MAX_ROWS = MAX_SAMPLES  # sequences of one owner that are decoded together; more wait
MAX_ALL_ROWS = 4 * MAX_ROWS


class Schedule:
    """The queue may be used from any thread; everything else belongs to the device's.

    ``rows``: samples being decoded, those of an adapter together. ``jobs``: begun and not fully computed, oldest first.
    """

    def __init__(self, cache: KVCache, max_ranks: int) -> None:
        """``max_ranks``: of all adapters that are computed for at a time; others wait."""
        self._cache, self._max_ranks = cache, max_ranks
        self._lock = threading.Lock()
        self._queue: Turns[Job] = Turns()  # not begun, or preempted
        self._owners: set[str] = set()  # seen so far
        self._orders = itertools.count()
        self.rows: list[Row] = []
        self.jobs: list[Job] = []
        self.preemptions = 0

    @property
    def running(self) -> list[Row | Job]:
        """Everything that holds blocks."""
        return [*self.rows, *self.jobs]

    # ---- the queue -------------------------------------------------------------------------------------------------

    def append(self, job: Job) -> None:
        with self._lock:
            self._owners.add(job.request.owner)
            self._queue.append(job.request.owner, job)

    def waiting(self) -> list[Request]:
        """Requests that have not begun."""
        with self._lock:
            return [job.request for job in self._queue if job.request.begun is None]

    def queued(self) -> list[Request]:
        """Requests that have not begun, or of which something was preempted."""
        with self._lock:
            return [job.request for job in self._queue]

    def withdraw(self, request: Request) -> None:
        """Take a request's jobs out of the queue."""
        with self._lock:
            for job in [job for job in self._queue if job.request is request]:
                self._queue.discard(request.owner, job)

    def next_jobs(self) -> Iterator[Job]:
        """What is to be computed, oldest first; a job is begun when its turn comes."""
        yield from list(self.jobs)
        while (job := self._start_next()) is not None:
            yield job

    def _start_next(self) -> Job | None:
        """The next job whose owner's turn it is and that fits, with its blocks taken; what is cached is reused."""
        with self._lock:
            if not self._queue:
                return None
            held = self._held()
            passed: set[str] = set()
            while len(passed) < self._queue.owners:
                job = self._queue.first()
                owner = job.request.owner
                if owner in passed or not self._within_share(job, *held.get(owner, (0, 0))):
                    passed.add(owner)
                    self._queue.skip()
                    continue
                if not self._fits(job, held):
                    return None
                self._queue.pop()
                if job.request.begun is not None:  # preempted before
                    self._open(job)
                    return job
                if job.request.future.set_running_or_notify_cancel():
                    job.request.begun, job.request.order = time.perf_counter(), next(self._orders)
                    self._open(job)
                    job.request.cache_hits = job.cache.length
                    return job
        return None

    def _open(self, job: Job) -> None:
        job.begin()
        if job.cached:
            job.cache = self._cache.open(self._found(job))
            self._cache.reserve(job.cache, job.remaining)
        self.jobs.append(job)
        self.jobs.sort(key=lambda j: j.age)

    def _found(self, job: Job) -> list[int]:
        return self._cache.find(job.keys[: job.reusable // BLOCK_TOKENS])

    # ---- what fits -------------------------------------------------------------------------------------------------

    def _fits(self, job: Job, held: dict[str, tuple[int, int]]) -> bool:
        """Whether its blocks are there, with one to spare for every sample that will want, and may have, another."""
        if len(self.rows) + sum(len(j.rows) for j in self.jobs) + len(job.rows) > MAX_ALL_ROWS:
            return False
        if job.request.adapter is not None and self.running and self._ranks_with(job) > self._max_ranks:
            return False
        if not job.cached:
            return True
        price = self._cache.price(self._found(job), len(job.tokens))
        if not self.rows and not self.jobs:
            return price <= self._cache.blocks_available  # always: submit saw to it
        wanted: dict[str, int] = {}
        for sequence in [*self.running, job]:
            more = _copies(sequence) if isinstance(sequence, Job) else _grows(sequence)
            wanted[sequence.request.owner] = wanted.get(sequence.request.owner, 0) + more
        spare = sum(min(n, max(0, self._share - held.get(owner, (0, 0))[1])) for owner, n in wanted.items())
        return price + spare <= self._cache.blocks_available

    def _ranks_with(self, job: Job) -> int:
        """Of the adapters of what is running and of the job, which will sit in the borders together."""
        together = (s.request.adapter for s in [*self.running, job])
        return sum(adapter.rank for adapter in {a for a in together if a is not None})

    def _within_share(self, job: Job, rows: int, blocks: int) -> bool:
        if rows + len(job.rows) > MAX_ROWS:
            return False
        if blocks == 0 or not job.cached:
            return True
        return blocks + self._cache.price(self._found(job), len(job.tokens)) + _copies(job) <= self._share

    @property
    def _share(self) -> int:
        """Blocks an owner may hold beside others."""
        return self._cache.num_blocks * (4 if len(self._owners) == 1 else 3) // 4

    def _held(self) -> dict[str, tuple[int, int]]:
        """Owner -> (rows, blocks) of what is running. One owner alone is not counted in blocks: all are his."""
        rows: dict[str, int] = {}
        blocks: dict[str, set[int]] = {}
        for sequence in self.running:
            owner = sequence.request.owner
            rows[owner] = rows.get(owner, 0) + (len(sequence.rows) if isinstance(sequence, Job) else 1)
            if len(self._owners) > 1:
                blocks.setdefault(owner, set()).update(sequence.cache.blocks)
        return {owner: (n, len(blocks.get(owner, ()))) for owner, n in rows.items()}

    # ---- growing, and giving way -----------------------------------------------------------------------------------

    def make_room(self) -> list[Row]:
        """One more token's room for every running sample, oldest first; returns those that go on."""
        several = len(self._owners) > 1
        tight = several and self._cache.blocks_available - len(self.rows) < self._cache.num_blocks - self._share
        for row in sorted(self.rows, key=lambda r: r.age):
            while row.cache.blocks and (growth := self._cache.growth(row.cache, 1)):
                others: list[Row | Job] = []
                if growth > self._cache.blocks_available:
                    others = self.running
                elif tight and self._held()[row.request.owner][1] + growth > self._share:
                    others = [s for s in self.running if s.request.owner == row.request.owner]
                if len(others) < 2:  # there is room, or nobody else of whom to take it
                    break
                self.preempt(max(others, key=lambda s: s.age))
            if row.cache.blocks:
                self._cache.reserve(row.cache, 1)
        return self.rows

    def make_more_room(self, tokens: int) -> int:
        """Room for so many tokens of every row, at least one, but none that anybody else may want; how many it became.

        One token's is there (:meth:`make_room`).
        """
        growth = sum(self._cache.growth(row.cache, tokens) for row in self.rows)
        if growth > 0 and (len(self._owners) > 1 or growth > self._cache.blocks_available or self.queued()):
            tokens = min(tokens, *(len(row.cache.blocks) * BLOCK_TOKENS - row.cache.length for row in self.rows))
        for row in self.rows:
            self._cache.reserve(row.cache, tokens)
        return tokens

    def preempt(self, victim: Row | Job) -> None:
        """Take its blocks away and queue it, before whatever of its owner's is younger or has not begun."""
        self.preemptions += 1
        if isinstance(victim, Row):
            self.rows.remove(victim)
            job = Job.of_row(victim)
            self._cache.publish(victim.cache, job.keys, 0, victim.cache.length)
        else:
            self.jobs.remove(victim)
            job = victim
        self._cache.close(victim.cache)

        def before(other: Job) -> bool:
            return other.request.begun is None or other.age > job.age

        with self._lock:
            self._queue.put_back(job.request.owner, job, before)

    # ---- joining and leaving ---------------------------------------------------------------------------------------

    def finish_job(self, job: Job) -> list[Row]:
        """Its tokens are computed: its rows, forks of its sequence, are decoded from now on."""
        self.jobs.remove(job)
        for row in job.rows[:-1]:
            row.cache = self._cache.fork(job.cache)
        if job.rows:
            job.rows[-1].cache = job.cache
        else:
            self._cache.close(job.cache)
        self.rows = sorted([*self.rows, *job.rows], key=lambda r: adapter_order(r.request.adapter))
        return job.rows

    def remove(self, row: Row) -> None:
        self._cache.close(row.cache)
        self.rows = [r for r in self.rows if r is not row]

    def leave(self, gone: Callable[[Request], bool]) -> bool:
        """Free what belongs to requests that are ``gone``. False if there was nothing."""
        leaving: list[CachedSequence] = [s.cache for s in self.running if gone(s.request)]
        if leaving:
            self.rows = [row for row in self.rows if not gone(row.request)]
            self.jobs = [job for job in self.jobs if not gone(job.request)]
        for cache in leaving:
            self._cache.close(cache)
        return bool(leaving)


def _grows(row: Row) -> bool:
    """Whether a row may come to need another block."""
    return blocks_for(row.longest) > len(row.cache.blocks)


def _copies(job: Job) -> int:
    """Blocks a job's rows take when they go on: all but one write to a copy of their last block, or to a new one."""
    if not job.rows or job.rows[0].longest <= len(job.tokens):
        return 0
    return len(job.rows) - 1 + (blocks_for(job.rows[0].longest) > blocks_for(len(job.tokens)))
