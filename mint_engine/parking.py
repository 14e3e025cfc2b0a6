"""A model or a sampler put aside on disk, such that it goes on later, perhaps in another process, bit for bit.

A parked model is the directory of a training checkpoint (`checkpoint.py`) with its adapter's configuration beside it.
Unlike a checkpoint it may hold pending gradients that are not finite: the step that would have refused them still will.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from mint_engine.adapters import Adapter, TrainState
from mint_engine.checkpoint import read_meta, read_training_state, write_training_state
from mint_engine.errors import CheckpointError
from mint_engine.state import description
from mint_engine.types import LoraConfig

if TYPE_CHECKING:
    from mint_engine.bases import Base

LORA = "lora.json"


def parked_base(directory: Path) -> str:
    """The name of the base model that what is parked there belongs to."""
    return read_meta(directory).base_model


def park_model(adapter: Adapter, state: TrainState, base: Base) -> Callable[[Path], None]:
    """A writer of the model as it is. Nothing may change the model until it has run."""

    def write(directory: Path) -> None:
        write_training_state(
            directory,
            dict(adapter.named(adapter.params)),
            exp_avg=dict(adapter.named(state.exp_avg)),
            exp_avg_sq=dict(adapter.named(state.exp_avg_sq)),
            step=state.step,
            gradients=dict(adapter.named(state.grads)) if state.has_grads else None,
            **description(adapter, base),
        )
        (directory / LORA).write_text(adapter.lora.model_dump_json() + "\n")

    return write


def revive_model(directory: Path, base: Base) -> tuple[Adapter, TrainState]:
    """What :func:`park_model` wrote.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    stored = read_training_state(directory)
    try:
        lora = LoraConfig.model_validate_json((directory / LORA).read_text())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{directory / LORA}: missing or damaged ({error})") from error
    adapter = Adapter(base.decoder.groups, lora, base.decoder.device)
    state = TrainState(adapter)
    adapter.load(stored.tensors, adapter.params, str(directory))
    for tensors, flat in (
        (stored.exp_avg, state.exp_avg),
        (stored.exp_avg_sq, state.exp_avg_sq),
        (stored.gradients, state.grads),
    ):
        if tensors is not None:
            adapter.load(tensors, flat, str(directory), below=None)
    state.step, state.has_grads = stored.step, stored.gradients is not None
    return adapter, state
