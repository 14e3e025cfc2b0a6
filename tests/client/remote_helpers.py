"""What the tests of our HTTP client share."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

from mint import types
from mint_engine.client.remote import Address

ADDRESS = Address("http://server", api_key="tml-key")
DATUM = types.Datum(
    model_input=types.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3], "weights": [1, 1]}
)


def path_of(request: httpx.Request) -> str:
    return request.url.path.removeprefix("/api/v1/")


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
