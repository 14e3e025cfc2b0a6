"""What one client does never shows in another's numbers, and a version that was saved never changes.

"Bit-equal" everywhere: adapters of all clients pass through the same borders of the same weights, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import ADAM, VOCAB, logprobs, new_model, open_engine, train
from helpers import make_data

from mint_engine.engine import Engine
from mint_engine.errors import NonFiniteError
from mint_engine.types import AdamParams, Datum, ModelInput, SampleResponse, SamplingParams


@pytest.fixture(params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    with open_engine(tmp_path / "home", request.param) as made:
        yield made


def decay(engine: Engine, model: str) -> None:
    """Weight decay 1.0 at a learning rate that all but erases the adapter."""
    train(engine, model)
    engine.optim_step(model, AdamParams(learning_rate=0.5, weight_decay=1.0)).result()


def clip(engine: Engine, model: str) -> None:
    data = make_data("cross_entropy", (20, 30), VOCAB)
    engine.forward_backward(model, data, "cross_entropy").result()
    step = engine.optim_step(model, AdamParams(learning_rate=0.1, grad_clip_norm=1e-3)).result()
    assert (step.metrics or {})["grad_norm"] > 1e-3


def refused_loss(engine: Engine, model: str) -> None:
    before = logprobs(engine, model)
    bad = Datum(
        ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "logprobs": [-3e4, -1.0], "advantages": [1.0, 1.0]}
    )
    engine.forward_backward(model, make_data("cross_entropy", (9,), VOCAB), "cross_entropy").result()
    with pytest.raises(NonFiniteError):
        engine.forward_backward(model, [bad], "importance_sampling").result()
    assert np.array_equal(logprobs(engine, model), before)


def refused_step(engine: Engine, model: str) -> None:
    """A NaN among the gradients: the step is refused and nothing moves, for its own client either."""
    train(engine, model)
    before = logprobs(engine, model)
    engine._models[model].state.grads[5] = float("nan")
    with pytest.raises(NonFiniteError):
        engine.optim_step(model, AdamParams(learning_rate=0.1, weight_decay=1.0)).result()
    assert np.array_equal(logprobs(engine, model), before)


def infinite_loss(engine: Engine, model: str) -> None:
    """A custom loss that is not finite."""
    data = make_data("cross_entropy", (5,), VOCAB)
    with pytest.raises(NonFiniteError):
        engine.forward_backward_custom(model, data, lambda d, lps: (lps[0].sum() * float("inf"), {})).result()


def everything(engine: Engine, sampler: str) -> SampleResponse:
    """All a sampler can be asked for, at once."""
    params = SamplingParams(max_tokens=12, seed=3, temperature=0.8)
    return engine.sample(
        sampler, ModelInput.from_ints([5, 6, 7, 8]), 3, params, include_prompt_logprobs=True, topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
    ).result()  # fmt: skip


def same(a: SampleResponse, b: SampleResponse) -> bool:
    """Equal in every number; only the ids of the sequences differ."""
    sequences = zip(a.sequences, b.sequences, strict=True)
    return (a.prompt_logprobs, a.topk_prompt_logprobs) == (b.prompt_logprobs, b.topk_prompt_logprobs) and all(
        (x.tokens, x.logprobs, x.topk_logprobs, x.stop_reason) == (y.tokens, y.logprobs, y.topk_logprobs, y.stop_reason)
        for x, y in sequences
    )


@pytest.mark.parametrize("deed", [decay, clip, refused_loss, refused_step, infinite_loss])
def test_no_client_feels_what_another_does(
    engine: Engine, tiny_tied: Path, deed: Callable[[Engine, str], None]
) -> None:
    """Trained, untouched, of other ranks and modules, on the same base: log-probabilities and samples are bit-equal."""
    session = engine.create_session()
    offender = new_model(engine, session, tiny_tied, rank=6, seed=1)
    others = [
        new_model(engine, session, tiny_tied, rank=6, seed=1), new_model(engine, session, tiny_tied, rank=3, seed=2),
        new_model(engine, session, tiny_tied, rank=17, train_mlp=False), new_model(engine, session, tiny_tied, rank=1),
    ]  # fmt: skip
    for model in others[1:]:
        train(engine, model, 2)
    pending = others[2]
    engine.forward_backward(pending, make_data("cross_entropy", (7,), VOCAB, 8), "cross_entropy").result()
    samplers = [engine.save_weights_for_sampler(model).result().sampling_session_id or "" for model in others]
    samplers.append(engine.create_sampler(session, base_model=str(tiny_tied)).result())

    def state() -> list[Any]:
        """Every other client's weights, gradients and moments."""
        models = [engine._models[model] for model in others]
        return [
            (m.adapter.params.clone(), m.state.grads.clone(), m.state.exp_avg.clone(), m.state.exp_avg_sq.clone())
            for m in models
        ]

    said = [logprobs(engine, model) for model in others]
    sampled = [everything(engine, sampler) for sampler in samplers]
    kept = state()
    deed(engine, offender)
    for was, now in zip(kept, state(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(was, now, strict=True))
    for model, before in zip(others, said, strict=True):
        assert np.array_equal(logprobs(engine, model), before)
    for sampler, before in zip(samplers, sampled, strict=True):
        assert same(everything(engine, sampler), before)


def test_a_sampler_answers_after_ten_more_steps_as_before_them(engine: Engine, tiny_tied: Path) -> None:
    """Named or not, made by the training client or from the path, in use or not while the training went on."""
    session = engine.create_session()
    model = new_model(engine, session, tiny_tied)
    train(engine, model, 2)
    named = engine.save_weights_for_sampler(model, "v", sampler=True).result()
    assert named.path is not None
    samplers = [
        named.sampling_session_id or "",
        engine.save_weights_for_sampler(model).result().sampling_session_id or "",
        engine.create_sampler(session, model_path=named.path).result(),
    ]
    before = everything(engine, samplers[0])
    work = []
    for step in range(10):
        work.append(engine.forward_backward(model, make_data("cross_entropy", (6, 9), VOCAB, step), "cross_entropy"))
        work.append(engine.optim_step(model, AdamParams(learning_rate=0.05, weight_decay=1.0)))
        work.append(engine.sample(samplers[step % 3], ModelInput.from_ints([1]), 1, SamplingParams(max_tokens=4)))
    for future in work:
        future.result()
    samplers.append(engine.create_sampler(session, model_path=named.path).result())
    for sampler in samplers:
        assert same(everything(engine, sampler), before)
    newest = engine.save_weights_for_sampler(model).result().sampling_session_id or ""
    assert not same(everything(engine, newest), before), "the training did move the model"


def test_sampling_old_versions_never_touches_live_weights(engine: Engine, tiny_tied: Path) -> None:
    """A model whose old versions are sampled all along trains bit for bit like one that is left alone."""
    session = engine.create_session()
    watched, alone = (new_model(engine, session, tiny_tied, seed=4) for _ in range(2))
    samplers = [engine.create_sampler(session, base_model=str(tiny_tied)).result()]
    for step in range(6):
        data = make_data("cross_entropy", (6, 9), VOCAB, step)
        pending = []
        for model in (watched, alone):
            engine.forward_backward(model, data, "cross_entropy").result()
            if model == watched:
                saved = engine.save_weights_for_sampler(model, f"v{step}" if step % 2 else None, sampler=True).result()
                samplers.append(saved.sampling_session_id or "")
                pending = [
                    engine.sample(s, ModelInput.from_ints([1, 2]), 2, SamplingParams(max_tokens=20)) for s in samplers
                ]
            engine.optim_step(model, ADAM).result()
        for future in pending:
            assert len(future.result().sequences) == 2
    ours, theirs = (engine._models[m] for m in (watched, alone))
    assert torch.equal(ours.adapter.params, theirs.adapter.params)
    for name in ("grads", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(ours.state, name), getattr(theirs.state, name)), name
    assert np.array_equal(logprobs(engine, watched), logprobs(engine, alone))
