"""What a server wants of its clients: how large requests may be, how many samples may be under way."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from mint_engine import __version__
from mint_engine.client.remote.transport import Transport, json_object

# A call that fits one request is applied whole or not at all, so our own limits are wide.
CHUNK_DATUMS = 4096
CHUNK_BYTES = 32 * 2**20
SAMPLES = 512
_SPARE_FILES = 128  # descriptors left to the program


@dataclass(frozen=True)
class Limits:
    """chunk_datums, chunk_bytes: of one forward or forward_backward request. samples: under way at once."""

    chunk_datums: int = CHUNK_DATUMS
    chunk_bytes: int = CHUNK_BYTES
    samples: int = SAMPLES

    @classmethod
    async def fetch(cls, transport: Transport) -> Limits:
        """As the server's `client/config` says. One that has no such endpoint leaves it to us."""
        asked = {"sdk_version": f"mint-engine {__version__}"}
        response = await transport.post("client/config", asked, expect_status=frozenset({HTTPStatus.NOT_FOUND}))
        config = {} if response.status_code == HTTPStatus.NOT_FOUND else json_object(response)
        return cls(
            chunk_datums=_positive(config.get("fwdbwd_max_chunk_len"), CHUNK_DATUMS),
            chunk_bytes=_positive(config.get("fwdbwd_max_chunk_bytes_count"), CHUNK_BYTES),
            samples=min(_positive(config.get("sample_max_concurrent_requests"), SAMPLES), _open_files()),
        )


def _positive(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


def _open_files() -> int:
    """How many connections this process may have open: each sample under way holds one."""
    try:
        import resource
    except ImportError:  # not on Windows
        return SAMPLES
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if soft == resource.RLIM_INFINITY else max(16, (soft - _SPARE_FILES) // 2)
