"""An adapter and its training state to and from a checkpoint directory, with every mismatch spelled out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mint_engine.adapters import Adapter, TrainState
from mint_engine.checkpoint import (
    OPTIMIZER_STATE,
    AdapterMeta,
    read_adapter,
    read_training_state,
    write_adapter,
    write_training_state,
)
from mint_engine.errors import CheckpointError
from mint_engine.types import LoraConfig

if TYPE_CHECKING:
    from mint_engine.bases import Base

_FLAG_OF_MODULE = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "train_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "train_mlp"),
    "lm_head": "train_unembed",
}


def save_adapter(snapshot: Adapter, base: Base) -> Callable[[Path], None]:
    """A writer of a PEFT directory. ``snapshot`` must not change until it has run."""

    def write(directory: Path) -> None:
        write_adapter(directory, dict(snapshot.named(snapshot.params)), **description(snapshot, base))

    return write


def save_state(adapter: Adapter, state: TrainState, base: Base) -> Callable[[Path], None]:
    """A writer of the PEFT directory plus moments, step and gradients not applied yet, all as they are now."""
    snapshot = adapter.snapshot()
    exp_avg, exp_avg_sq, step = state.exp_avg.clone(), state.exp_avg_sq.clone(), state.step
    grads = state.grads.clone() if state.has_grads else None

    def write(directory: Path) -> None:
        write_training_state(
            directory,
            dict(snapshot.named(snapshot.params)),
            exp_avg=dict(snapshot.named(exp_avg)),
            exp_avg_sq=dict(snapshot.named(exp_avg_sq)),
            step=step,
            gradients=None if grads is None else dict(snapshot.named(grads)),
            **description(snapshot, base),
        )

    return write


def load_adapter(directory: Path, base: Base, what: str) -> Adapter:
    """A new adapter of the checkpoint's own rank and modules.

    Raises:
        CheckpointError: it is damaged, or does not fit the base model.
    """
    meta, tensors = read_adapter(directory)
    _check_base(meta, base, what)
    adapter = Adapter(base.decoder.groups, lora_of(meta, what), base.decoder.device)
    adapter.load(tensors, adapter.params, what)
    return adapter


def load_state(
    directory: Path, adapter: Adapter, state: TrainState, what: str, *, optimizer: bool, base: Base | None = None
) -> Callable[[], None]:
    """Read and check a checkpoint for an existing adapter; the function returned applies it, and cannot fail.

    Raises:
        CheckpointError: base model, rank, modules or shapes differ, the optimiser's state is not there, or the files
            are damaged.
    """
    meta, tensors = read_adapter(directory)
    if base is not None:
        _check_base(meta, base, what)
    differences = [] if meta.rank == adapter.rank else [f"rank {meta.rank}, this model has {adapter.rank}"]
    if set(meta.target_modules) != set(adapter.target_modules):
        theirs, ours = (", ".join(sorted(m)) for m in (meta.target_modules, adapter.target_modules))
        differences.append(f"modules {theirs}; this model trains {ours}")
    if differences:
        raise CheckpointError(f"{what}: does not fit: it has {'; '.join(differences)}")
    params = torch.empty_like(adapter.params)
    adapter.load(tensors, params, what)
    loaded = TrainState(adapter)
    if optimizer:
        if not (directory / OPTIMIZER_STATE).is_file():  # where it is on a server is not for its callers to know
            raise CheckpointError(f"{what}: holds weights only, not the optimizer's state")
        stored = read_training_state(directory)
        adapter.load(stored.exp_avg, loaded.exp_avg, what, below=math.inf)
        adapter.load(stored.exp_avg_sq, loaded.exp_avg_sq, what, below=math.inf)
        loaded.step = stored.step
        if stored.gradients is not None:
            adapter.load(stored.gradients, loaded.grads, what, below=math.inf)
            loaded.has_grads = True

    def apply() -> None:
        adapter.params.copy_(params)
        adapter.version += 1
        vars(state).update(vars(loaded))

    return apply


def description(adapter: Adapter, base: Base) -> dict[str, Any]:
    """What `checkpoint.write_adapter` wants to know of an adapter."""
    return {
        "base_model": base.name,
        "rank": adapter.rank,
        "alpha": adapter.lora.alpha,
        "target_modules": adapter.target_modules,
        "tied": base.config.tie_word_embeddings,
    }


def _check_base(meta: AdapterMeta, base: Base, what: str) -> None:
    if meta.base_model != base.name:
        raise CheckpointError(f"{what}: was trained on {meta.base_model!r}, this model is {base.name!r}")


def lora_of(meta: AdapterMeta, what: str) -> LoraConfig:
    """The configuration of an adapter of ours with that rank and those modules.

    Raises:
        CheckpointError: no such adapter of ours computes the same.
    """
    unknown = [m for m in meta.target_modules if m not in _FLAG_OF_MODULE]
    if unknown:
        raise CheckpointError(f"{what}: adapts modules this engine does not: {', '.join(unknown)}")
    lora = LoraConfig(rank=meta.rank, seed=0, **{
        flag: any(_FLAG_OF_MODULE[m] == flag for m in meta.target_modules)
        for flag in ("train_attn", "train_mlp", "train_unembed")
    })  # fmt: skip
    if meta.alpha != lora.alpha:
        raise CheckpointError(f"{what}: lora_alpha is {meta.alpha}, this engine's is {lora.alpha}")
    return lora
