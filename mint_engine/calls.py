"""One client's forward or forward_backward on its way through the passes: its loss, its sums, its gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mint_engine.adapters import Adapter, GroupFactors, TrainState
from mint_engine.datums import CheckedDatum, stack_inputs, stack_targets
from mint_engine.errors import NonFiniteError
from mint_engine.losses import Loss
from mint_engine.models.workspace import Workspace
from mint_engine.types import ForwardBackwardOutput, TensorData


@dataclass(frozen=True)
class Call:
    """A call, checked. ``state``: where its gradients go; None for a forward."""

    adapter: Adapter
    state: TrainState | None
    data: Sequence[CheckedDatum]
    loss: Loss
    config: Mapping[str, float]


class Work:
    """A call while its passes run: what they found, on the host. An ``error`` is the end of it.

    The whole answer is made before the passes and filled by them. Where memory for it is missing nothing has been
    added to anybody's gradients yet, so that the call can be done again.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.error: NonFiniteError | None = None
        # The answer's own memory.
        self._logprobs: list[np.ndarray] = [np.empty(d.targets.shape, np.float32) for d in call.data]
        self._answer = _unfilled(call, self._logprobs)

    def wanted(self, data: Sequence[CheckedDatum]) -> Tensor:
        """Which rows of the datums, bool [M], have a gradient that is not known to be zero beforehand."""
        inputs = stack_inputs(data)
        padded = stack_targets(data) < 0
        return ~(self.call.loss.masked(inputs) | padded).all(1)

    def evaluate(self, logprobs: Tensor, targets: Tensor, data: Sequence[CheckedDatum], first: int) -> Tensor:
        """Take the log-probabilities of the datums from ``first`` on, and answer d loss / d logprob.

        ``logprobs`` fp32 and ``targets`` int64 [M, K], K at least that of the widest of ``data``; the answer is that
        wide. A loss that is not finite sets ``error``, and the answer is zero.
        """
        loss, inputs = self.call.loss, stack_inputs(data)
        width = max(d.targets.shape[1] for d in data)
        logprobs, padded = logprobs[:, :width], targets[:, :width] < 0
        values, gradient = loss.fn(logprobs, inputs, self.call.config)
        values, gradient = values.masked_fill(padded, 0.0), gradient.masked_fill(padded, 0.0)
        return gradient if self.record(logprobs, values, data, first) else torch.zeros_like(gradient)

    def record(
        self, logprobs: Tensor, values: Tensor, data: Sequence[CheckedDatum], first: int, at: np.ndarray | None = None
    ) -> bool:
        """Take the log-probabilities and the loss, on the CPU, of the datums from ``first`` on.

        [M, at least K] both; with ``at`` (int64, ascending) they are of those of the M rows, the log-probabilities of
        the others NaN. A loss that is not finite sets ``error``; then the answer is False.
        """
        ends = np.cumsum([d.tokens.size for d in data])
        total = float(values.sum(dtype=torch.float64))
        if not math.isfinite(total):
            self.error = self._not_finite(values, ends, first, at)
            return False
        self._answer.metrics["loss:sum"] += total
        found = logprobs.numpy()
        for own, end in zip(self._logprobs[first : first + len(data)], ends.tolist(), strict=True):
            start = end - len(own)
            if at is None:
                own[:] = found[start:end, : own.shape[1]]
            else:
                low, high = np.searchsorted(at, (start, end)).tolist()
                own.fill(np.nan)
                own[at[low:high] - start] = found[low:high, : own.shape[1]]
        return True

    def _not_finite(self, values: Tensor, ends: np.ndarray, first: int, at: np.ndarray | None) -> NonFiniteError:
        broken = int((~torch.isfinite(values)).any(1).nonzero()[0])
        row = broken if at is None else int(at[broken])
        datum = int(np.searchsorted(ends, row, side="right"))
        position = row - (int(ends[datum - 1]) if datum else 0)
        return NonFiniteError(
            f"loss: {self.call.loss.name} is {float(values[broken].sum())} (datum {first + datum}, position "
            f"{position}); the call was refused and the adapter is as it was"
        )

    def output(self) -> ForwardBackwardOutput:
        """The call's result, unless there is an ``error``: once all its datums are recorded."""
        return self._answer


class Collecting(Work):
    """A call on the CPU: its gradients collect, and count at its end."""

    def __init__(self, call: Call, space: Workspace, index: int) -> None:
        """``index``: of the call among those of the same passes, which share the memory of ``space``."""
        super().__init__(call)
        # A call that fails half-way leaves no trace: its gradients collect in a buffer of its own, or in the state's if
        # that holds none yet and so can be emptied again.
        self.scratch: Tensor | None = None
        if call.state is not None:
            grads = call.state.grads
            if call.state.has_grads:
                self.scratch = space.take(("gradients", index), tuple(grads.shape), grads.dtype).zero_()
            else:
                self.scratch = grads

    def gradients(self) -> dict[str, GroupFactors]:
        """Where a backward adds this call's gradients. Only for a call that wants some."""
        state, scratch = self.call.state, self.scratch
        assert state is not None
        assert scratch is not None
        return state.factors if scratch is state.grads else self.call.adapter.views(scratch)

    def finish(self) -> ForwardBackwardOutput | Exception:
        """The call's result, or why it was refused. Only now its gradients count."""
        if self.error is not None:
            self.withdraw()
            return self.error
        try:
            if self.call.state is not None and self.scratch is not None:
                add_gradients(self.call.state, self.scratch)
        except Exception as error:  # the others' gradients count already: it is this call's alone
            self.withdraw()
            return error
        return self.output()

    def withdraw(self) -> None:
        """The call came to nothing: leave its state as it was."""
        if self.call.state is not None and self.scratch is self.call.state.grads:
            self.call.state.zero_grads()


def _unfilled(call: Call, logprobs: Sequence[np.ndarray]) -> ForwardBackwardOutput:
    """The call's result, but for its loss and what is in ``logprobs``, [N, K] of each datum."""
    data, loss = call.data, call.loss
    weights = sum(float(d.inputs["weights"].sum(dtype=np.float64)) for d in data if "weights" in d.inputs)
    outputs = [TensorData.wrap(lp.reshape(d.shape)) for lp, d in zip(logprobs, data, strict=True)]
    return ForwardBackwardOutput(
        loss_fn_output_type=loss.name,
        loss_fn_outputs=[{"logprobs": output} for output in outputs],
        metrics={"loss:sum": 0.0, "tokens:sum": float(sum(d.tokens.size for d in data))},
        weight_sum=weights if loss.name == "cross_entropy" else None,
    )


def refused_gradients() -> NonFiniteError:
    return NonFiniteError("gradient: not finite; the call was refused and the adapter is as it was")


def add_gradients(state: TrainState, scratch: Tensor) -> None:
    """Add a whole call's gradients to those since the last step. Raises NonFiniteError, and then adds nothing.

    ``scratch`` may be ``state.grads`` itself, if they are the first: then their norm is kept for the step.
    """
    first = scratch is state.grads
    total = state.measure_norm() if first and scratch.is_cpu else float(scratch.sum())
    if not math.isfinite(total) and not bool(torch.isfinite(scratch).all()):
        raise refused_gradients()
    if not first:
        state.grads.add_(scratch)
    state.has_grads = True
