"""Our client and a real server: the same numbers as in process, also over a bad network and past a restart."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import pytest
from chaos_proxy import chaos_proxy
from helpers import make_data
from other_process import sampled
from remote_helpers import eventually
from server_fixture import LiveServer, live_server
from tiny_models import build_tiny
from tiny_tokenizer import VOCAB, save_byte_tokenizer

import mint
from mint import types
from mint_engine.client.remote import Patience, RemoteEngine, address_of, close_connections
from mint_engine.engine import Engine

ADAM = types.AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = build_tiny(
        "qwen3", tmp_path_factory.mktemp("remote"), tie_word_embeddings=True, vocab_size=VOCAB, eos_token_id=256
    )
    save_byte_tokenizer(directory)
    return directory


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(dtype="float32", home=tmp_path / "home", kv_cache_bytes=1 << 22)
    yield engine
    engine.close()


@pytest.fixture
def server(engine: Engine, model: Path) -> Iterator[LiveServer]:
    with live_server(engine, models=[model]) as running:
        yield running
        close_connections()


def train(service: mint.ServiceClient, model: Path, steps: int = 6) -> tuple[list[float], np.ndarray]:
    """The losses of a few steps of every kind, and what the trained model says."""
    trainer = service.create_lora_training_client(str(model), rank=4, seed=0)
    data = make_data("cross_entropy", (6, 9, 14), VOCAB)
    ppo = make_data("ppo", (5, 7), VOCAB)
    calls = []
    for _ in range(steps):
        calls += [trainer.forward_backward(data), trainer.forward_backward(ppo, "ppo"), trainer.optim_step(ADAM)]
    custom = trainer.forward_backward_custom(data, lambda _, lps: (sum((lp**2).sum() for lp in lps), {}))
    trainer.optim_step(types.AdamParams(learning_rate=1e-2, grad_clip_norm=1.0, weight_decay=0.1))
    losses = [call.metrics["loss:sum"] for call in [*calls[0::3], *calls[1::3], custom]]
    said = trainer.forward(data).loss_fn_outputs
    return losses, np.concatenate([output["logprobs"].to_numpy() for output in said])


@pytest.mark.parametrize("transport", ["local", "remote"])
def test_a_loss_that_would_wait_for_itself_is_refused(server: LiveServer, model: Path, transport: str) -> None:
    to = {"engine": server.engine} if transport == "local" else {"base_url": server.url}
    service = mint.ServiceClient(**to)
    trainer, other = (service.create_lora_training_client(str(model), rank=4, seed=seed) for seed in (0, 1))
    data = make_data("cross_entropy", (6,), VOCAB)

    def loss_with(client: mint.TrainingClient) -> mint.APIFuture:
        return trainer.forward_backward_custom(
            data, lambda _, lps: (lps[0].sum() * client.forward(data).result(60).loss, {"n": 1})
        )

    with pytest.raises(mint.UserError, match="loss_fn: expected no calls of its own training client"):
        loss_with(trainer).result(60)
    assert loss_with(other).result(60).metrics["n"] == 1
    assert trainer.optim_step(ADAM).result(60).metrics


def test_numbers_are_those_of_the_engine_in_process_also_over_a_bad_network(server: LiveServer, model: Path) -> None:
    losses, said = train(mint.ServiceClient(engine=server.engine), model)
    with chaos_proxy(server.url, rate=0.3, max_delay=0.05) as proxy:
        for url in (server.url, proxy.url):
            remote = RemoteEngine(address_of(url))
            over_http = train(mint.ServiceClient(engine=remote), model)
            assert over_http[0] == losses
            assert np.array_equal(over_http[1], said)
            remote.close()
        assert proxy.counts["drop answer"] > 0


def test_every_call_answers_what_it_answers_in_process(server: LiveServer, model: Path) -> None:
    answers = []
    for service in (mint.ServiceClient(engine=server.engine), mint.ServiceClient(base_url=server.url)):
        trainer = service.create_lora_training_client(str(model), rank=4, seed=0)
        data = make_data("cross_entropy", (6, 9), VOCAB)
        output = trainer.forward_backward(data).result()
        trainer.optim_step(ADAM).result()
        state = trainer.save_state("state", user_metadata={"k": "v"}).path
        named = trainer.save_weights_and_get_sampling_client("named")
        again = trainer.save_weights_and_get_sampling_client("named")
        scores = named.compute_logprobs([5, 6, 7, 8]).result()
        topk = named.sample([1, 2], 1, types.SamplingParams(max_tokens=2, seed=3), True, 3, 2).result()
        external = trainer.save_weights_external("out").path
        rest = service.create_rest_client()
        copy = service.copy_weights(state).result()
        restored = service.create_training_client_from_state_with_optimizer(state)
        kl = trainer.forward_backward_reverse_kl(
            [types.ReverseKLDatum(types.ModelInput.from_ints([1, 2, 3]), types.ModelInput.from_ints([9, 1, 2, 3]),
                                  types.TensorData([2, 3], "int64"), types.TensorData([1.0, 0.5], "float32"))],
            named.model_path,
        ).result()  # fmt: skip
        mixed = rest.interpolate_checkpoints([named.model_path, named.model_path], [0.9, 0.1], "ema").result()
        run = trainer.model_id
        listed = [c.checkpoint_id for c in rest.list_checkpoints(run).checkpoints]
        answers.append([
            output.loss, output.metrics, [o["logprobs"] for o in output.loss_fn_outputs], state.removeprefix(f"tinker://{run}"),
            sampled(named) == sampled(again), sampled(named), scores, topk.sequences[0].topk_logprobs,
            topk.topk_prompt_logprobs, topk.prompt_logprobs, sorted(listed), named.model_path.removeprefix(f"tinker://{run}"),
            sorted(rest.get_external_weights_urls(external).urls), copy.endswith("/weights/state"),
            restored.get_info().lora_rank, restored.forward(data).loss, kl.metrics, [o["loss"] for o in kl.outputs],
            mixed.path.endswith("/sampler_weights/ema"), rest.get_weights_info_by_tinker_path(state).result(),
            trainer.get_info().model_data, trainer.get_tokenizer().encode("3 * 7 ="),
            rest.get_training_run_by_tinker_path("named").training_run_id == run,
            rest.get_server_capabilities().result(), rest.get_session(service.session_id).training_run_ids[0] == run,
            rest.get_training_run(run).last_checkpoint.user_metadata,
        ])  # fmt: skip
        for path in (named.model_path, state, external, copy, mixed.path):
            rest.delete_checkpoint_from_tinker_path(path).result()
        del trainer, named, again, restored
        gc.collect()
    for local, remote in zip(*answers, strict=True):
        assert local == remote


def test_an_account_is_what_the_server_has_of_it(
    server: LiveServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mint_engine.server.ledger.DELAY_S", 0.01)
    _, key = server.engine.store.keys.create("laptop")
    server.state.auth.forget()
    service = mint.ServiceClient(base_url=server.url, api_key=key, project_id="p")
    trainer = service.create_lora_training_client(str(model), rank=4)
    trainer.save_state("a").result()
    admin, rest = mint.AdminClient(base_url=server.url, api_key=key), service.create_rest_client()
    eventually(lambda: bool(admin.get_audit_log().entries))
    (entry,) = admin.get_audit_log(day=datetime.now(UTC).date()).entries
    assert (entry.event, entry.model_id, entry.event_details["status"]) == (
        "checkpoint_saved",
        trainer.model_id,
        "done",
    )
    (item,) = admin.get_current_checkpoint_storage_usage().data
    assert (item.project_id, item.checkpoint_count, item.user_name) == ("p", 1, "laptop")
    assert item.size_bytes == rest.list_user_checkpoints().checkpoints[0].size_bytes
    assert admin.get_billing_usage("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z").data == []
    me = rest.whoami().result()
    assert (me.user_urn, me.email) == (item.org_user_urn, "laptop")
    trace = httpx.get(rest.export_session_trace(service.session_id).result(), trust_env=False).json()
    assert "SaveWeights" in {event["name"] for event in trace["traceEvents"]}
    record = httpx.get(trainer.get_console_url(), headers={"X-API-Key": key}, trust_env=False).json()
    assert record["training_run_id"] == trainer.model_id


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda s, t: t.forward_backward([]), mint.UserError),
        (lambda s, t: t.forward_backward([types.Datum(types.ModelInput.from_ints([1]), {})]), mint.UserError),
        (lambda s, t: t.forward_backward(make_data("cross_entropy", (4,), VOCAB), "no such loss"), mint.UserError),
        (lambda s, t: t.forward_backward(_overflowing(), "importance_sampling"), mint.NonFiniteError),
        (lambda s, t: t.load_state("tinker://nobody/weights/none"), mint.NotFoundError),
        (lambda s, t: t.save_state("a/b"), mint.UserError),
        (lambda s, t: s.create_rest_client().get_training_run("nobody"), mint.NotFoundError),
        (lambda s, t: s.create_rest_client().delete_checkpoint_from_tinker_path("none"), mint.NotFoundError),
        (lambda s, t: s.create_rest_client().delete_checkpoint_from_tinker_path("a/b/c/d"), mint.UserError),
        (lambda s, t: t.save_weights_and_get_sampling_client().sample([VOCAB]), mint.UserError),
        (lambda s, t: s.create_rest_client().list_sessions(limit=-1), mint.UserError),
    ],
)
def test_what_is_refused_is_refused_by_the_same_class(server: LiveServer, model: Path, call, error) -> None:
    for service in (mint.ServiceClient(engine=server.engine), mint.ServiceClient(base_url=server.url)):
        trainer = service.create_lora_training_client(str(model), rank=4)
        failure = call(service, trainer).exception()
        assert type(failure) is error, (service, failure)
        assert trainer.optim_step(ADAM).metrics is not None, "and the model goes on"


def _overflowing() -> list[types.Datum]:
    inputs = {"target_tokens": [2, 3], "logprobs": [-1e30, -1e30], "advantages": [1.0, 1.0]}
    return [types.Datum(types.ModelInput.from_ints([1, 2]), inputs)]


def test_a_restarted_server_goes_on_where_the_old_one_was(tmp_path: Path, model: Path) -> None:
    home, data = tmp_path / "home", make_data("cross_entropy", (6, 9), VOCAB)

    def open_engine() -> Engine:
        return Engine(dtype="float32", home=home, kv_cache_bytes=1 << 22)

    engine = open_engine()
    with chaos_proxy("http://127.0.0.1:9", rate=0) as proxy:
        remote = RemoteEngine(address_of(proxy.url), patience=Patience(known=60))
        with live_server(engine, models=[model], park_on_shutdown=True) as first:
            proxy._address = ("127.0.0.1", int(first.url.rpartition(":")[2]))
            service = mint.ServiceClient(engine=remote)
            trainer = service.create_lora_training_client(str(model), rank=4, seed=0)
            sampler = trainer.save_weights_and_get_sampling_client()
            before = sampled(sampler)
            trainer.forward_backward(data).result()
            calls = [trainer.optim_step(ADAM), trainer.forward_backward(data), trainer.optim_step(ADAM)]
        engine.close()
        calls += [trainer.forward_backward(data), trainer.optim_step(ADAM)]
        engine = open_engine()
        with live_server(engine, models=[model]) as second:
            proxy._address = ("127.0.0.1", int(second.url.rpartition(":")[2]))
            assert [call.metrics["step"] for call in calls[0::2]] == [1.0, 2.0, 3.0]
            assert sampled(sampler) == before
            said = trainer.forward(data).loss
            straight = mint.ServiceClient(engine=engine).create_lora_training_client(str(model), rank=4, seed=0)
            for _ in range(3):
                straight.forward_backward(data)
                straight.optim_step(ADAM)
            assert straight.forward(data).loss == said
            remote.close()
        engine.close()


# --- processes


def run_script(body: str, server: LiveServer) -> subprocess.Popen:
    paths = [path for path in sys.path if path]
    # A shell starts its background jobs with SIGINT ignored, and their children inherit that.
    listen = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"import sys\nsys.path[:0] = {paths!r}\n{listen}\n{body}"
    environment = {**os.environ, "MINT_BASE_URL": server.url}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(server: LiveServer, session_id: str) -> str | None:
    (found,) = server.engine.store.search_sessions({"session_id": session_id}).sessions
    return found.status.reason.type if found.status.reason is not None else None


def test_what_was_called_is_done_though_the_program_ends_without_reading_it(server: LiveServer, model: Path) -> None:
    script = run_script(
        f"""
