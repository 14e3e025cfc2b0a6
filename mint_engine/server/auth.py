"""From a request to its `Caller`: keys, tokens that stand for keys, and this machine while there are no keys.

A key is looked up in the database at most once a second; so a revoked one works for a second at most, and an unknown
one, however often it is tried, costs one look a second. What is kept in memory are keyed hashes.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.requests import HTTPConnection

from mint_engine.errors import NotFoundError, UserError
from mint_engine.server import anonymous
from mint_engine.server.caller import Caller
from mint_engine.server.quotas import Quotas
from mint_engine.server.tokens import InvalidTokenError, Tokens, is_token, load_secret

if TYPE_CHECKING:
    from mint_engine.server.settings import Settings
    from mint_engine.store import KeyRecord, Store

_T = TypeVar("_T")

ANONYMOUS = "local"
"""The owner of what is made while no keys are configured."""

_FRESH_SECONDS = 1.0
_REMEMBERED = 4096
_THREADS = 4
_LONGEST = 8192  # characters of a credential


class Auth:
    """Who is asking, by `X-API-Key` or `Authorization: Bearer`.

    Args:
        store: of the engine; keys are in its database, the secret of tokens beside it.
        settings: `allow_anonymous`, `public_url` and the default limits are read.

    Attributes:
        quotas: what a caller may use.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._keys = store.keys
        self._tokens = Tokens(load_secret(store.home))
        self._anywhere = settings.allow_anonymous
        public_host = urlsplit(settings.public_url or "").hostname
        self._known_hosts = {public_host} if public_host else set()
        self._cache = _Cache()
        self._anonymous = Caller(ANONYMOUS, store.as_owner(ANONYMOUS))
        self._locked = False  # once a key has been seen nobody comes in without one, even after all are revoked
        self._next_look = 0.0
        self._threads = ThreadPoolExecutor(_THREADS, "mint-keys")  # of its own: slow work elsewhere locks nobody out
        self._looks: dict[str, asyncio.Task[Any]] = {}  # that are being taken just now
        self.quotas = Quotas(settings)

    async def caller(self, request: HTTPConnection) -> Caller:
        """Raises HTTPException 401, or 403 where a key would not help as the request is."""
        credential = _credential(request)
        if not await self._keys_exist():
            if (reason := anonymous.refusal(request, anywhere=self._anywhere, known_hosts=self._known_hosts)) is None:
                return self._anonymous
            raise HTTPException(403, reason)
        if not credential:
            _refuse("expected a key in the header X-API-Key or Authorization: Bearer, got none")
        return await self._identify(credential)

    async def reader(self, caller: Caller, token: str | None) -> Store:
        """What a request may read: the caller's checkpoints and published ones, or, with a `weights_access_token`, what
        the holder of that key may. Raises UserError for a token that is no key."""
        if not token:
            return caller.store
        if not await self._keys_exist():
            return caller.store  # everything is everybody's
        try:
            return (await self._identify(token)).store
        except HTTPException as error:
            raise UserError(f"weights_access_token: {error.detail}") from None

    async def known(self, owner: str) -> bool:
        """Whether an owner still has access: its key is not revoked, or it needs none."""
        if not await self._keys_exist():
            return True
        return await self._look_up(f"id {owner}", lambda: self._by_id(owner)) is not None

    def token(self, caller: Caller) -> str:
        """A JWT that stands for the caller's key for an hour."""
        return self._tokens.issue(caller.owner, caller.key.name if caller.key is not None else "")

    def forget(self) -> None:
        """Look at the database again at the next request: a key was made or revoked in this very process."""
        self._cache.clear()
        self._looks.clear()
        self._next_look = 0.0

    async def _identify(self, credential: str) -> Caller:
        if len(credential) > _LONGEST:
            _refuse("the key is unknown")
        if is_token(credential):
            return await self._by_token(credential)
        found = await self._look_up(f"key {credential}", lambda: self._keys.find(credential))
        if found is None:
            _refuse("the key is unknown or has been revoked")
        return found

    async def _by_token(self, token: str) -> Caller:
        try:
            owner = self._tokens.subject(token)
        except InvalidTokenError as error:
            _refuse(str(error), 'error="invalid_token"')
        found = await self._look_up(f"id {owner}", lambda: self._by_id(owner))
        if found is None:
            _refuse("the token's key has been revoked", 'error="invalid_token"')
        return found

    def _by_id(self, owner: str) -> KeyRecord | None:
        try:
            record = self._keys.get(owner)
        except NotFoundError:  # of before there were keys, or of another database
            return None
        return record if record.revoked is None else None

    async def _look_up(self, what: str, find: Callable[[], KeyRecord | None]) -> Caller | None:
        hit, caller = self._cache.get(what)
        if hit:
            return caller
        return await self._look(what, lambda: self._find(what, find))

    def _find(self, what: str, find: Callable[[], KeyRecord | None]) -> Caller | None:
        record = find()
        caller = None
        if record is not None:
            caller = Caller(record.key_id, self._store.as_owner(record.key_id), record)
        self._cache.put(what, caller)
        return caller

    async def _keys_exist(self) -> bool:
        if not self._locked and time.monotonic() >= self._next_look:
            if await self._look("keys", self._keys.any):  # another look may have seen one meanwhile
                self._locked = True
            self._next_look = time.monotonic() + _FRESH_SECONDS
        return self._locked

    async def _look(self, what: str, job: Callable[[], _T]) -> _T:
        """`job()` in a thread. Of many that come at once, one asks the database."""
        look = self._looks.get(what)
        if look is None:
            look = self._looks[what] = asyncio.get_running_loop().create_task(self._in_thread(job))
            look.add_done_callback(lambda done: self._looks.get(what) is done and self._looks.pop(what))
        found: _T = await asyncio.shield(look)
        return found

    async def _in_thread(self, job: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, job)


class _Cache:
    """What was found, or not found, in the last second. Unknown keys have a room of their own: a flood of them must
    not push out the known."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(16)
        self._rooms: tuple[OrderedDict[bytes, tuple[float, Caller | None]], ...] = (OrderedDict(), OrderedDict())

    def get(self, what: str) -> tuple[bool, Caller | None]:
        digest = self._digest(what)
        for room in self._rooms:
            entry = room.get(digest)
            if entry is not None and entry[0] > time.monotonic():
                return True, entry[1]
        return False, None

    def put(self, what: str, caller: Caller | None) -> None:
        digest = self._digest(what)
        for room in self._rooms:
            room.pop(digest, None)
        room = self._rooms[caller is None]
        room[digest] = (time.monotonic() + _FRESH_SECONDS, caller)
        while len(room) > _REMEMBERED:
            room.popitem(last=False)

    def clear(self) -> None:
        for room in self._rooms:
            room.clear()

    def _digest(self, what: str) -> bytes:
        return hashlib.blake2b(what.encode(errors="surrogatepass"), key=self._salt, digest_size=32).digest()


def _credential(request: HTTPConnection) -> str:
    if key := request.headers.get("x-api-key"):
        return key.strip()
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else ""


def _refuse(reason: str, error: str = "") -> NoReturn:
    challenge = 'Bearer realm="mint-engine"' + (f', {error}, error_description="{reason}"' if error else "")
    raise HTTPException(401, reason, headers={"WWW-Authenticate": challenge})
