"""Layers of a training pass, or of one over prompts, on a CPU in one call: what `layer.py` does op by op.

The call is `kernels/decoder_layer`. A layer's results are buffers whose addresses are known before: so the layers of a
pass can wait for each other (:class:`Waiting`) and be one call together, with no Python in between.

Here are the addresses only: of the weights, once; of what all layers of a pass share, once per pass; of the buffers of
a layer, which are those that layer.py takes, under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mint_engine.borders import Segment
from mint_engine.kernels import LayerCall, Words, decoder_layer_supported, decoder_layers, decoder_layers_backward
from mint_engine.models import linear
from mint_engine.models.workspace import Workspace

if TYPE_CHECKING:
    from mint_engine.models.layer import DecoderLayer, Pass, Saved

# Of layer.Saved the tensors.
Kept: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Weights:
    """A layer's LayerWeights. To be made again when a tensor has been replaced, as borders are, or words were kept."""

    def __init__(self, layer: DecoderLayer) -> None:
        self._made_of = _parts(layer)
        norms = layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm
        fields = [_address(t) for t in norms]
        for w in (layer.qkv, layer.o, layer.gate_up, layer.down):
            rows = [n for _, n in w.group.modules]
            fields += [w.buf.data_ptr(), w.buf.stride(0), _address(w.bias), w.n, w.k, w.m, *rows, *[0] * (3 - w.m)]
            fields += [0, 0] if w.words is None else [w.words.address_of_all(w.n), w.words.columns]
        self.table = np.array(fields, dtype=np.int64)

    def fit(self, layer: DecoderLayer) -> bool:
        return all(a is b for a, b in zip(_parts(layer), self._made_of, strict=True))


def _parts(layer: DecoderLayer) -> tuple[Tensor | Words | None, ...]:
    linears = layer.qkv, layer.o, layer.gate_up, layer.down
    norms = layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm
    return *norms, *(w.buf for w in linears), *(w.words for w in linears)


class Waiting:
    """Layers whose addresses are known and which have not been done yet: forwards, or backwards."""

    def __init__(self) -> None:
        self._together = False  # else each is done at once
        self._calls: list[LayerCall] = []
        self._run: Callable[[list[LayerCall]], None] | None = None

    @contextmanager
    def together(self, space: Workspace) -> Iterator[None]:
        """Layers wait for each other, but not beyond the block, nor beyond a move of their memory."""
        self._together, space.before_move = True, self.flush
        try:
            yield
            self.flush()
        finally:
            self._together, space.before_move = False, None
            self._calls = []

    def add(self, run: Callable[[list[LayerCall]], None], call: LayerCall) -> None:
        """``run`` is the same for all that wait together."""
        self._run = run
        self._calls.append(call)
        if not self._together:
            self.flush()

    def flush(self) -> None:
        """From here on the results are there."""
        calls, self._calls = self._calls, []
        if calls and self._run is not None:
            self._run(calls)


class Shared:
    """What the layers of a pass share, for all rows or with `some` of them behind the attention: a LayerPass.

    Who trains a linear of one layer trains it in all of them.
    """

    def __init__(self, layer: DecoderLayer, p: Pass, cu_seqlens: Tensor, some: Tensor | None) -> None:
        c, seating = p.config, p.seating
        behind = seating if some is None else seating.select(some)
        rows, count = len(p.cos), len(p.cos) if some is None else len(some)
        self.linears = [(layer.qkv, seating), (layer.o, behind), (layer.gate_up, behind), (layer.down, behind)]
        self.segments = [s.of(w.group) for w, s in self.linears]
        self.tails = [linear.tail(w, s) for w, s in self.linears]
        self.count = count
        seats = [_seats(segments) for segments in self.segments]
        slots = held = keys = None
        if p.context is not None:
            slots, held, keys = p.context.cells.slots, p.context.held, p.context.cu_keys
        self._kept = cu_seqlens, some, seats, slots, held, keys
        self.held = 0 if held is None else len(held)
        self.table = np.array(
            [
                rows, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim,
                len(cu_seqlens) - 1, cu_seqlens.data_ptr(),
                p.cos.data_ptr(), p.sin.data_ptr(), p.cos.stride(0), count, _address(some),
                _address(slots), _address(held), self.held, _address(keys),
                *(
                    field
                    for table, segments, tail in zip(seats, self.segments, self.tails, strict=True)
                    for field in (table.ctypes.data, len(segments), tail, len(segments) == 1 and not seating.grouped)
                ),
            ],
            dtype=np.int64,
        )  # fmt: skip

    def gradients(self, layer: DecoderLayer, grads: linear.Gradients) -> np.ndarray:
        """For each linear, where the gradients of its segments begin."""
        linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
        return np.array(
            [
                grads[s.adapter.uid][w.group.name].a.data_ptr()
                for w, segments in zip(linears, self.segments, strict=True)
                for s in segments
            ],
            dtype=np.int64,
        )