import mint
from mint import types
service = mint.ServiceClient()
client = service.create_lora_training_client({str(model)!r}, rank=4)
datum = types.Datum(types.ModelInput.from_ints([1, 2]), {{"target_tokens": [2, 3], "weights": [1, 1]}})
for _ in range(20):
    client.forward_backward([datum])
    client.optim_step(types.AdamParams())
client.save_state("final")
print(service.session_id, "torch" in sys.modules)
""",
        server,
    )
    output, errors = script.communicate(timeout=120)
    assert (script.returncode, errors) == (0, "")
    session_id, imported_torch = output.split()
    assert imported_torch == "False", "a client of a server starts without torch"
    deadline = time.monotonic() + 30
    while not (saved := server.engine.store.list_user_checkpoints().checkpoints):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert saved[0].checkpoint_id == "weights/final"
    assert finished(server, session_id) == "success"


def test_ctrl_c_ends_a_program_that_waits_and_its_session(server: LiveServer, model: Path) -> None:
    script = run_script(
        f"""
import mint, threading
from mint import types
datum = types.Datum(types.ModelInput.from_ints([1, 2]), {{"target_tokens": [2, 3], "weights": [1, 1]}})
service = mint.ServiceClient()
client = service.create_lora_training_client({str(model)!r}, rank=4)
waiting = client.forward_backward_custom([datum], lambda *_: threading.Event().wait())
print(service.session_id, flush=True)
waiting.result()
""",
        server,
    )
    with script:
        try:
            assert script.stdout is not None
            session_id = script.stdout.readline().strip()
            script.send_signal(signal.SIGINT)
            _, errors = script.communicate(timeout=30)
        finally:
            script.kill()
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert finished(server, session_id) == "interrupted"


def test_a_forked_child_makes_its_own_client_and_an_inherited_one_says_so(server: LiveServer, model: Path) -> None:
    script = run_script(
        f"""
