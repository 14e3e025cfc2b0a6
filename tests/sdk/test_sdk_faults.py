"""The SDKs as they are on PyPI over a bad network: training ends in the very same bits, and nothing is done twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import environments
import pytest
import serving
from chaos_proxy import FAULTS, chaos_proxy
from checkpoint_bits import check_same, contents
from engine_helpers import open_engine
from server_fixture import LiveServer, live_server
from server_process import Restarts, ServerProcess, server_process

from mint_engine.store import Store

pytestmark = pytest.mark.slow

CLIENTS = 2
# The SDKs wait for half a second and more before they send something again: as few faults as show every kind.
RATES = {"/optim_step": 0.9, "/forward_backward": 0.45, "/retrieve_future": 0.2}


@contextmanager
def server(base: Path, home: Path) -> Iterator[LiveServer]:
    with open_engine(home) as engine, live_server(engine, models=[base]) as running:
        yield running


def run(sdk: str, running: LiveServer, url: str, base: Path, out: Path) -> dict[str, Any]:
    """`drivers/faults.py`, by several clients at once: what they got and saved, and how often the server did what."""
    keys = running.engine.store.keys
    (record, key), (sk_record, sk_key) = keys.create("tinker"), keys.create("mint", prefix="sk-")
    address = serving.Server(url, running.engine.home, key, key, sk_key, sk_key)
    made: Any = serving.drive(
        environments.environment(sdk), "faults", out, address, str(base), "--clients", str(CLIENTS)
    )
    store = running.engine.store.as_owner(sk_record.key_id if sdk.startswith("mindlab") else record.key_id)
    return {
        "values": [one["values"] for one in made],
        "samples": [one["samples"] for one in made],
        "saved": [contents(store.resolve(path).directory) for one in made for path in one["paths"].values()],
        "done": running.engine.stats().operations,
        "sessions": len(store.list_sessions(limit=100).sessions),
        "runs": len(store.list_runs(limit=100).training_runs),
        "checkpoints": len(store.list_user_checkpoints(limit=100).checkpoints),
    }


@pytest.mark.parametrize("sdk", ["tinker-0.38.0", "mindlab-toolkit-0.2.0"])
def test_faults_do_not_change_a_bit(sdk: str, tiny_base: Path, tmp_path: Path) -> None:
    with server(tiny_base, tmp_path / "quiet") as running:
        quiet = run(sdk, running, running.url, tiny_base, tmp_path / "out")
    with server(tiny_base, tmp_path / "home") as running, chaos_proxy(running.url, rates=RATES) as proxy:
        disturbed = run(sdk, running, proxy.url, tiny_base, tmp_path / "over proxy")
    for path in RATES:
        missing = [fault for fault in FAULTS if not proxy.by_path[f"/api/v1{path}", fault]]
        assert not missing, (path, missing, proxy.by_path)
    check_same(disturbed, quiet)
    for what in ("done", "sessions", "runs", "checkpoints"):
        assert disturbed[what] == quiet[what], f"{what}: not each exactly once"


@pytest.mark.parametrize("sdk", ["tinker-0.38.0"])  # of the others the test above shows that they ask again
def test_a_restart_goes_unnoticed(sdk: str, tiny_base: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle, twice, and the next server on the same port takes up what waits."""

    def drive(server: ServerProcess, out: Path) -> dict[str, Any]:
        keys = {"key": "tml-1", "other_key": "tml-1", "sk_key": "sk-1", "other_sk_key": "sk-1"}
        address = serving.Server(server.url, server.home, **keys)
        made: Any = serving.drive(
            environments.environment(sdk), "faults", out, address, str(tiny_base), "--clients", str(CLIENTS)
        )
        store = Store(server.home)
        return {
            "values": [one["values"] for one in made],
            "samples": [one["samples"] for one in made],
            "saved": [contents(store.resolve(path).directory) for one in made for path in one["paths"].values()],
        }

    with server_process(tmp_path / "quiet", tiny_base) as server:
        quiet = drive(server, tmp_path / "out")
    with server_process(tmp_path / "home", tiny_base) as server:
        restarts = Restarts(server, ("middle", "sampler"), 0.02)
        with watching(server.home, restarts.reached):
            disturbed = drive(server, tmp_path / "with restarts")
        assert restarts.join() == 2
    check_same(disturbed, quiet)


@contextmanager
def watching(home: Path, saved: Callable[[str], None]) -> Iterator[None]:
    """Calls `saved` with the name of every checkpoint, when the first of that name is there."""
    over, seen, store = threading.Event(), set[str](), Store(home)

    def look() -> None:
        while not over.wait(0.01):
            for checkpoint in store.list_user_checkpoints(limit=100).checkpoints:
                if (name := checkpoint.checkpoint_id.split("/")[1]) not in seen:
                    seen.add(name)
                    saved(name)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        store.close()
