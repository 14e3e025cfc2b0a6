"""Opening a store: new, old, damaged, somebody else's."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from store_helpers import LORA, RUN, Place, save, text_of

from mint_engine.errors import StorageError, UserError
from mint_engine.store import Store, migrate, schema
from mint_engine.store.database import Database, _engine, _parse


@contextmanager
def connected(place: Place) -> Iterator[sqlalchemy.Connection]:
    place.home.mkdir(exist_ok=True)
    engine = _engine(_parse(place.url or f"sqlite:///{place.home / 'mint.db'}"))
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def differences(connection: sqlalchemy.Connection) -> list[object]:
    return compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), schema.metadata)


def test_the_migrations_make_the_tables_of_the_schema(place: Place) -> None:
    with connected(place) as connection:
        command.upgrade(migrate.config(connection), "head")
        assert differences(connection) == []
        assert MigrationContext.configure(connection).get_current_revision() == schema.HEAD
    place.open().create_session("s-1")
    with connected(place) as connection:
        command.downgrade(migrate.config(connection), "base")
        assert sqlalchemy.inspect(connection).get_table_names() == ["alembic_version"]
        command.upgrade(migrate.config(connection), "head")
    (place.home / "store-id").unlink()
    assert place.open().list_sessions().sessions == []


def test_a_new_database_has_the_tables_of_the_schema_and_is_marked_as_newest(place: Place) -> None:
    assert place.open().database_revision() == schema.HEAD
    with connected(place) as connection:
        assert differences(connection) == []
        command.upgrade(migrate.config(connection), "head")  # Alembic agrees that there is nothing to do


NEXT = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "0002", "0001"
def upgrade():
    op.add_column("sessions", sa.Column("mood", sa.Text, server_default="fine"))
    {then}
"""


@pytest.fixture
def next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The code of a later version, with one more migration: the file to write it to."""
    folder = tmp_path / "migrations"
    (folder / "versions").mkdir(parents=True)
    for source in (migrate.MIGRATIONS / "env.py", *(migrate.MIGRATIONS / "versions").glob("0*.py")):
        (folder / source.relative_to(migrate.MIGRATIONS)).write_text(source.read_text())
    monkeypatch.setattr(migrate, "MIGRATIONS", folder)
    monkeypatch.setattr(schema, "HEAD", "0002")
    return folder / "versions" / "0002_mood.py"


def test_an_old_database_is_upgraded_once_by_whoever_opens_it_first(
    place: Place, store: Store, next_version: Path
) -> None:
    path = save(store, "a")
    next_version.write_text(NEXT.format(then=""))
    with ThreadPoolExecutor(6) as pool:
        opened = list(pool.map(lambda _: place.open(), range(6)))
    assert {each.database_revision() for each in opened} == {"0002"}
    assert text_of(opened[0], path) == "x"
    with connected(place) as connection:
        assert connection.exec_driver_sql("SELECT mood FROM sessions").scalar() == "fine"


def test_an_upgrade_that_fails_changes_nothing(place: Place, store: Store, next_version: Path) -> None:
    next_version.write_text(NEXT.format(then='op.drop_table("nothing of that name")'))
    with pytest.raises(StorageError, match="nothing of that name"):
        place.open()
    assert store.database_revision() == "0001"
    with connected(place) as connection:
        assert differences(connection) == []
    next_version.write_text(NEXT.format(then="# mended, and it has another length"))
    assert place.open().database_revision() == "0002"


def test_a_database_of_a_later_version_is_refused(place: Place, store: Store) -> None:
    with connected(place) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(UserError, match=r"revision '9999'.*upgrade mint-engine"):
        place.open()


def test_opening_is_cheap(tmp_path: Path) -> None:
    """No torch, no Alembic, and a new database in a fraction of what importing either takes."""
    times = []
    for i in range(5):
        start = time.perf_counter()
        Store(tmp_path / str(i))
        times.append(time.perf_counter() - start)
    assert min(times) < 0.2
    code = f"""
import sys
from pathlib import Path
import mint_engine
from mint_engine.store import Store
store = Store(Path({str(tmp_path / "new")!r}))
store.create_session("s-1")
print([name for name in ("torch", "alembic", "transformers") if name in sys.modules])
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_the_default_database_survives_a_power_cut(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store._database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_sqlite_may_be_elsewhere(tmp_path: Path) -> None:
    Store(tmp_path / "home", database_url=f"sqlite:///{tmp_path}/other.db").create_session("s-1")
    assert (tmp_path / "other.db").exists()
    assert not (tmp_path / "home" / "mint.db").exists()


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://x/y", "sqlite://", "sqlite:///:memory:"])
def test_urls_that_cannot_work_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="database_url: expected"):
        Database(url, lock=tmp_path / ".lock")


def test_a_database_that_cannot_be_reached_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="opening failed: the database says"):
        Store(tmp_path, database_url=f"postgresql://me:secret@/x?host={tmp_path}")


def test_the_password_is_not_shown(tmp_path: Path) -> None:
    database = Database.__new__(Database)
    database.url = _parse("postgresql://me:secret@host/x")
    assert database.describe() == "postgresql+psycopg://me:***@host/x"
    assert "mint.db" in Store(tmp_path).database_description()


def test_a_damaged_database_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "mint.db").write_bytes(b"not a database " * 1000)
    with pytest.raises(StorageError, match=r"opening failed: .*not a database"):
        Store(tmp_path)


def test_a_home_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(StorageError, match="creating"):
        Store(tmp_path / "home")


def test_a_home_belongs_to_one_database(place: Place, store: Store, tmp_path: Path) -> None:
    """Opened with another one, every checkpoint would look like remains that can be removed."""
    path = save(store, "a")
    with pytest.raises(UserError, match="belongs to another database"):
        Store(place.home, database_url=f"sqlite:///{tmp_path}/other.db")
    assert text_of(place.open(), path) == "x"


def test_a_view_of_another_owner_is_cheap(store: Store) -> None:
    views = [store.as_owner(f"key-{i}") for i in range(1000)]
    views[7].create_session("s-7")
    assert views[7].list_sessions().sessions == ["s-7"]
    assert (views[8].list_sessions().sessions, store.owner) == ([], "local")
    assert views[7].as_owner("local").get_run(RUN).lora_rank == LORA.rank
