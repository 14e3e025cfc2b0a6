"""Reverse KL to a reference model over the whole vocabulary, with its gradient (on-policy distillation).

At every position of a completion, with p = softmax(student logits / T) and q = softmax(reference logits / T):

    KL = sum_v p_v (log p_v - log q_v)        dKL/dz_v = p_v (log p_v - log q_v - KL) / T

and the loss is the sum of weight * KL over positions and datums. The gradient flows through the student only. The two
models may read different prompts; they share the completion. Logits of a few rows at a time are kept, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mint_engine.adapters import Adapter, TrainState
from mint_engine.batch import PackedBatch, micro_batches, pack
from mint_engine.borders import Seating
from mint_engine.calls import add_gradients
from mint_engine.datums import Limits, check_ids, check_prompt
from mint_engine.errors import NonFiniteError, UserError
from mint_engine.models.decoder import Decoder
from mint_engine.models.layer import Saved
from mint_engine.types import ReverseKLDatum, ReverseKLOutput, TensorData

_LOGITS_BYTES = 64 << 20  # one matrix of logits; half a dozen of its size live at once


@dataclass(frozen=True)
class CheckedPair:
    """``student``, ``reference``: int64 tokens. ``weights``: float32 [T], of the last T positions of both."""

    student: np.ndarray
    reference: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Reference:
    """The model to stay close to: a base model with an adapter, or without one."""

    decoder: Decoder
    adapter: Adapter | None


def check_pairs(data: Sequence[ReverseKLDatum], student: Limits, reference: Limits) -> list[CheckedPair]:
    """Every datum of a call, checked.

    Raises:
        UserError: the first thing that is wrong: argument, what was expected, what came, and which datum; or the two
            models have different vocabularies.
    """
    if student.vocab_size != reference.vocab_size:
        raise UserError(
            f"reference_model_path: expected a model with the student's vocabulary of {student.vocab_size}, got "
            f"{reference.vocab_size}"
        )
    if len(data) == 0:
        raise UserError("data: expected at least one datum, got an empty list")
    return [_check_pair(datum, i, student, reference) for i, datum in enumerate(data)]


def check_temperature(temperature: float) -> float:
    """Raises UserError unless it is a finite number above 0."""
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not number or not math.isfinite(temperature) or temperature <= 0:
        raise UserError(f"temperature: expected a finite number above 0, got {temperature!r}")
    return float(temperature)


def _check_pair(datum: ReverseKLDatum, index: int, student: Limits, reference: Limits) -> CheckedPair:
    at = f"(datum {index})"
    own = check_prompt(datum.student_input, student, f"student_input {at}")
    other = check_prompt(datum.reference_input, reference, f"reference_input {at}")
    targets, weights = datum.target_tokens.to_numpy().reshape(-1), datum.weights.to_numpy().reshape(-1)
    if targets.dtype.kind not in "iu":
        raise UserError(f"target_tokens: expected integers, got dtype {targets.dtype} {at}")
    if targets.size == 0 or targets.size > min(own.size, other.size):
        raise UserError(
            f"target_tokens: expected 1 to {min(own.size, other.size)} tokens, as many as the shorter of student_input "
            f"({own.size}) and reference_input ({other.size}), got {targets.size} {at}"
        )
    check_ids(targets, student, f"target_tokens {at}")
    if weights.size != targets.size:
        raise UserError(f"weights: expected {targets.size} values to match target_tokens, got {weights.size} {at}")
    bad = np.flatnonzero(~np.isfinite(weights))
    if bad.size:
        raise UserError(f"weights: expected finite numbers, got {weights[bad[0]]} at index {bad[0]} {at}")
    return CheckedPair(own, other, weights.astype(np.float32))


def run(
    decoder: Decoder,
    adapter: Adapter,
    state: TrainState,
    reference: Reference,
    data: Sequence[CheckedPair],
    temperature: float,
    *,
    max_tokens: int | None = None,
) -> ReverseKLOutput:
    """The loss of ``data``; its gradients are added to ``state.grads``. ``max_tokens`` per pass, of both models.

    Raises:
        NonFiniteError: a KL or a gradient is not finite. ``state`` is as it was.
    """
    scratch = torch.zeros_like(state.grads)
    theirs = 0 if reference.adapter is None else reference.adapter.rank
    max_tokens = max_tokens or decoder.max_tokens(max(adapter.rank, theirs))
    per_row: list[np.ndarray] = []
    for chosen in micro_batches([d.student.size + d.reference.size for d in data], max_tokens):
        pairs = [data[i] for i in chosen]
        per_row += _one_pass(decoder, adapter, scratch, reference, pairs, temperature, first_datum=chosen.start)
    add_gradients(state, scratch)
    losses = [float((d.weights.astype(np.float64) * kl).sum()) for d, kl in zip(data, per_row, strict=True)]
    weighted = np.concatenate([kl[d.weights != 0] for d, kl in zip(data, per_row, strict=True)])
    return ReverseKLOutput(
        outputs=[{"loss": TensorData.from_numpy(np.array([loss], dtype=np.float32))} for loss in losses],
        metrics={
            "loss:sum": sum(losses),
            "kl:mean": float(weighted.mean()) if weighted.size else 0.0,
            "tokens:sum": float(weighted.size),
        },
    )


def _one_pass(
    decoder: Decoder, adapter: Adapter, scratch: Tensor, reference: Reference, pairs: Sequence[CheckedPair],
    temperature: float, *, first_datum: int,
) -> list[np.ndarray]:  # fmt: skip
    """KL of every position of every pair, float64 (0 where the weight is 0); gradients are added to ``scratch``."""
    own, other = pack([d.student for d in pairs]), pack([d.reference for d in pairs])
    weights = torch.from_numpy(np.concatenate([d.weights for d in pairs]))
    active = weights.nonzero().squeeze(1)
    kl = torch.zeros(len(weights), dtype=torch.float64)
    if active.numel():
        lengths = [len(d.weights) for d in pairs]
        rows, other_rows = (_last_rows(batch, lengths)[active] for batch in (own, other))
        seating, other_seating = _seat(decoder, adapter, reference, own.num_tokens, other.num_tokens)

        h, _ = reference.decoder.hidden(
            other.tokens, other.positions, other_seating, reference.decoder.packed_attend(other)
        )
        other_seating = other_seating.select(other_rows)
        target = reference.decoder.head_input(h[other_rows], other_seating)

        saved: list[Saved] = []
        h, p = decoder.hidden(own.tokens, own.positions, seating, decoder.packed_attend(own), saved)
        own_rows = h[rows]
        seating = seating.select(rows)
        x = decoder.head_input(own_rows, seating)

        grads = {adapter.uid: adapter.views(scratch)}
        dh = torch.empty_like(own_rows)
        for part in _parts(len(active), decoder.config.vocab_size):
            own_part, other_part = seating.select(part), other_seating.select(part)
            logits = decoder.logits(x[part], own_part)
            value, gradient = kl_and_gradient(logits, reference.decoder.logits(target[part], other_part), temperature)
            kl[active[part]] = value.double().to(kl.device)
            gradient.mul_(weights[active[part], None].to(gradient.device))
            dh[part] = decoder.head_backward_logits(own_rows[part], x[part], gradient, own_part, grads)
        p.cu_seqlens = own.cu_seqlens
        decoder.hidden_backward(dh, rows, saved, p, grads)
    per_datum = np.split(kl.numpy(), np.cumsum([len(d.weights) for d in pairs])[:-1])
    for i, values in enumerate(per_datum):
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise NonFiniteError(
                f"loss: the reverse KL is {values[bad[0]]} (datum {first_datum + i}, position {bad[0]} of its "
                "targets); the call was refused and the adapter is as it was"
            )
    return per_datum


def kl_and_gradient(logits: Tensor, reference: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(KL [M], dKL/dlogits [M, V]) from the logits of both models, fp32 [M, V]."""
    log_p, log_q = (torch.log_softmax(z / temperature, dim=-1) for z in (logits, reference))
    p = log_p.exp()
    difference = log_p.sub_(log_q)
    kl = (p * difference).sum(-1)
    return kl, difference.sub_(kl[:, None]).mul_(p).div_(temperature)


def _seat(decoder: Decoder, adapter: Adapter, reference: Reference, own: int, other: int) -> tuple[Seating, Seating]:
    """Seatings of the student's and of the reference's rows. On one base both adapters sit in it at the same time."""
    if reference.decoder is not decoder:
        theirs = reference.decoder.borders.seat([(reference.adapter, 0, other)])
        return decoder.borders.seat([(adapter, 0, own)]), theirs
    both = decoder.borders.seat([(adapter, 0, own), (reference.adapter, own, own + other)])
    return both.select(torch.arange(own)), both.select(torch.arange(own, own + other))


def _last_rows(batch: PackedBatch, lengths: Sequence[int]) -> Tensor:
    """Rows of the last ``lengths[i]`` positions of each sequence, int64."""
    ends = batch.cu_seqlens[1:].tolist()
    return torch.cat([torch.arange(end - n, end) for end, n in zip(ends, lengths, strict=True)])


def _parts(rows: int, vocab: int) -> Iterator[Tensor]:
    """Consecutive rows whose logits fit the scratch."""
    size = max(1, _LOGITS_BYTES // (4 * vocab))
    for start in range(0, rows, size):
        yield torch.arange(start, min(start + size, rows))
