"""kill -9 at any moment: every acknowledged checkpoint loads, no half-written one is ever listed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from nursery import nursery
from store_helpers import IMPORTS, RUN, Place, move_clock

from mint_engine.store import Store

PARTS = 4

# A checkpoint is PARTS files with the same text. `latest` is overwritten all the time; every other one stays. A line
# on stdout acknowledges: what it names must be there for ever.
SAVING = f"""
import itertools, json, sys
def writer(text):
    def write(directory):
        for i in range({PARTS}):
            (directory / f"part-{{i}}").write_text(text)
    return write
def say(what, text):
    print(json.dumps([what, text]), flush=True)
start = sys.argv[1]
say("open", "")
for n in itertools.count():
    text = f"{{start}}-{{n}}"
    say(save(store, {RUN!r}, "weights", text, writer(text)), text)
    say("latest?", text)
    say(save(store, {RUN!r}, "sampler_weights", "latest", writer(text), overwrite=True), text)
    store.park({RUN!r}, writer(text), {{"text": text}})
    say("parked", text)
"""


@dataclass
class Acknowledged:
    """What the killed processes have said. Of `latest` the last one, and what may have replaced it unsaid."""

    paths: dict[str, str] = field(default_factory=dict)
    latest: set[str] = field(default_factory=set)
    parked: str = ""

    def read(self, lines: list[str]) -> None:
        for line in lines:
            what, text = json.loads(line)
            if what == "latest?":
                self.latest.add(text)
            elif what == "parked":
                self.parked = text
            elif what.endswith("/latest"):
                self.latest = {text}
            elif what != "open":
                self.paths[what] = text


def kill_while_saving(place: Place, name: str, lines: int, seconds: float) -> list[str]:
    """The lines that a process printed before it was killed, `seconds` after it had printed so many."""
    child = nursery(IMPORTS)
    timer = threading.Timer(seconds, os.kill, (child.start(place.script(SAVING), name), signal.SIGKILL))
    printed = [child.line() for _ in range(lines)]
    timer.start()
    while isinstance(printed[-1], str):
        printed.append(child.line())
    timer.join()
    assert printed.pop() == -signal.SIGKILL, printed
    return [line for line in printed if line.endswith("\n")]


def check(store: Store, said: Acknowledged) -> None:
    listed = {c.tinker_path for c in store.list_checkpoints(RUN).checkpoints}
    assert set(said.paths) <= listed
    for path in listed:
        found = store.resolve(path)
        texts = [(found.directory / f"part-{i}").read_text() for i in range(PARTS)]
        assert len(set(texts)) == 1, f"{path} is a mixture"
        assert found.record.size_bytes == sum(map(len, texts))
        if found.name == "latest":
            assert texts[0] in said.latest
        else:
            assert texts[0] == said.paths.get(path, found.name)
    parked = store.parked(RUN)
    if parked is not None:
        assert {(parked.directory / f"part-{i}").read_text() for i in range(PARTS)} == {parked.note["text"]}
    assert parked is not None or not said.parked


def kill_often(place: Place, store: Store, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said, choose = Acknowledged(), random.Random(0)
    for i in range(times):
        said.read(kill_while_saving(place, str(i), choose.randint(1, 12), choose.uniform(0.0, 0.01)))
        check(place.open() if i % 5 == 0 else store, said)
    assert said.paths, "they had time to save something"
    # The remains go, and nothing but them.
    move_clock(monkeypatch, hours=1)
    store.purge_expired()
    check(store, said)
    there = {path for path in store.home.glob("runs/*/*/*") if path.is_dir()}
    assert there == {store.resolve(c.tinker_path).directory for c in store.list_checkpoints(RUN).checkpoints}
    assert len([path for path in store.home.glob("parked/*/*") if path.is_dir()]) == 1


def test_kill_9_while_saving_a_few_times(place: Place, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_often(place, store, 4, monkeypatch)


@pytest.mark.slow
def test_kill_9_while_saving_again_and_again(place: Place, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_often(place, store, 25, monkeypatch)


OPENING = """
import os, signal, sys, threading, time
from pathlib import Path
from mint_engine.store import Store
seconds = float(sys.argv[2])
threading.Thread(target=lambda: (time.sleep(seconds), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
for i in range(1000):
    Store(Path(sys.argv[1]) / str(i)).create_session("s-1")
"""


@pytest.mark.slow
def test_kill_9_while_a_store_is_made(tmp_path: Path) -> None:
    """Making the tables, too, happens entirely or not at all."""
    choose = random.Random(1)
    for i in range(10):
        home = tmp_path / str(i)
        command = [sys.executable, "-c", OPENING, str(home), str(choose.uniform(0.0, 0.1))]
        assert subprocess.run(command, check=False).returncode == -9
        for made in sorted(home.iterdir()) if home.exists() else []:
            store = Store(made)
            if store.list_sessions().sessions == []:
                store.create_session("s-1")
            assert store.list_sessions().sessions == ["s-1"]
            store.close()
