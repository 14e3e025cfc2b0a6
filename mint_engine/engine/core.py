"""What every side of the engine shares: the device thread, the base models, the store, who and what is in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from mint_engine.bases import BaseModels
from mint_engine.device import resolve
from mint_engine.engine.residents import Model, Residents, SamplerEntry, session_of
from mint_engine.errors import UserError
from mint_engine.executor import Executor
from mint_engine.fair_share import DEFAULT_SAMPLING_SHARE, FairShare
from mint_engine.kv_cache import default_bytes
from mint_engine.lanes import Lane
from mint_engine.stats import Recorder
from mint_engine.store import Store

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

T = TypeVar("T")
# An operation in steps: it yields what must run off the device thread (disk; a load, `Apart`) and is sent the results.
Steps: TypeAlias = Generator[Callable[[], Any], Any, T]


class EngineCore:
    """Base of the engine's sides."""

    def __init__(
        self, *, dtype: str, device: str | None, home: Path, kv_cache_bytes: int | None, store: Store | None,
        activation_bytes: int | None, sampling_share: float = DEFAULT_SAMPLING_SHARE, weights: str | None = None,
        speculation: int = 0,
    ) -> None:  # fmt: skip
        if dtype not in DTYPES:
            raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        if weights not in (None, "int8", "once", "twice"):
            raise UserError(f"weights: expected None, 'int8', 'once' or 'twice', got {weights!r}")
        if isinstance(speculation, bool) or not isinstance(speculation, int) or speculation < 0:
            raise UserError(f"speculation: expected an integer of at least 0, got {speculation!r}")
        self.dtype, self.device, self.home = dtype, resolve(device), home
        self.store = Store(home) if store is None else store
        self._executor = Executor("mint-engine", FairShare(sampling_share))
        if self.device.type == "cuda":
            # The thread's own: kernels are launched on the current device.
            self._executor.lane().submit(partial(torch.cuda.set_device, self.device))
        cache_bytes = kv_cache_bytes or default_bytes(self.device)
        add, wake = self._executor.add_stepper, self._executor.notify
        self._bases = BaseModels(
            home, DTYPES[dtype], self.device, cache_bytes, activation_bytes, add, wake,
            interruption=self._executor.interruption, weights=weights, speculation=speculation,
        )  # fmt: skip
        self._residents = Residents(self._executor.lane)
        self._recorder = Recorder()
        self._owners: dict[str, str] = {}
        self._released: deque[str] = deque()

    @property
    def _models(self) -> dict[str, Model]:
        return self._residents.models

    @property
    def _samplers(self) -> dict[str, SamplerEntry]:
        return self._residents.samplers

    def _submit(
        self, kind: str, lane: Lane, operation: Callable[[], Any], tokens: Callable[[Any], int] = lambda _: 0,
        caller: str = "",
    ) -> Future:  # fmt: skip
        """Queue an operation and count it under ``kind``. ``tokens(result)``: how many it went through."""
        return lane.submit(self._recorder.timed(kind, operation, tokens), caller=caller)

    def _trim(self) -> None:
        """Let go of the memory for activations where nobody trains any more. On the device thread, which uses it."""
        used = {id(model.base) for model in self._models.values()}
        for base in self._bases.loaded:
            if id(base) not in used:
                base.decoder.space.release()

    def _session_owner(self, session_id: str) -> str:
        if session_id not in self._owners:
            self._owners[session_id] = self.store.session_owner(session_id)
        return self._owners[session_id]

    def _view(self, owner: str) -> Store:
        """The store as ``owner`` may see it."""
        return self.store.as_owner(owner)

    def _owner_of(self, identifier: str) -> str:
        """Of a model or a sampler, wherever it is. Raises NotFoundError if there is no such session."""
        return self._residents.owner(identifier) or self._session_owner(session_of(identifier))

    def forget_session(self, session_id: str) -> None:
        """Nothing more is made in a session. Its models and samplers are let go of one by one."""
        self._owners.pop(session_id, None)
        self._residents.forget_session(session_id)

    def release(self, identifier: str) -> None:
        """Let go of a model's or a sampler's weights once what was asked of it is done; its checkpoints stay.

        Takes no lock and does its work later, when the next model or sampler is made: a client calls it from its
        finalizer, which the garbage collector may run inside any other call.
        """
        self._released.append(identifier)

    def _reap(self) -> None:
        while self._released:
            identifier = self._released.popleft()
            if identifier in self._residents.models:
                self.unload_model(identifier)
            elif identifier in self._residents.samplers:
                self._residents.forget(identifier)

    def unload_model(self, model_id: str) -> Future[None]:
        raise NotImplementedError


def failed(error: Exception) -> Future[Any]:
    """A future that has failed: a call that is refused answers like one that ran."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future
