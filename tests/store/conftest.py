"""Every store test runs on SQLite and on PostgreSQL."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from store_helpers import LORA, RUN, Place
from temporary_postgres import temporary_postgres

from mint_engine.store import Store

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with temporary_postgres() as socket:
        yield socket


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A fresh home directory and database."""
    if request.param == "sqlite":
        yield Place(tmp_path / "home", None)
        return
    socket = request.getfixturevalue("postgres")
    schema = f"test_{next(_numbers)}"
    engine = sqlalchemy.create_engine(f"postgresql+psycopg://postgres@/postgres?host={socket}")
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    engine.dispose()
    yield Place(tmp_path / "home", f"postgresql://postgres@/postgres?host={socket}&options=-csearch_path%3D{schema}")


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    """A store with one session and one run."""
    store = place.open()
    store.create_session("s-1", tags=["a"], user_metadata={"who": "me"}, project_id="p")
    store.create_run(RUN, session_id="s-1", base_model="tiny", lora=LORA, user_metadata={"k": "v"})
    yield store
    store.close()
