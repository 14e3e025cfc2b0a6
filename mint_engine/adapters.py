"""LoRA adapters: fp32 masters, gradients and moments in flat buffers, and the place each takes in a border.

Scaling is alpha / r with alpha = 32 for every rank, so that the best learning rate does not move with the rank
("LoRA Without Regret", Schulman et al., 2025). B starts at zero; A is uniform in ±1/sqrt(K), as in PEFT.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mint_engine.errors import NonFiniteError, UserError
from mint_engine.kernels import adamw_largest, adamw_norm
from mint_engine.types import LoraConfig

# What weights have to stay below, in magnitude: a thousandth of fp32's range and of bf16's. An infinity in a border
# would reach its neighbours' rows (0 * inf).
LARGEST = 1e35


@dataclass(frozen=True)
class LinearGroup:
    """Frozen linears that share an input and are stacked on N: ``modules`` is ((PEFT name, N_j), ...)."""

    name: str
    trained_by: str  # the LoraConfig flag: "train_attn", "train_mlp" or "train_unembed"
    in_features: int
    modules: tuple[tuple[str, int], ...]

    @property
    def out_features(self) -> int:
        return sum(n for _, n in self.modules)


@dataclass(frozen=True)
class GroupFactors:
    """One group's factors as views of a flat buffer: ``a`` [m*r, K] stacked, ``b[j]`` [N_j, r]."""

    a: Tensor
    b: tuple[Tensor, ...]


