"""Anybody's PEFT LoRA adapter as one of ours: same function of the input, written as this engine writes it.

Our adapters have lora_alpha = 32, and adapt whole groups of modules (attention, MLP, unembedding). An adapter with
another alpha, or with rank-stabilised scaling, gets the difference multiplied into B; a module it leaves out gets a
B of zeros, which adds nothing to the output and can be trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mint_engine.adapters import Adapter, LinearGroup
from mint_engine.checkpoint import ADAPTER_CONFIG, ADAPTER_MODEL, read_adapter, write_adapter
from mint_engine.errors import CheckpointError, UserError
from mint_engine.models.config import ModelConfig, load_config
from mint_engine.models.decoder import head_group, layer_groups
from mint_engine.server.uploads import check_safetensors, read_config
from mint_engine.types import LORA_ALPHA, MAX_RANK, LoraConfig

_MAX_ALPHA = 1e6
_FLAGS = ("train_attn", "train_mlp", "train_unembed")
_PREFIX, _SUFFIX_A, _SUFFIX_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def named_base(directory: Path) -> str:
    """The base model that an unpacked adapter says it is for. Raises UserError if it does not say."""
    name = read_config(directory).get("base_model_name_or_path")
    if not isinstance(name, str) or not name or len(name) > 512:
        raise UserError(f"{ADAPTER_CONFIG}: base_model_name_or_path: expected the name of a base model, got {name!r}")
    return name


def adopt(source: Path, target: Path, *, base_model: str, base_directory: Path) -> LoraConfig:
    """Read the unpacked adapter in `source`, and write it into the empty directory `target` as we write adapters.

    Args:
        base_model: what the base is called on this server. base_directory: where its config.json is.

    Returns: its rank, and which groups of modules it adapts.

    Raises:
        UserError: it is damaged, not a plain LoRA, or does not fit the base model; the message says where.
    """
    base = load_config(base_directory)
    config = read_config(source)
    modules = {name: group for group in _groups(base) for name, _ in group.modules}
    flags = _check_shapes(check_safetensors(source / ADAPTER_MODEL), modules, _rank(config))
    _make_plain(source, config)
    try:
        meta, tensors = read_adapter(source)
    except CheckpointError as error:  # where we unpacked it is nobody's business
        raise UserError(str(error).replace(f"{source}/", "")) from None
    try:
        lora = LoraConfig(rank=meta.rank, seed=0, **{flag: flag in flags for flag in _FLAGS})
    except ValidationError as error:
        raise UserError(f"{ADAPTER_CONFIG}: {error.errors()[0]['msg']}") from None

    adapter = Adapter(_groups(base), lora)
    scaled = {
        name: tensor * (meta.alpha / LORA_ALPHA) if name.endswith(_SUFFIX_B) else tensor
        for name, tensor in tensors.items()
    }
    complete = {name: view.clone() for name, view in adapter.named(adapter.params)} | scaled
    adapter.load(complete, adapter.params, "the adapter")  # refuses what is not finite
    write_adapter(
        target,
        dict(adapter.named(adapter.params)),
        base_model=base_model,
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=adapter.target_modules,
        tied=base.tie_word_embeddings,
    )
    return lora


def _groups(base: ModelConfig) -> tuple[LinearGroup, ...]:
    return (*(group for layer in layer_groups(base) for group in layer), head_group(base))


def _rank(config: Mapping[str, Any]) -> int:
    rank = config.get("r")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise UserError(f"{ADAPTER_CONFIG}: r: expected an integer from 1 to {MAX_RANK}, got {str(rank)[:100]}")
    return rank


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], modules: Mapping[str, LinearGroup], rank: int) -> set[str]:
    """Every tensor is a factor of a linear of the base. Returns the LoraConfig flags under which those are trained."""
    sizes = {name: n for group in modules.values() for name, n in group.modules}
    flags = set()
    for name, shape in shapes.items():
        module = name.removeprefix(_PREFIX).removesuffix(_SUFFIX_A).removesuffix(_SUFFIX_B)
        group = modules.get(module)
        if group is None or not name.startswith(_PREFIX) or not name.endswith((_SUFFIX_A, _SUFFIX_B)):
            raise UserError(
                f"{ADAPTER_MODEL}: {name[:200]!r} is no LoRA factor of this base model; expected for example "
                f"{_PREFIX}{next(iter(modules))}{_SUFFIX_A}"
            )
        wanted = (rank, group.in_features) if name.endswith(_SUFFIX_A) else (sizes[module], rank)
        if shape != wanted:
            raise UserError(f"{ADAPTER_MODEL}: {name}: expected shape {list(wanted)}, got {list(shape)}")
        flags.add(group.trained_by)
    return flags


def _make_plain(directory: Path, config: dict[str, Any]) -> None:
    """alpha / sqrt(r) is what a plain adapter with alpha' = alpha * sqrt(r) has."""
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _MAX_ALPHA:
        raise UserError(f"{ADAPTER_CONFIG}: lora_alpha: expected a number below {_MAX_ALPHA:g}, got {str(alpha)[:100]}")
    if config.get("use_rslora") is True:
        config = {**config, "use_rslora": False, "lora_alpha": alpha * math.sqrt(_rank(config))}
        (directory / ADAPTER_CONFIG).write_text(json.dumps(config))
