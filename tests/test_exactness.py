"""Sampling and training give a token the same log-probability: in bfloat16 too, up to the last sum's rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from check_isas import ISAS, using
from helpers import checked, load_decoder, trained_adapter
from sampling_helpers import drain, make_sampler, request

from mint_engine import trainer
from mint_engine.adapters import Adapter
from mint_engine.kernels import plan
from mint_engine.models.decoder import Decoder
from mint_engine.types import Datum, LoraConfig, ModelInput


def trained_logprobs(decoder: Decoder, adapter: Adapter, tokens: list[int]) -> np.ndarray:
    """Of tokens[1:]."""
    datum = Datum(
        ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    )
    out = trainer.run(decoder, adapter, None, *checked([datum], "cross_entropy", decoder))
    return out.loss_fn_outputs[0]["logprobs"].to_numpy()


@pytest.mark.parametrize("words", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("isa", ISAS)
def test_bf16_sampling_reports_what_training_computes(tiny_tied: Path, isa: str, words: bool) -> None:
    """Company of two adapters, a prompt in chunks, 140 tokens: nothing of it moves a hidden state by a bit."""
    decoder = load_decoder(tiny_tied, torch.bfloat16)
    decoder.keeps_words = words
    adapters = [trained_adapter(decoder, LoraConfig(rank=r, seed=r), scale=0.1) for r in (4, 7)]
    prompt = [(11 * i + 5) % 199 for i in range(70)]
    with using(isa), plan.own_products():
        sampler = make_sampler(decoder, chunk_alone=33)
        asked = [request(prompt, a, 2, max_tokens=70) for a in adapters]
        for adapter, answer in zip(adapters, drain(sampler, [sampler.submit(a) for a in asked]), strict=True):
            for sequence in answer.sequences:
                expected = trained_logprobs(decoder, adapter, prompt + sequence.tokens)[len(prompt) - 1 :]
                np.testing.assert_allclose(sequence.logprobs or [], expected, rtol=0, atol=2e-6)
