"""Putting models and samplers aside on disk and bringing them back, perhaps in another process.

A model that is parked keeps its id. What is submitted to it before it is back fails; what is submitted after a call of
`unpark`, without waiting for it, comes after it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from mint_engine.engine.core import Steps, failed
from mint_engine.engine.residents import Model, SamplerEntry, kind_of
from mint_engine.engine.sampling import Sampling
from mint_engine.errors import NotFoundError
from mint_engine.lanes import Lane
from mint_engine.off_thread import Apart
from mint_engine.parking import park_model, parked_base, revive_model
from mint_engine.state import load_adapter, save_adapter

log = logging.getLogger(__name__)


class Parking(Sampling):
    _sampler_lane: Lane  # samplers are put aside and brought back one after the other

    def park(self, identifier: str, note: Mapping[str, Any] | None = None) -> Future[None]:
        """Write a model (after everything submitted for it) or a sampler to disk, and free its memory.

        ``note`` is what `unpark` gives back: JSON. If the disk refuses, the model stays. A sampler of a saved version
        or of a base model needs nothing written, its record brings it back (`revive_sampler`); it keeps no note.
        """
        if kind_of(identifier) == "sample":
            return self._submit("park", self._sampler_lane, lambda: self._park_sampler(identifier, dict(note or {})))
        return self._submit(
            "park", self._residents.lane(identifier), lambda: self._park_model(identifier, dict(note or {}))
        )

    def _park_model(self, model_id: str, note: dict[str, Any]) -> Steps[None]:
        model = self._residents.model(model_id)
        store = self._view(model.owner)
        # No copy: the model's lane is busy until this has been written, and nobody else changes a model.
        write = park_model(model.adapter, model.state, model.base)
        yield lambda: store.park(model_id, write, note)
        self._residents.put_aside(model_id)
        self._trim()

    def _park_sampler(self, sampler_id: str, note: dict[str, Any]) -> Steps[None]:
        entry = self._residents.sampler(sampler_id)
        if entry.ephemeral and entry.adapter is not None:
            store, write = self._view(entry.owner), save_adapter(entry.adapter, entry.base)
            yield lambda: store.park(sampler_id, write, note)
        self._residents.put_aside(sampler_id)

    def unpark(self, identifier: str) -> Future[dict[str, Any]]:
        """Bring back what `park` put aside, in this process or another one; the future gives the note.

        Raises (in the future):
            NotFoundError: it is not parked. UserError: it is in memory, or on its way.
        """
        try:
            owner = self._owner_of(identifier)
            if kind_of(identifier) == "sample":
                return self._submit("unpark", self._sampler_lane, lambda: self._unpark_sampler(identifier, owner))
            self._residents.expect(identifier, owner)
        except Exception as error:
            return failed(error)
        lane = self._residents.lane(identifier)
        future = self._submit("unpark", lane, lambda: self._unpark_model(identifier, owner))
        future.add_done_callback(lambda f: self._residents.forget(identifier) if f.cancelled() else None)
        return future

    def _unpark_model(self, model_id: str, owner: str) -> Steps[dict[str, Any]]:
        store = self._view(owner)
        try:
            parked = yield lambda: store.parked(model_id)
            if parked is None:
                raise NotFoundError(f"model_id: there is no parked model {model_id!r}")
            base = yield Apart(lambda: self._bases.get(parked_base(parked.directory)))
            adapter, state = yield lambda: revive_model(parked.directory, base)
            # From here on what is on disk is the past: it must not come back in a later process.
            yield lambda: store.unpark(model_id)
        except BaseException:
            self._residents.forget(model_id)
            raise
        self._residents.add_model(model_id, Model(base, adapter, state, owner))
        note: dict[str, Any] = parked.note
        return note

    def _unpark_sampler(self, sampler_id: str, owner: str) -> Steps[dict[str, Any]]:
        store = self._view(owner)
        parked = yield lambda: store.parked(sampler_id)
        if parked is None:
            raise NotFoundError(f"sampler_id: there is no parked sampler {sampler_id!r}")
        base = yield Apart(lambda: self._bases.get(parked_base(parked.directory)))
        adapter = yield lambda: load_adapter(parked.directory, base, sampler_id)
        yield lambda: store.unpark(sampler_id)
        self._residents.add_sampler(sampler_id, SamplerEntry(base, adapter, None, owner))
        note: dict[str, Any] = parked.note
        return note

    def revive_sampler(self, sampler_id: str) -> Future[None]:
        """Make sure that a sampler is in memory: parked, of a saved version, or of a base model.

        Raises (in the future):
            NotFoundError: there is no such sampler, its checkpoint is gone, or its weights were never saved and it was
                released, or the process that held them has ended.
        """
        try:
            owner = self._owner_of(sampler_id)
        except Exception as error:
            return failed(error)
        return self._submit("revive_sampler", self._sampler_lane, lambda: self._revive(sampler_id, owner))

    def _revive(self, sampler_id: str, owner: str) -> Steps[None]:
        self._reap()  # or one that was let go of a moment ago would still be there
        if sampler_id in self._residents.samplers:
            return
        store = self._view(owner)
        if (yield lambda: store.parked(sampler_id)) is not None:
            yield from self._unpark_sampler(sampler_id, owner)
            return
        record = yield lambda: store.get_sampler(sampler_id)
        if record.model_path is None and (yield lambda: store.is_ephemeral(sampler_id)):
            raise NotFoundError(
                f"sampler_id: {sampler_id!r} held weights that were never saved, and was let go of, or its process has "
                "ended without parking it: save_weights_for_sampler makes a new one"
            )
        entry = yield from self._open(owner, record.model_path, record.base_model)
        self._residents.add_sampler(sampler_id, entry)

    def park_all(self, notes: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, BaseException]:
        """Park every model, and every sampler whose weights are nowhere else; waits until it is done.

        For the end of a process. ``notes`` by model id. Answers what could not be parked and why; it stays in memory.
        """
        models, samplers = self._residents.ids()
        futures = {model_id: self.park(model_id, (notes or {}).get(model_id)) for model_id in models}
        futures |= {s: self.park(s) for s in samplers if (e := self._samplers.get(s)) is not None and e.ephemeral}
        errors = {identifier: error for identifier, f in futures.items() if (error := f.exception()) is not None}
        # One whose creation has failed meanwhile is no loss.
        errors = {identifier: error for identifier, error in errors.items() if not isinstance(error, NotFoundError)}
        for identifier, error in errors.items():
            log.error("%s could not be parked: %s", identifier, error)
        return errors
