"""What the routes share: one object per application."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request

if TYPE_CHECKING:
    from mint_engine.engine import Engine
    from mint_engine.server.auth import Auth
    from mint_engine.server.ledger import Ledger
    from mint_engine.server.lifecycle import Housekeeping
    from mint_engine.server.metrics import Metrics
    from mint_engine.server.promises import Promises
    from mint_engine.server.samplers import Samplers
    from mint_engine.server.sequencer import Sequencer
    from mint_engine.server.served_models import ServedModels
    from mint_engine.server.sessions import Sessions
    from mint_engine.server.settings import Settings
    from mint_engine.server.signed_urls import Signer


@dataclass
class ServerState:
    """`app.state.mint`."""

    engine: Engine
    settings: Settings
    promises: Promises
    sequencer: Sequencer
    sessions: Sessions
    samplers: Samplers
    served: ServedModels
    ledger: Ledger
    metrics: Metrics
    auth: Auth
    signer: Signer
    housekeeping: Housekeeping | None = None  # once it has begun

    def resolve_base(self, name: str) -> str:
        """The canonical name of a base model that clients may use. Raises UserError that lists what is served."""
        return self.served.resolve(name)


def get_state(request: Request) -> ServerState:
    """FastAPI dependency."""
    state: ServerState = request.app.state.mint
    return state
