"""optim_step on a GPU: two groups of launches, recorded like a program's, with one wait between them.

The first gathers what the host must see before anything is changed: the gradients' norm, the smallest and the largest
weight. The second is AdamW over the flat buffers, which writes each new weight into its place in the border too, and
empties the gradients: where the adapter sits in the border, the next pass finds it up to date. The step's numbers are
eight floats on the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
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
        self._found = torch.zeros(3, dtype=torch.float64, device=device)
        self._hyper = Staged((8,), torch.float32, device)
        self._turns = Turns(device)
        self._captures: dict[str, Capture | None] = {}

    def statistics(self, adapter: Adapter, state: TrainState) -> tuple[float, float, float]:
        """What :func:`statistics` gives. The one wait of a step."""
        self._run("statistics", partial(self._gather, adapter.params, state.grads))
        found = download(self._found)
        if self._found.is_cuda:
            torch.cuda.current_stream().synchronize()
        norm, low, high = found.tolist()
        return norm, low, high

    def step(self, adapter: Adapter, state: TrainState, hyper: tuple[float, ...]) -> None:
        """One step with the numbers of `kernels.hyperparameters`, and no gradients afterwards. Nobody waits for it."""
        with self._turns.next() as slot:
            self._hyper.host(slot)[:] = hyper
            self._hyper.upload(slot)
        self._run("step", partial(self._step, adapter.params, state.grads, state.exp_avg, state.exp_avg_sq))

    def _gather(self, params: Tensor, grads: Tensor) -> None:
        self._found.copy_(statistics(grads, params))

    def _step(self, params: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        adamw_places_(params, grads, exp_avg, exp_avg_sq, self._hyper.device, self._places)

    def _run(self, name: str, launch: Callable[[], None]) -> None:
        """Launch by launch the first time, which compiles; the second recorded too, and replayed from then on."""
        if (capture := self._captures.get(name)) is not None:
            capture()
            return
        NoGraph(launch)()
        self._captures[name] = self._record(launch) if name in self._captures else None


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
