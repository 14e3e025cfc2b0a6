"""bf16 training: our error against float32 is within 2x of PEFT's own in bf16 (issue: LoRA)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import (
    checked,
    load_decoder,
    make_data,
    our_gradients,
    peft_logprobs,
    peft_model,
    peft_parameters,
    trained_adapter,
)
from test_gradients import autograd_loss
from tiny_models import build_tiny

from mint_engine import trainer
from mint_engine.adapters import Adapter, TrainState
from mint_engine.types import LoraConfig


def peft_gradients(
    directory: Path, adapter: Adapter, loss_fn: str, data: list, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    model = peft_model(directory, adapter, dtype)
    autograd_loss(loss_fn, peft_logprobs(model, data), data, {}).backward()
    return {n: p.grad.double() for n, p in peft_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "importance_sampling"])
@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "qwen3-tied"])
def test_gradients_in_bf16_are_as_good_as_pefts(family: str, loss_fn: str, tmp_path: Path) -> None:
    directory = build_tiny(family, tmp_path)
    decoder = load_decoder(directory, torch.bfloat16)
    adapter = trained_adapter(decoder, LoraConfig(rank=8, seed=0))
    # The same starting point for all three: masters that bf16 represents exactly.
    adapter.params.copy_(adapter.params.bfloat16().float())
    adapter.version += 1
    data = make_data(loss_fn, (40, 1, 23, 64), decoder.config.vocab_size)
    if loss_fn == "importance_sampling":  # ratios near 1, as in practice
        lps = [lp.detach() for lp in peft_logprobs(peft_model(directory, adapter), data)]
        data = [type(d)(d.model_input, {**d.loss_fn_inputs, "logprobs": lp}) for d, lp in zip(data, lps, strict=True)]
    state = TrainState(adapter)
    with torch.no_grad():
        trainer.run(decoder, adapter, state, *checked(data, loss_fn, decoder))
    exact = peft_gradients(directory, adapter, loss_fn, data, torch.float32)
    theirs = peft_gradients(directory, adapter, loss_fn, data, torch.bfloat16)
    ours = {n: g.double() for n, g in our_gradients(adapter, state).items()}

    def error(got: dict[str, torch.Tensor], kind: str) -> float:
        """Relative L2 error over all modules of a kind ("q_proj.lora_A", ...)."""
        names = [n for n in exact if kind in n]
        return (
            sum(float((got[n] - exact[n]).square().sum()) for n in names)
            / sum(float(exact[n].square().sum()) for n in names)
        ) ** 0.5

    kinds = sorted({".".join(n.split(".")[-3:-1]) for n in exact})
    assert len(kinds) == 16
    for kind in kinds:
        assert error(ours, kind) <= 2 * error(theirs, kind), kind