def weights_of(layer: DecoderLayer) -> Weights:
    if layer.addresses is None or not layer.addresses.fit(layer):
        layer.addresses = Weights(layer)
    return layer.addresses


def shared_of(layer: DecoderLayer, p: Pass, some: Tensor | None) -> Shared | None:
    """For a layer of the pass; None if it must be done op by op."""
    key = None if some is None else id(some)
    if key not in p.shared:
        p.shared[key] = _shared(layer, p, some)
    return p.shared[key]


def _shared(layer: DecoderLayer, p: Pass, some: Tensor | None) -> Shared | None:
    bounds, seating = p.bounds, p.seating
    if not isinstance(bounds, Tensor) or p.cells is not None or seating.tile_rows or seating.side_by_side:
        return None
    if not decoder_layer_supported(layer.qkv.buf) or p.cos.stride(0) != p.sin.stride(0):
        return None
    found = Shared(layer, p, bounds, some)
    for (_, s), segments, rows in zip(found.linears, found.segments, (len(p.cos), *[found.count] * 3), strict=True):
        if segments and not s.grouped and not linear.has_all(segments, s, rows):
            return None
    return found


def _seats(segments: Sequence[Segment]) -> np.ndarray:
    table = np.array([[s.start, s.stop, s.offset, s.adapter.rank, 0] for s in segments], dtype=np.int64).reshape(-1, 5)
    table.view(np.float64)[:, 4] = [s.adapter.scale for s in segments]
    return table


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def forward(
    layer: DecoderLayer, delta: Tensor, h: Tensor | None, p: Pass, save: bool, rows: Tensor | None, shared: Shared
) -> tuple[Tensor, Tensor, Kept | None]:
    """What `layer.forward` returns; its contents are there when the pass's waiting layers have been done."""
    m, some, at = len(delta), shared.count, layer.index if save else -1
    tail_qkv, tail_o, tail_gate_up, tail_down = shared.tails
    n_q, d, hidden, ffn = p.config.num_heads, p.config.head_dim, layer.qkv.k, layer.down.k

    def take(name: str, count: int, columns: int, *, kept: bool = False) -> Tensor:
        return p.space.take((name, at) if kept else name, (count, columns), delta.dtype)

    stream = delta if h is None else take("h", m, hidden, kept=True)
    qkv = take("qkv", m, layer.qkv.n, kept=True)
    attended = o = take("o", m, layer.o.k + (tail_o if rows is None else 0), kept=True)
    lse = p.space.take(("lse", at), (n_q, m), torch.float32)
    gathered: list[Tensor | None] = [None, None]
    if rows is not None:
        o = take("o of some", some, layer.o.k + tail_o, kept=True)
        gathered = [o, take("h of some", some, hidden)]
    out, h2 = take("delta", some, hidden), take("h2", some, hidden, kept=True)
    gate_up = take("gate_up", some, layer.gate_up.n, kept=True)
    tails: list[Tensor | None] = [None, None, None]
    if save:
        tails = [
            take(f"s of {w.group.name}", count, tail, kept=True)
            for w, count, tail in (
                (layer.qkv, m, tail_qkv), (layer.gate_up, some, tail_gate_up), (layer.down, some, tail_down)
            )
        ]  # fmt: skip
    s_qkv, s_gate_up, s_down = tails
    room = (
        delta, h, stream, take("x", m, hidden + tail_qkv), s_qkv, qkv,
        take("qk", m, (n_q + p.config.num_kv_heads) * d), attended, lse, *gathered, out,
        take("x behind", some, hidden + tail_gate_up), h2, s_gate_up, gate_up, take("a", some, ffn + tail_down), s_down,
        *_cells(layer, p, shared),
    )  # fmt: skip
    addresses = np.array([_address(t) for t in room], dtype=np.int64)
    p.waiting.add(
        lambda calls: decoder_layers(delta.dtype, calls, p.config.rms_norm_eps, d**-0.5),
        LayerCall(weights_of(layer).table, shared.table, addresses),
    )
    if s_qkv is None or s_gate_up is None or s_down is None:
        return out, h2, None
    return out, h2, (stream, s_qkv, qkv, attended[:, : layer.o.k], lse, o, h2, s_gate_up, gate_up, s_down)


