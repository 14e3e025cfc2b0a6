"""What tests of several files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from victim import Victim, victim


@pytest.fixture(scope="session")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """One server for all attacks: it takes seconds to start, and has to outlive them all."""
    with victim(tmp_path_factory.mktemp("victim")) as server:
        yield server
