"""optim_step: Adam with bias correction and decoupled weight decay (AdamW, arXiv:1711.05101) on the fp32 masters."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mint_engine.adapters import LARGEST, Adapter, TrainState
from mint_engine.borders import Borders
from mint_engine.errors import NonFiniteError
from mint_engine.gpu.run import Programs, programs
from mint_engine.gpu.stepper import DROPPED, REFUSED, TAKEN, Conditions
from mint_engine.kernels import Places, adamw_places_, hyperparameters
from mint_engine.models.decoder import Decoder
from mint_engine.pending import Pending
from mint_engine.types import AdamParams, OptimStepResponse

FP32_MAX = torch.finfo(torch.float32).max


def optim_step(
    adapter: Adapter, state: TrainState, params: AdamParams, decoder: Decoder | None = None
) -> OptimStepResponse:
    """Apply the accumulated gradients and zero them. Without gradients it is a step with zero gradients.

    ``grad_clip_norm`` > 0 clips by the global L2 norm first, as ``torch.nn.utils.clip_grad_norm_`` does.
    ``decoder``: the base model; its border is written too, if the adapter sits there.

    Raises:
        NonFiniteError: the gradient norm is not finite (the gradients are dropped), or the step would overflow fp32
            (they are kept). The adapter and the optimiser are as they were.
    """
    begun = begin_step(adapter, state, params, decoder)
    return begun.result() if isinstance(begun, Pending) else begun


def begin_step(
    adapter: Adapter, state: TrainState, params: AdamParams, decoder: Decoder | None = None
) -> OptimStepResponse | Pending[OptimStepResponse]:
    """The same; on a GPU it is only queued. What is queued behind it finds the new weights."""
    if decoder is not None and (found := programs(decoder)) is not None:
        return queue_step(found, adapter, state, params)
    norm = state.norm()
    if not math.isfinite(norm):
        state.zero_grads()
        raise _dropped(norm)
    conditions = _conditions(params)
    bound = _bound(state.largest(adapter), conditions)
    if not bound < conditions.limit:
        raise _refused(bound, params)
    borders = None if decoder is None else decoder.borders
    offset = None if borders is None else borders.offset_of(adapter)
    places = Places([(adapter.params.numel(), None)], "cpu") if borders is None else borders.places(adapter, offset)
    numbers = _numbers(state, params, grad_scale=min(1.0, conditions.clip / (norm + 1e-6)))
    hyper = torch.tensor(numbers, dtype=torch.float32)
    largest = adamw_places_(adapter.params, state.grads, state.exp_avg, state.exp_avg_sq, hyper, places)
    _written(adapter, borders, offset)
    state.taken(adapter, largest)
    return _done(state, norm)


def queue_step(found: Programs, adapter: Adapter, state: TrainState, params: AdamParams) -> Pending[OptimStepResponse]:
    """What :func:`optim_step` does, by recorded launches (`gpu/stepper.py`)."""
    if state.settle is not None:
        state.settle()  # whether that step was taken decides the number of this one
    borders = found.borders
    with torch.no_grad(), found.on_device():
        offset, stepper = borders.offset_of(adapter), found.steppers.of(adapter, state)
        step = _Step(stepper.queue(adapter, state, _numbers(state, params), _conditions(params)),
                     found.mark(), state, params)  # fmt: skip
    state.settle = step.settle
    # The weights may have changed; if they have not, what sits in the border is as good as before.
    _written(adapter, borders, offset)
    return Pending(step.wait, step.finish)


class _Step:
    """A step on the device, which decides whether it is taken."""

    def __init__(self, found: Tensor, wait: Callable[[], None], state: TrainState, params: AdamParams) -> None:
        self.wait, self._found, self._state, self._params = wait, found, state, params
        self._outcome: OptimStepResponse | NonFiniteError | None = None

    def settle(self) -> None:
        """Wait, and count the step if it was taken; once."""
        if self._outcome is not None:
            return
        self.wait()
        norm, low, high, what = self._found.tolist()
        if what == TAKEN:
            self._outcome = _done(self._state, norm)
        else:
            bound = _bound(max(-low, high), _conditions(self._params))
            self._outcome = _dropped(norm) if what == DROPPED else _refused(bound, self._params)
        if self._state.settle == self.settle:
            self._state.settle = None

    def finish(self) -> OptimStepResponse:
        self.settle()
        if self._found[3] != REFUSED:
            self._state.has_grads = False
        if not isinstance(self._outcome, OptimStepResponse):
            assert self._outcome is not None
            raise self._outcome
        return self._outcome


def _numbers(state: TrainState, params: AdamParams, grad_scale: float = 1.0) -> tuple[float, ...]:
    """The next step's numbers as `kernels.adamw_places_` takes them; NonFiniteError if one is not finite in fp32."""
    numbers = hyperparameters(
        lr=params.learning_rate, beta1=params.beta1, beta2=params.beta2, eps=params.eps,
        weight_decay=params.weight_decay, step=state.step + 1, grad_scale=grad_scale,
    )  # fmt: skip
    if max(map(abs, numbers)) > FP32_MAX:  # times a zero it would be NaN, which no bound shows
        raise NonFiniteError(
            f"optim_step: learning_rate {params.learning_rate}, weight_decay {params.weight_decay} and betas "
            f"{params.betas} make factors beyond fp32; the step was refused"
        )
    return numbers


def _conditions(p: AdamParams) -> Conditions:
    """Clipping, and the bound on Adam's update (arXiv:1412.6980, section 2.1) by which a step could not fit fp32."""
    update = p.learning_rate * max(1.0, (1 - p.beta1) / math.sqrt(1 - p.beta2))
    return Conditions(
        clip=p.grad_clip_norm if p.grad_clip_norm > 0 else math.inf,
        growth=max(1.0, abs(1 - p.learning_rate * p.weight_decay)),
        update=update,
        limit=LARGEST,  # with room to fp32's: the bound is loose when the betas change between steps
    )


def _bound(largest: float, conditions: Conditions) -> float:
    return largest * conditions.growth + conditions.update


def _dropped(norm: float) -> NonFiniteError:
    return NonFiniteError(f"gradient: its norm is {norm}; the step was refused and the gradients were dropped")


def _refused(bound: float, p: AdamParams) -> NonFiniteError:
    return NonFiniteError(
        f"optim_step: learning_rate {p.learning_rate} and weight_decay {p.weight_decay} could take weights to "
        f"{bound:.1e}, beyond fp32; the step was refused"
    )


def _written(adapter: Adapter, borders: Borders | None, offset: int | None) -> None:
    """The weights have changed, also where they sit in the border."""
    adapter.version += 1
    if borders is not None and offset is not None:
        borders.written(adapter, offset)


def _done(state: TrainState, norm: float) -> OptimStepResponse:
    state.step += 1
    return OptimStepResponse(metrics={"grad_norm": norm, "step": float(state.step)})
