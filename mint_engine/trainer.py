"""forward, forward_backward: one call's datums over the base model, with nothing applied unless all of it succeeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mint_engine.adapters import Adapter, TrainState
from mint_engine.batch import micro_batches
from mint_engine.datums import CheckedDatum, TrainingBatch, pack_training
from mint_engine.errors import NonFiniteError
from mint_engine.losses import Loss
from mint_engine.models.decoder import Decoder
from mint_engine.models.layer import Saved
from mint_engine.types import ForwardBackwardOutput, TensorData

# Activations kept at once; a call that needs more is cut at datum boundaries into passes, with the same sums.
ACTIVATION_BYTES = 4 << 30
# Targets of a pass, padded to those of the widest datum: one wide datum must not multiply all the others.
TARGET_CELLS = 1 << 25


@dataclass(frozen=True)
class _PassResult:
    logprobs: Tensor  # fp32 [M, K]
    loss: float
    weight: float


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

    Losses and gradients are sums over tokens and datums (DESIGN.md 2.5). ``max_tokens`` per pass: by default what
    ACTIVATION_BYTES allow.

    Raises:
        NonFiniteError: the loss or a gradient is not finite. ``state`` is as it was.
    """
    # Gradients of this call collect in a scratch buffer of their own: a call that fails half-way leaves no trace.
    scratch = None if state is None else torch.zeros_like(state.grads)
    if max_tokens is None:
        max_tokens = max(1, ACTIVATION_BYTES // decoder.activation_bytes_per_token)
    results: list[_PassResult] = []
    widths = [d.targets.shape[1] for d in data]
    for chosen in micro_batches([d.tokens.size for d in data], max_tokens, widths, TARGET_CELLS):
        batch = pack_training([data[i] for i in chosen])
        results.append(_one_pass(decoder, adapter, scratch, batch, loss, config, first_datum=chosen.start))
    if state is not None and scratch is not None:
        add_gradients(state, scratch)
    return ForwardBackwardOutput(
        loss_fn_output_type=loss.name,
        loss_fn_outputs=_per_datum(data, [r.logprobs.numpy() for r in results]),
        metrics={"loss:sum": sum(r.loss for r in results), "tokens:sum": float(sum(d.tokens.size for d in data))},
        weight_sum=sum(r.weight for r in results) if loss.name == "cross_entropy" else None,
    )


def add_gradients(state: TrainState, scratch: Tensor) -> None:
    """Add a whole call's gradients to those since the last step. Raises NonFiniteError, and then adds nothing."""
    if not bool(torch.isfinite(scratch.sum())) and not bool(torch.isfinite(scratch).all()):
        raise NonFiniteError("gradient: not finite; the call was refused and the adapter is as it was")
    state.grads.add_(scratch)
    state.has_grads = True


def _one_pass(
    decoder: Decoder, adapter: Adapter, scratch: Tensor | None, batch: TrainingBatch, loss: Loss,
    config: Mapping[str, float], *, first_datum: int,
) -> _PassResult:  # fmt: skip
    packed = batch.packed
    seating = decoder.borders.seat([(adapter, 0, packed.num_tokens)])
    saved: list[Saved] | None = None if scratch is None else []
    h, p = decoder.hidden(packed.tokens, packed.positions, seating, decoder.packed_attend(packed), saved)
    x = decoder.head_input(h, seating)
    logprobs, lse = decoder.target_logprob(x, batch.targets, seating)
    values, gradient = loss.fn(logprobs, batch.inputs, config)
    padded = batch.targets < 0
    values, gradient = values.masked_fill(padded, 0.0), gradient.masked_fill(padded, 0.0)
    total = float(values.double().sum())
    broken = (~torch.isfinite(values)).any(1).nonzero()
    if broken.numel():
        row = int(broken[0])
        datum = int(torch.searchsorted(packed.cu_seqlens, row, right=True)) - 1
        raise NonFiniteError(
            f"loss: {loss.name} is {float(values[row].sum())} (datum {first_datum + datum}, position "
            f"{row - int(packed.cu_seqlens[datum])}); the call was refused and the adapter is as it was"
        )
    if scratch is not None and saved is not None:
        # A row whose gradient is zero costs nothing in the unembedding's backward.
        active = (gradient != 0).any(1).nonzero().squeeze(1)
        if active.numel():
            grads = {adapter.uid: adapter.views(scratch)}
            dh = torch.zeros_like(h)
            targets, own = batch.targets[active], seating.select(active)
            dh[active] = decoder.head_backward(h[active], x[active], targets, gradient[active], lse[active], own, grads)
            p.cu_seqlens = packed.cu_seqlens
            decoder.hidden_backward(dh, saved, p, grads)
    weights = batch.inputs.get("weights")
    return _PassResult(logprobs, total, 0.0 if weights is None else float(weights.double().sum()))


def _per_datum(data: Sequence[CheckedDatum], logprobs: Sequence[np.ndarray]) -> list[dict[str, TensorData]]:
    """Cut the passes' log-probabilities back into one fp32 tensor per datum, shaped like its target_tokens."""
    out: list[dict[str, TensorData]] = []
    chunks = iter(logprobs)
    chunk, at = next(chunks), 0
    for d in data:
        if at == len(chunk):
            chunk, at = next(chunks), 0
        n, k = d.targets.shape
        out.append({"logprobs": TensorData.from_numpy(chunk[at : at + n, :k].reshape(d.shape))})
        at += n
    return out
