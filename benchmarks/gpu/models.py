"""The shapes that are measured, with random weights: no network, and the arithmetic is the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.gpu.bench import Bench
from mint_engine.datums import CheckedDatum
from mint_engine.models.config import ModelConfig
from mint_engine.models.decoder import Decoder
from mint_engine.models.weights import expected_tensors

# hidden, MLP, layers, heads, kv heads, head dim, vocabulary, tied
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "0.6b": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "4b": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
    "check": (64, 128, 2, 4, 2, 16, 211, True),
    "tiny": (32, 48, 1, 2, 1, 16, 67, True),
}
RANK = 16
LENGTH = 2048
SHARE = 0.25  # of the tokens in the loss


def hf_config(name: str) -> Any:
    from transformers import Qwen3Config

    hidden, ffn, layers, heads, kv, d, vocab, tied = SHAPES[name]
    return Qwen3Config(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=d, vocab_size=vocab, tie_word_embeddings=tied,
        max_position_embeddings=40960, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def config(name: str) -> ModelConfig:
    return ModelConfig.from_hf(hf_config(name).to_dict() | {"architectures": ["Qwen3ForCausalLM"]})


class RandomReader:
    """Stands for a model's files: weights of the right shapes, made on the device when they are asked for."""

    def __init__(self, shape: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._shapes, self._device, self._dtype = expected_tensors(shape), device, dtype

    def get(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self._device, dtype=self._dtype)
        return torch.empty(shape, device=self._device, dtype=self._dtype).normal_(0.0, shape[1] ** -0.5)


def decoder(bench: Bench, name: str) -> Decoder:
    """The base model of that shape."""
    shape = config(name)
    found = Decoder(shape, RandomReader(shape, bench.device, bench.dtype), bench.dtype, device=bench.device)  # type: ignore[arg-type]
    if bench.device.type == "cuda":
        from mint_engine.gpu.memory import free_bytes

        found.activation_bytes = free_bytes(bench.device)
    return found


def batch(shape: ModelConfig, tokens: int, length: int, seed: int = 0) -> list[CheckedDatum]:
    """Sequences of ``length``; the last quarter of each is in the loss."""
    rng, data = np.random.default_rng(seed), []
    for _ in range(max(1, tokens // length)):
        ids = rng.integers(0, shape.vocab_size, length + 1)
        weights = (np.arange(length) >= length - int(length * SHARE)).astype(np.float32)
        data.append(CheckedDatum(ids[:-1], ids[1:, None], {"weights": weights[:, None]}, (length,)))
    return data
