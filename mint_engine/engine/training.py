"""Training operations: each runs in its model's order, and changes nothing unless all of it succeeds."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from mint_engine import custom_loss, reverse_kl, trainer
from mint_engine.adapters import Adapter, TrainState
from mint_engine.datums import check_data
from mint_engine.engine.core import EngineCore, Steps
from mint_engine.engine.residents import Model
from mint_engine.engine.together import Together, TrainingCall
from mint_engine.losses import get_loss
from mint_engine.off_thread import Apart
from mint_engine.optimizer import begin_step
from mint_engine.pending import Pending
from mint_engine.state import load_adapter
from mint_engine.store import Store
from mint_engine.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    OptimStepResponse,
    ReverseKLDatum,
    ReverseKLOutput,
)

_REFERENCES = 2  # reference adapters kept: a training loop names the same one at every step


class Training(EngineCore):
    _together: Together
    _references: OrderedDict[Path, Adapter]  # by directory: a version's never changes. The device thread's own

    def forward(
        self, model_id: str, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """The loss and log-probabilities of ``data``; no gradients."""
        return self._train(model_id, data, loss_fn, loss_fn_config, backward=False)

    def forward_backward(
        self, model_id: str, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """The same, and the gradients are added to those of the calls since the last step."""
        return self._train(model_id, data, loss_fn, loss_fn_config, backward=True)

    def _train(
        self, model_id: str, data: Sequence[Datum], loss_fn: str, config: Mapping[str, Any] | None, *, backward: bool
    ) -> Future[ForwardBackwardOutput]:
        data, config = list(data), copy.copy(config)  # the caller may change both once this returns
        call = TrainingCall(self._together, model_id, data, loss_fn, config, backward=backward)
        return self._residents.lane(model_id).submit(call)

    def forward_backward_custom(
        self, model_id: str, data: Sequence[Datum], fn: custom_loss.CustomLoss
    ) -> Future[ForwardBackwardOutput]:
        """A loss of the caller's own: ``fn(data, logprobs) -> (loss, metrics)`` on torch tensors that require grad.

        ``fn`` runs on a thread of its own; the calls that follow on this model wait for it, other models do not. It
        may wait for calls on those.
        """
        data = list(data)

        def run() -> Steps[ForwardBackwardOutput]:
            model = self._residents.model(model_id)

            def both(datums: Sequence[Datum], state: TrainState | None) -> ForwardBackwardOutput:
                loss = get_loss("cross_entropy")
                checked = check_data(datums, loss, {}, model.base.limits)
                return trainer.run(model.base.decoder, model.adapter, state, checked, loss, {})

            outputs = both(custom_loss.with_weights(data), None).loss_fn_outputs
            evaluated = yield Apart(lambda: custom_loss.evaluate(fn, data, outputs))
            surrogate = both(custom_loss.with_weights(data, evaluated.weights), model.state)
            return custom_loss.result(surrogate, evaluated)

        lane = self._residents.lane(model_id)
        return self._submit("forward_backward_custom", lane, run, lambda _: _tokens(data))

    def forward_backward_reverse_kl(
        self, model_id: str, data: Sequence[ReverseKLDatum], *, reference_model_path: str, temperature: float = 1.0,
        reader: Store | None = None,
    ) -> Future[ReverseKLOutput]:  # fmt: skip
        """Sum of weight * KL(student || reference) over the vocabulary at each position; gradients are added.

        ``reference_model_path``: a checkpoint, on this or another base model with the same vocabulary, or the name of
        the student's own base model. ``reader``: whose checkpoints may be read, if it is not the model's owner.
        """
        data = list(data)

        def run() -> Steps[ReverseKLOutput]:
            model = self._residents.model(model_id)
            divisor = reverse_kl.check_temperature(temperature)
            base, adapter = model.base, None
            if reference_model_path != base.name:
                store = reader or self._view(model.owner)
                base, adapter = yield from self._reference(store, reference_model_path)
            pairs = reverse_kl.check_pairs(data, model.base.limits, base.limits)
            reference = reverse_kl.Reference(base.decoder, adapter)
            return reverse_kl.run(model.base.decoder, model.adapter, model.state, reference, pairs, divisor)

        tokens = sum(datum.student_input.length for datum in data)
        lane = self._residents.lane(model_id)
        return self._submit("forward_backward_reverse_kl", lane, run, lambda _: tokens)

    def _reference(self, store: Store, path: str) -> Steps[Any]:
        """(base model, adapter) of a checkpoint, which this model will stay close to."""
        found = yield lambda: store.resolve(path, prefer="sampler_weights")
        base = yield Apart(lambda: self._bases.get(found.record.base_model))
        if found.directory in self._references:
            self._references.move_to_end(found.directory)
        else:
            found = yield lambda: store.resolve(path, prefer="sampler_weights")
            self._references[found.directory] = yield lambda: load_adapter(found.directory, base, path)
            while len(self._references) > _REFERENCES:
                self._references.popitem(last=False)
        return base, self._references[found.directory]

    def optim_step(self, model_id: str, adam_params: AdamParams) -> Future[OptimStepResponse]:
        """AdamW with the gradients since the last step, which are zero afterwards."""

        def run() -> OptimStepResponse | Pending[OptimStepResponse]:
            model: Model = self._residents.model(model_id)
            return begin_step(model.adapter, model.state, adam_params, model.base.decoder)

        return self._residents.lane(model_id).submit(self._recorder.brief("optim_step", run), brief=True)


def _tokens(data: Sequence[Datum]) -> int:
    return sum(datum.num_tokens for datum in data)
