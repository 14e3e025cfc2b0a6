"""Bordered weights: the frozen base with room for adapters at its edge (DESIGN.md 2.1), and who sits there.

The border is a cache of adapter versions in the compute dtype. A pass asks for the adapters of its rows; those that
are not there yet, or have been trained since, are written. Row ``[W | B]`` serves the forward GEMM, rows ``W`` then
``A`` the backward one. The unused corner and unused columns stay finite, so a zero in S switches them off exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mint_engine.adapters import Adapter, LinearGroup
from mint_engine.kernels import Arena, Places, Words, write_places_

Shape: TypeAlias = tuple[int, tuple[str, ...]]  # of an adapter: its rank, and the groups it trains

DEFAULT_RANKS = 16  # room made at load time; the border grows when more is asked for
LEAST_TOGETHER = 256  # ranks that may always sit there together: one adapter may have as many


class BorderedWeight:
    """``buf [N + m*R, K + m*R]`` = ``[[W, B], [A, 0]]`` for a group of m stacked modules and R ranks of room.

    ``arena``: of the model's weights.
    """

    def __init__(self, group: LinearGroup, dtype: torch.dtype, ranks: int, arena: Arena) -> None:
        self.group = group
        self.n, self.k, self.m = group.out_features, group.in_features, len(group.modules)
        self.bias: Tensor | None = None
        self.int8: tuple[Tensor, Tensor] | None = None  # W as decode steps read it: values [N, K] and scales [N]
        self.words: Words | None = None  # or so: see `kernels.decode_words`
        self.buf = arena.zeros(self.n + self.m * ranks, self.k + self.m * ranks, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """The frozen W, [N, K]."""
        return self.buf[: self.n, : self.k]

    def set_rows(self, start: int, rows: Tensor, int8_arena: Arena | None = None) -> None:
        """Set rows ``start, ...`` of W. ``int8_arena``: to int8 values times a scale for each row, kept there."""
        stop = start + len(rows)
        if int8_arena is not None:
            if self.int8 is None:
                values = int8_arena.zeros(self.n, self.k, dtype=torch.int8)
                self.int8 = values, torch.zeros(self.n, dtype=torch.float32, device=self.buf.device)
            scales = rows.float().abs().amax(1).clamp(min=1e-30) / 127
            values = (rows.float() / scales[:, None]).round()
            self.int8[0][start:stop], self.int8[1][start:stop] = values.to(torch.int8), scales
            rows = values * scales[:, None]
        self.weight[start:stop].copy_(rows)

    def bytes_of(self, ranks: int) -> int:
        """What the buffer takes with room for ``ranks`` ranks."""
        return (self.n + self.m * ranks) * (self.k + self.m * ranks) * self.buf.itemsize

    def widen(self, ranks: int, arena: Arena) -> None:
        """Make room for ``ranks`` ranks. What sat in the border is forgotten."""
        old = self.weight
        self.buf = arena.zeros(self.n + self.m * ranks, self.k + self.m * ranks, dtype=old.dtype)
        self.weight.copy_(old)

    def forward_weight(self, ranks: int) -> Tensor:
        """``[W | B]`` [N, K + p] with p = m * ranks."""
        return self.buf[: self.n, : self.k + self.m * ranks]

    def backward_weight(self, ranks: int) -> Tensor:
        """``[W ; A]`` [N + p, K] with p = m * ranks."""
        return self.buf[: self.n + self.m * ranks, : self.k]

    def a(self, offset: int, rank: int) -> Tensor:
        """The stacked A of the adapter at rank offset ``offset``: [m*r, K]."""
        start = self.n + self.m * offset
        return self.buf[start : start + self.m * rank, : self.k]

    def b(self, offset: int, rank: int) -> list[Tensor]:
        """Its B of each module: [N_j, r], the diagonal blocks."""
        out, row, col = [], 0, self.k + self.m * offset
        for _, n in self.group.modules:
            out.append(self.buf[row : row + n, col : col + rank])
            row, col = row + n, col + rank
        return out

    def install(self, adapter: Adapter, offset: int) -> None:
        """Write the adapter's factors; a group it does not train gets zeros."""
        r, col = adapter.rank, self.k + self.m * offset
        factors = adapter.factors.get(self.group.name)
        if factors is None or self.m > 1:  # else its one block covers all
            self.buf[: self.n, col : col + self.m * r].zero_()
        if factors is None:
            self.a(offset, r).zero_()
            return
        self.a(offset, r).copy_(factors.a)
        for view, b in zip(self.b(offset, r), factors.b, strict=True):
            view.copy_(b)


