"""`SamplingClient`: text from one fixed version of a model."""

from __future__ import annotations

import base64
import json
import pickle
import weakref
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from mint_engine.client.connection import check_key_may_go, open_engine
from mint_engine.client.futures import APIFuture, failed, transformed, value_twin
from mint_engine.client.ready import Ready
from mint_engine.client.remote import Address, RemoteEngine, connect
from mint_engine.errors import UserError
from mint_engine.feed import Feed
from mint_engine.types import GetSamplerResponse, ModelInput, SampledToken, SampleResponse, SamplingParams, TensorData
from mint_engine.types.datum import as_tensor_data
from mint_engine.types.model_input import token_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mint_engine.client.protocol import ClientEngine, OnToken
    from mint_engine.client.session import Session


class SamplingClient(Ready):
    """Samples from one version of a model, which later training does not change. Made by the other clients.

    One that samples on a server can be pickled and used in other processes. The pickle holds the server's address and
    the API key; a handle (`get_sampler_handle`) is a string that holds no key.
    """

    def __init__(self, engine: ClientEngine, sampler_id: str, session: Session | None = None) -> None:
        self._engine, self._info = engine, engine.get_sampler(sampler_id)
        self._session = session  # which lives as long as this client does
        weakref.finalize(self, engine.release, sampler_id).atexit = False

    @classmethod
    def _copy(cls, engine: ClientEngine, info: GetSamplerResponse) -> SamplingClient:
        """A client of a sampler that somebody else made, and lets go."""
        client = cls.__new__(cls)
        client._engine, client._info, client._session = engine, info, None
        return client

    @property
    def sampler_id(self) -> str:
        return self._info.sampler_id

    @property
    def model_path(self) -> str | None:
        """Path of the checkpoint that is sampled, if it has one."""
        return self._info.model_path

    def sample(
        self,
        prompt: ModelInput | Sequence[int],
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | Any | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
        *,
        on_token: OnToken | None = None,
    ) -> APIFuture[SampleResponse]:
        """Draw `num_samples` continuations of `prompt`.

        Args:
            prompt: a ModelInput, or just its token ids.
            sampling_params: None means `SamplingParams()`.
            include_prompt_logprobs: also give the log-probability of every prompt token but the first.
            topk_prompt_logprobs, topk_sample_logprobs: so many most likely tokens at each position; 0 = none.
            target_prompt_logprobs: int64 [len(prompt) - 1, K], token ids to score at each position; -1 = skip.
            prompt_alt_tokens_k: so many draws at each prompt position, at the request's temperature.
            prompt_logprobs_last_n: score the last n prompt tokens only.
            on_token: called with (which of the samples, token, log-probability) for every token as it is drawn, on
                the engine's thread, which waits for it: be quick. In process only; see also `stream`.

        The tokens that end a sample are part of it. Log-probabilities of samples are those of the tempered
        distribution, log-probabilities of prompts those at temperature 1.
        """
        try:
            model_input = _as_model_input(prompt)
            params = SamplingParams() if sampling_params is None else sampling_params
            if not isinstance(params, SamplingParams):
                raise UserError(f"sampling_params: expected SamplingParams, got {type(params).__name__}")
            targets = target_prompt_logprobs
            if targets is not None:
                targets = as_tensor_data("target_prompt_logprobs", targets, "int64")
        except ValueError as error:
            return failed(error)
        future = self._engine.sample(
            self.sampler_id,
            model_input,
            num_samples,
            params,
            include_prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            target_prompt_logprobs=targets,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
            on_token=on_token,
        )
        return APIFuture(future)

    async def stream(
        self,
        prompt: ModelInput | Sequence[int],
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
    ) -> AsyncGenerator[SampledToken, None]:
        """The tokens of `num_samples` continuations of `prompt`, each as soon as it is drawn. In process only.

        The samples advance side by side, so their tokens come mixed: `SampledToken.sample` says whose one is. Leaving
        the loop, or cancelling the task, gives the rest up and frees its memory:

            async for drawn in sampler.stream(prompt, sampling_params=params):
                print(tokenizer.decode([drawn.token]), end="", flush=True)

        Raises:
            What `sample` raises.
        """
        feed: Feed[SampledToken] = Feed()
        future = self.sample(
            prompt, num_samples, sampling_params, on_token=lambda *drawn: feed.put(SampledToken(*drawn))
        ).future()
        future.add_done_callback(lambda _: feed.close())
        try:
            async for drawn in feed:
                yield drawn
            future.result()
        finally:
            self._engine.cancel_sample(future)

    def compute_logprobs(
        self, prompt: ModelInput | Sequence[int], prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        """The log-probability of every token of `prompt` given those before it, at temperature 1; the first is None."""
        scored = self.sample(
            prompt, num_samples=0, include_prompt_logprobs=True, prompt_logprobs_last_n=prompt_logprobs_last_n
        )
        return APIFuture(transformed(scored.future(), _prompt_logprobs))

    sample_async = value_twin(sample)
    compute_logprobs_async = value_twin(compute_logprobs)

    def get_base_model(self) -> str:
        return self._info.base_model

    async def get_base_model_async(self) -> str:
        return self.get_base_model()

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's Hugging Face tokenizer."""
        return self._engine.tokenizer(self.get_base_model())

    # ---- in other processes --------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        if not isinstance(self._engine, RemoteEngine):
            raise pickle.PicklingError(f"cannot pickle {self!r}: it {_STAYS}")
        return _unpickle, (self._engine.address, self._info.model_dump())

    def get_sampler_handle(self) -> str:
        """A string from which any process that has a key makes a client of the same sampler."""
        if not isinstance(self._engine, RemoteEngine):
            raise UserError(f"get_sampler_handle: {self!r} {_STAYS}")
        fields = {"url": self._engine.address.url, **self._info.model_dump()}
        return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()

    @staticmethod
    def from_sampler_handle(handle: str, *, base_url: str | None = None, api_key: str | None = None) -> SamplingClient:
        """The client of a handle.

        Args:
            handle: from `get_sampler_handle`.
            base_url: the server; default the one the handle names.
            api_key: default MINT_API_KEY, for base_url or where MINT_BASE_URL is. A handle may be anybody's, so this
                key goes to no other server that one names.
        """
        try:
            fields = json.loads(base64.urlsafe_b64decode(handle))
            url, info = fields.pop("url"), GetSamplerResponse.model_validate(fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"handle: expected a string from get_sampler_handle(), got {handle!r}") from error
        if not base_url and api_key is None:
            check_key_may_go(url)
        return SamplingClient._copy(open_engine(base_url=base_url or url, api_key=api_key, dtype=None), info)

    def __repr__(self) -> str:
        return (
            f"SamplingClient({self.sampler_id!r}, base_model={self.get_base_model()!r}, model_path={self.model_path!r})"
        )


_STAYS = "samples in this process; one of a server (MINT_BASE_URL) can be handed to others"


def _unpickle(address: Address, info: dict[str, Any]) -> SamplingClient:
    return SamplingClient._copy(connect(address), GetSamplerResponse.model_validate(info))


def _as_model_input(prompt: ModelInput | Sequence[int]) -> ModelInput:
    return prompt if isinstance(prompt, ModelInput) else ModelInput.from_ints(token_list(prompt, "prompt"))


def _prompt_logprobs(response: SampleResponse) -> list[float | None]:
    assert response.prompt_logprobs is not None, "the engine was asked for prompt_logprobs"
    return response.prompt_logprobs
