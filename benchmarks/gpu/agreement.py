"""The engine's steps on this device, launched, recorded and replayed, against the same on the CPU."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.checks import FACTOR, error
from benchmarks.gpu.models import RandomReader, batch, config
from mint_engine import trainer
from mint_engine.adapters import Adapter, TrainState
from mint_engine.calls import Call
from mint_engine.datums import CheckedDatum
from mint_engine.gpu.decode import DecodePrograms
from mint_engine.gpu.run import Programs
from mint_engine.kernels import force_face
from mint_engine.kv_cache import KVCache
from mint_engine.losses import get_loss
from mint_engine.models.config import ModelConfig
from mint_engine.models.decoder import Decoder
from mint_engine.optimizer import optim_step, queue_step
from mint_engine.pending import Pending
from mint_engine.sampling_pass import Piece, _step, decode, prefill
from mint_engine.types import AdamParams, ForwardBackwardOutput, LoraConfig

REORDERED = 1e-4  # fp32 sums in another order, through two layers and back
CPU = torch.device("cpu")


class _Reader(RandomReader):
    """The same weights on every device, the norms' among them."""

    def get(self, name: str) -> Tensor:
        shape = self._shapes[name]
        values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        values = 1.0 + 0.1 * values if len(shape) == 1 else values * shape[1] ** -0.5
        return values.bfloat16().to(self._device, self._dtype)  # exact in both dtypes


def agreement(bench: Bench) -> dict[str, Any]:
    """In float32 to rounding; in the working dtype at most three times as far from the CPU's float32 as its own is."""
    shape = config("check")
    wanted = _Side(CPU, shape, torch.float32, dry=bench.dry).results()
    found = {}
    for dtype in dict.fromkeys((torch.float32, bench.dtype)):
        limits = dict.fromkeys(wanted, REORDERED)
        if dtype is not torch.float32:
            plain = _Side(CPU, shape, dtype, dry=bench.dry).results()
            limits = {what: FACTOR * max(error(plain[what], of), 2.0**-9) for what, of in wanted.items()}
        for what, of in _Side(bench.device, shape, dtype, dry=bench.dry, programs=True).results().items():
            off, name = error(of, wanted[what]), f"{what}, {str(dtype).removeprefix('torch.')}"
            found[name] = {"right": bool(off <= limits[what]), "error": off, "limit": limits[what]}  # NaN is wrong
    return found


