"""Saving, loading, summing and copying adapters. The files are written and read off the device thread."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from mint_engine import interpolate
from mint_engine.checkpoint import open_adapter, write_adapter
from mint_engine.device import machine_bytes
from mint_engine.engine.core import EngineCore, Steps, failed
from mint_engine.engine.residents import Model
from mint_engine.external import parse_recipients, save_external
from mint_engine.lanes import Lane
from mint_engine.state import load_state, lora_of, save_state
from mint_engine.store import Store
from mint_engine.types import (
    CheckpointKind,
    InterpolateCheckpointsResponse,
    LoadWeightsResponse,
    SaveWeightsExternalResponse,
    SaveWeightsResponse,
)

DEFAULT_SUM = "interpolated"


class Checkpoints(EngineCore):
    # One sum after the other, owners in turn: each takes memory, and one of the few threads that all saves share.
    _sums_lane: Lane

    def save_weights(
        self, model_id: str, name: str, *, ttl_seconds: int | None = None, overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[SaveWeightsResponse]:  # fmt: skip
        """Everything training needs to go on from here, as ``tinker://<model id>/weights/<name>``."""

        def run() -> Steps[SaveWeightsResponse]:
            model = self._residents.model(model_id)
            write = save_state(model.adapter, model.state, model.base)
            path = yield from self._write(
                model_id, model, "weights", name, write, ttl_seconds=ttl_seconds, overwrite=overwrite,
                user_metadata=user_metadata,
            )  # fmt: skip
            return SaveWeightsResponse(path=path)

        return self._submit("save_weights", self._residents.lane(model_id), run)

    def save_weights_external(
        self, model_id: str, name: str, *, ttl_seconds: int | None = None, overwrite: bool = False,
        user_metadata: dict[str, str] | None = None, recipients: Sequence[str] | None = None,
    ) -> Future[SaveWeightsExternalResponse]:  # fmt: skip
        """The adapter as PEFT reads it, to be downloaded: ``tinker://<model id>/external_weights/<name>``.

        With ``recipients`` (age X25519 or SSH public keys) every file is encrypted to them and named ``*.age``.
        """
        recipients = None if recipients is None else recipients if isinstance(recipients, str) else list(recipients)

        def run() -> Steps[SaveWeightsExternalResponse]:
            model = self._residents.model(model_id)
            write = save_external(model.adapter.snapshot(), model.base, parse_recipients(recipients))
            path = yield from self._write(
                model_id, model, "external_weights", name, write, ttl_seconds=ttl_seconds, overwrite=overwrite,
                user_metadata=user_metadata,
            )  # fmt: skip
            return SaveWeightsExternalResponse(path=path)

        return self._submit("save_weights_external", self._residents.lane(model_id), run)

    def _write(
        self, model_id: str, model: Model, kind: CheckpointKind, name: str, write: Callable[[Path], None], *,
        ttl_seconds: int | None, overwrite: bool, user_metadata: dict[str, str] | None,
    ) -> Steps[str]:  # fmt: skip
        store = self._view(model.owner)
        path: str = yield lambda: store.write_checkpoint(
            model_id, kind, name, write, base_model=model.base.name, lora=model.adapter.lora,
            user_metadata=user_metadata, ttl_seconds=ttl_seconds, overwrite=overwrite,
        )  # fmt: skip
        return path

    def load_weights(
        self, model_id: str, path: str, *, optimizer: bool, reader: Store | None = None
    ) -> Future[LoadWeightsResponse]:
        """Put a checkpoint into an existing model. Without ``optimizer`` moments and step count start anew.

        ``reader``: whose checkpoints may be read, if it is not the model's owner.
        """

        def run() -> Steps[LoadWeightsResponse]:
            model = self._residents.model(model_id)
            store = reader or self._view(model.owner)
            found = yield lambda: store.resolve(path)
            apply = yield lambda: load_state(
                found.directory, model.adapter, model.state, path, optimizer=optimizer, base=model.base
            )
            apply()
            return LoadWeightsResponse(path=found.tinker_path, model_id=model_id)

        return self._submit("load_weights", self._residents.lane(model_id), run)

    def interpolate_checkpoints(
        self, owner: str, source_paths: Sequence[str], coefficients: Sequence[float], *,
        output_name: str | None = None, reader: Store | None = None,
    ) -> Future[InterpolateCheckpointsResponse]:  # fmt: skip
        """sum of coefficient * adapter, as a sampler checkpoint in a new run of ``owner``; see ``interpolate.py``.

        The sources are on one base model and adapt the same modules; the result has the largest of their ranks. One sum
        at a time is computed, and owners take turns. ``reader``: whose checkpoints may be read, if it is not ``owner``.

        Fails with UserError if the sources have more than `interpolate.MAX_RANKS` ranks together, a checkpoint that is
        named twice counted once, or if the sum would take more than an eighth of the machine's memory.
        """
        paths, given = list(source_paths), list(coefficients)

        def build() -> InterpolateCheckpointsResponse:
            weights = interpolate.check_coefficients(paths, given)
            store = self._view(owner)
            sources: dict[str, interpolate.Source] = {}
            sums: dict[str, float] = {}
            for path, weight in zip(paths, weights, strict=True):
                found = (reader or store).resolve(path, prefer="sampler_weights")
                if found.tinker_path not in sources:
                    sources[found.tinker_path] = interpolate.Source(path, *open_adapter(found.directory))
                sums[found.tinker_path] = sums.get(found.tinker_path, 0.0) + weight
            interpolate.check_size([*sources.values()], machine_bytes() // 8)
            merged = interpolate.check_coefficients([*sums], [*sums.values()])
            meta, tensors = interpolate.combine([*sources.values()], merged)
            with tempfile.TemporaryDirectory(prefix="mint-engine-") as folder:
                write_adapter(
                    Path(folder), tensors, base_model=meta.base_model, rank=meta.rank, alpha=meta.alpha,
                    target_modules=meta.target_modules, tied=bool(meta.tied),
                )  # fmt: skip
                saved = store.import_checkpoint(
                    Path(folder), base_model=meta.base_model, lora=lora_of(meta, paths[0]),
                    name=output_name or DEFAULT_SUM,
                )  # fmt: skip
            return InterpolateCheckpointsResponse(path=saved, source_paths=paths, coefficients=weights)

        def run() -> Steps[InterpolateCheckpointsResponse]:
            return (yield build)

        return self._submit("interpolate_checkpoints", self._sums_lane, run, caller=owner)

    def copy_checkpoint(
        self, source: str, *, owner: str | None = None, session_id: str | None = None, seq: int | None = None,
        project_id: str | None = None, ttl_seconds: int | None = None, reader: Store | None = None,
    ) -> Future[str]:  # fmt: skip
        """A copy of a checkpoint in a run of its own; the future gives its path.

        With ``session_id`` the run takes the id of that session's model ``seq`` (by default the next one), which no
        model can have any more. Otherwise it belongs to ``owner`` only. ``reader``: whose checkpoints may be read.
        """
        try:
            whose = self.store.owner if owner is None else owner
            taken = None
            if session_id is not None:
                whose = self._session_owner(session_id)
                taken = self._residents.reserve(session_id, "train", seq, whose)
        except Exception as error:
            return failed(error)
        number = None if taken is None else int(taken.rpartition(":")[2])
        store = self._view(whose)

        def run() -> Steps[str]:
            copied: str = yield lambda: store.copy_checkpoint(
                source, reader=reader, session_id=session_id, model_seq_id=number, project_id=project_id,
                ttl_seconds=ttl_seconds,
            )  # fmt: skip
            return copied

        future = self._submit("copy_checkpoint", self._executor.lane(), run)
        if taken is not None:
            future.add_done_callback(lambda _: self._residents.forget(taken))
        return future
