"""What an exception becomes: an HTTP answer, or the failure of a promise. The only place that decides this.

The SDKs retry 408, 409, 429 and 5xx for minutes, so a condition that will not go away by itself is never one of those.
"""

from __future__ import annotations

import logging
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from mint_engine.errors import (
    EngineClosedError,
    MintError,
    NotFoundError,
    SampleCancelledError,
    StorageError,
    UserError,
)
from mint_engine.server.context import current
from mint_engine.wire import BodyTooLargeError, EncodingError, explain

log = logging.getLogger(__name__)

Category: TypeAlias = Literal["user", "server", "unknown"]
RETRY_SECONDS = 1


class TryAgainLaterError(MintError):
    """Too much at once: the same request will be taken a little later (HTTP 429)."""


class GoneError(MintError):
    """A result that is no longer kept (HTTP 410): a sample is made again, a training step cannot be."""


class RestartingError(MintError):
    """The server is about to stop; the next one will answer (HTTP 503)."""


@dataclass(frozen=True)
class Failure:
    """``status`` and ``detail`` of an HTTP answer; ``category`` of a failed promise.

    ``type``: the class of ours that our own client raises, where it says more than the category.
    """

    status: int
    detail: str
    category: Category
    retry_after: int | None = None
    type: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}

    @property
    def permanent(self) -> bool:
        """The client will not send the same request again."""
        return 400 <= self.status < 500 and self.status not in (408, 409, 429)


def describe(error: BaseException, request_id: str | None = None) -> Failure:
    """What to tell the client. Of errors that we did not foresee it is told a request id to ask us about.

    What only the operator can mend is logged.

    ``request_id``: of the promise that fails; else that of the HTTP request counts.
    """
    request = current()
    about = request_id or (request.request_id if request is not None else "none")
    match error:
        case StarletteHTTPException():
            return Failure(error.status_code, str(error.detail), "user" if error.status_code < 500 else "server")
        case RequestValidationError() | ValidationError():
            return Failure(422, explain(error.errors()), "user")
        case TryAgainLaterError():
            return Failure(429, str(error), "server", RETRY_SECONDS)
        case GoneError():
            return Failure(410, str(error), "server")
        case EngineClosedError() | RestartingError():
            return Failure(503, str(error), "server", RETRY_SECONDS)
        case NotFoundError():
            return Failure(404, str(error), "user", type=_type(error))
        case SampleCancelledError() | CancelledError():
            return Failure(400, str(error) or "the request was cancelled", "user", type=SampleCancelledError.__name__)
        case BodyTooLargeError():
            return Failure(413, str(error), "user")
        case EncodingError():
            return Failure(415, str(error), "user")
        case UserError():
            return Failure(400, str(error), "user", type=_type(error))
        case StorageError():
            log.error("the disk refused: %s (request id %s)", error, about)
            return Failure(500, f"the server's disk refused: {error}", "server", type=_type(error))
        case MintError():
            return Failure(500, str(error), "server")
        case MemoryError():
            log.error("out of memory: %s (request id %s)", error, about)
            return Failure(500, "the server ran out of memory; a smaller batch may fit", "server")
    log.error("%s: %s (request id %s)", type(error).__name__, error, about, exc_info=error)
    return Failure(500, f"internal error: {type(error).__name__} (request id {about})", "server")


def _type(error: MintError) -> str | None:
    """The name of a class that clients have, too. A plain UserError is what the category "user" says."""
    kind = type(error)
    return kind.__name__ if kind.__module__ == MintError.__module__ and kind is not UserError else None
