"""The registry's part of the server alone: no engine, no promises, no lifespan."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import httpx
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse

from mint_engine.checkpoint import ADAPTER_CONFIG, ADAPTER_MODEL
from mint_engine.errors import MintError, NotFoundError, UserError
from mint_engine.server.auth import Auth
from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.failures import describe
from mint_engine.server.gate import Gate
from mint_engine.server.routes import account, checkpoints, downloads, mint, registry, uploads
from mint_engine.server.settings import Settings
from mint_engine.server.signed_urls import Signer
from mint_engine.store import Store
from mint_engine.types import LoraConfig

LORA = LoraConfig(rank=4, seed=0)


class SmallApp:
    """A store, and an application over it. `client(key)` is an HTTP client that sends a key."""

    def __init__(self, home: Path, *, base: Path | None = None, **settings: Any) -> None:
        self.store = Store(home)
        self.settings = Settings(**settings)
        self.auth = Auth(self.store, self.settings)
        self.signer = Signer(home, public_url=self.settings.public_url)
        self.resident: dict[str, int] = {}
        self.bytes_read = 0
        self._base = base
        self.app = FastAPI()
        self.app.add_middleware(Gate)
        for routes in (account, registry, checkpoints, uploads, downloads, mint):
            self.app.include_router(routes.router, prefix="/api/v1")
        self.app.add_exception_handler(MintError, _failed)
        self.app.add_api_route("/whoami", _whoami)
        self.app.add_api_route("/open", lambda: {"status": "ok"})
        self.app.add_api_route("/count", self._count, methods=["POST"])
        self.app.state.mint = SimpleNamespace(
            auth=self.auth,
            signer=self.signer,
            settings=self.settings,
            engine=SimpleNamespace(
                store=self.store, home=home, resident_models=lambda owner: self.resident.get(owner, 0)
            ),
            sessions=SimpleNamespace(check=self._check_session),
            resolve_base=self._resolve_base,
        )

    def client(self, key: str | None = None, **headers: str) -> httpx.AsyncClient:
        if key is not None:
            headers["X-API-Key"] = key
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=headers)

    def key(self, name: str = "someone", **options: Any) -> tuple[str, str]:
        """A new key: its id, which owns what it makes, and its secret."""
        record, secret = self.store.keys.create(name, **options)
        self.auth.forget()
        return record.key_id, secret

    def run(self, owner: str, session: str = "s", number: int = 0) -> str:
        """A session (if it is new) and a run of it. Returns the run's id."""
        store = self.store.as_owner(owner)
        try:
            store.get_session(session)
        except NotFoundError:
            store.create_session(session, user_metadata={"who": owner}, display_name=f"the session of {owner}")
        run_id = f"{session}:train:{number}"
        store.create_run(run_id, session_id=session, base_model="tiny", lora=LORA)
        return run_id

    def checkpoint(self, owner: str, run_id: str, name: str = "one", kind: Any = "weights", **options: Any) -> str:
        return self.store.as_owner(owner).write_checkpoint(
            run_id, kind, name, _write, base_model="tiny", lora=LORA, **options
        )

    async def _count(self, request: Request, _: Annotated[Caller, Depends(get_caller)]) -> dict[str, int]:
        async for chunk in request.stream():
            self.bytes_read += len(chunk)
        return {"bytes": self.bytes_read}

    async def _check_session(self, caller: Caller, session_id: str) -> None:
        caller.store.get_session(session_id)

    def _resolve_base(self, name: str) -> str:
        if self._base is not None and name in ("tiny", str(self._base)):
            return str(self._base)
        raise UserError(f"base_model: {name!r} is not served here; there is: tiny")


def _write(directory: Path) -> None:
    (directory / ADAPTER_CONFIG).write_text('{"r": 4}')
    (directory / ADAPTER_MODEL).write_bytes(bytes(range(256)) * 40)


async def _whoami(caller: Annotated[Caller, Depends(get_caller)]) -> dict[str, str]:
    return {"owner": caller.owner}


def _failed(request: Request, error: Exception) -> JSONResponse:
    failure = describe(error)
    return JSONResponse({"detail": failure.detail}, failure.status)
