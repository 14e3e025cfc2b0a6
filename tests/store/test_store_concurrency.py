"""Several threads and several processes on one home."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_helpers import META, RUN, Place, save, text_of, versions

from mint_engine.errors import UserError
from mint_engine.store import Store


def run_together(place: Place, body: str, count: int = 2) -> list[str]:
    """Run `body` in several processes that start it at the same moment, and return what each printed."""
    body = "print('ready', flush=True); sys.stdin.readline()\n" + body
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen(place.python(f"me = {i}\n{body}"), stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for i in range(count)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n", child.communicate()[1]
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    outputs = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0] * count, outputs
    return [out for out, _ in outputs]


def test_of_many_writers_of_one_name_exactly_one_wins(store: Store) -> None:
    def attempt(i: int) -> bool:
        try:
            save(store, "a", str(i))
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        winners = [i for i, won in enumerate(pool.map(attempt, range(16))) if won]
    assert len(winners) == 1
    assert text_of(store, f"{RUN}/weights/a") == str(winners[0])
    assert len(versions(store)) == 1


def test_concurrent_overwrites_leave_one_complete_version(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: save(store, "a", str(i), overwrite=True), range(24)))
    store.purge_expired()  # what was overwritten while its writer still held it is removed then
    assert text_of(store, f"{RUN}/weights/a") in map(str, range(24))
    assert len(versions(store)) == 1


def test_readers_never_miss_a_checkpoint_that_is_being_overwritten(store: Store) -> None:
    path = save(store, "a", "0")

    def read(_: int) -> int:
        return int(text_of(store, path))

    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(lambda: [read(i) for i in range(40)]) for _ in range(3)]
        for i in range(1, 30):
            save(store, "a", str(i), overwrite=True)
        for seen in reads:
            assert seen.result() == sorted(seen.result()), "nor see an older one after a newer one"


def test_two_processes_and_their_threads_share_a_home(place: Place, store: Store) -> None:
    """Each makes sessions, runs, checkpoints and ledger lines of its own, and they overwrite a common checkpoint."""
    run_together(
        place,
        f"""
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from mint_engine.store import LedgerEntry
def work(i):
    session = f"p{{me}}-{{i}}"
    store.create_session(session)
    store.create_run(f"{{session}}:train:0", session_id=session, base_model="tiny", lora=LORA)
    path = save(store, f"{{session}}:train:0", "weights", "a", note(session))
    assert (store.resolve(path).directory / "note.txt").read_text() == session
    save(store, {RUN!r}, "weights", "common", note(session), overwrite=True)
    store.add_sampler(session, f"{{session}}:sample:0", base_model="tiny")
    now = datetime.now(timezone.utc)
    store.ledger.append([LedgerEntry(session, "local", "Sample", "done", now)] * 3)
    store.purge_expired()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(work, range(10)))
""",
    )
    mine = {f"p{process}-{i}" for process in range(2) for i in range(10)}
    assert set(store.list_sessions(limit=100).sessions) == mine | {"s-1"}
    assert len(store.ledger.entries(limit=1000)) == 60
    checkpoints = store.list_user_checkpoints(limit=100).checkpoints
    assert len(checkpoints) == 21
    texts = {text_of(store, c.tinker_path) for c in checkpoints}
    assert texts == mine
    assert len(versions(store)) == 1


def test_processes_that_open_a_new_home_together_agree(place: Place) -> None:
    body = f"""
again = Store(store.home, database_url={place.url!r})
again.create_session(f"s-{{me}}")
print(again._database.store_id())
"""
    ids = run_together(place, body, count=3)
    assert len(set(ids)) == 1
    assert sorted(place.open().list_sessions().sessions) == ["s-0", "s-1", "s-2"]


def test_threads_that_open_a_new_home_together_agree(place: Place) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: place.open(), range(8)))
    for i, store in enumerate(stores):
        store.create_session(f"s-{i}")
    assert len(stores[0].list_sessions().sessions) == 8


def test_a_forked_child_has_connections_of_its_own(place: Place, store: Store) -> None:
    done = place.run(f"""
import warnings
warnings.simplefilter("ignore")
store.create_session("parent")
child = os.fork()
for i in range(20):
    store.create_session(f"{{'parent' if child else 'child'}}-{{i}}")
    save(store, {RUN!r}, "weights", f"{{bool(child)}}-{{i}}", note("x"))
if child == 0:
    os._exit(0)
assert os.wait()[1] == 0
""")
    assert done.returncode == 0, done.stderr
    assert len(store.list_sessions(limit=100).sessions) == 42
    assert len(store.list_checkpoints(RUN).checkpoints) == 40


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of threads; the child only waits
def test_a_child_forked_while_saving_does_not_block_readers(store: Store) -> None:
    """The child has the writer's descriptors; it must not keep the lock of a directory with them."""
    read, write = os.pipe()
    child = 0

    def writer(directory: Path) -> None:
        nonlocal child
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the parent is done
            os._exit(0)
        (directory / "note.txt").write_text("x")

    path = store.write_checkpoint(RUN, "weights", "a", writer, **META)
    try:
        assert text_of(store, path) == "x"
        store.delete_checkpoint(path, at_once=True)
        assert versions(store) == []
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)
