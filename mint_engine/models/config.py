"""What the decoder must know about a model, read from a Hugging Face ``config.json`` and checked.

Everything a model's config asks for is either understood or refused by name: a setting that is ignored would give a
model that runs and is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mint_engine.errors import ModelError
from mint_engine.models.rope import RopeConfig

FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}

# Settings that change the computation, with the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "quantization_config": (),
    "compression_config": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "text_config": (),
    "vision_config": (),
    "audio_config": (),
    "use_mrope": (False,),
    "mrope_section": (),
    "dual_chunk_attention_config": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "attention_multiplier": (),
    "no_rope_layers": ([],),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
}


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder: RMSNorm, grouped-query attention with RoPE, SwiGLU.

    ``dtype`` is the one the weights were saved in, as the config spells it; nothing is computed from it.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_context_length: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    architecture: str
    dtype: str | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
        """Read the contents of ``config.json`` and, if there is one, ``generation_config.json``.

        Raises ModelError that names the architecture or the setting that is not supported, or the key that is missing.
        """
        architecture = _architecture(config)
        family = FAMILIES[architecture]
        num_layers = _count(config, "num_hidden_layers")
        num_heads = _count(config, "num_attention_heads")
        hidden_size = _count(config, "hidden_size")
        max_context_length = _count(config, "max_position_embeddings")
        _refuse_unsupported(config, architecture, num_layers, max_context_length)

        # A null or, in Llama, an absent key means one key/value head per query head.
        kv_heads = config.get("num_key_value_heads", num_heads if family == "llama" else 0)
        num_kv_heads = num_heads if kv_heads in (None, num_heads) else _count(config, "num_key_value_heads")
        if num_heads % num_kv_heads:
            raise ModelError(
                f"num_attention_heads: expected a multiple of num_key_value_heads = {num_kv_heads}, got {num_heads}"
            )
        if config.get("head_dim") is not None:
            head_dim = _count(config, "head_dim")
        else:
            head_dim = 128 if family == "qwen3" else hidden_size // num_heads
        if head_dim % 2:
            raise ModelError(f"head_dim: expected an even number (RoPE rotates pairs), got {head_dim}")

        attention_bias = bool(config.get("attention_bias", False))
        if family == "qwen2" and config.get("attention_bias") is False:
            raise ModelError("attention_bias: Qwen2 has biases on q, k and v; a model without them is not supported")
        generation_config = generation_config or {}
        bos = config.get("bos_token_id", generation_config.get("bos_token_id"))
        return cls(
            family=family,
            vocab_size=_count(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_count(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_epsilon(config.get("rms_norm_eps", 1e-6)),
            max_context_length=max_context_length,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias and family != "qwen2",
            qk_norm=family == "qwen3",
            rope=RopeConfig.from_hf(config),
            eos_token_ids=_eos(config, generation_config),
            bos_token_id=bos if isinstance(bos, int) else None,
            architecture=architecture,
            dtype=config.get("dtype") or config.get("torch_dtype"),
        )


def load_config(directory: Path) -> ModelConfig:
    """Read ``config.json`` and ``generation_config.json`` of a model directory. Raises ModelError naming the file."""
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{path}: no such file; a model directory holds it, *.safetensors and the tokenizer's files")
    generation = directory / "generation_config.json"
    try:
        return ModelConfig.from_hf(_read_json(path), _read_json(generation) if generation.is_file() else None)
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name}: expected a JSON object, got {type(value).__name__}")
    return value


def _architecture(config: Mapping[str, Any]) -> str:
    supported = f"(supported: {', '.join(FAMILIES)})"
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    if not architectures:
        for name, family in FAMILIES.items():
            if family == model_type:
                return name
        raise ModelError(f"model type {model_type!r} is not supported {supported}")
    name = architectures[0]
    if name not in FAMILIES:
        raise ModelError(f"architecture {name!r} is not supported {supported}")
    if model_type is not None and model_type != FAMILIES[name]:
        raise ModelError(f"architecture {name!r} with model type {model_type!r} is not supported {supported}")
    return name


def _refuse_unsupported(config: Mapping[str, Any], architecture: str, num_layers: int, max_context_length: int) -> None:
    for key, neutral in _NEUTRAL.items():
        value = config.get(key)
        if value is not None and value not in neutral:
            shown = repr(value) if not isinstance(value, (Mapping, list)) else "{...}"
            raise ModelError(f"{architecture} with {key} = {shown} is not supported")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{architecture} with hidden_act = {activation!r} is not supported (supported: 'silu')")

    window = config.get("sliding_window")
    layer_types = config.get("layer_types")
    if layer_types is not None:
        other = sorted({kind for kind in layer_types if kind != "full_attention"})
        if other:
            raise ModelError(f"{architecture} with layers of type {', '.join(other)} is not supported")
    elif window is not None and window < max_context_length:
        if FAMILIES[architecture] == "llama":
            in_use = config.get("use_sliding_window", True)
        else:
            in_use = config.get("use_sliding_window", False) and config.get("max_window_layers", 28) < num_layers
        if in_use:
            raise ModelError(f"{architecture} with sliding_window = {window} in use is not supported")


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = repr(value) if key in config else "no such key"
        raise ModelError(f"{key}: expected a positive integer in config.json, got {found}")
    return value


def _epsilon(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ModelError(f"rms_norm_eps: expected a number >= 0, got {value!r}")
    return float(value)


def _eos(*configs: Mapping[str, Any]) -> tuple[int, ...]:
    """End tokens of all configs, in order, each once: instruct models often name the turn's end in one file only."""
    found: list[int] = []
    for config in configs:
        value = config.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and token not in found:
                found.append(token)
    return tuple(found)
