"""The result of `sample`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mint_engine.types import PromptAltTokens, SampledSequence, SampleResponse, TopkLists, TopkLogprobs
from mint_engine.types.results import NO_LOGPROB
from mint_engine.wire import messages
from mint_engine.wire.errors import WireError
from mint_engine.wire.json_values import finite
from mint_engine.wire.outputs import tensor_to_json
from mint_engine.wire.tensors import DenseBudget, numbers, parse_tensor, raw, write_tensor

_INT32 = np.dtype("<i4")
_FLOAT32 = np.dtype("<f4")
_STOP_REASONS = {messages.STOP: "stop", messages.LENGTH: "length"}


def encode_sample_response(response: SampleResponse) -> bytes:
    """Protobuf. A prompt token without a log-probability is NaN."""
    message = messages.SampleResponse(prompt_cache_hit_tokens=response.prompt_cache_hit_tokens)
    for sequence in response.sequences:
        entry = message.sequences.add()
        entry.stop_reason = messages.STOP if sequence.stop_reason == "stop" else messages.LENGTH
        entry.tokens = raw(np.asarray(sequence.tokens, dtype=_INT32))
        if sequence.logprobs is not None:
            entry.logprobs = raw(np.asarray(sequence.logprobs, dtype=_FLOAT32))
        if sequence.topk_logprobs is not None:
            _write_topk(entry.topk_sampled_logprobs, sequence.topk_logprobs)
    if response.prompt_logprobs is not None:
        message.prompt_logprobs = raw(np.array(response.prompt_logprobs, dtype=_FLOAT32))  # None becomes NaN
    if response.topk_prompt_logprobs is not None:
        _write_topk(message.topk_prompt_logprobs, response.topk_prompt_logprobs)
    if response.target_prompt_logprobs is not None:
        write_tensor(message.target_prompt_logprobs, response.target_prompt_logprobs)
    if response.prompt_alt_tokens is not None:
        write_tensor(message.prompt_alt_tokens.tokens, response.prompt_alt_tokens.tokens)
        write_tensor(message.prompt_alt_tokens.logprobs, response.prompt_alt_tokens.logprobs)
    body: bytes = message.SerializeToString()
    return body


def parse_sample_response(body: bytes, sequence_ids: Sequence[str] = ()) -> SampleResponse:
    """The other direction; the ids came with the promise (`sample_sequence_ids`). Raises WireError."""
    message = messages.parse(messages.SampleResponse, body)
    ids = [*sequence_ids, *[""] * (len(message.sequences) - len(sequence_ids))]
    budget = DenseBudget()
    return SampleResponse(
        sequences=[_parse_sequence(s, i) for s, i in zip(message.sequences, ids, strict=False)],
        prompt_logprobs=_parse_prompt_logprobs(message),
        topk_prompt_logprobs=_parse_topk(message, "topk_prompt_logprobs"),
        target_prompt_logprobs=(
            parse_tensor(message.target_prompt_logprobs, "target_prompt_logprobs", budget)
            if message.HasField("target_prompt_logprobs")
            else None
        ),
        prompt_alt_tokens=(
            PromptAltTokens(
                tokens=parse_tensor(message.prompt_alt_tokens.tokens, "prompt_alt_tokens", budget),
                logprobs=parse_tensor(message.prompt_alt_tokens.logprobs, "prompt_alt_tokens", budget),
            )
            if message.HasField("prompt_alt_tokens")
            else None
        ),
        prompt_cache_hit_tokens=message.prompt_cache_hit_tokens,
    )


def sample_response_to_json(response: SampleResponse) -> dict[str, Any]:
    """JSON for tinker 0.22, and for people with curl. What has no log-probability is null."""
    record: dict[str, Any] = {
        "type": "sample",
        "sequences": [_sequence_to_json(sequence) for sequence in response.sequences],
        "prompt_logprobs": None if response.prompt_logprobs is None else _nullable(response.prompt_logprobs),
        "topk_prompt_logprobs": _topk_to_json(response.topk_prompt_logprobs),
        "prompt_cache_hit_tokens": response.prompt_cache_hit_tokens,
    }
    if response.target_prompt_logprobs is not None:
        record["target_prompt_logprobs"] = tensor_to_json(response.target_prompt_logprobs)
    if response.prompt_alt_tokens is not None:
        record["prompt_alt_tokens"] = {
            "tokens": tensor_to_json(response.prompt_alt_tokens.tokens),
            "logprobs": tensor_to_json(response.prompt_alt_tokens.logprobs),
        }
    return record


def _parse_sequence(message: Any, sequence_id: str) -> SampledSequence:
    reason = _STOP_REASONS.get(message.stop_reason)
    if reason is None:
        raise WireError(f"stop_reason: expected 0 (stop) or 1 (length), got {message.stop_reason}")
    logprobs = numbers(message.logprobs, _FLOAT32, "logprobs").tolist() if message.HasField("logprobs") else None
    return SampledSequence(
        stop_reason=reason,  # type: ignore[arg-type]
        tokens=numbers(message.tokens, _INT32, "tokens").tolist(),
        logprobs=logprobs,
        topk_logprobs=_parse_topk(message, "topk_sampled_logprobs"),
        sequence_id=sequence_id,
    )


def _parse_prompt_logprobs(message: Any) -> list[float | None] | None:
    if not message.HasField("prompt_logprobs"):
        return None
    values = numbers(message.prompt_logprobs, _FLOAT32, "prompt_logprobs")
    return [None if missing else value for value, missing in zip(values.tolist(), np.isnan(values), strict=True)]


def _write_topk(message: Any, rows: TopkLists) -> None:
    topk = TopkLogprobs.of(rows)
    message.token_ids = raw(topk.token_ids.astype(_INT32, copy=False))
    message.logprobs = raw(topk.logprobs.astype(_FLOAT32, copy=False))
    message.length, message.k = topk.token_ids.shape


def _parse_topk(message: Any, name: str) -> TopkLists | None:
    if not message.HasField(name):
        return None
    topk = getattr(message, name)
    ids, logprobs = numbers(topk.token_ids, _INT32, name), numbers(topk.logprobs, _FLOAT32, name)
    if ids.size != topk.k * topk.length or logprobs.size != ids.size or (ids.size == 0 and topk.length > 2**20):
        raise WireError(f"{name}: expected {topk.length} x {topk.k} ids and log-probabilities, got {ids.size}")
    if topk.k == 0:
        return [None] * topk.length
    shape = topk.length, topk.k
    rows = zip(ids.reshape(shape).tolist(), logprobs.reshape(shape).tolist(), strict=True)
    return [[cell for cell in zip(*row, strict=True) if cell[1] > NO_LOGPROB] or None for row in rows]


def _sequence_to_json(sequence: SampledSequence) -> dict[str, Any]:
    record: dict[str, Any] = {
        "stop_reason": sequence.stop_reason,
        "tokens": [int(token) for token in sequence.tokens],
        "logprobs": None if sequence.logprobs is None else finite(sequence.logprobs),
    }
    if sequence.topk_logprobs is not None:
        record["topk_logprobs"] = _topk_to_json(sequence.topk_logprobs)
    return record


def _topk_to_json(rows: TopkLists | None) -> list[Any] | None:
    if rows is None:
        return None
    return [None if row is None else [[int(t), p] for t, p in row if np.isfinite(p)] for row in rows]


def _nullable(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None or not np.isfinite(value) else value for value in values]
