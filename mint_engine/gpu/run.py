"""Calls in passes over programs: pack, queue, go on packing; read everything back once, at the end."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np
import torch

from mint_engine.batch import micro_batches
from mint_engine.calls import Call, Work
from mint_engine.device import computing_on
from mint_engine.errors import NonFiniteError
from mint_engine.gpu.buckets import power_of_2
from mint_engine.gpu.capture import Capture, CudaGraphs, NoGraph
from mint_engine.gpu.layout import Part, Shape, seat_shape
from mint_engine.gpu.memory import Plan, plan
from mint_engine.gpu.program import Pending, Program
from mint_engine.gpu.stepper import Steppers
from mint_engine.models.decoder import Decoder
from mint_engine.types import ForwardBackwardOutput

PROGRAMS = 64  # kept, least recently used first out; what they do not share is small
# Targets of a pass, padded to those of the widest datum: one wide datum must not multiply all the others.
TARGET_CELLS = 1 << 25


class Programs:
    """The programs of one base model.

    ``record``: how launches become repeatable; by default a CUDA graph on a GPU and the plain launches elsewhere.
    """

    def __init__(self, decoder: Decoder, record: Callable[[Callable[[], None]], Capture] | None = None) -> None:
        self._decoder, self._programs = decoder, OrderedDict[Shape, Program]()
        self._record = record or (CudaGraphs(decoder.device).record if decoder.device.type == "cuda" else NoGraph)
        self.borders = decoder.borders
        self.steppers = Steppers(decoder.borders, self._record)

    def __len__(self) -> int:
        return len(self._programs)

    def run_together(
        self, calls: Sequence[Call], *, masked_logprobs: bool = True, memory: Plan | None = None
    ) -> list[ForwardBackwardOutput | NonFiniteError]:
        """What `trainer.run_together` does, for this base model. ``memory``: how calls are cut, by default planned."""
        space = self._decoder.space
        works = [Work(call, space, i) for i, call in enumerate(calls)]
        pending: list[Pending] = []
        try:
            with computing_on(self._decoder.device):
                for backward in (True, False):
                    some = [work for work in works if (work.scratch is not None) is backward]
                    # A forward is asked for the log-probability of every position.
                    for parts, checkpoint in self._passes(some, memory):
                        pending.append(self._queue(parts, backward, masked_logprobs or not backward, checkpoint))
                if self._decoder.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()  # the one time that the host waits
            for done in pending:
                _collect(done)
        except BaseException:
            for work in works:
                work.withdraw()
            raise
        return [work.finish() for work in works]

    def _passes(self, works: Sequence[Work], memory: Plan | None) -> Iterator[tuple[list[Part], bool]]:
        """The datums of all works, cut at their boundaries into passes that fit."""
        datums = [(work, i) for work in works for i in range(len(work.call.data))]
        if not datums:
            return
        lengths = [work.call.data[i].tokens.size for work, i in datums]
        widths = [work.call.data[i].targets.shape[1] for work, i in datums]
        memory = memory or plan(self._decoder, sum(lengths), max(lengths), company=len(works) > 1)
        for chosen in micro_batches(lengths, memory.max_tokens, widths, TARGET_CELLS):
            parts = []
            for work, group in groupby(datums[chosen.start : chosen.stop], key=lambda datum: datum[0]):
                first, *_ = indices = [i for _, i in group]
                data = work.call.data[first : indices[-1] + 1]
                scored = work.wanted(data).nonzero().squeeze(1).numpy()
                parts.append(Part(work, data, first, scored))
            yield parts, memory.checkpoint

    def _queue(self, parts: Sequence[Part], backward: bool, masked: bool, checkpoint: bool) -> Pending:
        borders, adapters = self._decoder.borders, [part.work.call.adapter for part in parts]
        borders.seat([(adapter, i, i + 1) for i, adapter in enumerate(adapters)])  # their weights into the border
        shape = Shape(
            seats=tuple(seat_shape(part, alone=len(parts) == 1) for part in parts),
            sequences=power_of_2(sum(len(part.data) + 1 for part in parts)),
            width=power_of_2(max(d.targets.shape[1] for part in parts for d in part.data)),
            backward=backward, masked=masked, checkpoint=checkpoint, capacity=borders.capacity,
        )  # fmt: skip
        program = self._program(shape, parts)
        result = program.run(parts)
        for part, gradients in zip(parts, program.gradients, strict=True):
            if part.work.scratch is not None:
                part.work.scratch.add_(gradients)
        return result

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


def programs(decoder: Decoder) -> Programs:
    """The programs of a base model, none at first."""
    if decoder.programs is None:
        decoder.programs = Programs(decoder)
    found: Programs = decoder.programs
    return found


def _collect(done: Pending) -> None:
    """Give every call its rows of a pass that is over, in memory of their own: a caller may keep them for ever."""
    logprobs, values, start = done.logprobs.clone(), done.values, 0
    for part, seat in zip(done.parts, done.shape.seats, strict=True):
        if done.shape.masked:
            rows = slice(start, start + part.tokens)
            found, losses = logprobs[rows], values[rows]
            start += seat.rows
        else:
            at = torch.from_numpy(part.scored)
            of = start + (at if seat.scored == seat.rows else torch.arange(len(at)))
            found = torch.full((part.tokens, done.shape.width), np.nan).index_copy_(0, at, logprobs[of])
            losses = torch.zeros(part.tokens, done.shape.width).index_copy_(0, at, values[of])
            start += seat.scored
        if part.work.error is None:
            part.work.record(found, losses, part.data, part.first)
