"""Greedy samples in float32 are transformers' on real prompts, sampled together, with speculation and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from helpers import load_decoder
from sampling_helpers import drain, make_sampler, request

from mint_engine.models.gguf import smollm2_directory

pytestmark = pytest.mark.slow  # a real model, most of a minute

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Ingredients: two eggs, a cup of flour, half a cup of milk and a pinch of salt. Method: First,",
    "1, 2, 3, 1, 2, 3, 1, 2, 3,",
]


def test_greedy_samples_are_those_of_transformers(smollm2_home: Path) -> None:
    directory = smollm2_directory(smollm2_home)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    decoder = load_decoder(directory)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
        expected.append(found[0, len(prompt) :].tolist())
    for speculation in (0, 7):
        sampler = make_sampler(decoder, 100, speculation=speculation)
        futures = [sampler.submit(request(p, max_tokens=32, temperature=0.0)) for p in prompts]
        assert [answer.sequences[0].tokens for answer in drain(sampler, futures)] == expected
