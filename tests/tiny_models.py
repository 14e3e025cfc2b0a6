"""Small random models of every supported family, made by transformers: the truth our models are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}

# Name of the model -> config class and what it changes.
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama-bias": (LlamaConfig, {"attention_bias": True}),
    "llama3": (LlamaConfig, {"rope_parameters": _LLAMA3}),
    "llama-linear": (LlamaConfig, {"rope_parameters": _LINEAR}),
    "llama-yarn": (LlamaConfig, {"rope_parameters": _YARN}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 24}),
    "qwen3-tied": (Qwen3Config, {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-yarn": (Qwen3Config, {"head_dim": 24, "rope_parameters": _YARN}),
}


def build_tiny(
    family: str,
    tmp_dir: Path,
    *,
    sharded: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Save a random model of ``family`` (a key of FAMILIES) under ``tmp_dir`` and return its directory.

    Hidden 64, 3 layers, 4 query and 2 key/value heads of 16 (Qwen3: 24, so that heads * head_dim != hidden),
    vocabulary 199, context 512. ``overrides`` are config fields. Every parameter is random, also norms and biases, and
    large enough to matter: a norm weight or a bias that is left out must not pass unseen. ``sharded`` splits the
    weights over several files.
    """
    config_class, changes = FAMILIES[family]
    fields: dict[str, Any] = {
        "vocab_size": 199, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    # transformers writes into the RoPE mapping it is given, hence the copy.
    fields |= {key: dict(value) if isinstance(value, dict) else value for key, value in (changes | overrides).items()}
    model = AutoModelForCausalLM.from_config(config_class(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name else parameter.shape[1] ** -0.5))
    directory = Path(tmp_dir) / f"tiny-{family}"
    model.to(dtype).save_pretrained(directory, max_shard_size="100KB" if sharded else "5GB")
    return directory
