"""The one object that owns a device: give it work, get futures.

Every call returns at once. Operations of one model run in the order of the calls; an error reaches exactly the future
it belongs to and leaves the model as it was. Method names and results follow the Tinker SDK's requests.
"""

from __future__ import annotations

import atexit
import copy
import os
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mint_engine import custom_loss, trainer
from mint_engine.adapters import Adapter, TrainState
from mint_engine.bases import Base, BaseModels
from mint_engine.datums import check_data
from mint_engine.errors import NotFoundError, UserError
from mint_engine.executor import Executor, Lane
from mint_engine.kv_cache import default_bytes
from mint_engine.losses import get_loss
from mint_engine.optimizer import optim_step
from mint_engine.prompt_scores import PromptQuery
from mint_engine.requests import make_request
from mint_engine.state import load_adapter, load_state, save_adapter, save_state
from mint_engine.store import Store
from mint_engine.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    LoadWeightsResponse,
    LoraConfig,
    ModelData,
    ModelInput,
    OptimStepResponse,
    SampleResponse,
    SamplingParams,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    SupportedModel,
    TensorData,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class _Model:
    """A training client's side of the engine. ``adapter`` and ``state`` are touched by the device thread only."""

    base: Base
    adapter: Adapter
    state: TrainState


@dataclass(frozen=True)
class _SamplerEntry:
    """A version that can be sampled: an adapter nobody changes any more, or the base model."""

    base: Base
    adapter: Adapter | None
    model_path: str | None


