"""The clients: the forms of the documentation and of both SDKs, errors where they are expected, order kept.

Each test runs twice: with an engine in the process, and with the same engine behind HTTP.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from fake_engine import FakeEngine
from fake_server import FakeServer
from tiny_tokenizer import save_byte_tokenizer

import mint
from mint import types
from mint_engine.client.protocol import ClientEngine
from mint_engine.client.remote import Address, RemoteEngine


@pytest.fixture
def engine(tmp_path) -> FakeEngine:
    return FakeEngine(tmp_path / "home")


@pytest.fixture(params=["local", "http"])
def transport(request) -> str:
    return request.param


@pytest.fixture
def reached(engine, transport) -> Iterator[ClientEngine]:
    """`engine` as the clients see it."""
    if transport == "local":
        yield engine
        return
    remote = RemoteEngine(Address("http://server"), wire=FakeServer(engine))
    yield remote
    engine.gate.set()
    remote.close()


@pytest.fixture
def service(reached) -> mint.ServiceClient:
    return mint.ServiceClient(engine=reached)


@pytest.fixture
def trainer(service) -> mint.TrainingClient:
    return service.create_lora_training_client(base_model="tiny", rank=4)


DATUM = types.Datum(
    model_input=types.ModelInput.from_ints(tokens=[1, 2]), loss_fn_inputs={"target_tokens": [2, 3], "weights": [1, 1]}
)
PROMPT = types.ModelInput.from_ints([1, 2, 3])


def operations(engine: FakeEngine) -> list[str]:
    return [operation for operation, _ in engine.log]


def last(engine: FakeEngine) -> dict:
    return engine.log[-1][1]


# --- where the engine is


def test_the_environment_is_read_when_a_client_is_made_and_not_at_import(monkeypatch, engine):
    asked = []
    monkeypatch.setattr("mint_engine.engine.get_engine", lambda dtype, device: asked.append(dtype) or engine)
    monkeypatch.setenv("MINT_BASE_URL", "")  # empty is unset
    monkeypatch.setenv("MINT_BASE_MODEL", "from-env")
    monkeypatch.setenv("MINT_LORA_RANK", "8")
    monkeypatch.setenv("MINT_API_KEY", "sk-x")
    client = mint.ServiceClient(dtype="float32").create_lora_training_client()
    assert asked == ["float32"]
    assert (last(engine)["base_model"], last(engine)["lora"].rank) == ("from-env", 8)
    assert client.get_info().model_name == "from-env"
    monkeypatch.setenv("MINT_LORA_RANK", "many")
    with pytest.raises(ValueError, match="MINT_LORA_RANK: expected an integer, got 'many'"):
        mint.ServiceClient().create_lora_training_client()


def test_defaults_are_those_of_the_documentation(service, engine):
    client = service.create_lora_training_client()
    assert client.get_info().lora_rank == 16
    assert last(engine) == {
        "base_model": "Qwen/Qwen3-0.6B",
        "lora": types.LoraConfig(rank=16, seed=None, train_mlp=True, train_attn=True, train_unembed=True),
    }


def test_options_of_the_http_client_are_accepted_and_unknown_ones_are_not(reached, monkeypatch):
    monkeypatch.setattr("mint_engine.engine.get_engine", lambda dtype, device: reached)
    mint.ServiceClient(timeout=mint.Timeout(3, connect=None), max_retries=2, default_headers={}, api_key="sk-x")
    mint.ServiceClient(timeout=None)
    with pytest.raises(TypeError, match="tiemout"):
        mint.ServiceClient(tiemout=3)
    for wrong in ({"timeout": 0}, {"max_retries": -1}, {"default_query": {"a": 1}}, {"http_client": object()}):
        with pytest.raises(mint.UserError, match=next(iter(wrong))):  # also where no request is made
            mint.ServiceClient(**wrong)


@pytest.mark.parametrize(
    "beside", [{"base_url": "http://x"}, {"api_key": "sk-x"}, {"dtype": "float32"}, {"device": "cpu"}, {"timeout": 3}]
)
def test_nothing_said_beside_an_engine_is_ignored(reached, beside):
    with pytest.raises(mint.UserError, match="got both: engine and"):
        mint.ServiceClient(engine=reached, **beside)
    if beside.keys() <= {"base_url", "api_key"}:
        with pytest.raises(mint.UserError, match="got both: engine and"):
            mint.RestClient(engine=reached, **beside)


def test_the_session_is_stored_with_what_is_said_about_it(engine, reached):
    service = mint.ServiceClient({"who": "me"}, "project", display_name="first", engine=reached)
    session = engine.store.get_session(service.session_id)
    assert (session.user_metadata, session.display_name) == ({"who": "me"}, "first")
    with pytest.raises(ValueError, match="user_metadata: expected a dict of strings"):
        mint.ServiceClient({"n": 1}, engine=reached)


# --- creating training clients


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank: .*got 0"),
        ({"rank": 257}, "rank: .*got 257"),
        ({"rank": "many"}, "rank: .*got 'many'"),
        ({"train_mlp": False, "train_attn": False, "train_unembed": False}, "nothing to train"),
        ({"base_model": ""}, "base_model: expected the name of a model"),
        ({"base_model": 3}, "base_model: expected the name of a model"),
        ({"base_model": "unknown"}, "base_model: unknown"),
        ({"optimizer": "sgd"}, "optimizer: expected AdamOptimizerConfig"),
        ({"user_metadata": {"a": 1}}, "user_metadata"),
    ],
)
def test_a_training_client_that_cannot_be_made_raises_at_once(service, arguments, message):
    with pytest.raises(ValueError, match=message):
        service.create_lora_training_client(**({"base_model": "tiny"} | arguments))
    with pytest.raises(ValueError, match=message):
        asyncio.run(service.create_lora_training_client_async(**({"base_model": "tiny"} | arguments)))


def test_a_created_client_is_also_a_future_of_itself(service, trainer):
    async def main() -> list[object]:
        made = await service.create_lora_training_client_async(base_model="tiny")
        return [await trainer, await trainer.result_async(), (await made) is made]

    assert asyncio.run(main()) == [trainer, trainer, True]
    assert trainer.result() is trainer
    sampler = trainer.save_weights_and_get_sampling_client()
    assert sampler.result(timeout=1) is sampler


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_a_client_from_a_state_takes_the_arguments_of_both_sdks(service, engine, with_optimizer):
    create = (
        service.create_training_client_from_state_with_optimizer
        if with_optimizer
        else service.create_training_client_from_state
    )
    old = create("tinker://r/weights/a", {"k": "v"})  # 0.22
    assert old.model_id
    assert last(engine) == {
        "path": "tinker://r/weights/a", "optimizer": with_optimizer, "base_model": None, "user_metadata": {"k": "v"},
    }  # fmt: skip
    assert create("tinker://r/weights/a", {"k": "v"}, "token").model_id
    assert create("tinker://r/weights/a", None, "token").model_id
    for wrong in (({"k": "v"}, {"k": "v"}), (None, "a", "b")):
        with pytest.raises(ValueError, match=r"base_model|user_metadata"):
            create("tinker://r/weights/a", *wrong)
    client = create("mint://r/weights/a", "tiny", {"k": "v"}, weights_access_token="t")  # 0.38
    assert (last(engine)["base_model"], last(engine)["user_metadata"]) == ("tiny", {"k": "v"})
    assert client.get_info().model_name == "tiny"


# --- training


def test_the_program_of_the_documentation_runs_in_its_own_form(service, engine):
    trainer = service.create_lora_training_client(
        base_model="tiny", rank=16, train_mlp=True, train_attn=True, train_unembed=True
    )
    adam = types.AdamParams(learning_rate=5e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    result = trainer.forward_backward([DATUM], loss_fn="cross_entropy").result()
    trainer.optim_step(adam).result()
    assert f"{result.loss:.4f}" == "2.0000"
    assert result.loss_fn_outputs[0]["logprobs"].tolist() == [-1.0, -3.0]
    checkpoint = trainer.save_weights_and_get_sampling_client(name="my-sft-v1")
    samples = checkpoint.sample(
        prompt=PROMPT, sampling_params=types.SamplingParams(max_tokens=16, temperature=0.7), num_samples=4
    )
    assert [sequence.tokens for sequence in samples.sequences] == [[0], [1], [2], [3]]
    assert checkpoint.model_path == f"tinker://{trainer.model_id}/sampler_weights/my-sft-v1"
    assert [name for name in operations(engine) if name != "create_sampler"] == [
        "create_model", "forward_backward", "optim_step", "save_weights_for_sampler", "sample",
    ]  # fmt: skip


def test_the_tokenizer_is_the_base_model_s(trainer, engine, tmp_path, transport):
    sampler = trainer.save_weights_and_get_sampling_client()
    if transport == "local":
        assert trainer.get_tokenizer() == sampler.get_tokenizer() == "tokenizer of tiny"
        return
    save_byte_tokenizer(tmp_path)
    engine.tokenizer_files["tiny"] = {file.name: file.read_bytes() for file in tmp_path.glob("*.json")}
    tokenizer = trainer.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("3 * 7 =")) == "3 * 7 ="
    assert sampler.get_tokenizer() is tokenizer


def test_calls_return_at_once_and_run_in_order(trainer, engine, transport):
    engine.gate.clear()
    calls = [
        trainer.forward([DATUM]),
        trainer.forward_backward([DATUM], "ppo", {"clip_low_threshold": 0.9}),
        trainer.forward_backward_custom([DATUM], lambda data, logprobs: (logprobs[0].sum(), {})),
        trainer.optim_step(adam_params=types.AdamParams()),
        trainer.save_state("a", ttl_seconds=60, overwrite=True, user_metadata={"k": "v"}),
        trainer.load_state("tinker://r/weights/a"),
        trainer.load_state_with_optimizer("tinker://r/weights/a"),
        trainer.save_weights_for_sampler("b"),
    ]
    assert not any(call.done() for call in calls)
    engine.gate.set()
    paths = [call.path for call in calls[4:]]
    assert paths[0] == f"tinker://{trainer.model_id}/weights/a"
    assert paths[3] == f"tinker://{trainer.model_id}/sampler_weights/b"
    custom = ["forward_backward_custom"] if transport == "local" else ["forward", "forward_backward"]
    assert operations(engine)[1:] == [
        "forward", "forward_backward", *custom, "optim_step", "save_weights", "load_weights", "load_weights",
        "save_weights_for_sampler",
    ]  # fmt: skip
    assert engine.log[2][1] == {"loss_fn": "ppo", "config": {"clip_low_threshold": 0.9}}
    assert engine.log[-4][1] == {"ttl_seconds": 60, "overwrite": True, "user_metadata": {"k": "v"}}
    assert [engine.log[i][1]["optimizer"] for i in (-3, -2)] == [False, True]


def test_async_calls_give_futures_that_are_awaited_again_or_read(trainer):
    async def main() -> list[object]:
        backward = await trainer.forward_backward_async([DATUM], "cross_entropy")
        step = await trainer.optim_step_async(types.AdamParams())
        saved = await (await trainer.save_state_async("a"))
        return [(await backward).loss, backward.loss, (await step).metrics, saved.path, await trainer.get_info_async()]

    loss, same, metrics, path, info = asyncio.run(main())
    assert (loss, same, metrics) == (2.0, 2.0, {"grad_norm": 1.0})
    assert path.endswith("/weights/a")
    assert info.lora_rank == 4


def test_an_error_reaches_the_call_it_belongs_to_and_no_other(trainer):
    good, bad, after = trainer.forward([DATUM]), trainer.forward([]), trainer.forward_backward([DATUM, DATUM])
    assert good.result().loss == 2.0
    with pytest.raises(ValueError, match="at least one datum"):
        bad.result()
    assert len(after.loss_fn_outputs) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.forward_backward(DATUM), "data: expected a list of Datum, got Datum"),
        (lambda t: t.forward_backward([DATUM, {"x": 1}]), r"data: expected a list of Datum, got dict \(datum 1\)"),
        (lambda t: t.forward_backward_custom([DATUM], "ce"), "loss_fn: expected a function, got str"),
        (lambda t: t.forward_backward_custom([DATUM], print, loss_type_input="logits"), "loss_type_input"),
        (lambda t: t.optim_step(), "adam_params: expected AdamParams, got NoneType"),
        (lambda t: t.optim_step({"learning_rate": 1}), "adam_params: expected AdamParams, got dict"),
        (lambda t: t.optim_step(types.AdamParams(), adam_params=types.AdamParams()), "got both"),
    ],
)
def test_a_bad_call_fails_in_its_future_and_never_reaches_the_engine(trainer, engine, call, message):
    before = len(engine.log)
    future = call(trainer)
    with pytest.raises(ValueError, match=message):
        future.result()
    assert len(engine.log) == before


def test_a_batch_that_changes_after_the_call_does_not_change_the_call(trainer, engine):
    engine.gate.clear()
    batch = [DATUM]
    future = trainer.forward_backward(batch)
    batch.clear()
    engine.gate.set()
    assert len(future.loss_fn_outputs) == 1


def test_zero_grad_is_a_no_op_with_a_warning(trainer, engine):
    before = len(engine.log)
    with pytest.warns(UserWarning, match="optim_step"):
        future = trainer.zero_grad_async()
    assert asyncio.run(future.coroutine()) is None
    assert len(engine.log) == before


# --- sampling


def test_sampling_arguments_reach_the_engine_and_prompts_may_be_plain_ids(trainer, engine):
    sampler = trainer.save_weights_and_get_sampling_client()
    targets = np.array([[1], [2]])
    sampler.sample(
        [1, 2, 3], 2, types.SamplingParams(max_tokens=1), True, 3, 4, targets, prompt_alt_tokens_k=5,
        prompt_logprobs_last_n=2,
    ).result()  # fmt: skip
    assert last(engine) == {
        "prompt": PROMPT, "num_samples": 2, "params": types.SamplingParams(max_tokens=1),
        "include_prompt_logprobs": True, "topk_prompt_logprobs": 3, "topk_sample_logprobs": 4,
        "target_prompt_logprobs": types.TensorData(targets, "int64"), "prompt_alt_tokens_k": 5,
        "prompt_logprobs_last_n": 2,
    }  # fmt: skip
    assert len(asyncio.run(sampler.sample_async(PROMPT)).sequences) == 1
    assert sampler.get_base_model() == asyncio.run(sampler.get_base_model_async()) == "tiny"


def test_compute_logprobs_gives_a_list_that_starts_with_none(trainer):
    sampler = trainer.save_weights_and_get_sampling_client()
    assert sampler.compute_logprobs(PROMPT).result() == [None, -1.0, -1.0]
    assert asyncio.run(sampler.compute_logprobs_async([1, 2])) == [None, -1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "text"}, "prompt: expected a list of token ids, got str; encode it"),
        ({"prompt": [1.5]}, "prompt: expected a flat list of integer token ids"),
        (
            {"prompt": PROMPT, "sampling_params": {"max_tokens": 1}},
            "sampling_params: expected SamplingParams, got dict",
        ),
        ({"prompt": PROMPT, "target_prompt_logprobs": [0.5]}, "target_prompt_logprobs: expected integers"),
    ],
)
def test_a_bad_prompt_fails_in_its_future(trainer, arguments, message):
    sampler = trainer.save_weights_and_get_sampling_client()
    with pytest.raises(ValueError, match=message):
        sampler.sample(**arguments).result()


def test_samplers_come_from_checkpoints_base_models_and_live_weights(service, trainer, engine):
    assert trainer.create_sampling_client("tinker://r/weights/a").model_path == "tinker://r/weights/a"
    assert service.create_sampling_client(model_path="tinker://r/weights/a").model_path == "tinker://r/weights/a"
    assert service.create_sampling_client(base_model="tiny").get_base_model() == "tiny"

    async def main() -> list[mint.SamplingClient]:
        return [
            await service.create_sampling_client_async(base_model="tiny"),
            await trainer.create_sampling_client_async("tinker://r/weights/a"),
            await trainer.save_weights_and_get_sampling_client_async("b"),
        ]

    assert [client.model_path for client in asyncio.run(main())] == [
        None, "tinker://r/weights/a", f"tinker://{trainer.model_id}/sampler_weights/b",
    ]  # fmt: skip
    assert len(engine.store.get_session(service.session_id).sampler_ids) == 6


def test_samplers_of_kinds_that_do_not_exist_here_are_refused(service, trainer):
    with pytest.raises(ValueError, match="expected model_path or base_model"):
        service.create_sampling_client()
    with pytest.raises(ValueError, match="kind: expected 'snapshot', got 'inflight'"):
        trainer.save_weights_and_get_sampling_client(kind="inflight")
    with pytest.raises(ValueError, match="record_stability_info"):
        service.create_sampling_client(base_model="tiny", record_stability_info=True)


# --- closing, and the store


def test_closing_lets_the_models_go_and_refuses_new_clients(engine, reached):
    with mint.ServiceClient(engine=reached) as service:
        models = [service.create_lora_training_client("tiny").model_id for _ in range(2)]
    assert [a["model_id"] for operation, a in engine.log if operation == "unload_model"] == models
    for create in (service.create_lora_training_client, lambda: service.create_sampling_client(base_model="tiny")):
        with pytest.raises(mint.EngineClosedError, match=service.session_id):
            create()
    assert service.close("success", detail="again").result() is None
    assert operations(engine).count("unload_model") == 2
    (found,) = engine.store.search_sessions({"session_id": service.session_id}).sessions
    assert (found.status.type, found.status.reason.type) == ("client_finished", "success")
    with pytest.raises(ValueError, match="status"):
        service.close("fine")


def test_the_rest_client_answers_from_the_store(service, trainer, engine):
    run, meta = trainer.model_id, {"base_model": "tiny", "lora": types.LoraConfig(rank=4)}
    path = engine.store.write_checkpoint(run, "weights", "a", lambda d: (d / "x").write_text("x"), **meta)
    rest = service.create_rest_client()
    assert rest.get_training_run(run).base_model == "tiny"
    assert rest.get_training_run_by_tinker_path(path).result().training_run_id == run
    assert [r.training_run_id for r in rest.list_training_runs().training_runs] == [run]
    assert [c.tinker_path for c in rest.list_checkpoints(run).checkpoints] == [path]
    assert rest.list_user_checkpoints().cursor.total_count == 1
    assert rest.get_weights_info_by_tinker_path(path).lora_rank == 4
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    (checkpoint,) = rest.list_checkpoints(run).result().checkpoints
    assert checkpoint.public
    assert checkpoint.expires_at is not None
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert rest.list_sessions().sessions == [service.session_id]
    assert rest.get_session(service.session_id).training_run_ids == [run]
    rest.assign_session_project(service.session_id, "p").result()
    assert rest.list_training_runs(project_id="p").cursor.total_count == 1
    sampler = trainer.save_weights_and_get_sampling_client()
    assert rest.get_sampler(sampler.sampler_id).base_model == "tiny"
    rest.delete_checkpoint(run, "weights/a").result()
    with pytest.raises(mint.NotFoundError, match="no checkpoint"):
        rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(ValueError, match="access_scope"):
        rest.list_sessions(access_scope="all")


def test_rest_calls_do_not_block_an_event_loop(service, trainer, engine, monkeypatch):
    entered, release = threading.Event(), threading.Event()

    def slow(*args: object) -> types.ListSessionsResponse:
        entered.set()
        release.wait()
        return types.ListSessionsResponse(sessions=["mine"])

    monkeypatch.setattr(engine.store, "list_sessions", slow)
    rest = service.create_rest_client()

    async def main() -> types.ListSessionsResponse:
        call = asyncio.create_task(rest.list_sessions_async())
        while not entered.is_set():
            await asyncio.sleep(0)
        release.set()  # never reached if the call held the loop
        return await call

    assert asyncio.run(main()).sessions == ["mine"]


def test_weights_are_copied_saved_for_download_and_mixed(service, trainer, engine):
    meta = {"base_model": "tiny", "lora": types.LoraConfig(rank=4)}
    path = engine.store.write_checkpoint(trainer.model_id, "weights", "a", lambda d: (d / "x").write_text("x"), **meta)
    rest = service.create_rest_client()
    inside, outside = service.copy_weights(path, ttl_seconds=3600).result(), rest.copy_weights(path, "project").result()
    assert inside.startswith(f"tinker://{service.session_id}:train:")
    assert inside != path
    assert not outside.startswith(f"tinker://{service.session_id}")
    (copy,) = rest.list_checkpoints(inside.split("/")[2]).checkpoints
    assert copy.expires_at is not None
    assert rest.list_training_runs(project_id="project").cursor.total_count == 1
    assert trainer.save_weights_external("out", 3600, ["age1x"]).path.endswith("/external_weights/out")
    assert last(engine) == {"ttl_seconds": 3600, "recipients": ["age1x"]}
    external = engine.store.write_checkpoint(
        trainer.model_id, "external_weights", "b", lambda d: (d / "adapter.age").write_text("x"), **meta
    )
    urls = rest.get_external_weights_urls(external).urls
    assert [url.endswith("/adapter.age") for url in urls.values()] == [True]
    mixed = mint.mint.interpolate_checkpoints(
        service, source_paths=[path, path], coefficients=[0.9, 0.1], output_path="ema"
    )
    assert (mixed.path, mixed.coefficients) == ("tinker://sum/sampler_weights/ema", [0.9, 0.1])


def test_sessions_are_searched_by_name(service, reached):
    named = mint.ServiceClient({"who": "me"}, display_name="arithmetic run", engine=reached)
    rest = service.create_rest_client()
    found = rest.search_sessions(types.SessionSearchRequest(display_name="RUN")).sessions
    assert [session.session_id for session in found] == [named.session_id]
    assert len(rest.search_sessions().sessions) == 2


def test_the_reverse_kl_divergence_is_asked_for_in_both_forms(trainer, engine):
    ints = types.ModelInput.from_ints
    datum = mint.ReverseKLDatum(ints([1, 2]), ints([9, 1, 2]), [2], [1.0])
    assert trainer.forward_backward_reverse_kl([datum], "tinker://r/sampler_weights/a", 1.5).loss == 0.5
    assert last(engine) == {"data": [datum], "reference": "tinker://r/sampler_weights/a", "temperature": 1.5}
    output = mint.mint.forward_backward_reverse_kl(trainer, reference_model_path="tinker://r/weights/a", data=[datum])
    assert output.outputs[0]["loss"].tolist() == output.outputs[0].loss.tolist() == [0.5]
    assert isinstance(output, mint.mint.ForwardBackwardReverseKLResponse)
    with pytest.raises(ValueError, match="data: expected a list of ReverseKLDatum"):
        trainer.forward_backward_reverse_kl([DATUM], "a").result()
