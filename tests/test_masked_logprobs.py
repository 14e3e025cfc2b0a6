"""forward_backward without the log-probabilities that its loss masks: NaN there, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_helpers import new_model, open_engine
from helpers import checked, load_decoder, make_data, relative, trained_adapter

from mint_engine import trainer
from mint_engine.adapters import TrainState
from mint_engine.calls import Call
from mint_engine.engine import close_engines, get_engine
from mint_engine.errors import UserError
from mint_engine.types import LoraConfig

REORDERED = 1e-5  # the same fp32 sums in another order


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"])
def test_masked_positions_are_nan_and_the_sums_the_same(tiny_tied: Path, loss_fn: str) -> None:
    decoder = load_decoder(tiny_tied)
    data = make_data(loss_fn, (1, 9, 14), 199)
    if loss_fn == "dro":
        for datum in data:
            q = datum.loss_fn_inputs["logprobs"].to_numpy()
            q[datum.loss_fn_inputs["advantages"].to_numpy() == 0] = 0.0
    adapters = [trained_adapter(decoder, LoraConfig(rank=rank, seed=rank)) for rank in (4, 3)]
    found = []
    for masked_logprobs in (True, False):
        states = [TrainState(adapters[0]), None]
        calls = [Call(a, s, *checked(data, loss_fn, decoder)) for a, s in zip(adapters, states, strict=True)]
        outputs = trainer.run_together(decoder, calls, masked_logprobs=masked_logprobs)
        logprobs = [np.concatenate([o["logprobs"].to_numpy() for o in out.loss_fn_outputs]) for out in outputs]
        found.append((outputs[0].metrics["loss:sum"], states[0].grads, *logprobs))
    (loss, gradient, all_of_it, forward), (loss2, gradient2, some, forward2) = found
    assert loss2 == pytest.approx(loss, rel=REORDERED)
    assert relative(gradient2, gradient) < REORDERED
    name = "weights" if loss_fn == "cross_entropy" else "advantages"
    masked = np.concatenate([d.loss_fn_inputs[name].to_numpy() for d in data]) == 0
    assert masked.any()
    np.testing.assert_array_equal(np.isnan(some), masked)
    np.testing.assert_allclose(some[~masked], all_of_it[~masked], rtol=REORDERED, atol=REORDERED)
    np.testing.assert_allclose(forward2, forward, rtol=REORDERED, atol=REORDERED)  # a forward reports all, always


def test_a_soft_target_without_weight_is_reported_if_its_row_has_any(tiny_tied: Path) -> None:
    decoder = load_decoder(tiny_tied)
    adapter = trained_adapter(decoder, LoraConfig(rank=4, seed=0))
    data = make_data("cross_entropy", (6,), 199, columns=3)
    weights = data[0].loss_fn_inputs["weights"].to_numpy()
    weights[0], weights[1] = [0, 0, 0], [0, 1, 0]
    call = Call(adapter, TrainState(adapter), *checked(data, "cross_entropy", decoder))
    (out,) = trainer.run_together(decoder, [call], masked_logprobs=False)
    nan = np.isnan(out.loss_fn_outputs[0]["logprobs"].to_numpy())
    assert nan[0].all()
    assert not nan[1].any()


def test_a_call_of_masked_positions_alone_has_loss_zero_and_no_gradient(tiny_tied: Path) -> None:
    decoder = load_decoder(tiny_tied)
    adapter = trained_adapter(decoder, LoraConfig(rank=4, seed=0))
    (datum,) = make_data("cross_entropy", (5,), 199)
    datum.loss_fn_inputs["weights"].to_numpy()[:] = 0
    state = TrainState(adapter)
    call = Call(adapter, state, *checked([datum], "cross_entropy", decoder))
    (out,) = trainer.run_together(decoder, [call], masked_logprobs=False)
    assert out.loss == 0.0
    assert np.isnan(out.loss_fn_outputs[0]["logprobs"].to_numpy()).all()
    assert not state.grads.any()


def test_it_is_a_setting_of_the_engine(tiny_tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data("cross_entropy", (9,), 199)
    masked = data[0].loss_fn_inputs["weights"].to_numpy() == 0
    with open_engine(tmp_path / "default") as engine:
        model = new_model(engine, engine.create_session(), tiny_tied, rank=4, seed=0)
        out = engine.forward_backward(model, data, "cross_entropy").result()
        assert np.isfinite(out.loss_fn_outputs[0]["logprobs"].to_numpy()).all()
    monkeypatch.setenv("MINT_MASKED_LOGPROBS", "false")
    monkeypatch.setenv("MINT_KV_CACHE_BYTES", str(1 << 22))
    engine = get_engine("float32", tmp_path / "env")
    model = new_model(engine, engine.create_session(), tiny_tied, rank=4, seed=0)
    out = engine.forward_backward(model, data, "cross_entropy").result()
    np.testing.assert_array_equal(np.isnan(out.loss_fn_outputs[0]["logprobs"].to_numpy()), masked)
    custom = engine.forward_backward_custom(model, data, lambda _, lp: (-lp[0][0], {})).result()
    assert np.isfinite(custom.loss_fn_outputs[0]["logprobs"].to_numpy()).all()
    close_engines()
    monkeypatch.setenv("MINT_MASKED_LOGPROBS", "no")
    with pytest.raises(UserError, match="MINT_MASKED_LOGPROBS: expected true or false, got 'no'"):
        get_engine("float32", tmp_path / "env")


def test_the_memory_for_activations_goes_with_the_last_client(tiny_tied: Path, tmp_path: Path) -> None:
    data = make_data("cross_entropy", (9,), 199)
    with open_engine(tmp_path) as engine:
        models = [new_model(engine, engine.create_session(), tiny_tied, rank=4, seed=i) for i in range(2)]
        engine.forward_backward(models[0], data, "cross_entropy").result()
        space = engine._bases.loaded[0].decoder.space
        assert space.nbytes > 0
        engine.unload_model(models[0]).result()
        assert space.nbytes > 0
        engine.unload_model(models[1]).result()
        assert space.nbytes == 0
