"""An engine that records what it is asked and answers from a thread: what the clients do, without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mint_engine.errors import UserError
from mint_engine.store import Store
from mint_engine.types import (
    ForwardBackwardOutput,
    GetInfoResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    InterpolateCheckpointsResponse,
    LoadWeightsResponse,
    LoraConfig,
    OptimStepResponse,
    ReverseKLOutput,
    SampledSequence,
    SampleResponse,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    TensorData,
)


class FakeEngine:
    """`log` holds (operation, its arguments) in the order of execution. Clear `gate` to hold everything back."""

    def __init__(self, home: Path) -> None:
        self.store = Store(home)
        self.log: list[tuple[str, dict[str, Any]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self._pool = ThreadPoolExecutor(1)
        self._infos: dict[str, GetInfoResponse] = {}
        self._samplers: dict[str, GetSamplerResponse] = {}
        self.tokenizer_files: dict[str, dict[str, bytes]] = {}

    def _later(self, operation: str, answer: Callable[[], Any], **arguments: Any) -> Future[Any]:
        def run() -> Any:
            self.gate.wait()
            self.log.append((operation, arguments))
            return answer()

        return self._pool.submit(run)

    def create_session(self, *, tags=(), user_metadata=None, project_id=None, display_name=None):
        session_id = f"session-{len(self.store.list_sessions(1000).sessions)}"
        self.store.create_session(
            session_id, tags=tags, user_metadata=user_metadata, project_id=project_id, display_name=display_name
        )
        return session_id

    def _new_model(self, session_id: str, base_model: str, lora: LoraConfig, user_metadata: Any) -> str:
        if base_model == "unknown":
            raise UserError("base_model: unknown")
        model_id = f"{session_id}:train:{len(self._infos)}"
        self.store.create_run(
            model_id, session_id=session_id, base_model=base_model, lora=lora, user_metadata=user_metadata
        )
        self._infos[model_id] = GetInfoResponse(model_id=model_id, model_name=base_model, lora_rank=lora.rank)
        return model_id

    def create_model(self, session_id, base_model, lora, *, user_metadata=None):
        return self._later(
            "create_model",
            lambda: self._new_model(session_id, base_model, lora, user_metadata),
            base_model=base_model,
            lora=lora,
        )

    def create_model_from_state(self, session_id, path, *, optimizer, base_model=None, user_metadata=None):
        return self._later(
            "create_model_from_state",
            lambda: self._new_model(session_id, base_model or "stored", LoraConfig(), user_metadata),
            path=path,
            optimizer=optimizer,
            base_model=base_model,
            user_metadata=user_metadata,
        )

    def unload_model(self, model_id):
        return self._later("unload_model", lambda: None, model_id=model_id)

    def get_info(self, model_id):
        return self._infos[model_id]

    def _output(self, data: list[Any]) -> ForwardBackwardOutput:
        if not data:
            raise UserError("data: expected at least one datum")
        outputs = [{"logprobs": TensorData([-1.0, -3.0], "float32")} for _ in data]
        return ForwardBackwardOutput("TorchLossReturn", outputs, {"loss:sum": 4.0 * len(data)}, 2.0 * len(data))

    def forward(self, model_id, data, loss_fn, loss_fn_config=None):
        return self._later("forward", lambda: self._output(data), loss_fn=loss_fn, config=loss_fn_config)

    def forward_backward(self, model_id, data, loss_fn, loss_fn_config=None):
        return self._later("forward_backward", lambda: self._output(data), loss_fn=loss_fn, config=loss_fn_config)

    def forward_backward_custom(self, model_id, data, fn):
        return self._later("forward_backward_custom", lambda: self._output(data), fn=fn)

    def forward_backward_reverse_kl(self, model_id, data, *, reference_model_path, temperature):
        return self._later(
            "forward_backward_reverse_kl",
            lambda: ReverseKLOutput(
                [{"loss": TensorData([0.5], "float32")} for _ in data], {"loss:sum": 0.5 * len(data)}
            ),
            data=data,
            reference=reference_model_path,
            temperature=temperature,
        )

    def optim_step(self, model_id, adam_params):
        return self._later("optim_step", lambda: OptimStepResponse(metrics={"grad_norm": 1.0}), params=adam_params)

    def save_weights(self, model_id, name, *, ttl_seconds=None, overwrite=False, user_metadata=None):
        path = f"tinker://{model_id}/weights/{name}"
        return self._later(
            "save_weights",
            lambda: SaveWeightsResponse(path=path),
            ttl_seconds=ttl_seconds,
            overwrite=overwrite,
            user_metadata=user_metadata,
        )

    def save_weights_external(self, model_id, name, *, ttl_seconds=None, recipients=None):
        path = f"tinker://{model_id}/external_weights/{name}"
        return self._later(
            "save_weights_external",
            lambda: SaveWeightsExternalResponse(path=path),
            ttl_seconds=ttl_seconds,
            recipients=recipients,
        )

    def copy_checkpoint(self, source, *, session_id=None, project_id=None, ttl_seconds=None, seq=None):
        seq = seq if session_id is None or seq is not None else len(self._infos) + 100
        return self._later(
            "copy_checkpoint",
            lambda: self.store.copy_checkpoint(
                source, session_id=session_id, model_seq_id=seq, project_id=project_id, ttl_seconds=ttl_seconds
            ),
        )

    def interpolate_checkpoints(self, owner, source_paths, coefficients, *, output_name=None):
        answer = InterpolateCheckpointsResponse(
            path=f"tinker://sum/sampler_weights/{output_name}", source_paths=source_paths, coefficients=coefficients
        )
        return self._later("interpolate_checkpoints", lambda: answer)

    def load_weights(self, model_id, path, *, optimizer):
        return self._later("load_weights", lambda: LoadWeightsResponse(path=path), path=path, optimizer=optimizer)

    def _new_sampler(self, session_id: str, base_model: str, model_path: str | None) -> str:
        sampler_id = f"{session_id}:sample:{len(self._samplers)}"
        self.store.add_sampler(session_id, sampler_id, base_model=base_model, model_path=model_path)
        self._samplers[sampler_id] = self.store.get_sampler(sampler_id)
        return sampler_id

    def save_weights_for_sampler(
        self, model_id, name=None, *, ttl_seconds=None, user_metadata=None, overwrite=False, sampler=None
    ):
        def answer() -> SaveWeightsForSamplerResponse:
            path = None if name is None else f"tinker://{model_id}/sampler_weights/{name}"
            sampler_id = self._new_sampler(model_id.split(":")[0], self._infos[model_id].model_name, path)
            return SaveWeightsForSamplerResponse(path=path, sampling_session_id=sampler_id)

        return self._later("save_weights_for_sampler", answer, name=name)

    def create_sampler(self, session_id, *, model_path=None, base_model=None):
        return self._later(
            "create_sampler", lambda: self._new_sampler(session_id, base_model or "stored", model_path), path=model_path
        )

    def release(self, identifier):
        pass

    def get_sampler(self, sampler_id):
        return self._samplers[sampler_id]

    def sample(self, sampler_id, prompt, num_samples, sampling_params, *, on_token=None, **options):
        def answer() -> SampleResponse:
            logprobs = [None, *[-1.0] * (prompt.length - 1)] if options["include_prompt_logprobs"] else None
            sequences = [SampledSequence("length", [i], [-0.5]) for i in range(num_samples)]
            return SampleResponse(sequences, prompt_logprobs=logprobs)

        return self._later("sample", answer, prompt=prompt, num_samples=num_samples, params=sampling_params, **options)

    def cancel_sample(self, future):
        return future.cancel()

    def tokenizer(self, base_model):
        return f"tokenizer of {base_model}"

    def capabilities(self):
        return GetServerCapabilitiesResponse(supported_models=[])
