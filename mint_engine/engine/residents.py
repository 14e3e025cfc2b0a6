"""What is in memory: models and samplers by id, whose they are, and the lane in which a model's work is ordered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mint_engine.adapters import Adapter, TrainState
from mint_engine.bases import Base
from mint_engine.errors import NotFoundError, UserError
from mint_engine.lanes import Lane

Kind = Literal["train", "sample"]


@dataclass
class Model:
    """A training client's side of the engine. ``adapter`` and ``state`` are touched by the device thread only."""

    base: Base
    adapter: Adapter
    state: TrainState
    owner: str


@dataclass(frozen=True)
class SamplerEntry:
    """A version that can be sampled: an adapter nobody changes any more, or the base model."""

    base: Base
    adapter: Adapter | None
    model_path: str | None
    owner: str

    @property
    def ephemeral(self) -> bool:
        """It was never saved under a name: these weights are nowhere else."""
        return self.adapter is not None and self.model_path is None


class Residents:
    """Thread-safe. The call that asks for an id, ``<session>:train:<n>`` or ``<session>:sample:<n>``, takes it."""

    def __init__(self, new_lane: Callable[[str], Lane]) -> None:
        self.models: dict[str, Model] = {}
        self.samplers: dict[str, SamplerEntry] = {}
        self._new_lane = new_lane
        self._lock = threading.Lock()
        self._coming: dict[str, str] = {}  # id -> owner of what is being made or brought back
        self._lanes: dict[str, Lane] = {}
        self._counts: dict[str, int] = {}

    def reserve(self, session_id: str, kind: Kind, seq: int | None, owner: str) -> str:
        """A new id: the one with the caller's ``seq``, or the next that was not used in this process.

        Raises:
            UserError: the id is in use.
        """
        if seq is not None and (isinstance(seq, bool) or not isinstance(seq, int) or seq < 0):
            raise UserError(f"seq: expected an integer of at least 0, got {seq!r}")
        key = f"{session_id}:{kind}"
        with self._lock:
            count = self._counts.get(key, 0)
            identifier = f"{key}:{count if seq is None else seq}"
            self._take(identifier, owner)
            self._counts[key] = max(count, int(identifier.rpartition(":")[2]) + 1)
        return identifier

    def expect(self, identifier: str, owner: str) -> None:
        """What was put aside is being brought back. Raises UserError if it is in memory, or on its way already."""
        with self._lock:
            self._take(identifier, owner)

    def _take(self, identifier: str, owner: str) -> None:
        if identifier in self.models or identifier in self.samplers or identifier in self._coming:
            raise UserError(f"id: {identifier!r} is in use")
        self._coming[identifier] = owner
        if kind_of(identifier) == "train" and identifier not in self._lanes:
            self._lanes[identifier] = self._new_lane(owner)

    def add_model(self, model_id: str, model: Model) -> None:
        with self._lock:
            self._coming.pop(model_id, None)
            self.models[model_id] = model

    def add_sampler(self, sampler_id: str, entry: SamplerEntry) -> None:
        with self._lock:
            self._coming.pop(sampler_id, None)
            self.samplers[sampler_id] = entry

    def put_aside(self, identifier: str) -> None:
        """Free its memory. A model keeps its lane: what is submitted next comes after what was submitted before."""
        with self._lock:
            self.models.pop(identifier, None)
            self.samplers.pop(identifier, None)

    def forget(self, identifier: str) -> None:
        """Free its memory and its id, whether it is there, coming, or neither."""
        with self._lock:
            self.models.pop(identifier, None)
            self.samplers.pop(identifier, None)
            self._coming.pop(identifier, None)
            self._lanes.pop(identifier, None)

    def forget_session(self, session_id: str) -> None:
        """Stop counting what is made in it."""
        with self._lock:
            for kind in ("train", "sample"):
                self._counts.pop(f"{session_id}:{kind}", None)

    def lane(self, model_id: str) -> Lane:
        """Where the model's work goes. One that does not exist gets a lane of its own, to say so in."""
        with self._lock:
            return self._lanes.get(model_id) or self._new_lane("")

    def model(self, model_id: str) -> Model:
        model = self.models.get(model_id)
        if model is None:
            raise NotFoundError(
                f"model_id: there is no model {model_id!r} (never created, failed to load, parked, or unloaded)"
            )
        return model

    def sampler(self, sampler_id: str) -> SamplerEntry:
        entry = self.samplers.get(sampler_id)
        if entry is None:
            raise NotFoundError(f"sampler_id: there is no sampler {sampler_id!r} in memory")
        return entry

    def owner(self, identifier: str) -> str | None:
        """Whose it is, if it is in memory or coming."""
        with self._lock:
            entry = self.models.get(identifier) or self.samplers.get(identifier)
            return self._coming.get(identifier) if entry is None else entry.owner

    def ids(self) -> tuple[list[str], list[str]]:
        """(models that are there or coming, samplers that are there)."""
        with self._lock:
            coming = [identifier for identifier in self._coming if kind_of(identifier) == "train"]
            return [*self.models, *coming], list(self.samplers)

    def count_models(self, owner: str) -> int:
        with self._lock:
            return sum(model.owner == owner for model in self.models.values())


def kind_of(identifier: str) -> Kind | None:
    """Whether it is the id of a model or of a sampler; None if of neither."""
    parts = identifier.rsplit(":", 2)
    if len(parts) != 3 or not parts[2].isdecimal():
        return None
    return "train" if parts[1] == "train" else "sample" if parts[1] == "sample" else None


def session_of(identifier: str) -> str:
    """The session of a model or a sampler."""
    return identifier.split(":train:")[0].split(":sample:")[0]
