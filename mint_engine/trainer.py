"""forward, forward_backward: the datums of calls in packed passes over the base model.

Calls of different clients may share a pass (:func:`run_together`): their sequences lie side by side, each row goes
through its own client's adapter, and each call has its own loss, its own sums and its own gradients (`calls.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import torch
from torch import Tensor

from mint_engine.adapters import Adapter, TrainState
from mint_engine.batch import micro_batches, pack
from mint_engine.calls import Call, Collecting
from mint_engine.datums import CheckedDatum, stack_targets
from mint_engine.device import upload
from mint_engine.gpu.memory import Plan
from mint_engine.gpu.run import TARGET_CELLS, programs
from mint_engine.losses import Loss
from mint_engine.models.decoder import Decoder
from mint_engine.models.layer import Saved
from mint_engine.pending import Pending
from mint_engine.types import ForwardBackwardOutput

Outcomes: TypeAlias = list[ForwardBackwardOutput | Exception]


def run(
    decoder: Decoder,
    adapter: Adapter,
    state: TrainState | None,
    data: Sequence[CheckedDatum],
    loss: Loss,
    config: Mapping[str, float],
    *,
    max_tokens: int | None = None,
) -> ForwardBackwardOutput:
    """The loss of ``data`` and, when ``state`` is given, its gradients added to ``state.grads``.

    Losses and gradients are sums over tokens and datums (DESIGN.md 2.5). ``max_tokens`` per pass: by default what the
    decoder's ``activation_bytes`` allow.

    Raises:
        NonFiniteError: the loss or a gradient is not finite. ``state`` is as it was.
    """
    (outcome,) = run_together(decoder, [Call(adapter, state, data, loss, config)], max_tokens=max_tokens)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_together(
    decoder: Decoder, calls: Sequence[Call], *, max_tokens: int | None = None, masked_logprobs: bool = True
) -> Outcomes:
    """Calls of different adapters in shared passes: of each what :func:`run` answers, or the error that it raises.

    Nothing of a call, not even a refused one, reaches another's rows, sums or gradients. Company can change the order
    of the sums inside a product (more rows and wider borders may be cut into other blocks), so a call's numbers are
    those it gets alone up to roundings of the compute dtype (in float32, 1e-5 relative) and not to the bit. Of two
    runs with the same calls in the same order, and of calls that are alone, every bit is the same.

    Without ``masked_logprobs``, positions that the loss masks (weight or advantage 0) are not computed in calls with a
    backward: they skip the unembedding and most of the last layer, and their log-probability is reported as NaN.
    Losses and gradients are the same sums.
    """
    begun = begin_together(decoder, calls, max_tokens=max_tokens, masked_logprobs=masked_logprobs)
    return begun.result() if isinstance(begun, Pending) else begun


def begin_together(
    decoder: Decoder, calls: Sequence[Call], *, max_tokens: int | None = None, masked_logprobs: bool = True
) -> Outcomes | Pending[Outcomes]:
    """The same; on a GPU it is only queued. What is queued behind it finds the calls' gradients in their states."""
    if (found := programs(decoder)) is not None:
        memory = None if max_tokens is None else Plan(max_tokens, checkpoint=False)
        return found.queue(calls, masked_logprobs=masked_logprobs, memory=memory)
    # Calls without a backward go last: the backward is a pass over the rows before them.
    works = sorted(
        (Collecting(call, decoder.space, i) for i, call in enumerate(calls)), key=lambda work: work.scratch is None
    )
    max_tokens = max_tokens or decoder.max_tokens(max(call.adapter.rank for call in calls))
    datums = [(work, i) for work in works for i in range(len(work.call.data))]
    lengths = [work.call.data[i].tokens.size for work, i in datums]
    widths = [work.call.data[i].targets.shape[1] for work, i in datums]
    try:
        for chosen in micro_batches(lengths, max_tokens, widths, TARGET_CELLS):
            # One that was refused in an earlier pass is over.
            live = (datum for datum in datums[chosen.start : chosen.stop] if datum[0].error is None)
            _one_pass(decoder, _spans(live), masked_logprobs)
    except BaseException:
        for work in works:
            work.withdraw()
        raise
    outcomes = {id(work.call): work.finish() for work in works}  # nothing is done again from here on
    return [outcomes[id(call)] for call in calls]


