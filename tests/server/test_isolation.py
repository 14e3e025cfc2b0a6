"""What one user does over HTTP never shows in another's numbers, and a version that was saved never changes.

To the last bit, in float32; `tests/test_engine_isolation.py` looks at the engine's insides for the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import VOCAB, open_engine
from helpers import make_data
from server_fixture import LiveServer, live_server

import mint
from mint import types
from mint_engine.client.remote import Address, RemoteEngine
from mint_engine.errors import MintError
from mint_engine.server import samplers as server_samplers

PROMPT = types.ModelInput.from_ints([5, 6, 7, 8])


@pytest.fixture
def running(request: pytest.FixtureRequest, tiny_tied: Path, tmp_path: Path) -> Iterator[LiveServer]:
    """The server, with room for two samplers in memory unless the test asks for more."""
    most = getattr(request, "param", 2)
    with open_engine(tmp_path) as engine, live_server(engine, models=[tiny_tied], max_resident_samplers=most) as server:
        engine.store.keys.create("so that one is asked for")
        yield server


@pytest.fixture
def user(running: LiveServer) -> Iterator[Callable[[], mint.ServiceClient]]:
    """Makes users, each with a key and connections of their own."""
    remotes: list[RemoteEngine] = []

    def make() -> mint.ServiceClient:
        _, secret = running.engine.store.keys.create("a user")
        remotes.append(RemoteEngine(Address(running.url, api_key=secret)))
        return mint.ServiceClient(engine=remotes[-1])

    yield make
    for remote in remotes:
        remote.close()


def new(user: mint.ServiceClient, base: Path, **lora: Any) -> mint.TrainingClient:
    return user.create_lora_training_client(str(base), **{"rank": 4, "seed": 0, **lora})


def train(client: mint.TrainingClient, steps: int = 2, seed: int = 0) -> list[float]:
    losses = []
    for step in range(steps):
        data = make_data("cross_entropy", (6, 9), VOCAB, seed + step)
        losses.append(client.forward_backward(data, "cross_entropy").result().metrics["loss:sum"])
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return losses


def logprobs(client: mint.TrainingClient) -> list[float]:
    out = client.forward(make_data("cross_entropy", (8, 12), VOCAB, 3), "cross_entropy").result()
    return [value for one in out.loss_fn_outputs for value in one["logprobs"].tolist()]


def answers(sampler: mint.SamplingClient) -> list[Any]:
    """Seeded samples, a greedy one, a scored prompt; one after the other, so that nobody shares a step with them."""
    seeded = sampler.sample(PROMPT, 3, types.SamplingParams(max_tokens=12, seed=3, temperature=0.8)).result()
    greedy = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=12, temperature=0.0)).result()
    sequences = [(s.tokens, s.logprobs, s.stop_reason) for s in (*seeded.sequences, *greedy.sequences)]
    return [*sequences, sampler.compute_logprobs(PROMPT).result()]


# ---- what an offender may do -----------------------------------------------------------------------------------------


def decay(client: mint.TrainingClient) -> None:
    """Weight decay 1.0 at a learning rate that all but erases the adapter."""
    train(client, 1)
    client.optim_step(types.AdamParams(learning_rate=0.5, weight_decay=1.0)).result()


def clip(client: mint.TrainingClient) -> None:
    client.forward_backward(make_data("cross_entropy", (20, 30), VOCAB), "cross_entropy").result()
    step = client.optim_step(types.AdamParams(learning_rate=0.1, grad_clip_norm=1e-3)).result()
    assert (step.metrics or {})["grad_norm"] > 1e-3


def overflowing_step(client: mint.TrainingClient) -> None:
    client.forward_backward(make_data("cross_entropy", (9,), VOCAB), "cross_entropy").result()
    with pytest.raises(MintError, match="refused"):
        client.optim_step(types.AdamParams(learning_rate=1e36)).result()


def infinite_gradient(client: mint.TrainingClient) -> None:
    """Each call's gradient is finite, their sum is not: the step that would have spread it is refused."""
    data = types.Datum(types.ModelInput.from_ints([1] * 9), {"target_tokens": [2] * 9, "weights": [1e36] * 9})
    pending = [client.forward_backward([data], "cross_entropy") for _ in range(12)]
    with pytest.raises(MintError, match="its norm is inf"):
        client.optim_step(types.AdamParams(learning_rate=1.0)).result()
    for future in pending:
        future.result()


def infinite_loss(client: mint.TrainingClient) -> None:
    refused_data(client, "cross_entropy", weights=[3e38] * 4)


def infinite_ratio(client: mint.TrainingClient) -> None:
    refused_data(client, "importance_sampling", logprobs=[-3e4, -1.0, -1.0, -1.0], advantages=[1.0] * 4)


def nan_weights(client: mint.TrainingClient) -> None:
    refused_data(client, "cross_entropy", weights=[1.0, float("nan"), 1.0, 1.0])


def refused_data(client: mint.TrainingClient, loss_fn: str, **inputs: list[float]) -> None:
    """Refused, and a step afterwards only takes what was given before."""
    client.forward_backward(make_data("cross_entropy", (9,), VOCAB), "cross_entropy").result()
    bad = types.Datum(types.ModelInput.from_ints([1, 2, 3, 4]), {"target_tokens": [2, 3, 4, 5], **inputs})
    with pytest.raises(MintError, match=r"finite|is -?inf"):
        client.forward_backward([bad], loss_fn).result()
    client.optim_step(types.AdamParams(learning_rate=1.0)).result()


