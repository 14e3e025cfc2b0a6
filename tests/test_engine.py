"""Several clients in one engine: order, isolation, immutability of samplers, and nothing lost on a mistake."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from engine_helpers import ADAM, VOCAB, logprobs, new_model, sampled, train
from helpers import make_data, peft_logprobs
from tiny_models import build_tiny

from mint_engine.bases import Base
from mint_engine.engine import Engine
from mint_engine.errors import CheckpointError, NonFiniteError, NotFoundError, UserError
from mint_engine.off_thread import THREADS
from mint_engine.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = Engine(dtype="float32", home=tmp_path / "home", kv_cache_bytes=1 << 22)
    yield made
    made.close()


@pytest.fixture
def session(engine: Engine) -> str:
    return engine.create_session()


def test_work_of_one_model_runs_in_the_order_of_the_calls(engine: Engine, session: str, tiny_tied: Path) -> None:
    """Submitting everything before reading anything gives bit for bit what waiting for each call gives."""
    waited, piped = (new_model(engine, session, tiny_tied) for _ in range(2))
    expected = train(engine, waited, 4)
    data = make_data("cross_entropy", (6, 9), VOCAB)
    futures = []
    for _ in range(4):
        futures.append(engine.forward_backward(piped, data, "cross_entropy"))
        engine.optim_step(piped, ADAM)
    assert [f.result().metrics["loss:sum"] for f in futures] == expected


def test_a_model_can_be_used_before_its_creation_has_finished(engine: Engine, session: str, tiny_tied: Path) -> None:
    created = engine.create_model(session, str(tiny_tied), LoraConfig(rank=4, seed=0))
    out = engine.forward(f"{session}:train:0", make_data("cross_entropy", (4,), VOCAB), "cross_entropy")
    assert out.result().metrics["loss:sum"] != 0
    assert created.result() == f"{session}:train:0"


def test_clients_share_one_base_and_never_touch_each_other(engine: Engine, session: str, tiny_tied: Path) -> None:
    """One client's training, weight decay and mistakes leave the other's log-probabilities bit-equal."""
    a = new_model(engine, session, tiny_tied, rank=4)
    b = new_model(engine, session, tiny_tied, rank=7, train_mlp=False)
    train(engine, b, 2)
    before = logprobs(engine, b)
    train(engine, a, 3)
    engine.optim_step(a, AdamParams(learning_rate=1e-2, weight_decay=0.5)).result()
    with pytest.raises(UserError):
        engine.forward_backward(a, [], "cross_entropy").result()
    assert np.array_equal(logprobs(engine, b), before)
    assert len(engine._bases.loaded) == 1


def test_interleaved_clients_train_as_if_alone(engine: Engine, session: str, tiny_tied: Path) -> None:
    alone = [train(engine, new_model(engine, session, tiny_tied, seed=s), 3, seed=s) for s in (1, 2)]
    models = [new_model(engine, session, tiny_tied, seed=s) for s in (1, 2)]
    together: list[list[float]] = [[], []]
    for _ in range(3):
        for i, m in enumerate(models):
            together[i] += train(engine, m, 1, seed=i + 1)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_a_sampler_is_an_immutable_version(engine: Engine, session: str, tiny_tied: Path) -> None:
    model = new_model(engine, session, tiny_tied)
    train(engine, model, 2)
    first = engine.save_weights_for_sampler(model, "v1", sampler=True).result()
    assert first.path == f"tinker://{model}/sampler_weights/v1"
    assert first.sampling_session_id is not None
    said = sampled(engine, first.sampling_session_id)
    live = logprobs(engine, model)
    train(engine, model, 3)
    trained = logprobs(engine, model)
    assert not np.array_equal(trained, live)
    assert sampled(engine, first.sampling_session_id) == said
    again = engine.create_sampler(session, model_path=first.path).result()
    assert sampled(engine, again) == said
    assert np.array_equal(logprobs(engine, model), trained), "sampling an old version left the live weights alone"
    second = engine.save_weights_for_sampler(model, None).result()
    assert second.path is None
    assert second.sampling_session_id is not None
    assert sampled(engine, second.sampling_session_id) != said


def test_sampling_goes_on_between_training_steps(engine: Engine, session: str, tiny_tied: Path) -> None:
    model = new_model(engine, session, tiny_tied)
    sampler = engine.create_sampler(session, base_model=str(tiny_tied)).result()
    expected = sampled(engine, sampler)
    data = make_data("cross_entropy", (6, 9), VOCAB)
    work = [engine.forward_backward(model, data, "cross_entropy") for _ in range(5)]
    params = SamplingParams(max_tokens=8, seed=1)
    samples = [engine.sample(sampler, ModelInput.from_ints([1, 2, 3]), 2, params) for _ in range(5)]
    work += [engine.optim_step(model, ADAM)]
    for future in samples:
        got = future.result().sequences
        assert [s.tokens for s in got] == [tokens for tokens, _ in expected]
        for s, (_, lps) in zip(got, expected, strict=True):
            np.testing.assert_allclose(s.logprobs, lps, atol=1e-5)
    for f in work:
        f.result()


def test_load_state_restores_weights_and_with_optimizer_moments_too(
    engine: Engine, session: str, tiny_tied: Path
) -> None:
    model = new_model(engine, session, tiny_tied)
    train(engine, model, 3)
    path = engine.save_weights(model, "a").result().path
    saved = logprobs(engine, model)
    after = train(engine, model, 2)
    engine.load_weights(model, path, optimizer=True).result()
    assert np.array_equal(logprobs(engine, model), saved)
    assert train(engine, model, 2) == after
    engine.load_weights(model, path.replace("tinker://", "mint://"), optimizer=False).result()
    assert np.array_equal(logprobs(engine, model), saved)
    assert train(engine, model, 2) != after, "without the moments the steps differ"


def test_weights_without_an_optimizers_state_are_refused_by_their_path(
    engine: Engine, session: str, tiny_tied: Path
) -> None:
    model = new_model(engine, session, tiny_tied)
    path = engine.save_weights_for_sampler(model, "a").result().path
    refused = rf"^{re.escape(path)}: holds weights only, not the optimizer's state$"
    with pytest.raises(CheckpointError, match=refused):
        engine.load_weights(model, path, optimizer=True).result()
    with pytest.raises(CheckpointError, match=refused):
        engine.create_model_from_state(session, path, optimizer=True).result()


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_difference(
    engine: Engine, session: str, tiny_tied: Path
) -> None:
    model = new_model(engine, session, tiny_tied, rank=4)
    path = engine.save_weights(model, "a").result().path
    other = new_model(engine, session, tiny_tied, rank=8, train_mlp=False)
    before = logprobs(engine, other)
    with pytest.raises(CheckpointError, match=r"rank 4, this model has 8; modules .*down_proj.*this model trains"):
        engine.load_weights(other, path, optimizer=True).result()
    assert np.array_equal(logprobs(engine, other), before)
    damaged = engine.store.resolve(path).directory / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        engine.load_weights(model, path, optimizer=False).result()
    with pytest.raises(NotFoundError):
        engine.load_weights(model, f"tinker://{model}/weights/missing", optimizer=False).result()


def test_a_full_disk_while_saving_loses_nothing(
    engine: Engine, session: str, tiny_tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(engine, session, tiny_tied)
    path = engine.save_weights(model, "a").result().path
    kept = (engine.store.resolve(path).directory / "adapter_model.safetensors").read_bytes()
    train(engine, model)
    before = logprobs(engine, model)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mint_engine.state.write_training_state", full)
    with pytest.raises(OSError, match="No space left on device"):
        engine.save_weights(model, "a", overwrite=True).result()
    monkeypatch.undo()
    directory = engine.store.resolve(path).directory
    assert (directory / "adapter_model.safetensors").read_bytes() == kept
    assert [p for p in directory.parent.iterdir() if p.is_dir()] == [directory], "nothing half-written stays"
    assert np.array_equal(logprobs(engine, model), before)
    engine.save_weights(model, "a", overwrite=True).result()


def test_non_finite_gradients_are_refused_by_the_step(engine: Engine, session: str, tiny_tied: Path) -> None:
    model = new_model(engine, session, tiny_tied)
    train(engine, model)
    before = logprobs(engine, model)
    engine._models[model].state.grads[5] = float("nan")
    with pytest.raises(NonFiniteError, match="its norm is nan"):
        engine.optim_step(model, ADAM).result()
    assert np.array_equal(logprobs(engine, model), before)
    train(engine, model)


def test_a_step_that_would_overflow_is_refused(engine: Engine, session: str, tiny_tied: Path) -> None:
    model = new_model(engine, session, tiny_tied)
    before = logprobs(engine, model)
    for adam in (AdamParams(learning_rate=1e38), AdamParams(learning_rate=1.0, weight_decay=1e37)):
        with pytest.raises(NonFiniteError, match="beyond fp32"):
            engine.optim_step(model, adam).result()
    assert np.array_equal(logprobs(engine, model), before)


def test_gradients_are_clipped_by_their_global_norm(engine: Engine, session: str, tiny_tied: Path) -> None:
    """Clipping to c is the same step as scaling the weights of the batch by c / norm."""
    a, b = (new_model(engine, session, tiny_tied) for _ in range(2))
    data = make_data("cross_entropy", (6, 9), VOCAB)
    engine.forward_backward(a, data, "cross_entropy").result()
    norm = (
        engine.optim_step(a, AdamParams(learning_rate=1e-2, eps=1.0, grad_clip_norm=0.5)).result().metrics["grad_norm"]
    )
    assert norm > 0.5
    scaled = [
        Datum(
            d.model_input,
            {**d.loss_fn_inputs, "weights": d.loss_fn_inputs["weights"].to_numpy() * np.float32(0.5 / norm)},
        )
        for d in data
    ]
    engine.forward_backward(b, scaled, "cross_entropy").result()
    engine.optim_step(b, AdamParams(learning_rate=1e-2, eps=1.0)).result()
    np.testing.assert_allclose(logprobs(engine, a), logprobs(engine, b), atol=1e-5)


def test_a_custom_loss_has_the_gradient_of_its_built_in_twin(engine: Engine, session: str, tiny_tied: Path) -> None:
    a, b = (new_model(engine, session, tiny_tied) for _ in range(2))
    data = make_data("importance_sampling", (5, 7), VOCAB)

    def loss(data: list[Datum], lps: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total = torch.zeros(())
        for d, lp in zip(data, lps, strict=True):
            x = {k: v.to_torch() for k, v in d.loss_fn_inputs.items()}
            total = total - (torch.exp(lp - x["logprobs"]) * x["advantages"]).sum()
        return total, {"mine:sum": 3.0}

    custom = engine.forward_backward_custom(a, data, loss).result()
    built_in = engine.forward_backward(b, data, "importance_sampling").result()
    assert custom.loss == pytest.approx(built_in.loss, rel=1e-5)
    assert custom.metrics["mine:sum"] == 3.0
    engine.optim_step(a, ADAM).result()
    engine.optim_step(b, ADAM).result()
    np.testing.assert_allclose(logprobs(engine, a), logprobs(engine, b), atol=1e-4)


def test_while_a_custom_loss_runs_its_model_waits_and_others_work(
    engine: Engine, session: str, tiny_tied: Path
) -> None:
    a, b = (new_model(engine, session, tiny_tied) for _ in range(2))
    data = make_data("cross_entropy", (5,), VOCAB)
    go = threading.Event()

    def loss(data: list[Datum], lps: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        assert go.wait(30)
        return -lps[0].sum(), {}

    custom = engine.forward_backward_custom(a, data, loss)
    step = engine.optim_step(a, ADAM)
    train(engine, b)
    assert not custom.done()
    assert not step.done()
    go.set()
    custom.result()
    assert step.result().metrics["grad_norm"] > 0


def test_many_custom_losses_may_wait_for_calls_on_another_model(engine: Engine, session: str, tiny_tied: Path) -> None:
    """They take none of the threads that the other model's saving needs."""
    *models, other = (new_model(engine, session, tiny_tied) for _ in range(THREADS + 1))
    together = threading.Barrier(THREADS)

    def loss(data: list[Datum], lps: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        name = f"step{together.wait(30)}"
        engine.save_weights(other, name).result(30)
        return -lps[0].sum(), {}

    data = make_data("cross_entropy", (5,), VOCAB)
    for future in [engine.forward_backward_custom(model, data, loss) for model in models]:
        future.result()


def test_whoever_waits_for_a_base_model_holds_nobody_up(
    engine: Engine, session: str, tiny_tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(engine, session, tiny_tied)
    go, load = threading.Event(), engine._bases._load

    def slow(name: str) -> Base:
        assert go.wait(30)
        return load(str(tiny_tied))

    monkeypatch.setattr(engine._bases, "_load", slow)
    waiting: list[Future] = []
    for _ in range(THREADS):
        waiting.append(engine.load_base("slow"))
        waiting.append(engine.create_model(session, "slow", LoraConfig(rank=2)))
        waiting.append(engine.create_sampler(session, base_model="slow"))
    engine.save_weights(model, "step0").result(10)
    assert not any(future.done() for future in waiting)
    go.set()
    for future in waiting:
        future.result()
    engine.close()
    assert not [t for t in threading.enumerate() if t.name == "mint-engine-apart"]


def test_an_error_in_a_custom_loss_reaches_its_future_and_leaves_the_model(
    engine: Engine, session: str, tiny_tied: Path
) -> None:
    model = new_model(engine, session, tiny_tied)
    data = make_data("cross_entropy", (5,), VOCAB)

    def broken(data: list[Datum], lps: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        engine.forward_backward_custom(model, data, broken).result()
    with pytest.raises(NonFiniteError):
        engine.forward_backward_custom(model, data, lambda d, lps: (lps[0].sum() * float("inf"), {})).result()
    with pytest.raises(UserError, match="expected \\(loss, metrics\\)"):
        engine.forward_backward_custom(model, data, lambda d, lps: lps[0].sum()).result()  # type: ignore[arg-type, return-value]
    assert engine.optim_step(model, ADAM).result().metrics["grad_norm"] == 0.0


@pytest.mark.parametrize("metrics", [{"mine": "x"}, {"mine": None}, {"mine": torch.ones(2)}, [1.0]])
def test_metrics_of_a_custom_loss_that_are_no_numbers_are_named(
    engine: Engine, session: str, tiny_tied: Path, metrics: Any
) -> None:
    model = new_model(engine, session, tiny_tied)
    data = make_data("cross_entropy", (4,), VOCAB)
    with pytest.raises(UserError, match="loss_fn: expected metrics"):
        engine.forward_backward_custom(model, data, lambda d, lps: (lps[0].sum(), metrics)).result()


@pytest.mark.parametrize("family", ["llama", "qwen2-tied", "qwen3-tied"])
def test_peft_loads_a_trained_adapter_and_says_the_same(
    engine: Engine, session: str, family: str, tmp_path: Path
) -> None:
    """PeftModel.from_pretrained on the checkpoint's directory: its log-probabilities are ours."""
    base = build_tiny(family, tmp_path / "base")
    model = new_model(engine, session, base)
    train(engine, model, 5)
    path = engine.save_weights_for_sampler(model, "v1").result().path
    assert path is not None
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, engine.store.resolve(path).directory)
    data = make_data("cross_entropy", (8,), VOCAB, 3)
    with torch.no_grad():
        (expected,) = peft_logprobs(theirs, data)
        with theirs.disable_adapter():
            (untrained,) = peft_logprobs(theirs, data)
    assert float((expected - untrained).abs().max()) > 0.1, "the adapter says something else than the base"
    np.testing.assert_allclose(logprobs(engine, model), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_a_dict_changed_after_the_call_changes_nothing(engine: Engine, session: str, tiny_tied: Path) -> None:
    model = new_model(engine, session, tiny_tied)
    data = make_data("ppo", (6,), VOCAB)
    expected = engine.forward(model, data, "ppo", {"clip_high_threshold": 1.01}).result().loss
    first = engine.forward(model, make_data("cross_entropy", (100,) * 20, VOCAB), "cross_entropy")
    config = {"clip_high_threshold": 1.01}
    pending = engine.forward(model, data, "ppo", config)
    config["clip_high_threshold"] = 5.0
    first.result()
    assert pending.result().loss == expected


def test_one_copy_of_a_base_however_its_directory_is_spelled(engine: Engine, session: str, tiny_tied: Path) -> None:
    for spelling in (str(tiny_tied), f"{tiny_tied}/", f"{tiny_tied}/../{tiny_tied.name}"):
        engine.create_model(session, spelling, LoraConfig(rank=2)).result()
    assert len(engine._bases.loaded) == 1


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torch_s_default_dtype_is_none_of_our_business(
    engine: Engine, session: str, tiny_tied: Path, default: torch.dtype
) -> None:
    expected_model = new_model(engine, session, tiny_tied)
    expected = train(engine, expected_model, 2)
    sampler = engine.save_weights_for_sampler(expected_model).result().sampling_session_id
    assert sampler is not None
    said = sampled(engine, sampler)
    torch.set_default_dtype(default)
    try:
        assert train(engine, new_model(engine, session, tiny_tied), 2) == expected
        assert sampled(engine, sampler) == said
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_custom_loss_that_ignores_the_logprobs_is_refused(engine: Engine, session: str, tiny_tied: Path) -> None:
    model = new_model(engine, session, tiny_tied)
    with pytest.raises(UserError, match="does not depend on the log-probabilities"):
        engine.forward_backward_custom(
            model, make_data("cross_entropy", (4,), VOCAB), lambda d, lps: (lps[0].detach().sum(), {})
        ).result()