class _Side:
    """A base model on one device, and what is done with it: by ``programs``, or as a CPU does it.

    ``dry``: each thing once.
    """

    def __init__(
        self, device: torch.device, shape: ModelConfig, dtype: torch.dtype, *, dry: bool, programs: bool = False
    ) -> None:
        self.base = Decoder(shape, _Reader(shape, device, dtype), dtype, device=device)  # type: ignore[arg-type]
        self._programs = Programs(self.base) if programs else None
        self._dry = dry

    def results(self) -> dict[str, Tensor]:
        parts = self._training(), self._step(), self._ahead(), self._decode()
        return {name: t.double().cpu() for part in parts for name, t in part}

    def _face(self, name: str = "reference") -> AbstractContextManager[None]:
        """The face that programs use in a dry run; on a GPU they choose as ever."""
        return force_face(name) if self._dry and self._programs is not None else nullcontext()

    def _adapter(self, rank: int) -> Adapter:
        adapter = Adapter(self.base.groups, LoraConfig(rank=rank, seed=rank))
        generator = torch.Generator().manual_seed(rank)
        for factors in adapter.factors.values():
            for b in factors.b:
                b.normal_(0.0, 0.05, generator=generator)
        made = Adapter(self.base.groups, LoraConfig(rank=rank, seed=rank), self.base.device)
        made.params.copy_(adapter.params)
        made.version += 1
        return made

    def _training(self) -> Iterator[tuple[str, Tensor]]:
        """One shape three times, so that it is replayed; then a wide adapter, for which the borders' memory moves and
        all that was recorded is dropped; and the first shape anew. Dry, each once, the second one interpreted."""
        one, two, wide = (self._adapter(rank) for rank in (16, 32, 80))
        rounds = [[one, two]] * 3 + [[wide]] * 3 + [[one, two]] * 3
        for i, adapters in enumerate(rounds):
            if self._dry and i % 3:
                continue
            shares = [batch(self.base.config, 96 + 32 * j, 32, seed=10 * i + j) for j in range(len(adapters))]
            with self._face("triton" if len(adapters) == 1 else "reference"):
                outputs, states = self._run(adapters, shares)
            for adapter, output, state in zip(adapters, outputs, states, strict=True):
                if not isinstance(output, ForwardBackwardOutput):
                    raise output
                logprobs = [row["logprobs"].to_torch() for row in output.loss_fn_outputs]
                yield f"round {i}, rank {adapter.rank}: log-probabilities", torch.cat(logprobs)
                yield f"round {i}, rank {adapter.rank}: gradients", state.grads

    def _run(self, adapters: Sequence[Adapter], shares: Sequence[Sequence[CheckedDatum]]) -> tuple[Any, Any]:
        loss, states = get_loss("cross_entropy"), [TrainState(adapter) for adapter in adapters]
        calls = [Call(a, s, data, loss, {}) for a, s, data in zip(adapters, states, shares, strict=True)]
        with torch.no_grad():
            if self._programs is None:
                return trainer.run_together(self.base, calls), states
            return self._programs.run_together(calls), states

    def _step(self) -> Iterator[tuple[str, Tensor]]:
        """Three optimiser steps on gradients that are the same everywhere, the adapter in its seat."""
        adapter = self._adapter(16)
        state, generator = TrainState(adapter), torch.Generator().manual_seed(3)
        self.base.borders.seat([(adapter, 0, 1)])
        with torch.no_grad(), self._face():
            for _ in range(3):
                state.grads.copy_(torch.randn(state.grads.shape, generator=generator))
                if self._programs is None:
                    optim_step(adapter, state, AdamParams(learning_rate=1e-2))
                else:
                    queue_step(self._programs, adapter, state, AdamParams(learning_rate=1e-2)).result()
        yield "optimiser: weights", adapter.params

    def _ahead(self) -> Iterator[tuple[str, Tensor]]:
        """Calls and steps of two adapters in turns, all queued before the first is read; of each a call is refused."""
        adapters, loss, adam = [self._adapter(rank) for rank in (16, 32)], get_loss("cross_entropy"), AdamParams()
        states, found, rounds = [TrainState(adapter) for adapter in adapters], [], 2 if self._dry else 4
        with torch.no_grad(), self._face():
            for i in range(rounds):
                data = batch(self.base.config, 96, 32, seed=i)
                if i == 1:
                    data[0].inputs["weights"][-1] = 3e38
                for adapter, state in zip(adapters, states, strict=True):
                    call = Call(adapter, state, data, loss, {})
                    if self._programs is None:
                        found.append(trainer.run_together(self.base, [call]))
                        optim_step(adapter, state, adam)
                    else:
                        found.append(self._programs.queue([call]))
                        queue_step(self._programs, adapter, state, adam)
        outcomes = [one.result() if isinstance(one, Pending) else one for one in found]
        for i, (outcome,) in enumerate(outcomes):
            if isinstance(outcome, ForwardBackwardOutput) is (i // 2 == 1):
                raise AssertionError(f"call {i}: expected each second one alone to be refused, got {outcome}")
            if isinstance(outcome, ForwardBackwardOutput):
                yield f"ahead, call {i}: loss", torch.tensor([outcome.metrics["loss:sum"]])
        for adapter in adapters:
            yield f"ahead, rank {adapter.rank}: weights", adapter.params

    def _decode(self) -> Iterator[tuple[str, Tensor]]:
        """Two prompts and three decode steps of each: the base model's and an adapter's."""
        cache = KVCache(self.base.config, self.base.dtype, 1 << 20, self.base.device)
        programs, generator = DecodePrograms(self.base, cache), np.random.default_rng(5)
        vocabulary, pieces = self.base.config.vocab_size, []
        for adapter, n in ((None, 5), (self._adapter(16), 40)):
            sequence = cache.open()
            cache.reserve(sequence, n)
            piece = Piece(adapter, sequence, generator.integers(0, vocabulary, n), 0)
            with torch.no_grad(), self._face():
                prefill(self.base, cache, [piece])
            sequence.length = n
            pieces.append(piece)
        for i in range(1 if self._dry else 3):
            new = []
            for piece in pieces:
                cache.reserve(piece.cache, 1)
                new.append(Piece(piece.adapter, piece.cache, generator.integers(0, vocabulary, 1), piece.cache.length))
                piece.cache.length += 1
            with torch.no_grad(), self._face("triton"):
                logits = decode(self.base, cache, new) if self._programs is None else programs.logits(_step(cache, new))
            yield f"decode step {i}: logits", logits
