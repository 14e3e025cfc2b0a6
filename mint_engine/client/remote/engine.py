"""`RemoteEngine`: an engine on a server, with the methods that the clients call of one in the process.

Every call returns at once, from any thread; requests are made on one loop's thread (`background.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

import httpx

from mint_engine.client.remote import tokenizers
from mint_engine.client.remote.address import Address
from mint_engine.client.remote.background import in_thread
from mint_engine.client.remote.models import Models
from mint_engine.client.remote.registry import RemoteRegistry
from mint_engine.client.remote.sampling import Sampling
from mint_engine.client.remote.sessions import BEAT_SECONDS
from mint_engine.client.remote.training import Training
from mint_engine.client.remote.transport import Patience
from mint_engine.errors import NotFoundError
from mint_engine.types import FinishReason, GetServerCapabilitiesResponse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DRAIN_SECONDS, FAREWELL_SECONDS = 30.0, 3.0  # patience with a silent server at the end


class RemoteEngine(Models, Training, Sampling):
    """Training and sampling on a server.

    Args:
        address: where it is. See `connect` for one that is shared by the whole process.
        patience: how long a silent server is asked again. beat_seconds: between heartbeats of a session.
        wire: what carries requests, for tests; default the network.
    """

    def __init__(
        self, address: Address, *, patience: Patience | None = None, beat_seconds: float = BEAT_SECONDS,
        wire: httpx.AsyncBaseTransport | None = None,
    ) -> None:  # fmt: skip
        super().__init__(address, patience=patience, beat_seconds=beat_seconds, wire=wire)
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self.registry = RemoteRegistry(
            self._transport, self._submit, self._end, lambda session_id: self._next(self._models, session_id)
        )

    def tokenizer(self, base_model: str) -> PreTrainedTokenizerBase:
        """From Hugging Face's cache on this machine, else from the server."""
        if base_model not in self._tokenizers:
            self._tokenizers[base_model] = self._submit(lambda: self._load_tokenizer(base_model)).result()
        return self._tokenizers[base_model]

    async def _load_tokenizer(self, base_model: str) -> PreTrainedTokenizerBase:
        directory = await in_thread(lambda: tokenizers.cached_directory(base_model))
        if directory is None:
            try:
                answer = await self._transport.send(
                    "GET", "mint/tokenizer", params={"base_model": base_model}, headers={"Accept": "*/*"}
                )
            except NotFoundError:  # not a server of ours, or a model without a tokenizer: the hub may have it
                return await in_thread(lambda: tokenizers.from_hub(base_model))
            directory = await in_thread(lambda: tokenizers.unpack(answer.content, base_model))
        found = directory
        return await in_thread(lambda: tokenizers.load(found))

    def capabilities(self) -> GetServerCapabilitiesResponse:
        return self.registry.capabilities().result()

    def close(self, *, drain: bool = False, status: FinishReason = "success") -> None:
        """Finish the sessions and hang up; with `drain`, first send what has been called and not been sent yet.

        That may wait for a loss of the user's own, as long as it takes; not if the program was interrupted.
        """
        if self._closed or os.getpid() != self._background.pid:
            return
        self._closed = True

        async def end() -> None:
            self._transport.hurry(DRAIN_SECONDS)
            if drain:
                sending = asyncio.gather(*(lane.settled() for lane in list(self._lanes.values())))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(sending, FAREWELL_SECONDS if status == "interrupted" else None)
            self._transport.hurry(FAREWELL_SECONDS)
            ends = [(session_id, *self._ending.get(session_id, (status, None))) for session_id in self._sessions.alive]
            await asyncio.gather(*(self._sessions.finish(*end, before=_nothing) for end in ends))
            await self._sessions.left()
            await self._transport.close()

        self._background.submit(end).result()


async def _nothing() -> None:
    pass
