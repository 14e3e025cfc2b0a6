"""kill -9 of a whole server: what was acknowledged is there, what was not is not half there, and clients are told."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoint_bits import contents
from engine_helpers import VOCAB
from helpers import make_data
from server_process import QuickServerProcess, ServerProcess, server_process
from sqlalchemy import create_engine, text

import mint
from mint import types
from mint_engine.checkpoint import read_training_state
from mint_engine.client.remote import Address, Patience, RemoteEngine, transport
from mint_engine.errors import MintError, NotFoundError
from mint_engine.store import Store

pytestmark = pytest.mark.slow  # processes that start, stop and start again

PROMPT = types.ModelInput.from_ints([5, 6, 7])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(transport, "LAST_DELAY", 0.2)


@pytest.fixture
def server(tiny_tied: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(tmp_path / "home", tiny_tied, QuickServerProcess) as running:
        yield running


@contextmanager
def user(server: ServerProcess) -> Iterator[mint.ServiceClient]:
    remote = RemoteEngine(Address(server.url), patience=Patience(known=30.0))
    try:
        yield mint.ServiceClient(engine=remote)
    finally:
        remote.close()


def train(client: mint.TrainingClient, steps: int, seed: int) -> list[float]:
    losses = []
    for step in range(steps):
        data = make_data("cross_entropy", (6, 9), VOCAB, 100 * seed + step)
        losses.append(client.forward_backward(data, "cross_entropy").result().metrics["loss:sum"])
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return losses


def test_after_kill_9_one_goes_on_from_the_checkpoint(server: ServerProcess, tiny_tied: Path) -> None:
    """The client of the lost model is told what to do; doing it gives the very steps that were lost."""
    with user(server) as service:
        training = service.create_lora_training_client(str(tiny_tied), rank=4, seed=0)
        train(training, 3, seed=0)
        path = training.save_state("state").result().path
        lost = train(training, 3, seed=1)
        many = make_data("cross_entropy", (300,) * 16, VOCAB)
        under_way = [training.forward_backward(many, "cross_entropy") for _ in range(4)]
        under_way.append(training.save_state("too late"))
        server.kill()
        server.start()
        for future in under_way:
            with pytest.raises(NotFoundError, match="its checkpoints are there: create_training_client_from_state"):
                future.result()
        with pytest.raises(NotFoundError, match="not in memory any more"):
            training.optim_step(types.AdamParams()).result()

        resumed = service.create_training_client_from_state_with_optimizer(path)
        assert train(resumed, 3, seed=1) == lost
    with user(server) as another:
        assert train(another.create_training_client_from_state_with_optimizer(path), 3, seed=1) == lost
    listed = Store(server.home).list_user_checkpoints(limit=100).checkpoints
    assert [checkpoint.tinker_path for checkpoint in listed] == [path]


def test_samplers_after_kill_9(server: ServerProcess, tiny_tied: Path) -> None:
    """Of saved weights and of the base model they go on, also with what was under way; others say why they cannot."""
    params = types.SamplingParams(max_tokens=100, seed=1, stop=[])

    def tokens(response: types.SampleResponse) -> list[list[int]]:
        return [list(sequence.tokens) for sequence in response.sequences]

    with user(server) as service:
        training = service.create_lora_training_client(str(tiny_tied), rank=4, seed=0)
        train(training, 2, seed=0)
        path = training.save_weights_for_sampler("saved").result().path
        saved, base = (service.create_sampling_client(path), service.create_sampling_client(base_model=str(tiny_tied)))
        unnamed = training.save_weights_and_get_sampling_client()
        before = [tokens(sampler.sample(PROMPT, 2, params).result()) for sampler in (saved, base)]
        under_way = [sampler.sample(PROMPT, 2, params) for sampler in (saved, base)]
        server.kill()
        server.start()
        assert [tokens(future.result()) for future in under_way] == before
        assert [tokens(sampler.sample(PROMPT, 2, params).result()) for sampler in (saved, base)] == before
        with pytest.raises(NotFoundError, match="save_weights_for_sampler makes a new one"):
            unnamed.sample(PROMPT, 1, params).result()


class Saver(threading.Thread):
    """Trains and saves without a pause, on from the last acknowledged checkpoint, until its server is gone."""

    def __init__(self, server: ServerProcess, base: Path, round_: int, acknowledged: dict[str, float]) -> None:
        super().__init__()
        self._server, self._base, self._round, self._acknowledged = server, base, round_, acknowledged
        self.begun = threading.Event()
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            with user(self._server) as service:
                self._work(service)
        except MintError:
            self.problem = None  # killed
        except BaseException as problem:
            self.problem = problem
        finally:
            self.begun.set()

    def _work(self, service: mint.ServiceClient) -> None:
        client = service.create_lora_training_client(str(self._base), rank=4, seed=self._round)
        if self._acknowledged:
            client.load_state_with_optimizer(list(self._acknowledged)[-1]).result()
        self.begun.set()
        for n in range(10_000):
            loss = train(client, 1, seed=1000 * self._round + n)[0]
            path = client.save_state(f"{self._round}-{n}").result().path
            self._acknowledged[path] = loss
            client.save_state("latest", overwrite=True).result()


def kill_while_saving(server: ServerProcess, base: Path, times: int) -> None:
    acknowledged: dict[str, float] = {}
    choose = random.Random(0)
    for i in range(times):
        savers = [Saver(server, base, 2 * i + k, acknowledged) for k in range(2)]
        for saver in savers:
            saver.start()
        for saver in savers:
            assert saver.begun.wait(60)
        # By what is saved, not by the clock: a busy machine saves little in a third of a second.
        enough, end = len(acknowledged) + choose.randint(0, 3), time.monotonic() + 60
        while len(acknowledged) < enough and all(saver.is_alive() for saver in savers):
            assert time.monotonic() < end, "nothing is saved"
            time.sleep(0.005)
        time.sleep(choose.uniform(0.0, 0.1))
        server.kill()
        check_listed(server.home, acknowledged)
        server.start()
        for saver in savers:
            saver.join(60)
            assert saver.problem is None, saver.problem
    assert len(acknowledged) > times, "they had time to save something"
    with user(server) as service:
        client = service.create_lora_training_client(str(base), rank=4)
        for path in acknowledged:
            client.load_state_with_optimizer(path).result()


def check_listed(home: Path, acknowledged: dict[str, float]) -> None:
    """In the files of a server that has just been killed."""
    store = Store(home)
    listed = {checkpoint.tinker_path for checkpoint in store.list_user_checkpoints(limit=10_000).checkpoints}
    assert set(acknowledged) <= listed
    for path in [*list(acknowledged)[-6:], *(listed - set(acknowledged))]:
        assert len(contents(store.resolve(path).directory)) == 2
        read_training_state(store.resolve(path).directory)
    store.close()
    database = create_engine(f"sqlite:///{home / 'mint.db'}")
    with database.connect() as connection:
        assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
    database.dispose()


def test_kill_9_while_saving_again_and_again(server: ServerProcess, tiny_tied: Path) -> None:
    kill_while_saving(server, tiny_tied, 15)
