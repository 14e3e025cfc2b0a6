"""Adapters and training states on disk, as safetensors in the layout PEFT reads. Nothing is ever unpickled.

A sampler checkpoint is a PEFT directory: `adapter_config.json` and `adapter_model.safetensors`. A training checkpoint
is the same with `optimizer.safetensors` beside it: Adam's moments, its step count, and gradients not yet applied.
All tensors are float32, bit for bit.

These functions write into a directory they are given; making that atomic is the store's business.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from mint_engine.errors import CheckpointError, StorageError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
OPTIMIZER_STATE = "optimizer.safetensors"

_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_NUMPY_DTYPES = ("F16", "F32", "F64")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")

# PEFT options that change what an adapter computes, and the value under which it computes what ours does.
_PLAIN_LORA: dict[str, Any] = {
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


@dataclass(frozen=True)
class AdapterMeta:
    """What `adapter_config.json` says. `tied`: whether the base ties its embeddings; None if the file is not ours."""

    base_model: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    tied: bool | None = None

    @property
    def scale(self) -> float:
        """alpha / rank, the factor of B A x."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class TrainingState:
    """Everything needed to continue training: `tensors`, `exp_avg`, `exp_avg_sq` and `gradients` have the same names.

    step: optimiser steps taken. gradients: accumulated since the last step, or None.
    """

    meta: AdapterMeta
    tensors: dict[str, torch.Tensor]
    exp_avg: dict[str, torch.Tensor]
    exp_avg_sq: dict[str, torch.Tensor]
    step: int
    gradients: dict[str, torch.Tensor] | None


def write_adapter(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    base_model: str,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    tied: bool,
) -> None:
    """Write a PEFT LoRA adapter into `directory`.

    Args:
        tensors: float32, named as PEFT saves them: `base_model.model.<module>.lora_A.weight` [rank, K] and
            `...lora_B.weight` [N, rank].
        target_modules: the last parts of the adapted modules' names (`q_proj`, ..., `lm_head`).
        tied: the base ties its embeddings. Recorded for tools that merge: a merged head must be untied first.

    Raises:
        StorageError: the disk refused (for example: it is full).
        CheckpointError: the tensors are not such an adapter.
    """
    _check_factors(tensors, rank, directory / ADAPTER_MODEL)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(target_modules),
        "inference_mode": True,
        "init_lora_weights": True,
        **_PLAIN_LORA,
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    _save_tensors(directory / ADAPTER_MODEL, tensors, {"tied_word_embeddings": json.dumps(tied)})


def read_adapter(directory: Path) -> tuple[AdapterMeta, dict[str, torch.Tensor]]:
    """Read a PEFT LoRA adapter: ours, or any other without options that change the computation.

    Returns: what the config says, and the tensors in float32 on the CPU, by PEFT's names.

    Raises:
        CheckpointError: a file is missing, damaged, or not a plain LoRA adapter; names the file and the problem.
    """
    config = _read_json(directory / ADAPTER_CONFIG)
    tensors, metadata = _load_tensors(directory / ADAPTER_MODEL)
    meta = _parse_config(config, metadata, directory / ADAPTER_CONFIG)
    _check_factors(tensors, meta.rank, directory / ADAPTER_MODEL)
    return meta, tensors


def open_adapter(
    directory: Path,
) -> tuple[AdapterMeta, dict[str, torch.Tensor], Callable[[str], torch.Tensor]]:
    """What `read_adapter` gives, but the tensors have shapes only (they are on torch's meta device).

    The function reads one of them. The file stays open as long as it is kept, whatever becomes of the directory.
    """
    config = _read_json(directory / ADAPTER_CONFIG)
    file = _TensorFile(directory / ADAPTER_MODEL)
    meta = _parse_config(config, file.metadata, directory / ADAPTER_CONFIG)
    shapes = {name: torch.empty(file.shape(name), device="meta") for name in file.names}
    _check_factors(shapes, meta.rank, directory / ADAPTER_MODEL)
    return meta, shapes, file.read


def read_meta(directory: Path) -> AdapterMeta:
    """What `adapter_config.json` says, without reading the tensors. Raises CheckpointError."""
    return _parse_config(_read_json(directory / ADAPTER_CONFIG), {}, directory / ADAPTER_CONFIG)


