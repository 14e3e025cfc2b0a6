"""optim_step on a GPU: one group of launches, recorded like a program's, in which nobody waits for the host.

First what decides the step: the gradients' norm, the smallest and the largest weight. Then, on the device, whether it
is taken and how the gradients are clipped, by the host's arithmetic in float64. Then AdamW over the flat buffers, which
writes each new weight into its place in the border too and empties the gradients: where the adapter sits in the border,
the next pass finds it up to date. The step's numbers are data; what was decided is sent to the host, for its answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mint_engine.adapters import Adapter, TrainState
from mint_engine.borders import Borders
from mint_engine.gpu.capture import Capture, NoGraph
from mint_engine.gpu.staging import Staged, Turns, download
from mint_engine.kernels import adamw_places_

Record = Callable[[Callable[[], None]], Capture]
STEPPERS = 64  # kept, least recently used first out
CHUNK = 1 << 16
HYPER = 9  # numbers that `kernels.adamw_places_` takes
TAKEN, DROPPED, REFUSED = 1.0, -1.0, 0.0  # its last one: the step is taken; gradients are dropped; nothing is done


@dataclass(frozen=True)
class Conditions:
    """What a step depends on that the host has not seen yet.

    The gradients' ``clip``: their largest norm, infinity for any. The step is refused unless the largest weight, times
    ``growth`` and plus ``update``, is below ``limit``.
    """

    clip: float
    growth: float
    update: float
    limit: float


def statistics(grads: Tensor, params: Tensor) -> Tensor:
    """float64 [3]: the global norm of the gradients, the smallest and the largest parameter. Nobody is waited for."""
    # fp32 within chunks, float64 across them: as exact as float64 all through here, and many times faster.
    whole = grads.numel() // CHUNK * CHUNK
    parts = [torch.linalg.vector_norm(grads[:whole].view(-1, CHUNK), dim=1), grads[whole:].norm()[None]]
    norm = torch.linalg.vector_norm(torch.cat(parts), dtype=torch.float64)
    low, high = torch.aminmax(params)  # no copy of their absolute values
    return torch.stack([norm, low.double(), high.double()])


class Stepper:
    """The steps of one adapter in one seat (``offset``; None: it has none, and no border is written).

    It keeps neither the adapter nor its state alive, and is called with the same ones each time.
    """

    def __init__(self, adapter: Adapter, borders: Borders, offset: int | None, record: Record) -> None:
        self._record, device = record, adapter.params.device
        self._places = borders.places(adapter, offset)
        self._found = torch.zeros(4, dtype=torch.float64, device=device)
        self._given = Staged((HYPER + 4,), torch.float64, device)
        self._hyper = torch.zeros(HYPER, dtype=torch.float32, device=device)
        self._turns = Turns(device)
        self._capture: Capture | None = None
        self._runs = 0

    def queue(self, adapter: Adapter, state: TrainState, hyper: tuple[float, ...], conditions: Conditions) -> Tensor:
        """One step with the numbers of `kernels.hyperparameters` if ``conditions`` are met; no gradients afterwards.

        The answer is on its way to the host, float64 [4]: what :func:`statistics` gives, and what was done.
        """
        with self._turns.next() as slot:
            c = conditions
            self._given.host(slot)[:] = (*hyper, c.clip, c.growth, c.update, c.limit)
            self._given.upload(slot)
        self._run(partial(self._step, adapter.params, state.grads, state.exp_avg, state.exp_avg_sq))
        return download(self._found)

    def _step(self, params: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        given, hyper = self._given.device, self._hyper
        norm, low, high, what = self._found.unbind()
        clip, growth, update, limit = given[HYPER:].unbind()
        self._found[:3].copy_(statistics(grads, params))
        bounded = torch.maximum(-low, high) * growth + update < limit  # not so if it is NaN
        what.copy_(torch.where(norm < torch.inf, bounded.double(), DROPPED))
        hyper.copy_(given[:HYPER])
        hyper[0].copy_((clip / (norm + 1e-6)).clamp(max=1.0))
        hyper[HYPER - 1].copy_(what)
        adamw_places_(params, grads, exp_avg, exp_avg_sq, hyper, self._places)

    def _run(self, launch: Callable[[], None]) -> None:
        """Launch by launch the first time, which compiles; the second recorded too, and replayed from then on."""
        if self._capture is not None:
            self._capture()
            return
        NoGraph(launch)()
        self._runs += 1
        if self._runs > 1:
            self._capture = self._record(launch)


class Steppers:
    """The steppers of one base model's adapters."""

    def __init__(self, borders: Borders, record: Record) -> None:
        self._borders, self._record = borders, record
        self._steppers = OrderedDict[tuple[int | None, ...], Stepper]()
        borders.before_move = self._steppers.clear  # their places are in the border's memory

    def __len__(self) -> int:
        return len(self._steppers)

    def of(self, adapter: Adapter, state: TrainState) -> Stepper:
        """The stepper for where the adapter, its state and its seat are now."""
        offset = self._borders.offset_of(adapter)
        buffers = [t.data_ptr() for t in (adapter.params, state.grads, state.exp_avg, state.exp_avg_sq)]
        key = (adapter.uid, offset, self._borders.capacity, *buffers)
        if key not in self._steppers:
            while len(self._steppers) >= STEPPERS:
                self._steppers.popitem(last=False)
            self._steppers[key] = Stepper(adapter, self._borders, offset, self._record)
        self._steppers.move_to_end(key)
        return self._steppers[key]