@dataclass(frozen=True)
class _Span:
    """Rows ``start:stop`` of a pass: some datums of one call, ``first`` and on."""

    work: Collecting
    data: Sequence[CheckedDatum]
    first: int
    start: int
    stop: int


def _spans(datums: Iterable[tuple[Collecting, int]]) -> list[_Span]:
    """Datums, given as (call, index), laid end to end; those of a call lie together."""
    spans, row = [], 0
    for work, group in groupby(datums, key=lambda datum: datum[0]):
        indices = [i for _, i in group]
        data = work.call.data[indices[0] : indices[-1] + 1]
        rows = sum(d.tokens.size for d in data)
        spans.append(_Span(work, data, indices[0], row, row + rows))
        row += rows
    return spans


def _one_pass(decoder: Decoder, spans: Sequence[_Span], masked_logprobs: bool) -> None:
    """Forward over all rows, backward over those of the calls that want gradients, which come first."""
    if not spans:
        return
    data = [d for span in spans for d in span.data]
    packed, targets = pack([d.tokens for d in data]), stack_targets(data)
    seating = decoder.borders.seat([(s.work.call.adapter, s.start, s.stop) for s in spans], grouped=True)
    training = [s for s in spans if s.work.scratch is not None]
    saved: list[Saved] | None = [] if training else None
    rows = None if masked_logprobs else _wanted(spans)
    if rows is not None and not len(rows):
        for s in spans:  # a loss of zero, without gradients
            s.work.evaluate(torch.full((s.stop - s.start, targets.shape[1]), torch.nan), targets[s.start : s.stop],
                            s.data, s.first)  # fmt: skip
        return
    h, p = decoder.hidden(
        packed.tokens, packed.positions, seating, decoder.packed_attend(packed), saved, rows=rows, space=decoder.space
    )
    at_head = seating.bordered if rows is None else seating.bordered.select(rows)
    x = decoder.head_input(h, at_head, decoder.space)
    kept = decoder.room_to_keep(_differentiable(spans, rows)) if training else None
    logprobs, lse = decoder.target_logprob(x, targets if rows is None else targets[rows], at_head, kept)
    reported = logprobs
    if rows is not None:
        reported = torch.full(targets.shape, torch.nan, device=logprobs.device)
        reported[upload(rows, logprobs.device)] = logprobs
    gradients = torch.zeros_like(reported)
    for s in spans:
        of_span = slice(s.start, s.stop)
        gradient = s.work.evaluate(reported[of_span], targets[of_span], s.data, s.first)
        if s.work.scratch is not None:
            gradients[of_span, : gradient.shape[1]] = gradient
    # A row whose gradient is zero costs nothing in the unembedding's backward, and little in the last layer's.
    active = (gradients != 0).any(1).nonzero().squeeze(1)
    if saved is None or not active.numel():
        return
    grads = {s.work.call.adapter.uid: s.work.gradients() for s in training}
    at = active if rows is None else torch.searchsorted(rows, active)
    dh = decoder.head_backward(
        decoder.rows(h, at, "h"), decoder.rows(x, at, "x"), targets[active], gradients[active], lse[at],
        at_head.select(at), grads, kept, at,
    )  # fmt: skip
    end, sequences = training[-1].stop, sum(len(s.data) for s in training)
    p.cu_seqlens = packed.cu_seqlens[: sequences + 1]
    if end < packed.num_tokens:
        p, saved[:] = p.first(end), [s.first(end) for s in saved]
    decoder.hidden_backward(dh, active, saved, p, grads)


def _wanted(spans: Sequence[_Span]) -> Tensor | None:
    """The rows (int64, ascending) of forwards, and those of the others that may have a gradient; None: all rows."""
    wanted = _where(spans, forwards=True)
    return None if bool(wanted.all()) else wanted.nonzero().squeeze(1)


def _differentiable(spans: Sequence[_Span], rows: Tensor | None) -> Tensor:
    """Of the ``rows`` of a pass (None: all) those that may have a gradient (int64, ascending: places among them)."""
    found = _where(spans, forwards=False)
    return (found if rows is None else found[rows]).nonzero().squeeze(1)


def _where(spans: Sequence[_Span], *, forwards: bool) -> Tensor:
    """bool [M]: rows that may have a gradient; those of calls that want none are ``forwards``."""
    parts = [
        torch.full((s.stop - s.start,), forwards) if s.work.scratch is None else s.work.wanted(s.data) for s in spans
    ]
    return torch.cat(parts)
