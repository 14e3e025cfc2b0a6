"""What a GPU will see of the step, without one: "meta" tensors, which have a device and a shape and no memory.

On these an operation that waits for the device (an ``item()``, a ``nonzero()``) raises, and so does one that mixes
devices. Kernel launches are counted and left out.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checked, make_data
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mint_engine.adapters import Adapter, TrainState
from mint_engine.calls import Call, Work
from mint_engine.gpu import program as program_module
from mint_engine.gpu import run as run_module
from mint_engine.gpu import stepper as stepper_module
from mint_engine.gpu.capture import NoGraph
from mint_engine.gpu.layout import Part, Shape, seat_shape
from mint_engine.gpu.memory import Plan
from mint_engine.gpu.program import Program
from mint_engine.gpu.run import Programs
from mint_engine.gpu.stepper import Stepper
from mint_engine.kernels import force_face
from mint_engine.models.config import load_config
from mint_engine.models.decoder import Decoder
from mint_engine.models.weights import WeightReader
from mint_engine.optimizer import queue_step
from mint_engine.types import AdamParams, LoraConfig

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_gpu_step.py captures for real"),
]


LOSSES = ("ppo", "cispo", "cross_entropy", "dro", "importance_sampling")


class NoHost(TorchDispatchMode):
    """Refuses every operation that touches a tensor on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, out)):
            assert not isinstance(t, torch.Tensor) or t.device.type == "meta", f"{func} on the host"
        return out


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("ranks", [(4,), (4, 6), (16, 32)])
def test_nothing_in_a_program_waits_for_the_device(
    tiny_tied: Path, launches: list[str], masked: bool, checkpoint: bool, ranks: tuple[int, ...]
) -> None:
    config = load_config(tiny_tied)
    on_cpu = Decoder(config, WeightReader(tiny_tied), torch.float32)
    parts, losses = [], []
    for i, rank in enumerate(ranks):
        name = LOSSES[(i + sum(ranks) + masked) % len(LOSSES)]  # each of them somewhere
        data, loss, settings = checked(make_data(name, (20, 9), 199, i), name, on_cpu)
        work = Work(Call(Adapter(on_cpu.groups, LoraConfig(rank=rank)), None, data, loss, settings))
        parts.append(Part(work, data, 0, work.wanted(data).nonzero().squeeze(1).numpy()))
        losses.append(loss)
    with force_face("triton"), torch.no_grad():
        decoder = Decoder(config, WeightReader(tiny_tied), torch.bfloat16, device="meta")
        adapters = [Adapter(decoder.groups, LoraConfig(rank=rank), decoder.device) for rank in ranks]
        decoder.borders.seat([(a, i, i + 1) for i, a in enumerate(adapters)])
        shape = Shape(
            tuple(seat_shape(part, alone=len(parts) == 1) for part in parts), 8, 1, True, masked, checkpoint,
            decoder.borders.capacity,
        )  # fmt: skip
        program = Program(decoder, shape, adapters, losses, lambda launch: pytest.fail("recorded"))
        program._launch()
        first = list(launches)
        launches.clear()
        with NoHost():
            program._launch()
    assert launches == first, "the launches of a shape are always the same"
    assert {"forward", "backward_q", "backward_kv"} <= set(first)
    if len(ranks) > 1:  # dA and dB of a linear, and before them S and dS, are one launch each for all adapters
        assert first.count("_outer") == 2 * 4 * config.num_layers
        assert first.count("_linear") == (3 if checkpoint else 2) * 4 * config.num_layers
        assert "_pass" not in first
    else:  # dS and dB of a linear, all its modules, are two launches
        assert first.count("_pass") == first.count("_add") == 4 * config.num_layers


def test_nothing_in_a_step_waits_for_the_device(tiny_tied: Path, launches: list[str]) -> None:
    config = load_config(tiny_tied)
    with force_face("triton"), torch.no_grad():
        decoder = Decoder(config, WeightReader(tiny_tied), torch.bfloat16, device="meta")
        adapter = Adapter(decoder.groups, LoraConfig(rank=4), decoder.device)
        state = TrainState(adapter)
        decoder.borders.seat([(adapter, 0, 1)])
        stepper = Stepper(adapter, decoder.borders, 0, lambda launch: pytest.fail("recorded"))
        with NoHost():
            stepper._step(adapter.params, state.grads, state.exp_avg, state.exp_avg_sq)
    assert launches == ["_places"]  # masters, moments and border in one kernel


@pytest.mark.parametrize("passes", [1, 2])
def test_calls_and_steps_are_queued_without_waiting(
    tiny_tied: Path, launches: list[str], monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    """Two calls, a forward beside them and a step behind, by what the engine calls; nothing of them comes back."""
    for module in (program_module, run_module, stepper_module):
        monkeypatch.setattr(module, "download", lambda tensor: tensor)
    config = load_config(tiny_tied)
    on_cpu = Decoder(config, WeightReader(tiny_tied), torch.float32)
    data, loss, settings = checked(make_data("ppo", (20, 9), 199), "ppo", on_cpu)
    with force_face("triton"), torch.no_grad():
        decoder = Decoder(config, WeightReader(tiny_tied), torch.bfloat16, device="meta")
        programs = Programs(decoder, lambda launch: NoGraph(launch))
        adapters = [Adapter(decoder.groups, LoraConfig(rank=rank), decoder.device) for rank in (4, 8, 16)]
        states = [TrainState(adapter) for adapter in adapters]
        calls = [Call(a, s, data, loss, settings) for a, s in zip(adapters, (*states[:2], None), strict=True)]
        for _ in range(3):
            pending = [programs.queue(calls, memory=Plan(64 // passes, checkpoint=False)),
                       queue_step(programs, adapters[0], states[0], AdamParams(learning_rate=1e-4))]  # fmt: skip
            states[0].settle = None  # by the host, which would have to see it
            for one in pending:
                with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                    one.result()
    assert launches.count("_places") == 3
