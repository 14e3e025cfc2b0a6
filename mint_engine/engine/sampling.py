"""Samplers: versions that can be sampled, and the samples themselves."""

from __future__ import annotations

import time
from concurrent.futures import Future

from mint_engine.engine.core import EngineCore, Steps, failed
from mint_engine.engine.residents import Model, SamplerEntry, session_of
from mint_engine.errors import SampleCancelledError, UserError
from mint_engine.off_thread import Apart
from mint_engine.prompt_scores import PromptQuery
from mint_engine.requests import OnToken, Request, make_request
from mint_engine.state import load_adapter, save_adapter
from mint_engine.store import Store
from mint_engine.types import (
    GetSamplerResponse,
    ModelInput,
    SampleResponse,
    SamplingParams,
    SaveWeightsForSamplerResponse,
    TensorData,
)


class Sampling(EngineCore):
    def save_weights_for_sampler(
        self, model_id: str, name: str | None = None, *, ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None, overwrite: bool = False, sampler: bool | None = None,
        sampler_seq: int | None = None,
    ) -> Future[SaveWeightsForSamplerResponse]:  # fmt: skip
        """A snapshot to sample from.

        With a name it is kept as ``tinker://<model id>/sampler_weights/<name>``. A sampler of it, which stays until
        :meth:`release`, is made if ``sampler``, by default if it has no name; its id is ``<session>:sample:<n>`` with
        ``n = sampler_seq``, or as the engine counts.
        """
        wanted = name is None if sampler is None else sampler

        def run() -> Steps[SaveWeightsForSamplerResponse]:
            model = self._residents.model(model_id)
            if not wanted:
                entry = yield from snapshot(model)
                return SaveWeightsForSamplerResponse(path=entry.model_path)
            sampler_id = self._residents.reserve(session_of(model_id), "sample", sampler_seq, model.owner)
            entry = yield from self._add_sampler(sampler_id, snapshot(model))
            return SaveWeightsForSamplerResponse(path=entry.model_path, sampling_session_id=sampler_id)

        def snapshot(model: Model) -> Steps[SamplerEntry]:
            store, base, adapter, path = self._view(model.owner), model.base, model.adapter.snapshot(), None
            if name is not None:
                path = yield lambda: store.write_checkpoint(
                    model_id, "sampler_weights", name, save_adapter(adapter, base), base_model=base.name,
                    lora=adapter.lora, user_metadata=user_metadata, ttl_seconds=ttl_seconds, overwrite=overwrite,
                )  # fmt: skip
            return SamplerEntry(base, adapter, path, model.owner)

        return self._submit("save_weights_for_sampler", self._residents.lane(model_id), run)

    def create_sampler(
        self, session_id: str, *, model_path: str | None = None, base_model: str | None = None, seq: int | None = None,
        reader: Store | None = None,
    ) -> Future[str]:  # fmt: skip
        """A sampler of a saved version, or of a base model; the future gives its id, ``<session>:sample:<seq>``.

        Without ``seq`` the engine counts. ``reader``: whose checkpoints may be read, if not the session's owner.
        """
        try:
            if model_path is None and base_model is None:
                raise UserError("create_sampler: expected model_path or base_model, got neither")
            owner = self._session_owner(session_id)
            sampler_id = self._residents.reserve(session_id, "sample", seq, owner)
        except Exception as error:
            return failed(error)

        def create() -> Steps[str]:
            yield from self._add_sampler(sampler_id, self._open(owner, model_path, base_model, reader))
            return sampler_id

        future = self._submit("create_sampler", self._executor.lane(owner), create)
        future.add_done_callback(lambda f: self._residents.forget(sampler_id) if f.cancelled() else None)
        return future

    def _open(
        self, owner: str, model_path: str | None, base_model: str | None, reader: Store | None = None
    ) -> Steps[SamplerEntry]:
        if model_path is None:
            base = yield Apart(lambda: self._bases.get(base_model or ""))
            return SamplerEntry(base, None, None, owner)
        store = reader or self._view(owner)
        name = (yield lambda: store.resolve(model_path)).record.base_model
        if base_model is not None and base_model != name:
            raise UserError(f"base_model: {model_path} was trained on {name!r}, got {base_model!r}")
        base = yield Apart(lambda: self._bases.get(name))
        # Once more: loading the base may have taken minutes, and a resolved directory only stays for a while.
        found = yield lambda: store.resolve(model_path)
        adapter = yield lambda: load_adapter(found.directory, base, model_path)
        return SamplerEntry(base, adapter, found.tinker_path, owner)

    def _add_sampler(self, sampler_id: str, make: Steps[SamplerEntry]) -> Steps[SamplerEntry]:
        """Make a sampler, record it and let it be used; if that fails its reserved id is free again."""
        self._reap()
        try:
            entry = yield from make
            store = self._view(entry.owner)
            yield lambda: store.add_sampler(
                session_of(sampler_id), sampler_id, base_model=entry.base.name, model_path=entry.model_path,
                ephemeral=entry.ephemeral,
            )  # fmt: skip
        except BaseException:
            self._residents.forget(sampler_id)
            raise
        self._residents.add_sampler(sampler_id, entry)
        return entry

    def get_sampler(self, sampler_id: str) -> GetSamplerResponse:
        entry = self._residents.sampler(sampler_id)
        return GetSamplerResponse(sampler_id=sampler_id, base_model=entry.base.name, model_path=entry.model_path)

    def sample(
        self, sampler_id: str, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams, *,
        include_prompt_logprobs: bool = False, topk_prompt_logprobs: int = 0, topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None, prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None, on_token: OnToken | None = None,
    ) -> Future[SampleResponse]:  # fmt: skip
        """``num_samples`` continuations of ``prompt``; 0 only scores the prompt. Requests are independent.

        ``on_token(sample index, token, log-probability)`` is called for every token as it is drawn, on the device
        thread: it must be quick. An exception in it fails this request only.
        """
        asked = time.perf_counter()
        try:
            if (inherited := self._executor.inherited()) is not None:
                raise inherited
            entry = self._residents.sampler(sampler_id)
            query = PromptQuery(
                logprobs=include_prompt_logprobs, topk=topk_prompt_logprobs, alternatives=prompt_alt_tokens_k,
                last_n=prompt_logprobs_last_n,
            )  # fmt: skip
            request = make_request(
                entry.base, entry.adapter, prompt, num_samples, sampling_params, query, topk=topk_sample_logprobs,
                targets=target_prompt_logprobs, on_token=on_token, owner=entry.owner,
            )  # fmt: skip
            future = entry.base.sampler.submit(request)
        except Exception as error:
            self._recorder.record("sample", time.perf_counter() - asked, 0, False)
            return failed(error)
        future.add_done_callback(lambda done: self._record_sample(request, done))
        return future

    def _record_sample(self, request: Request, future: Future[SampleResponse]) -> None:
        if future.cancelled() or isinstance(future.exception(), SampleCancelledError):
            return  # neither done nor failed
        now = time.perf_counter()
        seconds = now - (now if request.begun is None else request.begun)
        ok = future.exception() is None
        tokens = sum(len(sequence.tokens) for sequence in future.result().sequences) if ok else 0
        self._recorder.record("sample", seconds, tokens, ok)

    def cancel_sample(self, future: Future[SampleResponse]) -> bool:
        """Give up a sample: its future fails with SampleCancelledError, its memory is free after the next step.

        False if it has been answered already, or is not a sample of this engine.
        """
        return any(base.sampler.cancel(future) for base in self._bases.loaded)

    def sampler_load(self, owner: str | None = None) -> tuple[int, int]:
        """(requests that wait to be admitted, their prompt tokens), all or an owner's: what back-pressure looks at."""
        loads = [base.sampler.load(owner) for base in self._bases.loaded]
        return sum(requests for requests, _ in loads), sum(tokens for _, tokens in loads)
