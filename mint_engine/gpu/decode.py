"""Decode steps on a GPU: one program for each shape, recorded and replayed (`program.py` has the same for training).

A shape is how many rows each adapter has, rounded up, and how many blocks the longest sequence has, rounded up. Rows
that only fill it up have no cell in the cache and no keys, and nobody reads their logits. Nothing in a step waits for
the device: tokens, positions, cells and block tables are data, what comes back are logits that stay there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from mint_engine import kernels
from mint_engine.adapters import Adapter
from mint_engine.borders import Seating, Segment
from mint_engine.device import computing_on, upload
from mint_engine.gpu.buckets import power_of_2
from mint_engine.gpu.capture import Capture, CudaGraphs, NoGraph
from mint_engine.gpu.layout import trained
from mint_engine.gpu.staging import Staged, Turns
from mint_engine.kv_cache import BLOCK_TOKENS, KVCache
from mint_engine.models.decoder import Decoder
from mint_engine.models.layer import Cells

LEAST_BLOCKS = 8  # a table of one split of the keys (kernels/paged_attention)
PROGRAMS = 64  # kept, least recently used first out
TILE_ROWS = 16  # in company a tile of rows has one adapter (kernels/bordered_by_tile)


@dataclass(frozen=True)
class Step:
    """Rows of a decode step: int64 [M] tokens, positions, cells of the cache; int32 table [M, blocks], lengths [M].

    ``seats``: whose rows they are, in order, and how many. ``temperatures`` float32 [M] and ``uniforms`` float64 [M]
    where tokens are drawn in the same program.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    table: np.ndarray
    lengths: np.ndarray
    seats: Sequence[tuple[Adapter | None, int]]
    temperatures: np.ndarray | None = None
    uniforms: np.ndarray | None = None


@dataclass(frozen=True)
class _Seat:
    rows: int
    rank: int = 0
    scale: float = 0.0
    trained: tuple[bool, bool, bool] = (False, False, False)

    @classmethod
    def of(cls, adapter: Adapter | None, rows: int, *, alone: bool) -> _Seat:
        rows = power_of_2(rows if alone else max(rows, TILE_ROWS))
        return cls(rows) if adapter is None else cls(rows, adapter.rank, adapter.scale, trained(adapter))


@dataclass(frozen=True)
class _Shape:
    """``capacity``: ranks that the borders have room for, as making more room moves the weights."""

    seats: tuple[_Seat, ...]
    blocks: int
    capacity: int
    draws: bool

    @property
    def rows(self) -> int:
        return sum(seat.rows for seat in self.seats)


