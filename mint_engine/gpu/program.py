"""One shape's program: its buffers on the device, and the launches from tokens to gradients.

Nothing in `Program._launch` depends on what a batch holds, nothing waits for the device: on a GPU it is recorded once
and replayed. The first batch of a shape runs launch by launch, which compiles kernels and makes tables; the second is
recorded, so a shape that never comes again costs no recording.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mint_engine.adapters import Adapter
from mint_engine.borders import Seating, Segment
from mint_engine.gpu.capture import Capture, NoGraph
from mint_engine.gpu.layout import TILE_ROWS, Part, Rows, Shape, lay_out
from mint_engine.gpu.staging import Staged, Turns, download
from mint_engine.kernels.attention import Bounds
from mint_engine.losses import Loss
from mint_engine.models import checkpointed
from mint_engine.models.decoder import Decoder
from mint_engine.models.layer import Saved

Record = Callable[[Callable[[], None]], Capture]


@dataclass(frozen=True)
class Results:
    """Results of a pass on their way to the host: fp32 [rows or scored rows, K] each."""

    parts: Sequence[Part]
    shape: Shape
    logprobs: Tensor
    values: Tensor


class Program:
    """The step for one shape. ``record`` makes its launches repeatable once they have run."""

    def __init__(
        self, decoder: Decoder, shape: Shape, adapters: Sequence[Adapter], losses: Sequence[Loss], record: Record
    ) -> None:
        self._decoder, self._shape, self._losses, self._record = decoder, shape, losses, record
        device, rows, width = decoder.device, shape.rows, shape.width
        inputs = sorted({name for seat in shape.seats for name in seat.inputs})

        def staged(*size: int, dtype: torch.dtype = torch.int64) -> Staged:
            return Staged(size, dtype, device)

        self._tokens, self._positions, self._targets = staged(rows), staged(rows), staged(rows, width)
        self._inputs = {name: staged(rows, width, dtype=torch.float32) for name in inputs}
        self._scored, self._rest = staged(shape.scored), staged(rows - shape.scored)
        self._bounds = Bounds(rows, shape.sequences, device)
        self._staged_bounds: list[Staged] = []
        self._turns = Turns(device)
        self._adapters = [adapter.outline() for adapter in adapters]
        results = rows if shape.masked else shape.scored
        self._logprobs, self._values = (torch.zeros(results, width, device=device) for _ in range(2))
        self._seating, self._head, self._others = self._seatings()
        self._capture: Capture | None = None
        self._runs = 0
        self._generation = -1
        self._table: object = None

    @property
    def gradients(self) -> list[Tensor]:
        """Where each call's gradients of a pass are, flat, until the next pass: all programs use the same memory."""
        take = self._decoder.space.take
        return [take(("collected", i), tuple(a.params.shape), torch.float32) for i, a in enumerate(self._adapters)]

    def run(self, parts: Sequence[Part]) -> Results:
        """Queue a pass over ``parts``. Gradients are in :attr:`gradients` until the next one."""
        with self._turns.next() as slot:
            self._stage(parts, slot)
        space = self._decoder.space
        if self._capture is None or self._generation != space.generation:
            # The first time, or buffers that other programs share have moved.
            NoGraph(self._launch)()
            self._runs += 1
            if self._runs > 1:
                self._capture = self._record(self._launch)
                self._table = self._decoder.rope.table  # what was recorded reads this one, even if a longer one comes
                self._generation = space.generation
        else:
            self._capture()
        return Results(parts, self._shape, download(self._logprobs), download(self._values))

    def _stage(self, parts: Sequence[Part], slot: int) -> None:
        buffers = [self._tokens, self._positions, self._targets, self._scored, self._rest, *self._inputs.values()]
        host = Rows(
            self._tokens.host(slot), self._positions.host(slot), self._targets.host(slot),
            {name: s.host(slot) for name, s in self._inputs.items()}, self._scored.host(slot),
            self._rest.host(slot),
        )  # fmt: skip
        bounds = lay_out(parts, self._shape, host)
        for buffer in buffers:
            buffer.upload(slot)
        for i, (new, target) in enumerate(self._bounds.write(bounds)):
            if i == len(self._staged_bounds):
                self._staged_bounds.append(Staged(new.shape, torch.int32, target.device))
            staged = self._staged_bounds[i]
            staged.host(slot)[...] = new
            staged.upload(slot, target)

    def _seatings(self) -> tuple[Seating, Seating, Seating]:
        """Of all rows, of those in ``_scored`` and in ``_rest``; the first knows that ``_scored`` gives the second."""
        rows, scored, rest, offset = [], [], [], 0
        start = first = 0
        for seat, adapter in zip(self._shape.seats, self._adapters, strict=True):
            rows.append(Segment(start, start + seat.rows, adapter, offset))
            scored.append(Segment(first, first + seat.scored, adapter, offset))
            rest.append(Segment(start - first, start - first + seat.rows - seat.scored, adapter, offset))
            start, first, offset = start + seat.rows, first + seat.scored, offset + seat.rank
        # A tile of rows has its own columns of the border, where the kernel's contract allows it.
        widths = [seat.rank for seat in self._shape.seats]
        widths += [width for w in self._decoder.borders.weights for width in (w.n, w.k) if w is not self._decoder.head]
        by_tile = len(rows) > 1 and all(width % 16 == 0 for width in widths)
        tile_rows, side_by_side = TILE_ROWS if by_tile else 0, len(rows) > 1 and not by_tile
        selected = Seating(tuple(scored), offset, tile_rows=tile_rows, side_by_side=side_by_side)
        every = replace(selected, segments=tuple(rows), tables={}, known=(self._scored.device, selected))
        return every, selected, Seating(tuple(rest), offset)

    @torch.no_grad()
    def _launch(self) -> None:
        decoder, shape, scored = self._decoder, self._shape, self._scored.device
        attend = decoder.attend_within(self._bounds)
        saved: list[Saved] | None = [] if shape.backward else None
        some = None if shape.masked else scored
        forward, backward = decoder.hidden, decoder.hidden_backward
        if shape.checkpoint and shape.backward:
            forward, backward = checkpointed.functions(decoder)
        h, p = forward(
            self._tokens.device, self._positions.device, self._seating, attend, saved, rows=some,
            space=decoder.space, length=shape.rows,
        )  # fmt: skip
        head = (self._seating if shape.masked else self._head).bordered
        x = decoder.head_input(h, head, decoder.space)
        if saved is None:
            self._score(x, None, self._seating)
            return
        grads = {a.uid: a.views(flat.zero_()) for a, flat in zip(self._adapters, self.gradients, strict=True)}
        logprobs, values = self._logprobs, self._values
        if shape.masked:
            # The rows without a gradient are only scored: nobody's logits are computed twice.
            if shape.rows > shape.scored:
                rest = self._rest.device
                self._score(decoder.rows(x, rest, "rest"), rest, self._others)
            h, x = decoder.rows(h, scored, "h"), decoder.rows(x, scored, "x")
            logprobs, values = (results.new_empty(shape.scored, shape.width) for results in (logprobs, values))
        broken = torch.zeros_like(x[:, :1], dtype=torch.bool)
        if len(shape.seats) > 1:
            # The head's border is one product over all calls' rows, where 0 * inf would reach another's columns.
            broken = ~torch.isfinite(x).all(1, keepdim=True)
            x.masked_fill_(broken, 0.0)
        targets = self._targets.device[scored]
        gradient = partial(self._evaluate, self._head, self._gathered(scored), targets, values)
        dh = decoder.head_both(h, x, targets, gradient, self._head.bordered, grads, logprobs)
        values.masked_fill_(broken, torch.nan)
        if shape.masked:
            self._logprobs.index_copy_(0, scored, logprobs)
            self._values.index_copy_(0, scored, values)
        p.cu_seqlens = self._bounds
        backward(dh, scored, saved, p, grads)
        if shape.masked:
            targets, values = self._targets.device, self._values
        self._spoil(values, targets, self._seating if shape.masked else self._head)

    def _spoil(self, values: Tensor, targets: Tensor, seating: Seating) -> None:
        """Put a NaN into the gradients of a call whose loss is not finite: what refuses the ones refuses the others."""
        nothing = values.masked_fill(targets < 0, 0.0).mul_(0.0)  # or NaN; what fills a shape up has no targets
        for segment, flat in zip(seating.segments, self.gradients, strict=True):
            flat[:1].add_(nothing[segment.start : segment.stop].sum())

    def _score(self, x: Tensor, rows: Tensor | None, seating: Seating) -> None:
        """Log-probabilities and losses of ``rows`` (None: of all) into the results; ``x``: the head's input."""
        at = slice(None) if rows is None else rows
        targets = self._targets.device[at]
        logprobs, _ = self._decoder.target_logprob(x, targets, seating.bordered)
        values = torch.empty_like(logprobs)
        self._evaluate(seating, self._gathered(at), targets, values, slice(0, len(x)), logprobs)
        self._logprobs[at], self._values[at] = logprobs, values

    def _gathered(self, rows: Tensor | slice) -> dict[str, Tensor]:
        return {name: staged.device[rows] for name, staged in self._inputs.items()}

    def _evaluate(
        self, seating: Seating, inputs: Mapping[str, Tensor], targets: Tensor, into: Tensor, rows: slice,
        logprobs: Tensor,
    ) -> Tensor:  # fmt: skip
        """The losses' values of ``rows`` among those of ``seating`` ``into`` a buffer, and d loss / d logprob of them.

        ``inputs``, ``targets`` and ``into`` are of all rows of ``seating``, ``logprobs`` of ``rows``.
        """
        gradients = torch.empty_like(logprobs)
        for segment, seat, loss in zip(seating.segments, self._shape.seats, self._losses, strict=True):
            start, stop = max(segment.start, rows.start), min(segment.stop, rows.stop)
            if start >= stop:
                continue
            here = slice(start - rows.start, stop - rows.start)
            own = {name: inputs[name][start:stop] for name in seat.inputs}
            values, gradient = loss.fn(logprobs[here], own, dict(seat.config))
            padded = targets[start:stop] < 0
            values, gradient = values.masked_fill(padded, 0.0), gradient.masked_fill(padded, 0.0)
            # What is not finite makes the call's loss so, for the host to find, and goes no further.
            values = values.masked_fill(~torch.isfinite(gradient), torch.nan)
            into[start:stop] = values
            gradients[here] = gradient.masked_fill(~torch.isfinite(values), 0.0)
        return gradients
