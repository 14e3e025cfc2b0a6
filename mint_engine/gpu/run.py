"""Calls in passes over programs: pack, queue, go on packing; what comes back is read when it is there.

The host is ahead of the device by whole calls: it decides nothing that the device has not computed yet. Whether a
call's gradients are finite and so count is found on the device; the host is told, for its answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from mint_engine.batch import micro_batches
from mint_engine.calls import Call, Work, refused_gradients
from mint_engine.device import computing_on
from mint_engine.gpu.buckets import power_of_2
from mint_engine.gpu.capture import Capture, CudaGraphs, NoGraph
from mint_engine.gpu.layout import Part, Shape, seat_shape
from mint_engine.gpu.memory import Plan, plan
from mint_engine.gpu.program import Program, Results
from mint_engine.gpu.staging import download, mark
from mint_engine.gpu.stepper import Steppers
from mint_engine.models.decoder import Decoder
from mint_engine.pending import Pending
from mint_engine.types import ForwardBackwardOutput

PROGRAMS = 64  # kept, least recently used first out; what they do not share is small
# Targets of a pass, padded to those of the widest datum: one wide datum must not multiply all the others.
TARGET_CELLS = 1 << 25

Outcome = ForwardBackwardOutput | Exception


@dataclass(frozen=True)
class _Passes:
    """The datums of calls, (call, index) each, cut at their boundaries into passes that fit."""

    datums: list[tuple[Work, int]]
    ranges: list[range]
    checkpoint: bool

    def parts(self, chosen: range) -> list[Part]:
        parts = []
        for work, group in groupby(self.datums[chosen.start : chosen.stop], key=lambda datum: datum[0]):
            first, *_ = indices = [i for _, i in group]
            data = work.call.data[first : indices[-1] + 1]
            parts.append(Part(work, data, first, work.wanted(data).nonzero().squeeze(1).numpy()))
        return parts


class Programs:
    """The programs of one base model.

    ``record``: how launches become repeatable; by default a CUDA graph on a GPU and the plain launches elsewhere.
    ``mark``: how one waits for what has been queued (`staging.mark`).
    """

    def __init__(
        self, decoder: Decoder, record: Callable[[Callable[[], None]], Capture] | None = None,
        mark: Callable[[torch.device], Callable[[], None]] = mark,
    ) -> None:  # fmt: skip
        self._decoder, self._programs = decoder, OrderedDict[Shape, Program]()
        self._record = record or (CudaGraphs(decoder.device).record if decoder.device.type == "cuda" else NoGraph)
        self._mark = mark
        self.borders = decoder.borders
        self.steppers = Steppers(decoder.borders, self._record)

    def __len__(self) -> int:
        return len(self._programs)

    def on_device(self) -> AbstractContextManager[None]:
        return computing_on(self._decoder.device)

    def mark(self) -> Callable[[], None]:
        """A function that waits, on any thread, for what has been queued on this base model's device so far."""
        return self._mark(self._decoder.device)

    def run_together(
        self, calls: Sequence[Call], *, masked_logprobs: bool = True, memory: Plan | None = None
    ) -> list[Outcome]:
        """What `trainer.run_together` does, for this base model. ``memory``: how calls are cut, by default planned."""
        return self.queue(calls, masked_logprobs=masked_logprobs, memory=memory).result()

    def queue(
        self, calls: Sequence[Call], *, masked_logprobs: bool = True, memory: Plan | None = None
    ) -> Pending[list[Outcome]]:
        """The same without waiting: the device has it all to do, down to adding the gradients to the calls' states.

        If it raises, nothing of the calls has been added, nor will be.
        """
        works = [Work(call) for call in calls]
        training = [work for work in works if work.call.state is not None]
        with self.on_device():
            # Those without a backward first: what may still fail for lack of memory comes before anything is added.
            passes = self._cut([work for work in works if work.call.state is None], memory)
            results = [self._run(passes.parts(chosen), False, True, passes.checkpoint)[0] for chosen in passes.ranges]
            passes = self._cut(training, memory)
            sums = self._sums(training) if len(passes.ranges) > 1 else []
            for chosen in passes.ranges:
                parts = passes.parts(chosen)
                result, found = self._run(parts, True, masked_logprobs, passes.checkpoint)
                results.append(result)
                for part, gradients in zip(parts, found, strict=True):
                    if len(passes.ranges) > 1:
                        sums[training.index(part.work)].add_(gradients)
                    else:
                        sums.append(gradients)  # every call's whole gradients, in the order of the calls
            refused = _add(training, sums)
            wait = self.mark()

        def finish() -> list[Outcome]:
            for done in results:
                _collect(done)
            for work, bad in zip(training, refused.tolist(), strict=True):
                if bad and work.error is None:
                    work.error = refused_gradients()
                if work.error is None and work.call.state is not None:
                    work.call.state.has_grads = True
            return [work.output() if work.error is None else work.error for work in works]

        return Pending(wait, finish)

    def _cut(self, works: Sequence[Work], memory: Plan | None) -> _Passes:
        datums = [(work, i) for work in works for i in range(len(work.call.data))]
        if not datums:
            return _Passes([], [], False)
        lengths = [work.call.data[i].tokens.size for work, i in datums]
        widths = [work.call.data[i].targets.shape[1] for work, i in datums]
        rank = max(work.call.adapter.rank for work in works)
        memory = memory or plan(self._decoder, sum(lengths), max(lengths), rank, company=len(works) > 1)
        ranges = list(micro_batches(lengths, memory.max_tokens, widths, TARGET_CELLS))
        return _Passes(datums, ranges, memory.checkpoint)

    def _sums(self, works: Sequence[Work]) -> list[Tensor]:
        """Zeros, for the gradients of several passes of each call."""
        take, params = self._decoder.space.take, [work.call.adapter.params for work in works]
        return [take(("gradients", i), tuple(p.shape), torch.float32).zero_() for i, p in enumerate(params)]

    def _run(
        self, parts: Sequence[Part], backward: bool, masked: bool, checkpoint: bool
    ) -> tuple[Results, list[Tensor]]:
        """Queue a pass: its results on their way to the host, and where its gradients are until the next pass."""
        borders, adapters = self._decoder.borders, [part.work.call.adapter for part in parts]
        borders.seat([(adapter, i, i + 1) for i, adapter in enumerate(adapters)])  # their weights into the border
        shape = Shape(
            seats=tuple(seat_shape(part, alone=len(parts) == 1) for part in parts),
            sequences=power_of_2(sum(len(part.data) + 1 for part in parts)),
            width=power_of_2(max(d.targets.shape[1] for part in parts for d in part.data)),
            backward=backward, masked=masked, checkpoint=checkpoint, capacity=borders.capacity,
        )  # fmt: skip
        program = self._program(shape, parts)
        return program.run(parts), program.gradients if backward else []

    def _program(self, shape: Shape, parts: Sequence[Part]) -> Program:
        if shape not in self._programs:
            for stale in [old for old in self._programs if old.capacity != shape.capacity]:
                del self._programs[stale]
            while len(self._programs) >= PROGRAMS:
                self._programs.popitem(last=False)
            calls = [part.work.call for part in parts]
            self._programs[shape] = Program(
                self._decoder, shape, [c.adapter for c in calls], [c.loss for c in calls], self._record
            )
        self._programs.move_to_end(shape)
        return self._programs[shape]