@dataclass(frozen=True)
class Segment:
    """Rows ``start:stop`` of a pass belong to ``adapter``, which sits at rank offset ``offset``."""

    start: int
    stop: int
    adapter: Adapter
    offset: int


@dataclass(frozen=True)
class Seating:
    """Where a pass's adapters sit: its segments in row order, and the ranks of border in use (0: base model only).

    ``grouped``: the rows meet their own adapter only (`models/company.py`), instead of all that sit in the border.
    ``tile_rows``: so they do, but in the base's own product (`kernels/bordered_by_tile`); segments are whole tiles.
    ``side_by_side``: they meet the whole border, with zeros in the columns of others.
    ``known``: rows, and the seating of these rows, made beforehand: `select` need not look at what they are.
    """

    segments: tuple[Segment, ...] = ()
    ranks: int = 0
    grouped: bool = False
    tables: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)  # of `models/company.py`
    tile_rows: int = 0
    side_by_side: bool = False
    known: tuple[Tensor, Seating] | None = field(default=None, repr=False, compare=False)

    @property
    def by_table(self) -> bool:
        """Whether the narrow products (S, dS, dA, dB) of all adapters are one call each (`models/company.py`)."""
        return self.grouped or self.side_by_side or self.tile_rows > 0

    def of(self, group: LinearGroup) -> tuple[Segment, ...]:
        """The segments whose adapter trains this group."""
        return tuple(s for s in self.segments if group.name in s.adapter.factors)

    def ranks_of(self, group: LinearGroup) -> int:
        """Ranks of border this group needs: none if no adapter of the pass trains it."""
        return self.ranks if self.of(group) else 0

    def select(self, rows: Tensor) -> Seating:
        """The same seating for a pass over the given rows (int64, ascending, on the CPU) of this one."""
        if self.known is not None and self.known[0] is rows:
            return self.known[1]
        cuts = torch.tensor([[s.start, s.stop] for s in self.segments], dtype=rows.dtype).reshape(-1)
        found = torch.searchsorted(rows, cuts).reshape(-1, 2).tolist()
        return Seating(
            tuple(
                Segment(start, stop, s.adapter, s.offset)
                for s, (start, stop) in zip(self.segments, found, strict=True)
                if stop > start
            ),
            self.ranks,
            self.grouped,
        )

    @property
    def bordered(self) -> Seating:
        """The same with every row meeting the whole border."""
        return Seating(self.segments, self.ranks)


