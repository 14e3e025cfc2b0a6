"""Checking what a training call was given, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mint_engine.errors import UserError
from mint_engine.losses import Loss
from mint_engine.types import Datum, ModelInput, TensorData


@dataclass(frozen=True)
class Limits:
    """What a base model can take: token ids in [0, vocab_size), sequences of at most max_context_length tokens."""

    vocab_size: int
    max_context_length: int


@dataclass(frozen=True)
class CheckedDatum:
    """``tokens`` int64 [N]; ``targets`` int64 [N, K]; ``inputs`` fp32 [N, K] each; ``shape``: the user's targets'."""

    tokens: np.ndarray
    targets: np.ndarray
    inputs: dict[str, np.ndarray]
    shape: tuple[int, ...]


def check_tokens(tokens: np.ndarray, limits: Limits, what: str) -> np.ndarray:
    """``tokens`` itself if it is a non-empty sequence of known token ids that fits the context.

    Raises:
        UserError: it is not; the message names ``what``.
    """
    if tokens.size == 0:
        raise UserError(f"{what}: expected at least one token, got an empty sequence")
    if tokens.size > limits.max_context_length:
        raise UserError(
            f"{what}: expected at most {limits.max_context_length} tokens (the model's context), got {tokens.size}"
        )
    return check_ids(tokens, limits, what)


def check_ids(tokens: np.ndarray, limits: Limits, what: str) -> np.ndarray:
    """``tokens`` itself, of any shape, if all are known token ids. Raises UserError, which names ``what``."""
    bad = np.flatnonzero((tokens < 0) | (tokens >= limits.vocab_size))
    if bad.size:
        where = tuple(int(i) for i in np.unravel_index(bad[0], tokens.shape))
        at = where[0] if len(where) == 1 else where
        raise UserError(
            f"{what}: expected token ids in [0, {limits.vocab_size}), got {tokens.flat[bad[0]]} at index {at}"
        )
    return tokens


def check_prompt(prompt: ModelInput | Datum, limits: Limits, what: str = "prompt") -> np.ndarray:
    """The token ids of a prompt or of a datum's input, int64 [N], checked as by :func:`check_tokens`."""
    try:
        tokens = prompt.token_array()
    except OverflowError:
        raise UserError(f"{what}: expected token ids in [0, {limits.vocab_size}), got one beyond 64 bits") from None
    return check_tokens(tokens, limits, what)


def check_data(data: Sequence[Datum], loss: Loss, config: Mapping[str, float], limits: Limits) -> list[CheckedDatum]:
    """Every datum of a call, checked. An optional input that some datum gives is filled from ``config`` in the others.

    Raises:
        UserError: the first thing that is wrong: argument, what was expected, what came, and which datum.
    """
    if len(data) == 0:
        raise UserError("data: expected at least one datum, got an empty list")
    checked = [_check_datum(datum, i, loss, limits) for i, datum in enumerate(data)]
    for name in {name for datum in checked for name in datum.inputs}:
        for datum in checked:
            datum.inputs.setdefault(name, np.full(datum.targets.shape, config.get(name, 0.0), dtype=np.float32))
    return checked


def _check_datum(datum: Datum, index: int, loss: Loss, limits: Limits) -> CheckedDatum:
    at = f"(datum {index})"
    tokens = check_prompt(datum, limits, f"model_input {at}")
    given = datum.loss_fn_inputs
    missing = [name for name in ("target_tokens", *loss.required) if name not in given]
    if missing:
        raise UserError(f"loss_fn_inputs: {loss.name} needs {', '.join(missing)} {at}")
    targets = _integers(given["target_tokens"], f"target_tokens {at}")
    _check_length(targets, tokens.size, "target_tokens", "model_input", at)
    if targets.ndim > 2 or (targets.ndim == 2 and not loss.matrix_targets):
        raise UserError(f"target_tokens: {loss.name} expects shape [N], got {list(targets.shape)} {at}")
    check_ids(targets, limits, f"target_tokens {at}")
    inputs = {}
    for name in (*loss.required, *(n for n in loss.optional if n in given)):
        values = given[name].to_numpy().astype(np.float32, copy=False)
        if values.shape != targets.shape:
            _check_length(values, targets.shape[0], name, "target_tokens", at)
            raise UserError(
                f"{name}: expected shape {list(targets.shape)} like target_tokens, got {list(values.shape)} {at}"
            )
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise UserError(f"{name}: expected finite numbers, got {values.flat[bad[0]]} at index {bad[0]} {at}")
        inputs[name] = values.reshape(tokens.size, -1)
    return CheckedDatum(tokens, targets.reshape(tokens.size, -1), inputs, targets.shape)


def _integers(tensor: TensorData, what: str) -> np.ndarray:
    values = tensor.to_numpy()
    if values.dtype.kind not in "iu":
        raise UserError(f"{what}: expected integers, got dtype {values.dtype}")
    return values.astype(np.int64, copy=False)


def _check_length(values: np.ndarray, expected: int, name: str, like: str, at: str) -> None:
    got = values.shape[0] if values.ndim else 0
    if got != expected:
        raise UserError(f"{name}: expected {expected} values to match {like}, got {got} {at}")


def stack_targets(data: Sequence[CheckedDatum]) -> Tensor:
    """The targets of datums laid end to end, int64 [M, K]. Where K differs, the narrower ones are padded with -1."""
    return _stack([d.targets for d in data], -1)


def stack_inputs(data: Sequence[CheckedDatum]) -> dict[str, Tensor]:
    """The loss inputs of one call's datums laid end to end, fp32 [M, K] each, padded with 0."""
    return {name: _stack([d.inputs[name] for d in data], 0.0) for name in data[0].inputs}


def _stack(arrays: list[np.ndarray], fill: float) -> Tensor:
    width = max(a.shape[1] for a in arrays)
    if all(a.shape[1] == width for a in arrays):
        return torch.from_numpy(np.concatenate(arrays))
    stacked = np.full((sum(len(a) for a in arrays), width), fill, dtype=arrays[0].dtype)
    start = 0
    for a in arrays:
        stacked[start : start + len(a), : a.shape[1]] = a
        start += len(a)
    return torch.from_numpy(stacked)
