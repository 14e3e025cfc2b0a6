"""Losses on one datum at a time: the sum over the datums, in process and over HTTP, and what cannot be one."""

from __future__ import annotations

import pytest
import torch
from fake_engine import FakeEngine
from fake_server import FakeServer

import mint
from mint import types
from mint_engine import custom_loss
from mint_engine.client.loss_handle import make_loss
from mint_engine.client.remote import Address, RemoteEngine


def datum(*advantages: float, targets: int | None = None) -> types.Datum:
    count = len(advantages) if targets is None else targets
    return types.Datum(
        types.ModelInput.from_ints([1] * count),
        {"target_tokens": [2] * count, "advantages": torch.tensor(advantages), "weights": [1.0] * count},
    )


def policy(logprobs, advantages):
    loss = -(logprobs * advantages).sum()
    return loss, {"custom/loss:sum": loss.detach(), "custom/loss:mean": loss.detach()}


RANKS = {"logprobs": 1, "advantages": 1}


def test_the_losses_of_the_datums_are_summed_and_metrics_are_combined_as_they_say():
    handle = make_loss(policy, RANKS)
    assert (handle.name, handle.input_names) == ("policy", ("advantages",))
    data = [datum(1, 2), datum(3)]
    outputs = [{"logprobs": types.TensorData.from_numpy(torch.tensor(lp).numpy())} for lp in ([-1.0, -2.0], [-4.0])]
    evaluated = custom_loss.evaluate(handle, data, outputs)
    assert evaluated.loss == 17
    assert evaluated.metrics == {"custom/loss:sum": 17, "custom/loss:mean": 8.5}
    assert [w.tolist() for w in evaluated.weights] == [[1, 2], [3]]  # minus the gradient


@pytest.mark.parametrize("transport", ["local", "http"])
def test_a_handle_takes_the_place_of_a_function(tmp_path, transport):
    engine = FakeEngine(tmp_path / "home")
    reached = engine if transport == "local" else RemoteEngine(Address("http://server"), wire=FakeServer(engine))
    service = mint.ServiceClient(engine=reached)
    trainer = service.create_lora_training_client("tiny")
    handle = service.create_custom_loss(policy, RANKS).result()
    assert isinstance(handle, mint.LossHandle)
    done = trainer.forward_backward_custom([datum(1, 2)], handle).result()
    if transport == "http":
        assert done.metrics["custom/loss:sum"] == done.metrics["loss:sum"] == 7  # its log-probabilities are -1 and -3
    operations = len(engine.log)
    for wrong, message in (
        (
            datum(1, 2, targets=2).loss_fn_inputs | {"advantages": [[1.0, 2.0]]},
            r"advantages: expected rank 1.*got 2 \(datum 1\)",
        ),
        ({"advantages": [1.0]}, r"needs target_tokens \(datum 1\)"),
        ({"target_tokens": [1]}, r"needs advantages \(datum 1\)"),
    ):
        bad = types.Datum(types.ModelInput.from_ints([1]), wrong)
        with pytest.raises(mint.UserError, match=message):
            trainer.forward_backward_custom([datum(1), bad], handle).result()
    assert len(engine.log) == operations
    if transport == "http":
        reached.close()


def no_logprobs(advantages):
    pass


def keywords(logprobs, **more):
    pass


def default(logprobs, advantages=None):
    pass


@pytest.mark.parametrize(
    ("fn", "ranks", "message"),
    [
        ("policy", RANKS, "fn: expected a function, got str"),
        (no_logprobs, {"advantages": 1}, "fn: expected parameters logprobs"),
        (keywords, {"logprobs": 1}, "fn: expected parameters logprobs"),
        (default, RANKS, "fn: expected parameters logprobs"),
        (policy, {"logprobs": 1}, "input_ranks: expected a rank for each of logprobs, advantages"),
        (policy, [1, 1], "input_ranks: expected a rank for each"),
        (policy, {"logprobs": 0, "advantages": 1}, "input_ranks: .*got 0 for logprobs"),
        (policy, {"logprobs": 1, "advantages": 3}, "input_ranks: .*got 3 for advantages"),
    ],
)
def test_what_cannot_be_a_loss_is_refused_when_it_is_made(fn, ranks, message):
    with pytest.raises(mint.UserError, match=message):
        make_loss(fn, ranks)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda lp: lp.sum(), r"expected \(loss, dict of metrics\)"),
        (lambda lp: (lp, {}), r"expected a loss tensor without dimensions, got \(1,\)"),
        (lambda lp: (1.0, {}), "expected a loss tensor without dimensions, got float"),
        (lambda lp: (lp.sum(), {"kl": lp.sum()}), "expected metrics custom/<name>:sum .*got 'kl'"),
    ],
)
def test_what_a_loss_may_not_answer(answer, message):
    def loss(logprobs):
        return answer(logprobs)

    with pytest.raises(mint.UserError, match=message + r".*\(datum 0\)"):
        make_loss(loss, {"logprobs": 1})([datum(1)], [torch.tensor([-1.0], requires_grad=True)])
