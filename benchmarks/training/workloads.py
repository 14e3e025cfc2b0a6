"""What is trained on: batches of datums, and the shapes they run through."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mint_engine.demo import process_sft_example, questions
from mint_engine.models.config import ModelConfig
from mint_engine.models.gguf import smollm2_directory
from mint_engine.types import Datum, ModelInput

RANK = 16
SEQUENCE = 512
QWEN_SEQUENCES = 2  # eight do not fit: PEFT's float32 step would take some 7 MB a token, three processes stay loaded
RAGGED = [2048, 16, 700, 128, 350, 64, 33, 512, 245]


@dataclass(frozen=True)
class Workload:
    """A model's directory and a batch. ``long``: seconds a step, few rounds."""

    name: str
    model: Path
    data: list[Datum]
    long: bool
    note: str = ""

    @property
    def lengths(self) -> list[int]:
        return [d.model_input.length for d in self.data]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def weighted(self) -> int:
        return int(sum(np.count_nonzero(weights(d)) for d in self.data))

    def flops(self, config: ModelConfig, *, masked_logprobs: bool = True) -> float:
        """Multiply-adds x 2 that no LoRA step can avoid.

        Every linear forward and for its input's gradient (not qkv of the first layer: the embedding is frozen), the
        adapters three times, attention's two products forward and five backward under the causal mask, and the
        unembedding once for each row whose log-probability is reported and once more for each in the loss. In the
        last layer, rows outside the loss need K and V only: in the backward, and in the forward too if their
        log-probabilities are not asked for.
        """
        h, f, d = config.hidden_size, config.intermediate_size, config.head_dim
        q, kv = config.num_heads * d, config.num_kv_heads * d
        linears, qkv = h * (q + 2 * kv) + q * h + 3 * h * f, h * (q + 2 * kv)
        adapter = RANK * (3 * h + q + 2 * kv + q + h + 2 * h + 2 * f + f + h)
        total = self.tokens * (config.num_layers * (2 * linears + 3 * adapter) - qkv)
        total += config.num_layers * 7 * q * sum(n * (n + 1) // 2 for n in self.lengths)
        masked, avoidable = self.tokens - self.weighted, linears - 2 * h * kv
        total -= masked * avoidable * (1 if masked_logprobs else 2)
        reported = self.tokens if masked_logprobs else self.weighted
        total += (reported + self.weighted) * config.vocab_size * h + 3 * self.weighted * RANK * (config.vocab_size + h)
        return 2.0 * total


def weights(datum: Datum) -> np.ndarray:
    return np.asarray(datum.loss_fn_inputs["weights"].tolist(), dtype=np.float32)


def home() -> Path:
    return Path(os.environ.get("MINT_HOME") or Path.home() / ".mint-engine")


def random_data(lengths: list[int], vocab: int) -> list[Datum]:
    """Random tokens; the last quarter of each sequence is in the loss."""
    rng = np.random.default_rng(0)
    data = []
    for n in lengths:
        tokens = rng.integers(0, vocab, n + 1)
        inputs = {"target_tokens": tokens[1:], "weights": (np.arange(n) >= n - -(-n // 4)).astype(np.float32)}
        data.append(Datum(ModelInput.from_ints(tokens[:-1].tolist()), inputs))
    return data


def qwen_directory() -> Path:
    """A model of Qwen3-0.6B's shape with random weights, made once: no weights are downloaded."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    directory = home() / "models" / "random-qwen3-0.6b"
    if not (directory / "model.safetensors").exists():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=40960,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def demo() -> Workload:
    from transformers import AutoTokenizer

    directory = smollm2_directory(home())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return Workload("demo", directory, [process_sft_example(ex, tokenizer) for ex in questions(16, seed=0)], False)


def long(sequences: int = 8) -> Workload:
    return Workload("long", smollm2_directory(home()), random_data([SEQUENCE] * sequences, 49152), True)


def qwen(sequences: int = QWEN_SEQUENCES) -> Workload:
    note = f"{sequences} sequences: with 8, PEFT does not fit into 20 GB"
    return Workload("qwen", qwen_directory(), random_data([SEQUENCE] * sequences, 151936), True, note)


def ragged() -> Workload:
    return Workload("ragged", smollm2_directory(home()), random_data(RAGGED, 49152), True)


def tiny(directory: Path, vocab: int) -> Workload:
    """For the tests of this benchmark."""
    return Workload("tiny", directory, random_data([9, 24, 17], vocab), False)


WORKLOADS: dict[str, Callable[[], Workload]] = {"demo": demo, "long": long, "qwen": qwen, "ragged": ragged}
TITLES = {
    "demo": "the demo's batch, SmolLM2-135M",
    "long": f"8 x {SEQUENCE} tokens, 25 % in the loss, SmolLM2-135M",
    "qwen": f"{QWEN_SEQUENCES} x {SEQUENCE} tokens, 25 % in the loss, Qwen3-0.6B's shape",
    "ragged": "9 sequences of 16 to 2048 tokens, SmolLM2-135M",
}