class Engine:
    """LoRA training and sampling on one device.

    Args:
        dtype: "bfloat16" or "float32", the compute dtype. Masters, moments and log-probabilities are always fp32.
        home: where runs, checkpoints and converted models are kept.
        kv_cache_bytes: size of each base model's KV cache; default a quarter of the machine's memory.
    """

    def __init__(self, *, dtype: str = "bfloat16", home: Path, kv_cache_bytes: int | None = None) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        self.dtype, self.home = dtype, home
        self.store = Store(home)
        self._executor = Executor("mint-engine")
        cache_bytes = kv_cache_bytes or default_bytes()
        self._bases = BaseModels(home, DTYPES[dtype], cache_bytes, self._executor.add_stepper, self._executor.notify)
        self._lock = threading.Lock()
        self._lanes: dict[str, Lane] = {}
        self._models: dict[str, _Model] = {}
        self._samplers: dict[str, _SamplerEntry] = {}
        self._counts: dict[str, int] = {}
        self._released: deque[str] = deque()
        _alive.add(self)

    # ---- sessions and models -------------------------------------------------------------------------------------

    def create_session(
        self, *, tags: Sequence[str] = (), user_metadata: dict[str, str] | None = None, project_id: str | None = None
    ) -> str:
        session_id = str(uuid.uuid4())
        self.store.create_session(session_id, tags=list(tags), user_metadata=user_metadata, project_id=project_id)
        return session_id

    def create_model(
        self, session_id: str, base_model: str, lora: LoraConfig, *, user_metadata: dict[str, str] | None = None
    ) -> Future[str]:
        """A fresh adapter on ``base_model``; the future gives its model id."""
        model_id = self._new_id(session_id, "train")

        def create() -> Generator[Callable[[], Any], Any, str]:
            base = yield lambda: self._bases.get(base_model)
            self._add_model(session_id, model_id, base, Adapter(base.decoder.groups, lora), user_metadata)
            return model_id

        return self._lane(model_id).submit(create)

    def create_model_from_state(
        self, session_id: str, path: str, *, optimizer: bool, base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[str]:  # fmt: skip
        """A new model from a checkpoint: weights only, or with the optimiser's state."""
        model_id = self._new_id(session_id, "train")

        def create() -> Generator[Callable[[], Any], Any, str]:
            info = self.store.weights_info(path)
            if base_model is not None and base_model != info.base_model:
                raise UserError(f"base_model: {path} was trained on {info.base_model!r}, got {base_model!r}")
            base = yield lambda: self._bases.get(info.base_model)
            directory = self.store.resolve(path).directory
            adapter = yield lambda: load_adapter(directory, base, path)
            state = TrainState(adapter)
            if optimizer:
                apply = yield lambda: load_state(directory, adapter, state, path, optimizer=True)
                apply()
            self._add_model(session_id, model_id, base, adapter, user_metadata, state)
            return model_id

        return self._lane(model_id).submit(create)

    def _add_model(
        self, session_id: str, model_id: str, base: Base, adapter: Adapter, user_metadata: dict[str, str] | None,
        state: TrainState | None = None,
    ) -> None:  # fmt: skip
        self._reap()
        self.store.create_run(
            model_id, session_id=session_id, base_model=base.name, lora=adapter.lora, user_metadata=user_metadata
        )
        with self._lock:
            self._models[model_id] = _Model(base, adapter, state or TrainState(adapter))

    def unload_model(self, model_id: str) -> Future[None]:
        """Forget a model after everything submitted for it; its checkpoints stay."""

        def unload() -> None:
            self._model(model_id)
            with self._lock:
                del self._models[model_id], self._lanes[model_id]

        return self._lane(model_id).submit(unload)

    def get_info(self, model_id: str) -> GetInfoResponse:
        model = self._model(model_id)
        base = model.base
        return GetInfoResponse(
            model_id=model_id, model_name=base.name, is_lora=True, lora_rank=model.adapter.rank,
            model_data=ModelData(
                arch=base.config.architecture, model_name=base.name, tokenizer_id=str(base.directory)
            ),
        )  # fmt: skip

    # ---- training ------------------------------------------------------------------------------------------------

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

        def run() -> ForwardBackwardOutput:
            model, loss = self._model(model_id), get_loss(loss_fn)
            resolved = loss.resolve_config(config)
            checked = check_data(data, loss, resolved, model.base.limits)
            state = model.state if backward else None
            return trainer.run(model.base.decoder, model.adapter, state, checked, loss, resolved)

        return self._lane(model_id).submit(run)

    def forward_backward_custom(
        self, model_id: str, data: Sequence[Datum], fn: custom_loss.CustomLoss
    ) -> Future[ForwardBackwardOutput]:
        """A loss of the caller's own: ``fn(data, logprobs) -> (loss, metrics)`` on torch tensors that require grad.

        ``fn`` runs off the device thread; the calls that follow on this model wait for it, other models do not.
        """
        data = list(data)

        def run() -> Generator[Callable[[], Any], Any, ForwardBackwardOutput]:
            model = self._model(model_id)

            def both(datums: Sequence[Datum], state: TrainState | None) -> ForwardBackwardOutput:
                loss = get_loss("cross_entropy")
                checked = check_data(datums, loss, {}, model.base.limits)
                return trainer.run(model.base.decoder, model.adapter, state, checked, loss, {})

            outputs = both(custom_loss.with_weights(data), None).loss_fn_outputs
            evaluated = yield lambda: custom_loss.evaluate(fn, data, outputs)
            surrogate = both(custom_loss.with_weights(data, evaluated.weights), model.state)
            return custom_loss.result(surrogate, evaluated)

        return self._lane(model_id).submit(run)

    def optim_step(self, model_id: str, adam_params: AdamParams) -> Future[OptimStepResponse]:
        def run() -> OptimStepResponse:
            model = self._model(model_id)
            return optim_step(model.adapter, model.state, adam_params)

        return self._lane(model_id).submit(run)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save_weights(
        self, model_id: str, name: str, *, ttl_seconds: int | None = None, overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[SaveWeightsResponse]:  # fmt: skip
        """Everything training needs to go on from here, as ``tinker://<model id>/weights/<name>``."""

        def run() -> Generator[Callable[[], Any], Any, SaveWeightsResponse]:
            model = self._model(model_id)
            write = save_state(model.adapter, model.state, model.base)
            path = yield lambda: self.store.write_checkpoint(
                model_id, "weights", name, write, base_model=model.base.name, lora=model.adapter.lora,
                user_metadata=user_metadata, ttl_seconds=ttl_seconds, overwrite=overwrite,
            )  # fmt: skip
            return SaveWeightsResponse(path=path)

        return self._lane(model_id).submit(run)

    def load_weights(self, model_id: str, path: str, *, optimizer: bool) -> Future[LoadWeightsResponse]:
        """Put a checkpoint into an existing model. Without ``optimizer`` moments and step count start anew."""

        def run() -> Generator[Callable[[], Any], Any, LoadWeightsResponse]:
            model = self._model(model_id)
            found = self.store.resolve(path)
            apply = yield lambda: load_state(
                found.directory, model.adapter, model.state, path, optimizer=optimizer, base=model.base
            )
            apply()
            return LoadWeightsResponse(path=found.tinker_path, model_id=model_id)

        return self._lane(model_id).submit(run)

    def save_weights_for_sampler(
        self, model_id: str, name: str | None = None, *, ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None, overwrite: bool = False, sampler: bool | None = None,
    ) -> Future[SaveWeightsForSamplerResponse]:  # fmt: skip
        """A snapshot to sample from.

        With a name it is kept as ``tinker://<model id>/sampler_weights/<name>``. A sampler of it, which stays until
        :meth:`release`, is made if ``sampler``, by default if it has no name.
        """
        wanted = name is None if sampler is None else sampler

        def run() -> Generator[Callable[[], Any], Any, SaveWeightsForSamplerResponse]:
            model = self._model(model_id)
            snapshot, path = model.adapter.snapshot(), None
            if name is not None:
                path = yield lambda: self.store.write_checkpoint(
                    model_id, "sampler_weights", name, save_adapter(snapshot, model.base), base_model=model.base.name,
                    lora=snapshot.lora, user_metadata=user_metadata, ttl_seconds=ttl_seconds, overwrite=overwrite,
                )  # fmt: skip
            sampler_id = None
            if wanted:
                sampler_id = self._add_sampler(model_id.split(":")[0], _SamplerEntry(model.base, snapshot, path))
            return SaveWeightsForSamplerResponse(path=path, sampling_session_id=sampler_id)

        return self._lane(model_id).submit(run)

    # ---- sampling ------------------------------------------------------------------------------------------------

    def create_sampler(
        self, session_id: str, *, model_path: str | None = None, base_model: str | None = None
    ) -> Future[str]:
        """A sampler of a saved version, or of a base model."""

        def create() -> Generator[Callable[[], Any], Any, str]:
            if model_path is None:
                if base_model is None:
                    raise UserError("create_sampler: expected model_path or base_model, got neither")
                base = yield lambda: self._bases.get(base_model)
                return self._add_sampler(session_id, _SamplerEntry(base, None, None))
            info = self.store.weights_info(model_path)
            if base_model is not None and base_model != info.base_model:
                raise UserError(f"base_model: {model_path} was trained on {info.base_model!r}, got {base_model!r}")
            base = yield lambda: self._bases.get(info.base_model)
            found = self.store.resolve(model_path)
            adapter = yield lambda: load_adapter(found.directory, base, model_path)
            return self._add_sampler(session_id, _SamplerEntry(base, adapter, found.tinker_path))

        return self._executor.lane().submit(create)

    def _add_sampler(self, session_id: str, entry: _SamplerEntry) -> str:
        self._reap()
        sampler_id = self._new_id(session_id, "sample")
        self.store.add_sampler(session_id, sampler_id, base_model=entry.base.name, model_path=entry.model_path)
        with self._lock:
            self._samplers[sampler_id] = entry
        return sampler_id

    def release(self, identifier: str) -> None:
        """Let go of a model's or a sampler's weights once what was asked of it is done; its checkpoints stay.

        Takes no lock and does its work later, when the next model or sampler is made: a client calls it from its
        finalizer, which the garbage collector may run inside any other call.
        """
        self._released.append(identifier)

    def _reap(self) -> None:
        while self._released:
            identifier = self._released.popleft()
            with self._lock:
                self._samplers.pop(identifier, None)
                known = identifier in self._models
            if known:
                self.unload_model(identifier)

    def get_sampler(self, sampler_id: str) -> GetSamplerResponse:
        entry = self._sampler(sampler_id)
        return GetSamplerResponse(sampler_id=sampler_id, base_model=entry.base.name, model_path=entry.model_path)

    def sample(
        self, sampler_id: str, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams, *,
        include_prompt_logprobs: bool = False, topk_prompt_logprobs: int = 0, topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None, prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> Future[SampleResponse]:  # fmt: skip
        """``num_samples`` continuations of ``prompt``; 0 only scores the prompt. Requests are independent."""
        try:
            if (inherited := self._executor.inherited()) is not None:
                raise inherited
            entry = self._sampler(sampler_id)
            query = PromptQuery(
                logprobs=include_prompt_logprobs, topk=topk_prompt_logprobs, alternatives=prompt_alt_tokens_k,
                last_n=prompt_logprobs_last_n,
            )  # fmt: skip
            request = make_request(
                entry.base, entry.adapter, prompt, num_samples, sampling_params, query, topk=topk_sample_logprobs,
                targets=target_prompt_logprobs,
            )  # fmt: skip
            return entry.base.sampler.submit(request)
        except Exception as error:
            failed: Future[SampleResponse] = Future()
            failed.set_exception(error)
            return failed

    # ---- the rest ------------------------------------------------------------------------------------------------

    def tokenizer(self, base_model: str) -> PreTrainedTokenizerBase:
        return self._bases.get(base_model).tokenizer

    def capabilities(self) -> GetServerCapabilitiesResponse:
        """The base models that are loaded. Any other name a caller gives is resolved when it is asked for."""
        return GetServerCapabilitiesResponse(
            supported_models=[
                SupportedModel(
                    model_name=base.name,
                    max_context_length=base.limits.max_context_length,
                    trainable=True,
                    sampleable=True,
                )
                for base in self._bases.loaded
            ]
        )

    def close(self, *, drain: bool = False) -> None:
        """Finish what is running; refuse what is waiting, or with ``drain`` do that first (samples excepted)."""
        self._executor.close(drain=drain)

    def _new_id(self, session_id: str, kind: str) -> str:
        with self._lock:
            key = f"{session_id}:{kind}"
            n = self._counts.get(key, 0)
            self._counts[key] = n + 1
        return f"{key}:{n}"

    def _lane(self, model_id: str) -> Lane:
        with self._lock:
            if model_id not in self._lanes:
                self._lanes[model_id] = self._executor.lane()
            return self._lanes[model_id]

    def _model(self, model_id: str) -> _Model:
        with self._lock:
            if model_id in self._models:
                return self._models[model_id]
        raise NotFoundError(f"model_id: there is no model {model_id!r} (never created, failed to load, or unloaded)")

    def _sampler(self, sampler_id: str) -> _SamplerEntry:
        with self._lock:
            if sampler_id in self._samplers:
                return self._samplers[sampler_id]
        raise NotFoundError(f"sampler_id: there is no sampler {sampler_id!r}")


_alive: weakref.WeakSet[Engine] = weakref.WeakSet()
_engines: dict[tuple[str, Path], Engine] = {}
_engines_lock = threading.Lock()


def get_engine(dtype: str | None = None, home: Path | None = None) -> Engine:
    """The process's engine for a compute dtype and a home directory, made on first use.

    Defaults: MINT_DTYPE or "bfloat16"; MINT_HOME or ``~/.mint-engine``; MINT_KV_CACHE_BYTES or a quarter of
    the machine's memory (touched only as it is used).
    """
    dtype = dtype or os.environ.get("MINT_DTYPE") or "bfloat16"
    home = Path(home or os.environ.get("MINT_HOME") or Path.home() / ".mint-engine").expanduser().resolve()
    with _engines_lock:
        if (dtype, home) not in _engines:
            given = os.environ.get("MINT_KV_CACHE_BYTES") or "0"
            if not given.isdecimal():
                raise UserError(f"MINT_KV_CACHE_BYTES: expected a number of bytes, got {given!r}")
            _engines[dtype, home] = Engine(dtype=dtype, home=home, kv_cache_bytes=int(given))
        return _engines[dtype, home]


def close_engines() -> None:
    """Close every engine :func:`get_engine` made; the next call makes a new one."""
    with _engines_lock:
        engines = list(_engines.values())
        _engines.clear()
    for engine in engines:
        engine.close()


def _drain_all() -> None:
    for engine in list(_alive):
        engine.close(drain=True)


def _forget_inherited() -> None:
    """In a forked child the parent's engines have no thread: the child makes its own."""
    global _engines_lock
    _engines_lock = threading.Lock()  # the parent may have held it
    _engines.clear()
    _alive.clear()


# What was accepted is done before the process ends: a script may end with save_state() and never read its future.
# (And a thread killed inside a kernel may take the process with it.)
atexit.register(_drain_all)
os.register_at_fork(after_in_child=_forget_inherited)
