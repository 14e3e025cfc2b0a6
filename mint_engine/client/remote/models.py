"""Sessions and models on a server: made, and let go."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future
from typing import Any

from mint_engine.client.remote.core import RemoteCore
from mint_engine.client.remote.lane import Lane
from mint_engine.client.remote.transport import answer_as, json_object
from mint_engine.errors import MintError
from mint_engine.types import FinishReason, GetInfoResponse, LoraConfig


class Models(RemoteCore):
    def create_session(
        self, *, tags: Sequence[str] = (), user_metadata: dict[str, str] | None = None, project_id: str | None = None,
        display_name: str | None = None,
    ) -> str:  # fmt: skip
        """Waits for the server, and makes sure that it is one."""

        async def create() -> str:
            await self._get_limits()
            return await self._sessions.create(tags, user_metadata, project_id, display_name)

        future = self._submit(create)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: nobody will ever hold this session
            future.add_done_callback(self._drop_session)
            raise

    def _drop_session(self, created: Future[str]) -> None:
        if created.exception() is None:
            self.release(created.result())

    def create_model(
        self, session_id: str, base_model: str, lora: LoraConfig, *, user_metadata: dict[str, str] | None = None
    ) -> Future[str]:
        number = self._next(self._models, session_id)
        body = {
            "session_id": session_id, "model_seq_id": number, "base_model": base_model, "user_metadata": user_metadata,
            "lora_config": lora.model_dump(), "type": "create_model",
        }  # fmt: skip
        return self._submit(lambda: self._create("create_model", "CreateModel", body, f"{session_id}:train:{number}"))

    def create_model_from_state(
        self, session_id: str, path: str, *, optimizer: bool, base_model: str | None = None,
        user_metadata: dict[str, str] | None = None, weights_access_token: str | None = None,
    ) -> Future[str]:  # fmt: skip
        number = self._next(self._models, session_id)
        body = {
            "session_id": session_id, "model_seq_id": number, "path": path, "optimizer": optimizer,
            "base_model": base_model, "user_metadata": user_metadata, "weights_access_token": weights_access_token,
            "type": "load_weights",
        }  # fmt: skip
        return self._submit(lambda: self._create("load_weights", "LoadWeights", body, f"{session_id}:train:{number}"))

    async def _create(self, path: str, kind: str, body: dict[str, Any], model_id: str) -> str:
        answer = await self._ask(path, kind, body)
        model_id = str(json_object(answer).get("model_id") or model_id)
        self._infos[model_id] = await self._fetch_info(model_id)  # so that nobody has to wait for it later
        return model_id

    def get_info(self, model_id: str) -> GetInfoResponse:
        if model_id not in self._infos:
            self._infos[model_id] = self._submit(lambda: self._fetch_info(model_id)).result()
        return self._infos[model_id]

    async def _fetch_info(self, model_id: str) -> GetInfoResponse:
        response = await self._transport.post("get_info", {"model_id": model_id, "type": "get_info"})
        return answer_as(GetInfoResponse, response)

    def unload_model(self, model_id: str) -> Future[None]:
        async def run() -> None:
            unloading = self._unload(model_id)
            self._unloaded.add(model_id)
            await asyncio.shield(unloading)

        return self._submit(run)

    def _unload(self, model_id: str) -> asyncio.Task[None]:
        """Once, whether the session is closed first or the model's client is gone first."""
        if model_id not in self._unloading:
            self._unloading[model_id] = self._background.spawn(self._send_unload(model_id, self._lane(model_id)))
        return self._unloading[model_id]

    async def _send_unload(self, model_id: str, lane: Lane) -> None:
        try:
            await self._in_lane(lane, "unload_model", "UnloadModel", {"model_id": model_id, "type": "unload_model"})
        finally:
            self._lanes.pop(model_id, None)
            self._infos.pop(model_id, None)

    # ---- letting go ---------------------------------------------------------------------------------------------

    def release(self, identifier: str) -> None:
        """Let go of a session, a model or a sampler that no client holds any more. Takes no lock: a client's finalizer
        calls it, and the garbage collector may run that inside any other call."""
        if os.getpid() == self._background.pid and not self._closed:
            self._background.call(lambda: self._let_go(identifier))

    def _let_go(self, identifier: str) -> None:
        self._unloaded.discard(identifier)  # nobody is left who could ask
        if identifier in self._sessions.alive:
            self._background.spawn(self._finish(identifier, *self._ending.pop(identifier, ("success", None))))
        elif identifier in self._lanes or identifier in self._infos:
            self._background.spawn(_quietly(self._unload(identifier)))
        elif self._sampler_infos.pop(identifier, None) is not None:
            self._numbers.forget(identifier)
            session_id = identifier.split(":")[0]
            if session_id in self._ending and not self._has_samplers(session_id):
                self._background.spawn(self._finish(session_id, *self._ending.pop(session_id)))

    async def _end(self, session_id: str, status: FinishReason, detail: str | None) -> None:
        """Finish a session as soon as nobody samples from it: a server lets unnamed samplers go with their session."""
        if self._has_samplers(session_id):
            self._ending[session_id] = status, detail
        else:
            await self._finish(session_id, status, detail)

    def _has_samplers(self, session_id: str) -> bool:
        return any(sampler_id.startswith(f"{session_id}:") for sampler_id in self._sampler_infos)

    async def _finish(self, session_id: str, status: FinishReason, detail: str | None) -> None:
        async def sent() -> None:  # the server finishes what it has accepted; let it accept everything first
            lanes = [lane for model_id, lane in self._lanes.items() if model_id.startswith(f"{session_id}:")]
            await asyncio.gather(*(lane.settled() for lane in lanes))

        await self._sessions.finish(session_id, status, detail, sent)
        for model_id in [known for known in self._unloading if known.startswith(f"{session_id}:")]:
            del self._unloading[model_id]


async def _quietly(work: Awaitable[Any]) -> None:
    with contextlib.suppress(MintError):  # nobody is left to be told
        await work
