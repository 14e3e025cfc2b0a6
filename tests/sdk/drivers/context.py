"""What every part of a driver needs: the SDK, its clients, the server's address."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reporting import Report
from scenario import Made


@dataclass
class Context:
    """One run of a driver.

    sdk: the clients' package, `tinker` or (mindlab-toolkit's) `mint`. version: tinker's.
    other_key: another user's key. out: where files for the tests go.
    """

    url: str
    key: str
    other_key: str
    base_model: str
    out: Path
    sdk: Any = None
    version: tuple[int, ...] = ()
    service: Any = None
    rest: Any = None
    made: Made | None = None
    report: Report = field(default_factory=Report)

    @property
    def types(self) -> Any:
        return self.sdk.types

    def other_service(self) -> Any:
        """A ServiceClient of the other user."""
        return self.sdk.ServiceClient(api_key=self.other_key)


def opened(path: str) -> Context:
    """Read the JSON that the test wrote, set the environment as a user would, import the SDK."""
    request = json.loads(Path(path).read_text())
    package = request.pop("package")
    prefix = "MINT" if package == "mint" else "TINKER"
    os.environ[f"{prefix}_BASE_URL"], os.environ[f"{prefix}_API_KEY"] = request["url"], request["key"]
    context = Context(**request | {"out": Path(request["out"])})
    context.sdk = importlib.import_module(package)
    context.version = tuple(int(part) for part in importlib.metadata.version("tinker").split("."))
    return context


def configure(client: Any, **changes: Any) -> bool:
    """As if the server's client config had said so. False where this SDK has no such setting."""
    config = client.holder._client_config
    if any(name not in type(config).model_fields for name in changes):
        return False
    client.holder._client_config = config.model_copy(update=changes)
    return True
