"""A whole training step on the Triton faces (interpreted on CPU tensors) equals the step on the CPU's own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import checked, load_decoder, make_data, relative, trained_adapter

from mint_engine import trainer
from mint_engine.adapters import TrainState
from mint_engine.calls import Call
from mint_engine.gpu.memory import Plan
from mint_engine.gpu.run import Programs
from mint_engine.kernels import force_face
from mint_engine.types import ForwardBackwardOutput, LoraConfig

# The same fp32 sums in another order, through three layers forwards and back.
REORDERED = 1e-5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: kernels are not interpreted on CPU tensors"),
]


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "importance_sampling"])
def test_loss_gradient_and_logprobs_are_those_of_the_cpu(tiny_tied: Path, loss_fn: str) -> None:
    decoder = load_decoder(tiny_tied)
    adapter = trained_adapter(decoder, LoraConfig(rank=4, seed=0))
    data = make_data(loss_fn, (1, 9, 23), 199)
    found = {}
    for face in ("cpu", "triton"):
        state = TrainState(adapter)
        with torch.no_grad(), force_face(face):
            out = trainer.run(decoder, adapter, state, *checked(data, loss_fn, decoder))
        logprobs = [o["logprobs"].to_torch() for o in out.loss_fn_outputs]
        found[face] = out.metrics["loss:sum"], state.grads, torch.cat(logprobs)
    (loss, gradient, logprobs), (other_loss, other_gradient, other_logprobs) = found["cpu"], found["triton"]
    assert other_loss == pytest.approx(loss, rel=REORDERED)
    assert float(gradient.abs().max()) > 0
    assert relative(other_gradient, gradient) < REORDERED
    torch.testing.assert_close(other_logprobs, logprobs, rtol=REORDERED, atol=REORDERED)


@pytest.mark.parametrize(("masked_logprobs", "checkpoint"), [(True, False), (False, True)])
def test_programs_of_several_adapters_are_the_steps_of_the_cpu(
    tiny_tied: Path, masked_logprobs: bool, checkpoint: bool
) -> None:
    """What a GPU runs (mint_engine/gpu), its kernels interpreted: two adapters, masked rows, two passes."""
    decoder = load_decoder(tiny_tied)
    adapters = [trained_adapter(decoder, LoraConfig(rank=16 * i, seed=i)) for i in (1, 2)]
    data = [make_data("cross_entropy", lengths, 199, i) for i, lengths in enumerate([(20, 33), (9, 12)])]
    found = {}
    for face in ("cpu", "triton"):
        calls = [
            Call(a, TrainState(a), *checked(d, "cross_entropy", decoder)) for a, d in zip(adapters, data, strict=True)
        ]
        with torch.no_grad(), force_face(face):
            if face == "cpu":
                outputs = trainer.run_together(decoder, calls, masked_logprobs=masked_logprobs)
            else:
                outputs = Programs(decoder).run_together(
                    calls, masked_logprobs=masked_logprobs, memory=Plan(60, checkpoint)
                )
        found[face] = [(out, call.state) for out, call in zip(outputs, calls, strict=True)]
    for (out, state), (other, other_state) in zip(found["cpu"], found["triton"], strict=True):
        assert isinstance(out, ForwardBackwardOutput)
        assert isinstance(other, ForwardBackwardOutput)
        assert other.metrics == pytest.approx(out.metrics, rel=REORDERED, abs=REORDERED * 53)
        for a, b in zip(out.loss_fn_outputs, other.loss_fn_outputs, strict=True):
            lp, other_lp = a["logprobs"].to_torch(), b["logprobs"].to_torch()
            torch.testing.assert_close(other_lp, lp, rtol=REORDERED, atol=REORDERED, equal_nan=True)
        assert state is not None
        assert other_state is not None
        assert relative(other_state.grads, state.grads) < REORDERED