def _cells(layer: DecoderLayer, p: Pass, shared: Shared) -> list[Tensor | None]:
    """The layer's pools of K and V, and room for what they hold of the sequences."""
    if p.context is None:
        return [None] * 4
    cells, width = p.context.cells, p.config.num_kv_heads * p.config.head_dim
    room: list[Tensor | None] = [None, None]
    if shared.held:
        room = [p.space.take(f"{name} held", (shared.held, width), cells.k.dtype) for name in ("k", "v")]
    return [cells.k[layer.index], cells.v[layer.index], *room]


def backward(
    layer: DecoderLayer, dh: Tensor, saved: Saved, p: Pass, grads: linear.Gradients, need_dx: bool, shared: Shared
) -> Tensor | None:
    """What `layer.backward` returns, as :func:`forward`."""
    m, some, hidden, ffn = len(saved.h), shared.count, layer.qkv.k, layer.down.k
    q_width, qk_width = layer.o.k, layer.o.k + p.config.num_kv_heads * p.config.head_dim
    tail_qkv, _, tail_gate_up, _ = shared.tails

    def take(name: str, count: int, columns: int) -> Tensor:
        return p.space.take(name, (count, columns), dh.dtype)

    spread: list[Tensor | None] = [None, None]
    if saved.rows is not None:
        spread = [take("do of all", m, q_width), take("dh of all", m, dh.shape[1])]
    starts = shared.gradients(layer, grads)
    counts = [0, *(8 * len(segments) for segments in shared.segments)]
    room = [
        dh.data_ptr(), dh.stride(0), saved.h.data_ptr(), saved.s_qkv.data_ptr(), saved.s_qkv.stride(0),
        saved.qkv.data_ptr(), saved.attended.data_ptr(), saved.attended.stride(0), saved.lse.data_ptr(),
        saved.o.data_ptr(), saved.o.stride(0), saved.h2.data_ptr(), saved.s_gate_up.data_ptr(),
        saved.s_gate_up.stride(0), saved.gate_up.data_ptr(), saved.s_down.data_ptr(), saved.s_down.stride(0),
        *(
            _address(t)
            for t in (
                take("da", some, ffn), take("d gate_up", some, 2 * ffn + tail_gate_up), take("a", some, ffn),
                take("x", m, hidden), take("dx", m, hidden), take("do", some, q_width), *spread,
                take("qk", m, qk_width), take("dqk", m, qk_width), take("dqkv", m, layer.qkv.n + tail_qkv),
            )
        ),
        *(starts.ctypes.data + sum(counts[: i + 1]) for i in range(4)),
        need_dx,
    ]  # fmt: skip
    p.waiting.add(
        lambda calls: decoder_layers_backward(dh.dtype, calls, p.config.rms_norm_eps, p.config.head_dim**-0.5),
        LayerCall(weights_of(layer).table, shared.table, np.array(room, dtype=np.int64), starts),
    )
    if not need_dx:
        return None
    return dh if spread[1] is None else spread[1]
