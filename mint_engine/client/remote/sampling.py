"""Samplers on a server, and samples."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TYPE_CHECKING

from mint_engine.client.remote import samples
from mint_engine.client.remote.core import RemoteCore, given
from mint_engine.client.remote.transport import answer_as, json_object
from mint_engine.errors import UserError
from mint_engine.types import (
    GetSamplerResponse,
    ModelInput,
    SampleResponse,
    SamplingParams,
    SaveWeightsForSamplerResponse,
    TensorData,
)

if TYPE_CHECKING:
    from mint_engine.client.protocol import OnToken

_NO_STREAM = (
    "on_token: only an engine in this process tells tokens one by one; a server streams them over its OpenAI API "
    "(/v1/completions with stream=true)"
)
SLOW_SECONDS = 300.0  # for requests that are answered when weights have been read


class Sampling(RemoteCore):
    def save_weights_for_sampler(
        self, model_id: str, name: str | None = None, *, ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None, overwrite: bool = False, sampler: bool | None = None,
    ) -> Future[SaveWeightsForSamplerResponse]:  # fmt: skip
        wanted = name is None if sampler is None else sampler
        session_id = model_id.split(":")[0]
        body = {
            "model_id": model_id, "path": name, "ttl_seconds": ttl_seconds, "user_metadata": user_metadata,
            "overwrite": overwrite or None, "type": "save_weights_for_sampler",
            "sampling_session_seq_id": self._next(self._samplers, session_id) if wanted and name is None else None,
        }  # fmt: skip

        async def run() -> SaveWeightsForSamplerResponse:
            answer = await self._in_lane(
                self._lane(model_id), "save_weights_for_sampler", "SaveWeightsForSampler", body
            )
            saved = answer_as(SaveWeightsForSamplerResponse, answer)
            if not wanted:
                return saved
            sampler_id = saved.sampling_session_id
            if sampler_id is None:  # one with a name is opened by its path
                sampler_id = await self._open_sampler(session_id, model_path=saved.path)
            self._add_sampler(await self._fetch_sampler(sampler_id))
            return saved.model_copy(update={"sampling_session_id": sampler_id})

        return self._submit(run)

    def create_sampler(
        self, session_id: str, *, model_path: str | None = None, base_model: str | None = None
    ) -> Future[str]:
        async def run() -> str:
            sampler_id = await self._open_sampler(session_id, model_path=model_path, base_model=base_model)
            self._add_sampler(await self._fetch_sampler(sampler_id))
            return sampler_id

        return self._submit(run)

    async def _open_sampler(
        self, session_id: str, *, model_path: str | None = None, base_model: str | None = None
    ) -> str:
        body = {
            "session_id": session_id, "sampling_session_seq_id": self._next(self._samplers, session_id),
            "model_path": model_path, "base_model": base_model, "type": "create_sampling_session",
        }  # fmt: skip
        usual = self.address.timeouts.read
        patient = None if usual is None else max(usual, SLOW_SECONDS)
        response = await self._transport.post("create_sampling_session", given(body), timeout=patient)
        return str(json_object(response)["sampling_session_id"])

    async def _fetch_sampler(self, sampler_id: str) -> GetSamplerResponse:
        return answer_as(GetSamplerResponse, await self._transport.send("GET", f"samplers/{sampler_id}"))

    def _add_sampler(self, info: GetSamplerResponse) -> None:
        self._sampler_infos[info.sampler_id] = info
        self._numbers.start(info.sampler_id)

    def get_sampler(self, sampler_id: str) -> GetSamplerResponse:
        if sampler_id not in self._sampler_infos:
            self._sampler_infos[sampler_id] = self._submit(lambda: self._fetch_sampler(sampler_id)).result()
        return self._sampler_infos[sampler_id]

    def sample(
        self, sampler_id: str, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams, *,
        include_prompt_logprobs: bool = False, topk_prompt_logprobs: int = 0, topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None, prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None, on_token: OnToken | None = None,
    ) -> Future[SampleResponse]:  # fmt: skip
        """Cancelling the future cancels the request. ``on_token`` is refused: samples come when they are complete."""
        if on_token is not None:
            refused: Future[SampleResponse] = Future()
            refused.set_exception(UserError(_NO_STREAM))
            return refused
        with self._lock:
            number = self._numbers.next(sampler_id)
        body = samples.request_body(
            sampler_id, number, prompt, num_samples, sampling_params, include_prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs, topk_sample_logprobs=topk_sample_logprobs,
            target_prompt_logprobs=target_prompt_logprobs, prompt_alt_tokens_k=prompt_alt_tokens_k,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )  # fmt: skip

        async def run() -> SampleResponse:
            limits = await self._get_limits()
            if self._slots is None:
                self._slots = asyncio.Semaphore(limits.samples)
            return await samples.sample(self._transport, self._background, self._slots, body)

        return self._submit(run, cancellable=True)

    def cancel_sample(self, future: Future[SampleResponse]) -> bool:
        """Give up a sample; False if it has been answered."""
        return future.cancel()
