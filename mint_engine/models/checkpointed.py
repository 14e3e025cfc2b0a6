"""The decoder's pass when memory is short: each layer keeps its input only, and is computed again for its backward.

Half as much arithmetic more, for a frozen base (DESIGN.md 2.3), and the same numbers to the bit: a layer's input is
rounded before anything reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mint_engine.borders import Seating
from mint_engine.models import layer as decoder_layer
from mint_engine.models import linear
from mint_engine.models.decoder import Decoder
from mint_engine.models.layer import Attend, Pass, Saved
from mint_engine.models.workspace import Workspace


@dataclass
class _Inputs:
    """What is kept instead of `Saved`: the layers' inputs [M, H], and which rows the last layer was done for."""

    streams: list[Tensor]
    rows: Tensor | None


def functions(decoder: Decoder) -> tuple[Callable[..., tuple[Tensor, Pass]], Callable[..., None]]:
    """``(hidden, hidden_backward)`` with the signatures of the decoder's own."""
    kept = _Inputs([], None)

    def hidden(
        tokens: Tensor, positions: Tensor, seating: Seating, attend: Attend, saved: list[Saved] | None = None,
        *, rows: Tensor | None = None, space: Workspace | None = None, length: int | None = None,
    ) -> tuple[Tensor, Pass]:  # fmt: skip
        p, delta = decoder.embed(tokens, positions, seating, attend, length)
        kept.rows = rows
        h: Tensor | None = None
        for la in decoder.layers:
            stream = p.space.take(("input", la.index), tuple(delta.shape), delta.dtype)
            stream = stream.copy_(delta) if h is None else torch.add(h, delta, out=stream)
            kept.streams.append(stream)
            delta, h, _ = decoder_layer.forward(la, stream, None, p, False, rows if la is decoder.layers[-1] else None)
        assert h is not None
        return torch.add(h, delta, out=None if space is None else space.take("stream", tuple(h.shape), h.dtype)), p

    def hidden_backward(dh: Tensor, rows: Tensor, saved: Any, p: Pass, grads: linear.Gradients) -> None:
        gradient: Tensor | None = decoder.gradient_stream(dh, p)
        last = decoder.layers[-1]
        for la in reversed(decoder.layers):
            assert gradient is not None
            # All layers write what they keep into the memory that those of the forward have used: layer.forward's -1.
            some = kept.rows if la is last else None
            _, _, again = decoder_layer.forward(replace(la, index=-1), kept.streams[la.index], None, p, True, some)
            assert again is not None
            if la is last:
                again = again.only(rows, p.space)
            gradient = decoder_layer.backward(la, gradient, again, p, grads, need_dx=la.index > 0)

    return hidden, hidden_backward
