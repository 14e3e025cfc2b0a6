"""Making models and letting them go."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from mint_engine.adapters import Adapter, TrainState
from mint_engine.bases import Base
from mint_engine.engine.core import EngineCore, Steps, failed
from mint_engine.engine.residents import Model
from mint_engine.errors import NotFoundError, UserError
from mint_engine.off_thread import Apart
from mint_engine.state import load_adapter, load_state
from mint_engine.store import Store
from mint_engine.types import GetInfoResponse, LoraConfig, ModelData


class Models(EngineCore):
    def create_model(
        self, session_id: str, base_model: str, lora: LoraConfig, *, user_metadata: dict[str, str] | None = None,
        seq: int | None = None,
    ) -> Future[str]:  # fmt: skip
        """A fresh adapter on ``base_model``; the future gives its model id, ``<session>:train:<seq>``.

        Without ``seq`` the engine counts. An id that is or was in use is refused with UserError.
        """

        def build(store: Store) -> Steps[tuple[Base, Adapter, TrainState]]:
            base = yield Apart(lambda: self._bases.get(base_model))
            adapter = Adapter(base.decoder.groups, lora, base.decoder.device)
            return base, adapter, TrainState(adapter)

        return self._create(session_id, seq, build, user_metadata)

    def create_model_from_state(
        self, session_id: str, path: str, *, optimizer: bool, base_model: str | None = None,
        user_metadata: dict[str, str] | None = None, seq: int | None = None, reader: Store | None = None,
    ) -> Future[str]:  # fmt: skip
        """A new model from a checkpoint: weights only, or with the optimiser's state.

        ``reader``: whose checkpoints may be read, if it is not the session's owner.
        """

        def build(store: Store) -> Steps[tuple[Base, Adapter, TrainState]]:
            found = yield lambda: (reader or store).resolve(path)
            name = found.record.base_model
            if base_model is not None and base_model != name:
                raise UserError(f"base_model: {path} was trained on {name!r}, got {base_model!r}")
            base = yield Apart(lambda: self._bases.get(name))
            # Once more: loading the base may have taken minutes, and a resolved directory only stays for a while.
            directory = (yield lambda: (reader or store).resolve(path)).directory
            adapter = yield lambda: load_adapter(directory, base, path)
            state = TrainState(adapter)
            if optimizer:
                apply = yield lambda: load_state(directory, adapter, state, path, optimizer=True)
                apply()
            return base, adapter, state

        return self._create(session_id, seq, build, user_metadata)

    def _create(
        self, session_id: str, seq: int | None, build: Callable[[Store], Steps[tuple[Base, Adapter, TrainState]]],
        user_metadata: dict[str, str] | None,
    ) -> Future[str]:  # fmt: skip
        try:
            owner = self._session_owner(session_id)
            model_id = self._residents.reserve(session_id, "train", seq, owner)
        except Exception as error:
            return failed(error)

        def create() -> Steps[str]:
            self._reap()
            store = self._view(owner)
            try:
                base, adapter, state = yield from build(store)
                yield lambda: store.create_run(
                    model_id, session_id=session_id, base_model=base.name, lora=adapter.lora,
                    user_metadata=user_metadata,
                )  # fmt: skip
            except BaseException:
                self._residents.forget(model_id)
                raise
            self._residents.add_model(model_id, Model(base, adapter, state, owner))
            return model_id

        future = self._submit("create_model", self._residents.lane(model_id), create)
        future.add_done_callback(lambda f: self._residents.forget(model_id) if f.cancelled() else None)
        return future

    def unload_model(self, model_id: str) -> Future[None]:
        """Forget a model after everything submitted for it, parked or not; its checkpoints stay."""

        def unload() -> Steps[None]:
            if model_id not in self._residents.models:
                store = self._view(self._owner_of(model_id))
                if (yield lambda: store.parked(model_id)) is None:
                    self._residents.model(model_id)
                yield lambda: store.unpark(model_id)
            self._residents.forget(model_id)
            self._trim()

        return self._submit("unload_model", self._residents.lane(model_id), unload)

    def get_info(self, model_id: str) -> GetInfoResponse:
        model = self._residents.model(model_id)
        base = model.base
        return GetInfoResponse(
            model_id=model_id, model_name=base.name, is_lora=True, lora_rank=model.adapter.rank,
            model_data=ModelData(
                arch=base.config.architecture, model_name=base.name, tokenizer_id=str(base.directory)
            ),
        )  # fmt: skip

    def model_owner(self, model_id: str) -> str:
        """Whose model it is, in memory or parked. Raises NotFoundError if it is neither."""
        return self._known_owner(model_id, "model_id: there is no model")

    def sampler_owner(self, sampler_id: str) -> str:
        """Whose sampler it is, in memory or only recorded. Raises NotFoundError if it is neither."""
        owner = self._residents.owner(sampler_id)
        if owner is None:
            owner = self._owner_of(sampler_id)
            self._view(owner).get_sampler(sampler_id)
        return owner

    def _known_owner(self, identifier: str, what: str) -> str:
        owner = self._residents.owner(identifier)
        if owner is None:
            owner = self._owner_of(identifier)
            if self._view(owner).parked(identifier) is None:
                raise NotFoundError(f"{what} {identifier!r}")
        return owner

    def resident_models(self, owner: str) -> int:
        """How many models of an owner are in memory."""
        return self._residents.count_models(owner)

    def is_resident(self, identifier: str) -> bool:
        """Whether a model or a sampler is in memory, or on its way there."""
        return self._residents.owner(identifier) is not None
