"""An engine without a model: its futures are done at once, or when a test says so. With a real store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mint_engine.errors import NotFoundError, SampleCancelledError, UserError
from mint_engine.store import Store
from mint_engine.types import (
    CheckpointKind,
    ForwardBackwardOutput,
    GetInfoResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    LoadWeightsResponse,
    LoraConfig,
    ModelData,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    SupportedModel,
    TensorData,
)

BASE = "stub/base"
STATS = dict.fromkeys(
    (
        "tokens_trained", "tokens_scored", "tokens_prefilled", "tokens_sampled", "operations_waiting",
        "samples_waiting", "samples_running", "kv_cache_bytes_used", "kv_cache_bytes_total", "resident_models",
        "samplers", "rss_bytes",
    ),
    0,
)  # fmt: skip


@dataclass
class Call:
    """`finish()` completes it, from a thread of its own, as the device thread would."""

    name: str
    arguments: dict[str, Any]
    answer: Callable[[], Any]
    future: Future = field(default_factory=Future)
    begun: threading.Lock = field(default_factory=threading.Lock)  # once held, held: the second to come does nothing

    def finish(self, error: BaseException | None = None) -> None:
        thread = threading.Thread(target=self.run, args=(error,))
        thread.start()
        thread.join()

    def run(self, error: BaseException | None = None) -> None:
        if not self.begun.acquire(blocking=False):
            return
        if self.future.done() or not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.answer() if error is None else None
        except Exception as failed:
            error = failed
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class StubEngine:
    """`calls`: what was asked, in order. While `hold` is True futures stay open until `finish`ed."""

    dtype = "float32"

    def __init__(self, home: Path) -> None:
        self.home, self.store = home, Store(home)
        self.calls: list[Call] = []
        self.hold = False
        self.models: dict[str, str] = {}  # id -> owner
        self.samplers: dict[str, GetSamplerResponse] = {}
        self.waiting_samples = 0
        self.cancelled: list[Future] = []
        self.steps: dict[str, list[str]] = {}  # model id -> what was applied to it, parked and revived with it

    def _call(self, name: str, answer: Callable[[], Any], /, **arguments: Any) -> Future:
        call = Call(name, arguments, answer)
        self.calls.append(call)
        if not self.hold:
            call.run()
        return call.future

    def names(self, *without: str) -> list[str]:
        return [call.name for call in self.calls if call.name not in without]

    def take(self) -> list[Call]:
        """The calls so far; the list begins anew."""
        calls, self.calls = self.calls, []
        return calls

    # ---- sessions and models

    def add_checkpoint(self, model_id: str, kind: CheckpointKind = "weights") -> str:
        """A checkpoint called "one", without files; its path."""
        store = self.store.as_owner(self.models[model_id])
        lora = LoraConfig(rank=8)
        return store.write_checkpoint(model_id, kind, "one", lambda directory: None, base_model=BASE, lora=lora)

    def create_session(self, *, session_id=None, owner=None, **fields):
        session_id = session_id or f"session-{len(self.store.list_sessions(1000).sessions)}-{id(fields)}"
        self.store.as_owner(owner or "local").create_session(session_id, **fields)
        return session_id

    def _add_model(self, session_id: str, base: str, lora: LoraConfig, seq: int) -> str:
        owner = self.store.session_owner(session_id)
        model_id = f"{session_id}:train:{seq}"
        self.store.as_owner(owner).create_run(model_id, session_id=session_id, base_model=base, lora=lora)
        self.models[model_id] = owner
        self.steps[model_id] = []
        return model_id

    def create_model(self, session_id, base_model, lora, *, user_metadata=None, seq=None):
        return self._call("create_model", lambda: self._add_model(session_id, base_model, lora, seq), lora=lora)

    def create_model_from_state(self, session_id, path, *, optimizer, user_metadata=None, seq=None, reader=None, **_):
        return self._call(
            "create_model_from_state",
            lambda: self._add_model(session_id, BASE, LoraConfig(), seq),
            path=path,
            optimizer=optimizer,
            reader=reader,
        )

    def unload_model(self, model_id):
        def answer() -> None:
            if self.models.pop(model_id, None) is None:
                if self.store.parked(model_id) is None:
                    raise NotFoundError(f"model_id: there is no model {model_id!r}")
                self.store.unpark(model_id)

        return self._call("unload_model", answer, model_id=model_id)

    def forget_session(self, session_id):
        pass

    def get_info(self, model_id):
        self._model(model_id)
        data = ModelData(arch="stub", model_name=BASE, tokenizer_id=BASE)
        return GetInfoResponse(model_id=model_id, model_name=BASE, is_lora=True, lora_rank=16, model_data=data)

    def _model(self, model_id: str) -> list[str]:
        if model_id not in self.models:
            raise NotFoundError(f"model_id: there is no model {model_id!r}")
        return self.steps[model_id]

    # ---- training

    def _train(self, name, model_id, data, loss_fn, config):
        def answer() -> ForwardBackwardOutput:
            self._model(model_id).append(f"{name}({len(data)})")
            if loss_fn == "refused":
                raise UserError("loss_fn: refused (datum 0)")
            lengths = [len(d.loss_fn_inputs["target_tokens"]) for d in data]
            outputs = [{"logprobs": TensorData(np.full(n, -0.5, np.float32), "float32")} for n in lengths]
            return ForwardBackwardOutput("TorchLossReturn", outputs, {"loss:sum": float(sum(lengths))})

        return self._call(name, answer, model_id=model_id, data=data, loss_fn=loss_fn, config=config)

    def forward(self, model_id, data, loss_fn, loss_fn_config=None):
        return self._train("forward", model_id, data, loss_fn, loss_fn_config)

    def forward_backward(self, model_id, data, loss_fn, loss_fn_config=None):
        return self._train("forward_backward", model_id, data, loss_fn, loss_fn_config)

    def optim_step(self, model_id, adam_params):
        def answer() -> OptimStepResponse:
            self._model(model_id).append(f"optim_step({adam_params.learning_rate:g})")
            return OptimStepResponse(metrics={"grad_norm": 1.0})

        return self._call("optim_step", answer, model_id=model_id, params=adam_params)

    # ---- weights and samplers

    def save_weights(self, model_id, name, **fields):
        path = f"tinker://{model_id}/weights/{name}"
        return self._call("save_weights", lambda: SaveWeightsResponse(path=path), name=name, **fields)

    def load_weights(self, model_id, path, *, optimizer, reader=None):
        answer = LoadWeightsResponse(path=path, model_id=model_id)
        return self._call("load_weights", lambda: answer, path=path, optimizer=optimizer, reader=reader)

    def save_weights_for_sampler(self, model_id, name=None, *, sampler_seq=None, **fields):
        def answer() -> SaveWeightsForSamplerResponse:
            if name is not None:
                return SaveWeightsForSamplerResponse(path=f"tinker://{model_id}/sampler_weights/{name}")
            session_id = model_id.split(":")[0]
            return SaveWeightsForSamplerResponse(
                sampling_session_id=self._add_sampler(session_id, sampler_seq, BASE, None, ephemeral=True)
            )

        return self._call("save_weights_for_sampler", answer, name=name, sampler_seq=sampler_seq)

    def save_weights_external(self, model_id, name, *, recipients=None, **fields):
        path = f"tinker://{model_id}/external_weights/{name}"
        saved = SaveWeightsExternalResponse(path=path)
        return self._call("save_weights_external", lambda: saved, recipients=recipients)

    def _add_sampler(self, session_id: str, seq: int, base: str, path: str | None, ephemeral: bool = False) -> str:
        sampler_id = f"{session_id}:sample:{seq}"
        store = self.store.as_owner(self.store.session_owner(session_id))
        store.add_sampler(session_id, sampler_id, base_model=base, model_path=path, ephemeral=ephemeral)
        self.samplers[sampler_id] = store.get_sampler(sampler_id)
        return sampler_id

    def create_sampler(self, session_id, *, model_path=None, base_model=None, seq=None, reader=None):
        return self._call(
            "create_sampler",
            lambda: self._add_sampler(session_id, seq, base_model or BASE, model_path),
            path=model_path,
            base_model=base_model,
        )

    def get_sampler(self, sampler_id):
        if sampler_id not in self.samplers:
            raise NotFoundError(f"sampler_id: there is no sampler {sampler_id!r}")
        return self.samplers[sampler_id]

    def release(self, identifier):
        self.samplers.pop(identifier, None)

    def sample(self, sampler_id, prompt, num_samples, sampling_params, **options):
        def answer() -> SampleResponse:
            self.get_sampler(sampler_id)
            tokens = prompt.length if options.get("include_prompt_logprobs") else 0
            logprobs = [None, *[-1.0] * (tokens - 1)] if tokens else None
            sequences = [SampledSequence("length", [7, i], [-0.5, -0.5]) for i in range(num_samples)]
            return SampleResponse(sequences, prompt_logprobs=logprobs)

        return self._call("sample", answer, sampler_id=sampler_id, num_samples=num_samples, **options)

    def cancel_sample(self, future):
        self.cancelled.append(future)
        if not future.done():
            future.set_exception(SampleCancelledError("sample: cancelled"))
        return True

    # ---- disk

    def is_resident(self, identifier):
        return identifier in self.models or identifier in self.samplers

    def park(self, identifier, note):
        def write(directory: Path) -> None:
            (directory / "steps").write_text("\n".join(self.steps.get(identifier, [])))

        def answer() -> None:
            if not self.is_resident(identifier):
                raise NotFoundError(f"there is no {identifier!r}")
            self.store.park(identifier, write, note)
            self.models.pop(identifier, None)
            self.samplers.pop(identifier, None)

        return self._call("park", answer, identifier=identifier, note=note)

    def unpark(self, identifier):
        def answer() -> dict:
            parked = self.store.parked(identifier)
            if parked is None:
                raise NotFoundError(f"{identifier!r} is not parked")
            if ":train:" in identifier:
                self.models[identifier] = self.store.session_owner(identifier.split(":")[0])
                self.steps[identifier] = (parked.directory / "steps").read_text().splitlines()
            else:
                self.samplers[identifier] = GetSamplerResponse(sampler_id=identifier, base_model=BASE)
            self.store.unpark(identifier)
            return parked.note

        return self._call("unpark", answer, identifier=identifier)

    def revive_sampler(self, sampler_id):
        def answer() -> None:
            if sampler_id in self.samplers:
                return
            if self.store.parked(sampler_id) is not None:
                self.store.unpark(sampler_id)
            owner = self.store.session_owner(sampler_id.split(":")[0])
            self.samplers[sampler_id] = self.store.as_owner(owner).get_sampler(sampler_id)

        return self._call("revive_sampler", answer, sampler_id=sampler_id)

    # ---- the rest

    def resident_models(self, owner):
        return sum(1 for of in self.models.values() if of == owner)

    def sampler_load(self, owner=None):
        return self.waiting_samples, 0

    def stats(self):
        return SimpleNamespace(operations={}, failures={}, **STATS)

    def on_operation(self, callback):
        pass

    def load_base(self, name):
        return self._call("load_base", lambda: None, base=name)

    def base_info(self, name=None):
        info = SimpleNamespace(name=BASE, directory=self.home)
        return [info] if name is None else info

    def capabilities(self):
        model = SupportedModel(model_name=BASE, max_context_length=4096, trainable=True, sampleable=True)
        return GetServerCapabilitiesResponse(supported_models=[model])

    def tokenizer(self, base_model):
        raise UserError("the stub has no tokenizer")