class DecodePrograms:
    """The decode steps of one base model over one cache.

    ``record``: how launches become repeatable; by default a CUDA graph on a GPU and the plain launches elsewhere.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, record: Callable[[Callable[[], None]], Capture] | None = None
    ) -> None:
        self._decoder, self._cache, self._programs = decoder, cache, OrderedDict[_Shape, _Program]()
        self._record = record or (CudaGraphs(decoder.device).record if decoder.device.type == "cuda" else NoGraph)

    def __len__(self) -> int:
        return len(self._programs)

    def logits(self, step: Step) -> Tensor:
        """fp32 [M, V] on the device, until the next step. K and V of the rows go into the cache.

        Raises:
            ValueError: an adapter has two seats.
        """
        return self._run(step, draws=False)[0]

    def draw(self, step: Step) -> tuple[Tensor, Tensor]:
        """(tokens int64 [M], log-probabilities fp32 [M]) of plain temperature sampling, on the device; else the same.

        The logits are never stored (`kernels.sample_head`).
        """
        tokens, logprobs = self._run(step, draws=True)
        return tokens, logprobs

    def _run(self, step: Step, *, draws: bool) -> tuple[Tensor, ...]:
        own = [adapter.uid for adapter, _ in step.seats if adapter is not None]
        if len(set(own)) < len(own):
            raise ValueError("seats: expected one for each adapter, got two of one (DecodePrograms)")
        borders, bounds = self._decoder.borders, np.cumsum([0, *(n for _, n in step.seats)]).tolist()
        borders.seat([(a, i, j) for (a, _), i, j in zip(step.seats, bounds[:-1], bounds[1:], strict=True)])
        alone = len(step.seats) == 1
        shape = _Shape(
            tuple(_Seat.of(adapter, n, alone=alone) for adapter, n in step.seats),
            power_of_2(max(step.table.shape[1], LEAST_BLOCKS)), borders.capacity, draws,
        )  # fmt: skip
        with computing_on(self._decoder.device):
            return self._program(shape, [adapter for adapter, _ in step.seats]).run(step)

    def _program(self, shape: _Shape, adapters: Sequence[Adapter | None]) -> _Program:
        if shape not in self._programs:
            for stale in [old for old in self._programs if old.capacity != shape.capacity]:
                del self._programs[stale]
            while len(self._programs) >= PROGRAMS:
                self._programs.popitem(last=False)
            self._programs[shape] = _Program(self._decoder, self._cache, shape, adapters, self._record)
        self._programs.move_to_end(shape)
        return self._programs[shape]


class _Program:
    def __init__(
        self, decoder: Decoder, cache: KVCache, shape: _Shape, adapters: Sequence[Adapter | None],
        record: Callable[[Callable[[], None]], Capture],
    ) -> None:  # fmt: skip
        self._decoder, self._cache, self._shape, self._record = decoder, cache, shape, record
        device, rows = decoder.device, shape.rows

        def staged(*size: int, dtype: torch.dtype = torch.int64) -> Staged:
            return Staged(size, dtype, device)

        self._tokens, self._positions, self._slots = staged(rows), staged(rows), staged(rows)
        self._table, self._lengths = staged(rows, shape.blocks, dtype=torch.int32), staged(rows, dtype=torch.int32)
        self._temperatures, self._uniforms = staged(rows, dtype=torch.float32), staged(rows, dtype=torch.float64)
        self._turns = Turns(device)
        self._seating = self._seat([None if a is None else a.outline() for a in adapters])
        self._results: tuple[Tensor, ...] = ()
        self._capture: Capture | None = None
        self._runs, self._generation = 0, -1
        self._rope: object = None

    def run(self, step: Step) -> tuple[Tensor, ...]:
        rows = self._places(step.seats)
        with self._turns.next() as slot:
            self._stage(step, rows, slot)
        space = self._decoder.space
        if self._capture is None or self._generation != space.generation:
            # The first time, or buffers that other programs share have moved.
            NoGraph(self._launch)()
            results = self._results
            self._runs += 1
            if self._runs > 1:
                self._capture = self._record(self._launch)
                self._rope = self._decoder.rope.table  # what was recorded reads this one, even if a longer one comes
                self._generation = space.generation
        else:
            self._capture()
            results = self._results
        if len(step.seats) == 1:
            return tuple(result[: len(rows)] for result in results)
        at = upload(torch.from_numpy(rows), self._decoder.device)
        return tuple(result[at] for result in results)

    def _places(self, seats: Sequence[tuple[Adapter | None, int]]) -> np.ndarray:
        """The program's row of each row of a step, int64."""
        starts = np.cumsum([0, *(seat.rows for seat in self._shape.seats)])
        return np.concatenate([start + np.arange(n) for start, (_, n) in zip(starts[:-1], seats, strict=True)])

    def _stage(self, step: Step, rows: np.ndarray, slot: int) -> None:
        buffers = (self._tokens, self._positions, self._slots, self._table, self._lengths)
        hosts = tokens, positions, slots, table, lengths = tuple(buffer.host(slot) for buffer in buffers)
        for host, filling in zip(hosts, (0, 0, -1, -1, 0), strict=True):
            host[...] = filling
        tokens[rows], positions[rows], slots[rows] = step.tokens, step.positions, step.slots
        table[rows, : step.table.shape[1]], lengths[rows] = step.table, step.lengths
        for buffer in buffers:
            buffer.upload(slot)
        if self._shape.draws:
            for staged, values in ((self._temperatures, step.temperatures), (self._uniforms, step.uniforms)):
                assert values is not None
                host = staged.host(slot)
                host[...] = 0.0
                host[rows] = values
                staged.upload(slot)

    def _seat(self, adapters: Sequence[Adapter | None]) -> Seating:
        """Rows of one adapter lie together, adapters side by side in the border, in the same order (`Borders.seat`)."""
        segments, start, offset = [], 0, 0
        for seat, adapter in zip(self._shape.seats, adapters, strict=True):
            if adapter is not None:
                segments.append(Segment(start, start + seat.rows, adapter, offset))
                offset += adapter.rank
            start += seat.rows
        # A tile of rows has its own columns of the border, where the kernel's contract allows it.
        widths = [seat.rank for seat in self._shape.seats]
        widths += [n for w in self._decoder.borders.weights for n in (w.n, w.k) if w is not self._decoder.head]
        company = len(self._shape.seats) > 1
        by_tile = company and all(width % TILE_ROWS == 0 for width in widths)
        return Seating(
            tuple(segments), offset, tile_rows=TILE_ROWS if by_tile else 0, side_by_side=company and not by_tile
        )

    @torch.no_grad()
    def _launch(self) -> None:
        decoder, c = self._decoder, self._decoder.config
        table, lengths = self._table.device, self._lengths.device

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
            kernels.paged_attention(
                q, k, v, table, lengths, c.num_heads, c.num_kv_heads, c.head_dim**-0.5, out=out
            )  # fmt: skip

        h, _ = decoder.hidden(
            self._tokens.device, self._positions.device, self._seating, attend, space=decoder.space,
            length=self._shape.blocks * BLOCK_TOKENS, cells=Cells(self._slots.device, self._cache.k, self._cache.v),
        )  # fmt: skip
        head = self._seating.bordered
        x = decoder.head_input(h, head, decoder.space)
        if self._shape.draws:
            self._results = decoder.draw(x, self._temperatures.device, self._uniforms.device, head)
        else:
            self._results = (decoder.logits(x, head),)


def decode_programs(decoder: Decoder, cache: KVCache) -> DecodePrograms:
    """The programs of a cache, none at first."""
    if cache.programs is None:
        cache.programs = DecodePrograms(decoder, cache)
    found: DecodePrograms = cache.programs
    return found


def seats(adapters: Sequence[Adapter | None], rows: Sequence[int]) -> list[tuple[Adapter | None, int]]:
    """(adapter, rows) of neighbours together."""
    pairs = groupby(zip(adapters, rows, strict=True), key=lambda pair: None if pair[0] is None else pair[0].uid)
    groups = [list(group) for _, group in pairs]
    return [(group[0][0], sum(n for _, n in group)) for group in groups]
