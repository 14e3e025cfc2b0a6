"""Where the rows of a batch go in a program's buffers: each call has a range of its own, padded to the grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mint_engine.adapters import Adapter
from mint_engine.calls import Work
from mint_engine.datums import CheckedDatum
from mint_engine.gpu.buckets import bucket, power_of_2

TILE_ROWS = 128  # in company a tile of rows has one adapter (kernels/bordered_by_tile)


@dataclass(frozen=True)
class Part:
    """Some datums of one call in one pass, ``first`` and on; ``scored``: which of their rows may have a gradient."""

    work: Work
    data: Sequence[CheckedDatum]
    first: int
    scored: np.ndarray  # int64, ascending

    @property
    def tokens(self) -> int:
        return sum(d.tokens.size for d in self.data)


@dataclass(frozen=True)
class SeatShape:
    """What of one call is fixed in a program: rows, rows with a gradient, the adapter's shape, the loss."""

    rows: int
    scored: int
    rank: int
    scale: float
    trained: tuple[bool, bool, bool]
    loss: str
    config: tuple[tuple[str, float], ...]
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Shape:
    """What a program is made for. Everything else of a batch is data.

    ``width``: targets per row. ``masked``: rows outside the loss are scored too. ``capacity``: ranks that the borders
    have room for, as making more room moves the weights.
    """

    seats: tuple[SeatShape, ...]
    sequences: int
    width: int
    backward: bool
    masked: bool
    checkpoint: bool
    capacity: int

    @property
    def rows(self) -> int:
        return sum(s.rows for s in self.seats)

    @property
    def scored(self) -> int:
        return sum(s.scored for s in self.seats)


def seat_shape(part: Part, *, alone: bool) -> SeatShape:
    """``alone``: the pass has no other call. In company the grid is coarser: shapes multiply."""
    call = part.work.call
    rows, scored = part.tokens, len(part.scored)
    if alone:
        rows, scored = bucket(rows), bucket(scored)
    else:
        rows, scored = power_of_2(max(rows, TILE_ROWS)), power_of_2(max(scored, TILE_ROWS))
    return SeatShape(
        rows, min(rows, scored), call.adapter.rank, call.adapter.scale, trained(call.adapter), call.loss.name,
        tuple(sorted(call.config.items())), tuple(sorted(part.data[0].inputs)),
    )  # fmt: skip


def trained(adapter: Adapter) -> tuple[bool, bool, bool]:
    lora = adapter.lora
    return lora.train_attn, lora.train_mlp, lora.train_unembed


@dataclass(frozen=True)
class Rows:
    """The host's arrays of one pass. ``scored`` int64: the rows with a gradient, padded with others; or, where there is
    room for all rows, all of them in order. ``rest``: the rows that are not there."""

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    inputs: dict[str, np.ndarray]
    scored: np.ndarray
    rest: np.ndarray


def lay_out(parts: Sequence[Part], shape: Shape, out: Rows) -> np.ndarray:
    """Fill ``out`` and answer the bounds of the sequences, int32.

    A call's padding rows are a sequence of their own with token 0: computed, so that nothing in them is infinite, and
    without a target. Every call has as many rows and scored rows as its `SeatShape` says.
    """
    out.tokens[:], out.positions[:], out.targets[:] = 0, 0, -1
    for values in out.inputs.values():
        values[:] = 0.0
    bounds, start, first = [0], 0, 0
    for part, seat in zip(parts, shape.seats, strict=True):
        row = start
        for datum in part.data:
            n, k = datum.targets.shape
            out.tokens[row : row + n] = datum.tokens
            out.positions[row : row + n] = np.arange(n)
            out.targets[row : row + n, :k] = datum.targets
            for name, values in datum.inputs.items():
                out.inputs[name][row : row + n, :k] = values
            row += n
            bounds.append(row)
        if row < start + seat.rows:
            bounds.append(start + seat.rows)
        scored, rest = out.scored[first : first + seat.scored], out.rest[start - first :][: seat.rows - seat.scored]
        if seat.scored == seat.rows:
            scored[:] = start + np.arange(seat.rows)
        else:
            without = np.setdiff1d(np.arange(seat.rows), part.scored, assume_unique=True)
            padding = seat.scored - len(part.scored)
            scored[: len(part.scored)] = start + part.scored
            scored[len(part.scored) :] = start + without[:padding]
            rest[:] = start + without[padding:]
        start, first = start + seat.rows, first + seat.scored
    return np.array(bounds, dtype=np.int32)