REFUSED = [overflowing_step, infinite_gradient, infinite_loss, infinite_ratio, nan_weights]


# ---- what nobody else may feel ---------------------------------------------------------------------------------------


def test_no_user_feels_what_another_does(user: Callable[[], mint.ServiceClient], tiny_tied: Path) -> None:
    offender = user()
    others = [
        new(user(), tiny_tied, rank=6, seed=1), new(user(), tiny_tied, rank=17, train_mlp=False),
        new(user(), tiny_tied, rank=1),
    ]  # fmt: skip
    for other in others[1:]:
        train(other)
    others[1].forward_backward(make_data("cross_entropy", (7,), VOCAB, 8), "cross_entropy").result()
    samplers = [other.save_weights_and_get_sampling_client() for other in others]
    before = [logprobs(other) for other in others], [answers(sampler) for sampler in samplers]
    for deed in (decay, clip, *REFUSED):
        deed(new(offender, tiny_tied))
        after = [logprobs(other) for other in others], [answers(sampler) for sampler in samplers]
        assert after == before, deed.__name__


@pytest.mark.parametrize("deed", REFUSED)
def test_what_is_refused_leaves_no_trace(
    user: Callable[[], mint.ServiceClient], tiny_tied: Path, deed: Callable[[mint.TrainingClient], None]
) -> None:
    """A client that did it trains on like its twin that did not."""
    service = user()
    client, twin = new(service, tiny_tied), new(service, tiny_tied)
    train(client), train(twin)
    deed(client)
    if deed is not infinite_gradient:
        twin.forward_backward(make_data("cross_entropy", (9,), VOCAB), "cross_entropy").result()
    if deed not in (infinite_gradient, overflowing_step):  # after the latter the gradients are still there
        twin.optim_step(types.AdamParams(learning_rate=1.0)).result()
    assert train(client) == train(twin)
    assert logprobs(client) == logprobs(twin)


def test_losses_are_those_of_training_alone(user: Callable[[], mint.ServiceClient], tiny_tied: Path) -> None:
    """Three train at once while a fourth does everything it should not."""
    clients = [new(user(), tiny_tied, rank=3 + i, seed=i) for i in range(3)]
    alone = [new(user(), tiny_tied, rank=3 + i, seed=i) for i in range(3)]
    expected = [train(client, 8, 10 * i) for i, client in enumerate(alone)]
    offender = user()
    with ThreadPoolExecutor(4) as threads:
        deeds = threads.submit(lambda: [deed(new(offender, tiny_tied)) for deed in (decay, clip, *REFUSED)])
        losses = list(threads.map(lambda i: train(clients[i], 8, 10 * i), range(3)))
        deeds.result()
    assert losses == expected


# ---- what never changes ----------------------------------------------------------------------------------------------


def test_a_sampler_answers_after_ten_more_steps_as_before_them(
    user: Callable[[], mint.ServiceClient], running: LiveServer, tiny_tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named or not, opened by its path or not, and though the server had to put samplers on disk meanwhile."""
    monkeypatch.setattr(server_samplers, "_GRACE_S", 0.0)  # it may keep two in memory, and only those just used
    service = user()
    training = new(service, tiny_tied)
    train(training)
    path = training.save_weights_for_sampler("version").result().path
    assert path is not None
    samplers = [
        training.save_weights_and_get_sampling_client(), service.create_sampling_client(model_path=path),
        training.save_weights_and_get_sampling_client(), training.create_sampling_client(path),
    ]  # fmt: skip
    before = [answers(sampler) for sampler in samplers]
    assert before == [before[0]] * len(samplers)
    for step in range(10):
        training.forward_backward(make_data("cross_entropy", (6, 9), VOCAB, step), "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=0.05, weight_decay=1.0))
        samplers[step % 4].sample(PROMPT, 1, types.SamplingParams(max_tokens=4)).result()
    samplers.append(service.create_sampling_client(model_path=path))
    assert [answers(sampler) for sampler in samplers] == [before[0]] * len(samplers)
    assert answers(training.save_weights_and_get_sampling_client()) != before[0], "the training did move the model"
    assert running.engine.stats().operations["park"] > 0, "some were on disk"


@pytest.mark.parametrize("running", [16], indirect=True)  # an unnamed version that is one too many would be dropped
def test_sampling_old_versions_never_touches_live_weights(
    user: Callable[[], mint.ServiceClient], tiny_tied: Path
) -> None:
    """A model whose old versions are sampled all along trains like one that is left alone."""
    service = user()
    watched, alone = new(service, tiny_tied, seed=4), new(service, tiny_tied, seed=4)
    samplers = [service.create_sampling_client(base_model=str(tiny_tied))]
    losses: list[list[float]] = [[], []]
    for step in range(6):
        samplers.append(watched.save_weights_and_get_sampling_client())
        pending = [sampler.sample(PROMPT, 2, types.SamplingParams(max_tokens=20)) for sampler in samplers]
        losses[0] += train(watched, 1, step)
        for future in pending:
            assert len(future.result().sequences) == 2
        losses[1] += train(alone, 1, step)
    assert losses[0] == losses[1]
    assert logprobs(watched) == logprobs(alone)
    assert answers(watched.save_weights_and_get_sampling_client()) == answers(
        alone.save_weights_and_get_sampling_client()
    )