def write_training_state(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    base_model: str,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    tied: bool,
    exp_avg: Mapping[str, torch.Tensor],
    exp_avg_sq: Mapping[str, torch.Tensor],
    step: int,
    gradients: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter (see `write_adapter`) and the optimiser's state beside it.

    Args:
        exp_avg, exp_avg_sq: Adam's first and second moments, float32, named and shaped as `tensors`.
        step: optimiser steps taken.
        gradients: accumulated and not yet applied, named and shaped as `tensors`.
    """
    write_adapter(
        directory, tensors, base_model=base_model, rank=rank, alpha=alpha, target_modules=target_modules, tied=tied
    )
    groups = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq} | ({} if gradients is None else {"gradient": gradients})
    path = directory / OPTIMIZER_STATE
    for group, state in groups.items():
        _check_like(state, tensors, group, path)
    flat = {f"{group}/{name}": tensor for group, state in groups.items() for name, tensor in state.items()}
    _save_tensors(path, flat, {"step": str(step)})


def read_training_state(directory: Path) -> TrainingState:
    """Read what `write_training_state` wrote.

    Raises:
        CheckpointError: a file is missing or damaged, or the directory is a sampler checkpoint (no optimiser state).
    """
    path = directory / OPTIMIZER_STATE
    meta, tensors = read_adapter(directory)
    if not path.is_file():
        raise CheckpointError(f"{path}: missing: this checkpoint holds weights only, not the optimizer's state")
    flat, metadata = _load_tensors(path)
    groups: dict[str, dict[str, torch.Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}, "gradient": {}}
    for key, tensor in flat.items():
        group, _, name = key.partition("/")
        if group not in groups:
            raise CheckpointError(f"{path}: expected tensors of exp_avg, exp_avg_sq or gradient, got {key!r}")
        groups[group][name] = tensor
    for group, state in groups.items():
        if state or group != "gradient":
            _check_like(state, tensors, group, path)
    try:
        step = int(metadata["step"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged metadata ({error!r})") from error
    return TrainingState(meta, tensors, groups["exp_avg"], groups["exp_avg_sq"], step, groups["gradient"] or None)


def _parse_config(config: dict[str, Any], metadata: Mapping[str, str], path: Path) -> AdapterMeta:
    def problem(text: str) -> CheckpointError:
        return CheckpointError(f"{path}: {text}")

    if config.get("peft_type") != "LORA":
        raise problem(f"expected peft_type 'LORA', got {config.get('peft_type')!r}")
    for option, plain in _PLAIN_LORA.items():
        value = config.get(option, plain)
        if value != plain and not (not value and not plain):  # None, [] and {} all mean "unused"
            raise problem(f"expected {option} = {plain!r}, got {value!r}: this kind of adapter is not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise problem(f"r: expected an integer of at least 1, got {rank!r}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise problem(f"lora_alpha: expected a number, got {alpha!r}")
    modules = config.get("target_modules")
    if isinstance(modules, str):
        modules = [modules]  # PEFT's regular expression, or "all-linear": the tensors tell which modules there are
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise problem(f"target_modules: expected a list of names, got {modules!r}")
    tied = metadata.get("tied_word_embeddings")
    return AdapterMeta(
        base_model=str(config.get("base_model_name_or_path") or ""),
        rank=rank,
        alpha=alpha,
        target_modules=tuple(modules),
        tied=None if tied is None else tied == "true",
    )


def _check_factors(tensors: Mapping[str, torch.Tensor], rank: int, path: Path) -> None:
    """Every tensor is a factor A [rank, K] or B [N, rank], and no factor lacks its other half."""
    found: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{path}: expected LoRA factors named ...lora_A.weight or ...lora_B.weight, got {name}"
            )
        size = tensor.shape[0 if match["factor"] == "A" else -1] if tensor.ndim == 2 else None
        if size != rank:
            wanted = f"[{rank}, K]" if match["factor"] == "A" else f"[N, {rank}]"
            raise CheckpointError(f"{path}: {name}: expected shape {wanted}, got {list(tensor.shape)}")
        found.setdefault(match["module"], set()).add(match["factor"])
    lonely = [module for module, factors in found.items() if len(factors) == 1]
    if lonely:
        raise CheckpointError(f"{path}: {lonely[0]}: expected lora_A and lora_B, got only one of them")
    if not found:
        raise CheckpointError(f"{path}: holds no LoRA factors")


def _check_like(state: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], group: str, path: Path) -> None:
    for name in [*tensors, *state]:
        there = [name in tensors, name in state]
        if not all(there):
            raise CheckpointError(f"{path}: {group}/{name}: {'missing' if there[0] else 'unexpected'}")
        if state[name].shape != tensors[name].shape:
            raise CheckpointError(
                f"{path}: {group}/{name}: expected shape {list(tensors[name].shape)}, got {list(state[name].shape)}"
            )


def _save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"{path.name}: {name}: expected float32, got {tensor.dtype}")
    # clone() gives each view of a flat buffer its own storage, which the format's writer insists on.
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    try:
        safetensors.torch.save_file(owned, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        refused = _OS_ERROR.search(str(error))
        if refused is None:
            raise
        number = int(refused[1])
        raise StorageError(number, f"writing {path.name} failed: {os.strerror(number)}") from error


def _load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    file = _TensorFile(path)
    return {name: file.read(name) for name in file.names}, file.metadata


class _TensorFile:
    """A file of tensors whose header has been read."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        self._path = path
        with self._damage():
            # By way of numpy, which knows no bfloat16: safetensors 0.8 leaks two integers with every tensor it makes
            # for torch, and is three times as slow.
            self._file, self._wide = safe_open(path, framework="np"), safe_open(path, framework="pt")
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            self.names: list[str] = list(self._file.keys())

    def shape(self, name: str) -> list[int]:
        return list(self._file.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        with self._damage():
            numpy_knows = self._file.get_slice(name).get_dtype() in _NUMPY_DTYPES
            tensor = torch.from_numpy(self._file.get_tensor(name)) if numpy_knows else self._wide.get_tensor(name)
            # The file is mapped into memory: copy, so that replacing or removing it cannot reach a loaded tensor.
            return tensor.to(torch.float32, copy=True)

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise CheckpointError(f"{self._path}: damaged ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: damaged (expected a JSON object, got {type(value).__name__})")
    return value