import os, gc, mint, warnings
from mint import types
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # Python 3.12, of any fork
mine = mint.ServiceClient().create_lora_training_client({str(model)!r}, rank=4)
mine.optim_step(types.AdamParams()).result()
if os.fork() == 0:
    error = mine.optim_step(types.AdamParams()).exception(timeout=30)
    print("inherited:", type(error).__name__, "before a fork" in str(error), flush=True)
    own = mint.ServiceClient().create_lora_training_client({str(model)!r}, rank=4)
    print("own:", own.optim_step(types.AdamParams()).metrics["step"], flush=True)
    sys.exit(0)
_, status = os.wait()
print("parent:", status, mine.optim_step(types.AdamParams()).metrics["step"])
""",
        server,
    )
    output, errors = script.communicate(timeout=120)
    assert output.splitlines() == ["inherited: EngineClosedError True", "own: 1.0", "parent: 0 2.0"], errors
    assert errors == ""


def test_a_sampling_client_is_used_by_other_processes(server: LiveServer, model: Path) -> None:
    service = mint.ServiceClient(base_url=server.url)
    sampler = service.create_lora_training_client(str(model), rank=4, seed=0).save_weights_and_get_sampling_client()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        theirs = list(pool.map(sampled, [sampler] * 4))
    for sequences in theirs:
        for (tokens, logprobs), (expected, scores) in zip(sequences, sampled(sampler), strict=True):
            assert tokens == expected
            assert logprobs == pytest.approx(scores, abs=1e-4)  # other requests beside it change roundings


def test_an_address_where_nobody_listens_is_given_up_soon() -> None:
    with pytest.raises(mint.TransportError, match=r"Is a server running at http://127\.0\.0\.1:9\?"):
        mint.ServiceClient(base_url="127.0.0.1:9", max_retries=1)
