"""`ServiceClient`: the way in. Makes training clients and sampling clients."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, get_args

from mint_engine.client.connection import (
    access_token,
    address_of_record,
    build,
    check_metadata,
    default_base_model,
    default_rank,
    engine_of,
    registry_of,
)
from mint_engine.client.futures import APIFuture, completed, value_twin
from mint_engine.client.loss_handle import LossHandle, PerDatumLossFn, make_loss
from mint_engine.client.rest_client import RestClient
from mint_engine.client.sampling_client import SamplingClient
from mint_engine.client.session import Session
from mint_engine.client.training_client import TrainingClient, check_stability
from mint_engine.errors import EngineClosedError, UserError
from mint_engine.types import AdamOptimizerConfig, FinishReason, GetServerCapabilitiesResponse, LoraConfig

if TYPE_CHECKING:
    from mint_engine.client.protocol import ClientEngine

log = logging.getLogger("mint_engine.client")

# Options of the SDKs' HTTP clients.
_HTTP_OPTIONS = frozenset({"default_headers", "default_headers_overrides", "default_query", "http_client", "timeout"})
_HTTP_OPTIONS |= {"max_retries"}


class ServiceClient:
    """A session with an engine.

    Args:
        user_metadata, project_id, display_name: kept with the session.
        base_url: a server; default MINT_BASE_URL. Without one the engine runs in this process.
        api_key: for a server; default MINT_API_KEY. A local engine asks for none.
        dtype: compute dtype of an engine in this process, "bfloat16" or "float32"; default MINT_DTYPE, else bfloat16.
        device: of an engine in this process, "cpu", "cuda" or "cuda:1"; default MINT_DEVICE, else the CPU.
        engine: an engine of your own, instead of the process's.
        http_options: of the requests to a server. timeout: seconds until it must have answered, an httpx.Timeout
            (`mint.Timeout`), or None for no limit; results are waited for as long as they take. max_retries,
            default_headers, default_headers_overrides, default_query. An engine in this process makes no requests:
            they are checked there, and change nothing.

    Also a context manager: leaving it closes the session, see `close`. A session also ends when all its clients are
    gone.

    Raises:
        TransportError: the server cannot be reached.
        UserError (a ValueError): it refuses, for example the key.
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        display_name: str | None = None,
        engine: ClientEngine | None = None,
        **http_options: Any,
    ) -> None:
        unknown = sorted(set(http_options) - _HTTP_OPTIONS)
        if unknown:
            raise TypeError(f"ServiceClient() got unexpected keyword arguments: {', '.join(unknown)}")
        check_metadata(user_metadata)
        engine = engine_of(
            engine, base_url=base_url, api_key=api_key, dtype=dtype, device=device, http_options=http_options or None
        )
        self._engine = engine
        session_id = engine.create_session(
            user_metadata=user_metadata, project_id=project_id, display_name=display_name
        )
        self._session = Session(engine, session_id)
        self._models: list[str] = []
        self._closed = False

    @property
    def session_id(self) -> str:
        return self._session.session_id

    def get_telemetry(self) -> None:
        """Nothing is reported to anybody: None."""

    def get_console_url(self) -> str:
        """Where to look: there is no console here. Of a server, the address under which it tells of this session; of an
        engine in this process, the directory that everything is kept in."""
        return address_of_record(self._engine, "sessions", self.session_id)

    # ---- training clients ----------------------------------------------------------------------------------------

    def create_lora_training_client(
        self,
        base_model: str | None = None,
        rank: int | None = None,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> TrainingClient:
        """A new LoRA adapter on `base_model`. Loads the base model if it is not resident yet, and returns when it is.

        Args:
            base_model: a Hugging Face name, a directory, or smollm2-135m; default MINT_BASE_MODEL, else
                Qwen/Qwen3-0.6B.
            rank: 1 to 256; default MINT_LORA_RANK, else 16.
            seed: of the adapter's initial values; None = a different one each time.
            train_mlp, train_attn, train_unembed: which linears get an adapter; at least one.
            optimizer: AdamW is the only one.

        Raises:
            UserError (a ValueError): an argument is out of range, or there is nothing to train.
            ModelError (a ValueError): the base model is unknown, unsupported or damaged.
        """
        created = self._create_model(
            base_model, rank, seed, train_mlp, train_attn, train_unembed, user_metadata, optimizer
        )
        return self._training_client(created.result())

    async def create_lora_training_client_async(
        self,
        base_model: str | None = None,
        rank: int | None = None,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> TrainingClient:
        """The same, without blocking the event loop."""
        created = self._create_model(
            base_model, rank, seed, train_mlp, train_attn, train_unembed, user_metadata, optimizer
        )
        return self._training_client(await APIFuture(created))

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | Mapping[str, str] | None = None,
        user_metadata: dict[str, str] | str | None = None,
        weights_access_token: str | None = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> TrainingClient:
        """A new adapter with a checkpoint's weights; the optimiser starts anew.

        `base_model`, if given, must be the checkpoint's. (tinker 0.22 has `user_metadata` in second place and the token
        in third: a dict and a string there are taken as such.) mint-engine asks for no access token.
        """
        created = self._from_state(path, base_model, user_metadata, weights_access_token, optimizer, False)
        return self._training_client(created.result())

    async def create_training_client_from_state_async(
        self,
        path: str,
        base_model: str | Mapping[str, str] | None = None,
        user_metadata: dict[str, str] | str | None = None,
        weights_access_token: str | None = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> TrainingClient:
        """The same, without blocking the event loop."""
        created = self._from_state(path, base_model, user_metadata, weights_access_token, optimizer, False)
        return self._training_client(await APIFuture(created))

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | Mapping[str, str] | None = None,
        user_metadata: dict[str, str] | str | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """A new adapter that continues where `save_state` was called, with the optimiser's state."""
        created = self._from_state(path, base_model, user_metadata, weights_access_token, None, True)
        return self._training_client(created.result())

    async def create_training_client_from_state_with_optimizer_async(
        self,
        path: str,
        base_model: str | Mapping[str, str] | None = None,
        user_metadata: dict[str, str] | str | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """The same, without blocking the event loop."""
        created = self._from_state(path, base_model, user_metadata, weights_access_token, None, True)
        return self._training_client(await APIFuture(created))

    # ---- the others ----------------------------------------------------------------------------------------------

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """A sampler of a saved checkpoint (`model_path`) or of a base model."""
        created = self._create_sampler(model_path, base_model, record_stability_info)
        return SamplingClient(self._engine, created.result(), self._session)

    async def create_sampling_client_async(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """The same, without blocking the event loop."""
        created = self._create_sampler(model_path, base_model, record_stability_info)
        return SamplingClient(self._engine, await APIFuture(created), self._session)

    def copy_weights(
        self, path: str, *, ttl_seconds: int | None = None, weights_access_token: str | None = None
    ) -> APIFuture[str]:
        """A copy of one's own or of a published checkpoint, as a training run of this session. Gives its path."""
        self._check_open()
        future = registry_of(self._engine).copy_weights(
            path,
            session_id=self.session_id,
            project_id=None,
            ttl_seconds=ttl_seconds,
            weights_access_token=weights_access_token,
        )
        return APIFuture(future)

    copy_weights_async = value_twin(copy_weights)

    def create_custom_loss(self, fn: PerDatumLossFn, input_ranks: Mapping[str, int]) -> APIFuture[LossHandle]:
        """A loss of your own that looks at one datum at a time, for `TrainingClient.forward_backward_custom`.

        It runs in this process and is summed over the datums. (The SDKs have it done by servers that can.)

        Args:
            fn: takes `logprobs`, the datum's target log-probabilities, and then one parameter for each of the
                loss_fn_inputs that it reads, all as tensors. Returns a loss without dimensions, and a dict of metrics
                named custom/<name>:sum or custom/<name>:mean, which says how they are combined.
            input_ranks: how many dimensions each parameter has, `logprobs` included.
        """
        return completed(make_loss(fn, input_ranks))

    def create_rest_client(self) -> RestClient:
        return RestClient(engine=self._engine)

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        return self._engine.capabilities()

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        return await APIFuture(registry_of(self._engine).capabilities())

    # ---- the end -------------------------------------------------------------------------------------------------

    def close(self, status: FinishReason = "success", detail: str | None = None) -> APIFuture[None]:
        """End the session: its training clients' models are let go once what was submitted to them is done.

        Waits for that, unless it was interrupted. Checkpoints stay, and sampling clients go on working. A closed client
        makes no new clients.
        """
        if status not in get_args(FinishReason):
            raise UserError(f"status: expected one of {', '.join(get_args(FinishReason))}, got {status!r}")
        if self._closed:
            return completed(None)
        self._closed = True
        unloading, self._models = [self._engine.unload_model(model_id) for model_id in self._models], []
        finish = registry_of(self._engine).finish_session
        if status == "interrupted":
            return APIFuture(finish(self.session_id, status, detail))
        wait(unloading)
        if (error := finish(self.session_id, status, detail).exception()) is not None:
            log.warning("session %s: its end was not recorded: %s", self.session_id, error)  # and nothing is lost
        return completed(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("success")
        else:
            self.close("interrupted" if issubclass(kind, KeyboardInterrupt) else "errored", detail=kind.__name__)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _create_model(
        self,
        base_model: str | None,
        rank: int | None,
        seed: int | None,
        train_mlp: bool,
        train_attn: bool,
        train_unembed: bool,
        user_metadata: dict[str, str] | None,
        optimizer: AdamOptimizerConfig | None,
    ) -> Future[str]:
        self._check_open()
        check_metadata(user_metadata)
        _check_optimizer(optimizer)
        name = default_base_model() if base_model is None else base_model
        if not isinstance(name, str) or not name:
            raise UserError(f"base_model: expected the name of a model, got {name!r}")
        lora = build(
            LoraConfig,
            rank=default_rank() if rank is None else rank,
            seed=seed,
            train_mlp=train_mlp,
            train_attn=train_attn,
            train_unembed=train_unembed,
        )
        return self._engine.create_model(self.session_id, name, lora, user_metadata=user_metadata)

    def _from_state(
        self,
        path: str,
        base_model: str | Mapping[str, str] | None,
        user_metadata: Any,
        token: str | None,
        optimizer: AdamOptimizerConfig | None,
        with_optimizer: bool,
    ) -> Future[str]:
        self._check_open()
        if isinstance(base_model, Mapping) and isinstance(user_metadata, Mapping):
            raise UserError(f"base_model: expected a name beside user_metadata, got {base_model!r}")
        if isinstance(user_metadata, str):
            if token is not None:
                raise UserError("user_metadata: expected a dict of strings, got a string")
            user_metadata, token = None, user_metadata
        name = None if isinstance(base_model, Mapping) else base_model
        metadata = dict(base_model) if isinstance(base_model, Mapping) else user_metadata
        check_metadata(metadata)
        _check_optimizer(optimizer)
        return self._engine.create_model_from_state(
            self.session_id,
            path,
            optimizer=with_optimizer,
            base_model=name,
            user_metadata=metadata,
            **access_token(self._engine, token),
        )

    def _create_sampler(self, model_path: str | None, base_model: str | None, stability: bool) -> Future[str]:
        self._check_open()
        check_stability(stability)
        if model_path is None and base_model is None:
            raise UserError("create_sampling_client: expected model_path or base_model, got neither")
        return self._engine.create_sampler(self.session_id, model_path=model_path, base_model=base_model)

    def _training_client(self, model_id: str) -> TrainingClient:
        self._models.append(model_id)
        return TrainingClient(self._engine, self._session, model_id)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError(f"session {self.session_id} is closed")


def _check_optimizer(optimizer: AdamOptimizerConfig | None) -> None:
    if optimizer is not None and not isinstance(optimizer, AdamOptimizerConfig):
        raise UserError(f"optimizer: expected AdamOptimizerConfig, got {type(optimizer).__name__}")
