"""One sample call, checked."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mint_engine.adapters import Adapter
from mint_engine.datums import check_prompt
from mint_engine.errors import UserError
from mint_engine.prompt_scores import PromptQuery
from mint_engine.sampling import Draw
from mint_engine.stopping import StopRule
from mint_engine.types import ModelInput, SampledSequence, SampleResponse, SamplingParams, TensorData

if TYPE_CHECKING:
    from mint_engine.bases import Base


# What one call may ask for. It shares a batch and the memory with everybody else's.
MAX_SAMPLES = 256  # decoded together
MAX_VALUES = 1 << 22  # alternatives in an answer, some hundred bytes each
MAX_DRAWS = 1 << 18  # alternatives drawn for the tokens of a prompt ...
MAX_ALTERNATIVES = 128  # ... and for each of them

# (sample index, token, log-probability): called on the device thread, which waits for it.
OnToken = Callable[[int, int, float], None]


@dataclass(eq=False)  # a request is itself, not its fields
class Request:
    """What the sampler works on. ``num_samples`` 0 only scores the prompt. ``adapter`` None is the base model."""

    adapter: Adapter | None
    prompt: np.ndarray
    num_samples: int
    params: SamplingParams
    stop: StopRule
    query: PromptQuery = field(default_factory=PromptQuery)
    topk: int = 0  # alternatives reported beside each sampled token
    sequence_ids: list[str] = field(default_factory=list)
    future: Future[SampleResponse] = field(default_factory=Future)
    finished: dict[int, SampledSequence] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    on_token: OnToken | None = None
    owner: str = ""  # whose turn it takes
    begun: float | None = None  # time.perf_counter() when it was admitted
    order: int = -1  # of admission
    cache_hits: int = 0  # prompt tokens that were in the KV cache when it was admitted

    @property
    def draw(self) -> Draw:
        return Draw(self.params.temperature, self.params.top_k, self.params.top_p)

    @property
    def response(self) -> SampleResponse:
        sequences = [self.finished[i] for i in range(self.num_samples)]
        return SampleResponse(sequences, **self.scores, prompt_cache_hit_tokens=self.cache_hits)


def make_request(
    base: Base,
    adapter: Adapter | None,
    prompt: ModelInput,
    num_samples: int,
    params: SamplingParams,
    query: PromptQuery,
    *,
    topk: int = 0,
    targets: TensorData | None = None,
    on_token: OnToken | None = None,
    owner: str = "",
) -> Request:
    """Check a call and turn it into a request. ``targets`` become ``query.targets``.

    Raises:
        UserError: a prompt, a count or a target matrix that cannot be; the message names it.
    """
    tokens = check_prompt(prompt, base.limits)
    counts = {
        "num_samples": num_samples, "topk_prompt_logprobs": query.topk, "topk_sample_logprobs": topk,
        "prompt_alt_tokens_k": query.alternatives, "prompt_logprobs_last_n": query.last_n or 0,
    }  # fmt: skip
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise UserError(f"{name}: expected an integer of at least 0, got {count!r}")
    if num_samples > MAX_SAMPLES:
        raise UserError(f"num_samples: expected at most {MAX_SAMPLES}, got {num_samples}")
    if query.alternatives > MAX_ALTERNATIVES:
        raise UserError(f"prompt_alt_tokens_k: expected at most {MAX_ALTERNATIVES}, got {query.alternatives}")
    check_product(MAX_DRAWS, "prompt_alt_tokens_k", tokens=len(tokens), alternatives=query.alternatives)
    top = min(query.topk, base.limits.vocab_size)
    check_product(MAX_VALUES, "topk_prompt_logprobs", tokens=len(tokens), alternatives=top)
    unknown = [t for t in params.stop_token_ids if t >= base.limits.vocab_size]
    if unknown:
        raise UserError(f"stop: expected token ids in [0, {base.limits.vocab_size}), got {unknown[0]}")
    tokenizer = base.tokenizer if params.stop_strings else None

    def decode(ids: list[int]) -> str:
        return "" if tokenizer is None else str(tokenizer.decode(ids))

    return Request(
        adapter=adapter,
        prompt=tokens,
        num_samples=num_samples,
        params=params,
        stop=StopRule.of(params, base.config.eos_token_ids, decode),
        query=replace(query, targets=_target_matrix(targets, len(tokens), base.limits.vocab_size)),
        topk=topk,
        sequence_ids=[uuid.uuid4().hex for _ in range(num_samples)],
        on_token=on_token,
        owner=owner,
    )


def check_product(most: int, name: str, **factors: int) -> None:
    """Raises UserError if ``factors`` multiply to more than ``most``."""
    if math.prod(factors.values()) > most:
        got = " x ".join(f"{count} {what}" for what, count in factors.items())
        raise UserError(f"{name}: expected at most {most} values in all, got {got}")


def _target_matrix(targets: TensorData | None, prompt: int, vocab_size: int) -> np.ndarray | None:
    if targets is None:
        return None
    matrix = targets.to_numpy(pad_value=-1)
    if matrix.ndim != 2 or matrix.shape[0] != prompt - 1 or matrix.dtype.kind != "i":
        raise UserError(
            f"target_prompt_logprobs: expected int64 of shape [{prompt - 1}, K] (the first token has no row), got "
            f"{matrix.dtype} {list(matrix.shape)}"
        )
    if matrix.size and (matrix.min() < -1 or matrix.max() >= vocab_size):
        raise UserError(f"target_prompt_logprobs: expected token ids in [0, {vocab_size}) or -1 to skip")
    return matrix