class Adapter:
    """The trainable state of one LoRA adapter. All tensors are fp32 views of four flat buffers of the same layout."""

    _ids = itertools.count()

    def __init__(self, groups: tuple[LinearGroup, ...], lora: LoraConfig, device: torch.device | str = "cpu") -> None:
        self.lora = lora
        self.rank = lora.rank
        self.scale = lora.scale
        self.groups = tuple(g for g in groups if getattr(lora, g.trained_by))
        self.uid = next(self._ids)
        self.version = 0  # counts changes of params; a border that holds an older one is stale
        size = sum(self.rank * (len(g.modules) * g.in_features + g.out_features) for g in self.groups)
        self.params = torch.zeros(size, dtype=torch.float32)
        self.factors = self.views(self.params)
        self._init_a(lora.seed)  # on the CPU: the same seed gives the same weights on every device
        if self.params.device != torch.device(device):
            self.params = self.params.to(device)
            self.factors = self.views(self.params)

    def views(self, flat: Tensor) -> dict[str, GroupFactors]:
        """``flat`` [size] cut into the factors of each group, by group name."""
        out, pos, r = {}, 0, self.rank

        def take(rows: int, cols: int) -> Tensor:
            nonlocal pos
            pos += rows * cols
            return flat[pos - rows * cols : pos].view(rows, cols)

        for g in self.groups:
            a = take(len(g.modules) * r, g.in_features)
            out[g.name] = GroupFactors(a, tuple(take(n, r) for _, n in g.modules))
        return out

    def named(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of ``flat`` under PEFT's state-dict names: A [r, K] and B [N, r] of every module."""
        views, r = self.views(flat), self.rank
        for g in self.groups:
            for j, (module, _) in enumerate(g.modules):
                yield f"base_model.model.{module}.lora_A.weight", views[g.name].a[j * r : (j + 1) * r]
                yield f"base_model.model.{module}.lora_B.weight", views[g.name].b[j]

    @property
    def target_modules(self) -> list[str]:
        """The module names PEFT targets, for example ``["q_proj", ..., "lm_head"]``."""
        return list(dict.fromkeys(module.rsplit(".", 1)[-1] for g in self.groups for module, _ in g.modules))

    def snapshot(self) -> Adapter:
        """An immutable copy of the weights as they are now (no gradients, no moments): what a sampler serves.

        Raises NonFiniteError if a weight is not finite, or not below ``LARGEST``.
        """
        self.check_finite()
        copy = self.shaped()
        copy.params.copy_(self.params)
        return copy

    def shaped(self) -> Adapter:
        """An adapter of the same shape whose parameters are zero: a place for gradients, say."""
        other = object.__new__(Adapter)
        other.lora, other.rank, other.scale, other.groups = self.lora, self.rank, self.scale, self.groups
        other.uid, other.version = next(self._ids), 0
        other.params = torch.zeros_like(self.params)
        other.factors = other.views(other.params)
        return other

    def outline(self) -> Adapter:
        """An adapter of the same shape without memory for parameters: one that sits in the border already."""
        other = object.__new__(Adapter)
        other.lora, other.rank, other.scale, other.groups = self.lora, self.rank, self.scale, self.groups
        other.uid, other.version = next(self._ids), 0
        other.params = torch.empty_like(self.params, device="meta")
        other.factors = other.views(other.params)
        return other

    def check_finite(self) -> None:
        """Raises NonFiniteError if a weight is not finite, or not below ``LARGEST``."""
        if not _below(self.params, LARGEST):
            raise NonFiniteError(f"adapter: it has weights that are not finite, or not below {LARGEST}")

    def load(self, tensors: dict[str, Tensor], flat: Tensor, what: str, *, below: float | None = LARGEST) -> None:
        """Copy PEFT-named tensors into ``flat``, all or nothing.

        Raises:
            UserError: names or shapes differ; the message lists the difference.
            NonFiniteError: a magnitude is not ``below`` that (infinity: not finite; None: anything goes).
        """
        wanted = dict(self.named(flat))
        problems = [f"missing {name}" for name in wanted if name not in tensors]
        problems += [f"unexpected {name}" for name in tensors if name not in wanted]
        problems += [
            f"{name}: expected shape {list(wanted[name].shape)}, got {list(tensors[name].shape)}"
            for name in wanted
            if name in tensors and wanted[name].shape != tensors[name].shape
        ]
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise UserError(f"{what}: does not fit this adapter: {'; '.join(problems[:5])}{more}")
        if below is not None and not all(_below(tensors[name], below) for name in wanted):
            beyond = "" if below == math.inf else f", or not below {below}"
            raise NonFiniteError(f"{what}: it has values that are not finite{beyond}")
        for name, view in wanted.items():
            view.copy_(tensors[name])

    def _init_a(self, seed: int | None) -> None:
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        for g in self.groups:
            # kaiming_uniform(a=sqrt(5)) over K inputs, PEFT's init, is uniform in ±1/sqrt(K).
            bound = 1.0 / math.sqrt(g.in_features)
            self.factors[g.name].a.uniform_(-bound, bound, generator=generator)


def _below(tensor: Tensor, limit: float) -> bool:
    """Whether all magnitudes are below the limit; False if there is a NaN."""
    low, high = torch.aminmax(tensor)
    return bool(-limit < low) and bool(high < limit)


class TrainState:
    """What training adds to an adapter: accumulated gradients, Adam's moments and the step count."""

    def __init__(self, adapter: Adapter) -> None:
        self.grads = torch.zeros_like(adapter.params)
        self.factors = adapter.views(self.grads)
        self.exp_avg = torch.zeros_like(adapter.params)
        self.exp_avg_sq = torch.zeros_like(adapter.params)
        self.step = 0
        self.has_grads = False
        self.settle: Callable[[], None] | None = None  # waits for a step that is on a device and counts it
        self._norm: tuple[int, float] | None = None
        self._largest: tuple[tuple[int, ...], float] | None = None

    def zero_grads(self) -> None:
        self.grads.zero_()
        self.has_grads = False

    # A tensor's _version counts what torch writes to it or to a view of it. What kernels write is not counted: after
    # their gradients comes measure_norm, after their step taken.

    def measure_norm(self) -> float:
        """The L2 norm of the gradients, which :meth:`norm` then knows."""
        norm = adamw_norm(self.grads)
        self._norm = self.grads._version, norm
        return norm

    def norm(self) -> float:
        """The same; as measured, if nothing has been written since."""
        if self._norm is not None and self._norm[0] == self.grads._version:
            return self._norm[1]
        return self.measure_norm()

    def largest(self, adapter: Adapter) -> float:
        """The largest magnitude of a parameter; NaN if one is not finite. As measured, if nothing was written since."""
        if self._largest is not None and self._largest[0] == _written(adapter):
            return self._largest[1]
        largest = adamw_largest(adapter.params)
        self._largest = _written(adapter), largest
        return largest

    def taken(self, adapter: Adapter, largest: float | None) -> None:
        """A kernel has taken a step and emptied the gradients; ``largest``: what it found out about the parameters."""
        self.has_grads, self._norm = False, None
        self._largest = None if largest is None else (_written(adapter), largest)


def _written(adapter: Adapter) -> tuple[int, ...]:
    return adapter.uid, adapter.version, adapter.params._version
