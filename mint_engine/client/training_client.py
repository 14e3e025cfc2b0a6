"""`TrainingClient`: one adapter in training."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mint_engine.client.connection import access_token, address_of_record, check_metadata
from mint_engine.client.futures import APIFuture, completed, failed, future_twin
from mint_engine.client.loss_handle import LossHandle
from mint_engine.client.ready import Ready
from mint_engine.client.sampling_client import SamplingClient
from mint_engine.errors import UserError
from mint_engine.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    ReverseKLDatum,
    ReverseKLOutput,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch
    from transformers import PreTrainedTokenizerBase

    from mint_engine.client.protocol import ClientEngine
    from mint_engine.client.session import Session

    CustomLoss = Callable[[list[Datum], list[torch.Tensor]], tuple[torch.Tensor, dict[str, float]]]


class TrainingClient(Ready):
    """Trains one LoRA adapter. Made by `ServiceClient`.

    Calls return at once and run in the order in which they were made; `.result()` or `await` gives the outcome. A call
    that fails raises there and leaves the adapter as it was.
    """

    def __init__(self, engine: ClientEngine, session: Session, model_id: str) -> None:
        self._engine = engine
        self._session = session  # which lives as long as this client does
        self._info = engine.get_info(model_id)
        self._losses: set[int] = set()  # threads that are in a loss of this client's
        # Nobody can reach the model without this client: let it go with it, after the work already submitted.
        weakref.finalize(self, engine.release, model_id).atexit = False

    @property
    def model_id(self) -> str:
        """Also the id of the training run, the first part of its checkpoints' paths."""
        return self._info.model_id

    def get_info(self) -> GetInfoResponse:
        return self._info

    async def get_info_async(self) -> GetInfoResponse:
        return self._info

    def get_console_url(self) -> str:
        """Where to look at this training run: see `ServiceClient.get_console_url`."""
        return address_of_record(self._engine, "training_runs", self.model_id)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's Hugging Face tokenizer."""
        return self._engine.tokenizer(self._base_model)

    # ---- training ------------------------------------------------------------------------------------------------

    def forward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: Mapping[str, Any] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Loss and log-probabilities of `data`, without gradients. See `forward_backward`."""
        return self._run(self._in_turn.forward, data, loss_fn, loss_fn_config)

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: Mapping[str, Any] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Loss, log-probabilities and gradients of `data`. Gradients add up until `optim_step`.

        An engine with ``masked_logprobs`` off reports NaN for positions of weight or advantage 0.

        Args:
            data: at least one Datum.
            loss_fn: "cross_entropy", "importance_sampling", "ppo", "cispo" or "dro": sums over tokens and datums.
            loss_fn_config: clip_low_threshold and clip_high_threshold of ppo and cispo, beta of dro.
        """
        return self._run(self._in_turn.forward_backward, data, loss_fn, loss_fn_config)

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss, *, loss_type_input: Literal["logprobs"] | None = "logprobs"
    ) -> APIFuture[ForwardBackwardOutput]:
        """The same with a loss of your own: `loss_fn(data, logprobs)` gets one tensor of target log-probabilities per
        datum and returns `(loss, metrics)`; the loss is differentiated with torch. Or a `LossHandle` of
        `ServiceClient.create_custom_loss`. It may call other clients, but not this one: those calls wait for it."""
        if loss_type_input not in (None, "logprobs"):
            return failed(UserError(f"loss_type_input: expected 'logprobs', got {loss_type_input!r}"))
        if not callable(loss_fn):
            return failed(UserError(f"loss_fn: expected a function, got {type(loss_fn).__name__}"))
        check = loss_fn.check if isinstance(loss_fn, LossHandle) else None

        def loss(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            self._losses.add(threading.get_ident())
            try:
                return loss_fn(data, logprobs)
            finally:
                self._losses.discard(threading.get_ident())

        return self._run(self._in_turn.forward_backward_custom, data, loss, check=check)

    def forward_backward_reverse_kl(
        self, data: Sequence[ReverseKLDatum], reference_model_path: str, temperature: float = 1.0
    ) -> APIFuture[ReverseKLOutput]:
        """The reverse KL divergence from this model to a saved one over whole distributions, and its gradients.

        Args:
            data: completions under the prompts of both models.
            reference_model_path: a checkpoint on the same base model.
            temperature: of both distributions.
        """
        if not isinstance(data, Sequence) or not all(isinstance(datum, ReverseKLDatum) for datum in data):
            return failed(UserError(f"data: expected a list of ReverseKLDatum, got {type(data).__name__}"))
        future = self._in_turn.forward_backward_reverse_kl(
            self.model_id, list(data), reference_model_path=reference_model_path, temperature=temperature
        )
        return APIFuture(future)

    def optim_step(
        self, optim_params: AdamParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        """One AdamW step with the gradients since the last one, which are then cleared."""
        params = optim_params if adam_params is None else adam_params
        if optim_params is not None and adam_params is not None:
            return failed(UserError("optim_step: expected optim_params or adam_params, got both"))
        if not isinstance(params, AdamParams):
            return failed(UserError(f"adam_params: expected AdamParams, got {type(params).__name__}"))
        return APIFuture(self._in_turn.optim_step(self.model_id, params))

    def zero_grad_async(self) -> APIFuture[None]:
        """Does nothing: `optim_step` clears the gradients."""
        warnings.warn("zero_grad_async() does nothing: optim_step() clears the gradients", UserWarning, stacklevel=2)
        return completed(None)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Save everything needed to continue training from here. `.path` is `tinker://<model_id>/weights/<name>`."""
        check_metadata(user_metadata)
        future = self._in_turn.save_weights(
            self.model_id, name, ttl_seconds=ttl_seconds, overwrite=overwrite, user_metadata=user_metadata
        )
        return APIFuture(future)

    def load_state(self, path: str, weights_access_token: str | None = None) -> APIFuture[LoadWeightsResponse]:
        """Load a checkpoint's weights; the optimiser starts anew. mint-engine asks for no access token."""
        token = access_token(self._engine, weights_access_token)
        return APIFuture(self._in_turn.load_weights(self.model_id, path, optimizer=False, **token))

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Load a checkpoint's weights and the optimiser's state."""
        token = access_token(self._engine, weights_access_token)
        return APIFuture(self._in_turn.load_weights(self.model_id, path, optimizer=True, **token))

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Save the adapter as a PEFT directory. `.path` is `tinker://<model_id>/sampler_weights/<name>`."""
        check_metadata(user_metadata)
        future = self._in_turn.save_weights_for_sampler(
            self.model_id, name, ttl_seconds=ttl_seconds, user_metadata=user_metadata, sampler=False
        )
        return APIFuture(future)

    def save_weights_external(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: list[str] | None = None
    ) -> APIFuture[SaveWeightsExternalResponse]:
        """Save the adapter for download, see `RestClient.get_external_weights_urls`. With recipients (age1...) its
        files are encrypted for them. `.path` is `tinker://<model_id>/external_weights/<name>`."""
        future = self._in_turn.save_weights_external(
            self.model_id, name, ttl_seconds=ttl_seconds, recipients=age_encryption_recipients
        )
        return APIFuture(future)

    forward_async = future_twin(forward)
    forward_backward_async = future_twin(forward_backward)
    forward_backward_custom_async = future_twin(forward_backward_custom)
    forward_backward_reverse_kl_async = future_twin(forward_backward_reverse_kl)
    optim_step_async = future_twin(optim_step)
    save_state_async = future_twin(save_state)
    load_state_async = future_twin(load_state)
    load_state_with_optimizer_async = future_twin(load_state_with_optimizer)
    save_weights_for_sampler_async = future_twin(save_weights_for_sampler)
    save_weights_external_async = future_twin(save_weights_external)

    # ---- sampling ------------------------------------------------------------------------------------------------

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: Literal["snapshot"] = "snapshot",
    ) -> SamplingClient:
        """A sampler of the adapter as it is after the calls made so far. Waits for those calls.

        With a `name` it is also saved, as by `save_weights_for_sampler`, in place of an earlier one of that name (the
        SDKs ignore the name). `retry_config` is not used: what can be retried is.
        """
        saved = self._snapshot(name, record_stability_info, kind).result()
        return self._sampler_of(saved)

    async def save_weights_and_get_sampling_client_async(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: Literal["snapshot"] = "snapshot",
    ) -> SamplingClient:
        """The same, without blocking the event loop."""
        saved = await APIFuture(self._snapshot(name, record_stability_info, kind))
        return self._sampler_of(saved)

    def create_sampling_client(
        self, model_path: str, retry_config: Any = None, record_stability_info: bool = False
    ) -> SamplingClient:
        """A sampler of a saved checkpoint."""
        check_stability(record_stability_info)
        created = self._engine.create_sampler(self._session.session_id, model_path=model_path)
        return SamplingClient(self._engine, created.result(), self._session)

    async def create_sampling_client_async(
        self, model_path: str, retry_config: Any = None, record_stability_info: bool = False
    ) -> SamplingClient:
        """The same, without blocking the event loop."""
        check_stability(record_stability_info)
        created = self._engine.create_sampler(self._session.session_id, model_path=model_path)
        return SamplingClient(self._engine, await APIFuture(created), self._session)

    # ---- inside --------------------------------------------------------------------------------------------------

    @property
    def _in_turn(self) -> ClientEngine:
        """The engine, for a call that waits for the earlier ones: never within a loss, which would wait for itself."""
        if threading.get_ident() in self._losses:
            raise UserError("loss_fn: expected no calls of its own training client, which wait for the loss to return")
        return self._engine

    @property
    def _base_model(self) -> str:
        assert self._info.model_name is not None, "the engine names every model it makes"
        return self._info.model_name

    def _run(
        self, call: Callable[..., Future[ForwardBackwardOutput]], data: Any, *args: Any,
        check: Callable[[Sequence[Datum]], None] | None = None,
    ) -> APIFuture[Any]:  # fmt: skip
        if not isinstance(data, Sequence) or isinstance(data, (str, bytes)):
            return failed(UserError(f"data: expected a list of Datum, got {type(data).__name__}"))
        for i, datum in enumerate(data):
            if not isinstance(datum, Datum):
                return failed(UserError(f"data: expected a list of Datum, got {type(datum).__name__} (datum {i})"))
        if check is not None:
            try:
                check(data)
            except UserError as error:
                return failed(error)
        return APIFuture(call(self.model_id, list(data), *args))

    def _snapshot(self, name: str | None, stability: bool, kind: str) -> Future[SaveWeightsForSamplerResponse]:
        check_stability(stability)
        if kind != "snapshot":
            raise UserError(f"kind: expected 'snapshot', got {kind!r}: a sampler here never changes under its user")
        return self._in_turn.save_weights_for_sampler(self.model_id, name, overwrite=True, sampler=True)

    def _sampler_of(self, saved: SaveWeightsForSamplerResponse) -> SamplingClient:
        assert saved.sampling_session_id is not None, "the engine gives every snapshot a sampler"
        return SamplingClient(self._engine, saved.sampling_session_id, self._session)

    def __repr__(self) -> str:
        return f"TrainingClient({self.model_id!r}, base_model={self._base_model!r}, rank={self._info.lora_rank})"


def check_stability(record_stability_info: bool) -> None:
    if record_stability_info:
        raise UserError("record_stability_info: expected False: only the loss stable_reinforce needs it")
