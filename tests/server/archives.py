"""PEFT adapters as tar.gz, honest and hostile ones."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"


def tar_gz(files: Mapping[str, bytes] | Iterable[tuple[str, bytes]], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=format) as tar:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5  # a fraction: written as an extended header in pax format
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tar_gz_of(*members: tarfile.TarInfo) -> bytes:
    """Members without content: links, devices."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in members:
            tar.addfile(member)
    return buffer.getvalue()


def config(base_model: str | Path, rank: int = 4, **changes: Any) -> bytes:
    """As PEFT writes it."""
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": rank,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    return json.dumps(fields | changes).encode()


def tensors(shapes: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random factors for modules {name: (in_features, out_features)}."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for module, (inputs, outputs) in shapes.items():
        made[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        made[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    return made


def model(values: Mapping[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save(dict(values))
