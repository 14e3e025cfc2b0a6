"""Operations of a model that were refused: their numbers are used up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mint_engine import wire
from mint_engine.server.failures import describe
from mint_engine.server.reading import work

if TYPE_CHECKING:
    from mint_engine.server.caller import Caller
    from mint_engine.server.state import ServerState


class Refusals:
    """What is refused for good has used up its seq_id, if the model is the caller's: the SDK goes on with the next."""

    def __init__(self, caller: Caller, state: ServerState, raw: bytes | Mapping[str, Any]) -> None:
        self._caller, self._state, self._raw = caller, state, raw

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, Exception) or not describe(error).permanent:
            return
        size = len(self._raw) if isinstance(self._raw, bytes) else 0
        address = await work(self._caller, size, lambda: wire.address(self._raw))
        if address is not None and address[1] is not None:
            await self._state.sequencer.lane(self._caller, address[0])
            self._state.sequencer.refuse(*address)