class Borders:
    """All bordered weights of one base model, and which adapter versions sit in them.

    The adapters of a pass sit side by side from offset 0, in row order, whoever sat there before: a pass computes the
    same bits whatever other clients do. One that is still in its seat, unchanged, is not written again.
    """

    def __init__(self, weights: Sequence[BorderedWeight], ranks: int = DEFAULT_RANKS) -> None:
        self.weights = weights
        self.capacity = ranks
        self._seated: dict[int, tuple[int, int, int]] = {}  # rank offset -> (adapter uid, version, rank)
        self._laid: dict[int, Shape] = {}  # rank offset -> what has been laid out there: its zeros are in place
        self._at_zero: dict[Shape, tuple[Places, list[int]]] = {}  # places at offset 0, and how far each moves a rank
        self._places = WeakKeyDictionary[Adapter, tuple[int | None, Places]]()
        self.before_move: Callable[[], None] = lambda: None  # called before the buffers are replaced by wider ones

    def ranks_within(self, budget: int) -> int:
        """Ranks that may sit side by side: the most, a power of two, for which room takes at most ``budget`` bytes
        beside W, and at least ``LEAST_TOGETHER``. Room is there for a square of them, and stays."""
        ranks = LEAST_TOGETHER
        while sum(w.bytes_of(2 * ranks) - w.bytes_of(0) for w in self.weights) <= budget:
            ranks *= 2
        return ranks

    def seat(self, rows: Iterable[tuple[Adapter | None, int, int]], *, grouped: bool = False) -> Seating:
        """Seat the adapters of a pass given as (adapter or None for the base model, first row, last row + 1).

        ``grouped``: if there are several, have each meet its own rows only.
        """
        spans = _merged(rows)
        adapters = {a.uid: a for a, _, _ in spans}
        if not adapters:
            return Seating()
        ranks = sum(a.rank for a in adapters.values())
        if ranks > self.capacity:
            # Company comes and goes: room for up to twice as many at once, not a copy of all weights per newcomer.
            room = ranks if len(adapters) == 1 else 1 << (ranks - 1).bit_length()
            self.before_move()
            for known in (self._places, self._at_zero, self._laid):  # of the old buffers
                known.clear()
            # Should memory end half-way, nobody sits anywhere, and nothing made for the old buffers is used again.
            self.capacity, self._seated = 0, {}
            arena = Arena(self.weights[0].buf.device)
            for w in self.weights:
                w.widen(room, arena)
            self.capacity = room
        offsets, end = {}, 0
        for uid, adapter in adapters.items():
            offsets[uid], end = end, end + adapter.rank
            self._install(adapter, offsets[uid])
        segments = tuple(Segment(start, stop, a, offsets[a.uid]) for a, start, stop in spans)
        return Seating(segments, ranks, grouped and len(adapters) > 1)

    def offset_of(self, adapter: Adapter) -> int | None:
        """The adapter's seat with its newest version, of several the last it took; None if it has none."""
        seats = enumerate(self._seated.items())
        found = [(version, i, at) for i, (at, (uid, version, _)) in seats if uid == adapter.uid]
        return max(found)[2] if found else None

    def places(self, adapter: Adapter, offset: int | None) -> Places:
        """Where the pieces of the adapter's flat buffer sit (no ``offset``: nowhere). The last ones made are kept."""
        kept = self._places.get(adapter)
        if kept is None or kept[0] != offset:
            kept = self._places[adapter] = offset, self._places_at(adapter, offset)
        return kept[1]

    def _places_at(self, adapter: Adapter, offset: int | None) -> Places:
        """The seat's other columns and rows, of modules that it does not train, hold the zeros they got there."""
        if offset is None:
            return Places([(adapter.params.numel(), None)], adapter.params.device)
        shape = _shape(adapter)
        if shape not in self._at_zero:
            weights, pieces, steps = {w.group.name: w for w in self.weights}, list[tuple[int, Tensor | None]](), []
            for group in adapter.groups:
                w = weights[group.name]
                a, b = w.a(0, adapter.rank), w.b(0, adapter.rank)
                pieces += [(view.numel(), view) for view in (a, *b)]
                steps += [w.m * a.stride(0), *(w.m for _ in b)]
            self._at_zero[shape] = Places(pieces, adapter.params.device), steps
        places, steps = self._at_zero[shape]
        return places.moved([step * offset for step in steps])

    def written(self, adapter: Adapter, offset: int) -> None:
        """The adapter's present version has been written into its seat, piece by piece."""
        self._seated[offset] = (adapter.uid, adapter.version, adapter.rank)

    def _install(self, adapter: Adapter, offset: int) -> None:
        seat = (adapter.uid, adapter.version, adapter.rank)
        if self._seated.get(offset) == seat:
            return
        stop = offset + adapter.rank
        self._seated = {at: s for at, s in self._seated.items() if at >= stop or at + s[2] <= offset}
        shape = _shape(adapter)
        if self._laid.get(offset) == shape:
            write_places_(adapter.params, self.places(adapter, offset))
        else:
            self._laid = {at: s for at, s in self._laid.items() if at >= stop or at + s[0] <= offset}
            for w in self.weights:
                w.install(adapter, offset)
            self._laid[offset] = shape
        self._seated[offset] = seat


def _shape(adapter: Adapter) -> Shape:
    return adapter.rank, tuple(group.name for group in adapter.groups)


def _merged(rows: Iterable[tuple[Adapter | None, int, int]]) -> list[tuple[Adapter, int, int]]:
    """Spans of adapters, neighbours of the same adapter joined, the base model's left out."""
    spans: list[tuple[Adapter, int, int]] = []
    for adapter, start, stop in rows:
        if spans and spans[-1][0] is adapter and spans[-1][2] == start:
            start = spans.pop()[1]
        if adapter is not None:
            spans.append((adapter, start, stop))
    return spans