def programs(decoder: Decoder) -> Programs | None:
    """The programs of a base model on a GPU, none at first; None on a CPU, unless somebody has put some there."""
    if decoder.programs is None and decoder.device.type == "cuda":
        decoder.programs = Programs(decoder)
    found: Programs | None = decoder.programs
    return found


def _add(works: Sequence[Work], sums: Sequence[Tensor]) -> Tensor:
    """Add whole calls' gradients to those since the last step, but for those that are not finite: which, bool [calls],
    is decided on the device and on its way to the host. ``sums`` are spoilt."""
    if not works:
        return torch.zeros(0, dtype=torch.bool)
    largest = torch.stack([torch.linalg.vector_norm(total, ord=torch.inf) for total in sums])
    refused = ~(largest < torch.inf)  # or NaN
    found = download(refused)
    for work, total, bad in zip(works, sums, refused.unbind(), strict=True):  # from here on nothing needs memory
        assert work.call.state is not None
        work.call.state.grads.add_(total.masked_fill_(bad, 0.0))
    return found


def _collect(done: Results) -> None:
    """Give every call its rows of a pass that is over."""
    start = 0
    for part, seat in zip(done.parts, done.shape.seats, strict=True):
        at = None if done.shape.masked else part.scored
        size, count = (seat.rows, part.tokens) if at is None else (seat.scored, len(part.scored))
        found, losses = done.logprobs[start : start + size], done.values[start : start + size]
        start += size
        if at is not None and seat.scored == seat.rows:  # they are among the others
            rows = torch.from_numpy(at)
            found, losses = found[rows], losses[rows]
        if part.work.error is None:
            part.work.record(found[:count], losses[:count], part.data, part.first, at)
