"""forward and forward_backward of different clients, taken together by the device thread as one packed pass."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from mint_engine import trainer
from mint_engine.calls import Call
from mint_engine.datums import check_data
from mint_engine.engine.residents import Model, Residents
from mint_engine.joint import Joint
from mint_engine.losses import get_loss
from mint_engine.models.decoder import Decoder
from mint_engine.pending import Pending, joined
from mint_engine.stats import Recorder
from mint_engine.types import Datum, ForwardBackwardOutput

Outcomes: TypeAlias = Sequence[ForwardBackwardOutput | BaseException]

# A pass of more tokens gains nothing by being one, and others wait for its end. Every rank in company is a column more
# for all rows in the unembedding, and widens the borders, which stay in memory (benchmarks/packed_clients.py).
MAX_TOKENS = 1024
MAX_RANKS = 256
PATIENCE_S = 0.001  # for clients whose last call was answered just now


@dataclass(frozen=True)
class Together:
    """What training calls need of the engine.

    ``share``: whether those of different clients may share a pass. ``masked_logprobs``: whether a forward_backward
    reports the log-probabilities that its loss masks.
    """

    residents: Residents
    recorder: Recorder
    share: bool
    masked_logprobs: bool


class TrainingCall(Joint):
    """A forward or a forward_backward of one client, unchecked."""

    def __init__(
        self, engine: Together, model_id: str, data: Sequence[Datum], loss_fn: str, config: Mapping[str, Any] | None,
        *, backward: bool,
    ) -> None:  # fmt: skip
        self._engine, self.model_id, self._data = engine, model_id, data
        self._loss_fn, self._config, self._backward = loss_fn, config, backward
        self.patience = PATIENCE_S if engine.share else 0.0

    def choose(self, others: Sequence[Joint]) -> Sequence[Joint]:
        """Those on the same base model, in the order of their turns, as long as the pass stays small."""
        model, tokens = self.model, self.tokens
        if not self._engine.share or model is None or tokens is None:
            return []
        chosen: list[Joint] = []
        adapters, ranks = {model.adapter.uid}, model.adapter.rank
        for other in others:
            if not isinstance(other, TrainingCall):
                continue
            theirs, more = other.model, other.tokens
            if theirs is None or theirs.base is not model.base or theirs.adapter.uid in adapters:
                continue
            if more is None or tokens + more > MAX_TOKENS or ranks + theirs.adapter.rank > MAX_RANKS:
                continue
            tokens, ranks = tokens + more, ranks + theirs.adapter.rank
            adapters.add(theirs.adapter.uid)
            chosen.append(other)
        return chosen

    def run(self, company: Sequence[Joint]) -> Outcomes | Pending[Outcomes]:
        begun = time.perf_counter()
        calls = [self, *(other for other in company if isinstance(other, TrainingCall))]

        def record(outcomes: Outcomes) -> Outcomes:
            seconds = time.perf_counter() - begun
            for call, outcome in zip(calls, outcomes, strict=True):
                call.record(seconds, ok=not isinstance(outcome, BaseException))
            return outcomes

        running = _run(calls, self._engine.masked_logprobs)
        if isinstance(running, Pending):
            return Pending(running.wait, lambda: record(running.finish()))
        return record(running)

    @property
    def model(self) -> Model | None:
        return self._engine.residents.models.get(self.model_id)

    @cached_property
    def tokens(self) -> int | None:
        """None if the data are nothing that could be counted: checking them will say what they are."""
        try:
            return sum(datum.num_tokens for datum in self._data)
        except Exception:
            return None

    def checked(self) -> tuple[Decoder, Call]:
        """Raises what is wrong with the call."""
        model, loss = self._engine.residents.model(self.model_id), get_loss(self._loss_fn)
        config = loss.resolve_config(self._config)
        data = check_data(self._data, loss, config, model.base.limits)
        return model.base.decoder, Call(model.adapter, model.state if self._backward else None, data, loss, config)

    def record(self, seconds: float, *, ok: bool) -> None:
        kind = "forward_backward" if self._backward else "forward"
        self._engine.recorder.record(kind, seconds, self.tokens or 0 if ok else 0, ok)


def _run(calls: Sequence[TrainingCall], masked_logprobs: bool) -> Outcomes | Pending[Outcomes]:
    """The result or the exception of each call on one base model, in shared passes."""
    refused: dict[int, BaseException] = {}
    checked: dict[int, Call] = {}
    for i, call in enumerate(calls):
        try:
            decoder, checked[i] = call.checked()
        except Exception as error:
            refused[i] = error

    def everyone(found: Outcomes) -> Outcomes:
        outcomes = {**refused, **dict(zip(checked, found, strict=True))}
        return [outcomes[i] for i in range(len(calls))]

    if not checked:
        return everyone([])
    running = _passes(decoder, list(checked.values()), masked_logprobs)
    if isinstance(running, Pending):
        return Pending(running.wait, lambda: everyone(running.finish()))
    return everyone(running)


def _passes(decoder: Decoder, calls: Sequence[Call], masked_logprobs: bool) -> Outcomes | Pending[Outcomes]:
    try:
        return trainer.begin_together(decoder, calls, masked_logprobs=masked_logprobs)
    except Exception as error:
        if len(calls) == 1:
            return [error]
    # Something broke that belongs to nobody yet, such as memory that was not there for all of them: each alone.
    return joined([_passes(decoder, [call], masked_logprobs) for call in calls])
