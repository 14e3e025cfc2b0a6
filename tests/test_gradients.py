"""Our hand-written backward against PEFT + autograd on the same adapter (issue: 1e-4 relative, L2, per tensor)."""

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
    relative,
    trained_adapter,
)
from tiny_models import build_tiny

from mint_engine import trainer
from mint_engine.adapters import TrainState
from mint_engine.types import LoraConfig

LENGTHS = (7, 1, 12)
CONFIGS = {"ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.3}, "dro": {"beta": 0.1}}


def autograd_loss(loss_fn: str, lps: list[torch.Tensor], data: list, config: dict) -> torch.Tensor:
    """The formulas of wire-protocol section 5, written again for autograd."""
    total = torch.zeros((), dtype=lps[0].dtype)
    for lp, datum in zip(lps, data, strict=True):
        x = {k: v.to_torch() for k, v in datum.loss_fn_inputs.items()}
        if loss_fn == "cross_entropy":
            total = total - (lp * x["weights"]).sum()
            continue
        a, q = x["advantages"], x["logprobs"]
        r = torch.exp(lp - q)
        lo, hi = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
        per_token = {
            "importance_sampling": -r * a,
            "ppo": -torch.minimum(r * a, torch.clamp(r, lo, hi) * a),
            "cispo": -torch.clamp(r, lo, hi).detach() * lp * a,
            "dro": -(lp * a - 0.5 * config.get("beta", 0.05) * (lp - q) ** 2),
        }[loss_fn]
        total = total + per_token.sum()
    return total


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """One tiny model per family, with tied and untied embeddings."""
    return {
        (family, tied): build_tiny(family, tmp_path_factory.mktemp("models"), tie_word_embeddings=tied)
        for family in ("llama", "qwen2", "qwen3")
        for tied in (True, False)
    }


def compare(directory: Path, loss_fn: str, lora: LoraConfig, columns: int = 0) -> None:
    decoder = load_decoder(directory)
    adapter = trained_adapter(decoder, lora)
    state = TrainState(adapter)
    data = make_data(loss_fn, LENGTHS, decoder.config.vocab_size, columns=columns)
    config = CONFIGS.get(loss_fn, {})
    args = checked(data, loss_fn, decoder, config)
    with torch.no_grad():
        output = trainer.run(decoder, adapter, state, *args)

    model = peft_model(directory, adapter)
    lps = peft_logprobs(model, data)
    loss = autograd_loss(loss_fn, lps, data, config)
    loss.backward()

    for ours, theirs in zip(output.loss_fn_outputs, lps, strict=True):
        torch.testing.assert_close(ours["logprobs"].to_torch(), theirs.detach(), atol=1e-5, rtol=1e-5)
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-4)
    expected = {name: p.grad for name, p in peft_parameters(model).items()}
    got = our_gradients(adapter, state)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        assert gradient.abs().max() > 0, f"{name}: the comparison would be empty"
        assert relative(got[name], gradient) < 1e-4, name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_module_of_every_family_has_pefts_gradient(models: dict, family: str, tied: bool) -> None:
    compare(models[family, tied], "cross_entropy", LoraConfig(rank=4, seed=0))


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"])
def test_every_loss_has_pefts_gradient_on_a_tied_model(models: dict, loss_fn: str) -> None:
    compare(models["qwen3", True], loss_fn, LoraConfig(rank=8, seed=1))


def test_soft_targets_have_pefts_gradient(models: dict) -> None:
    compare(models["llama", True], "cross_entropy", LoraConfig(rank=4, seed=2), columns=3)


@pytest.mark.parametrize("rank", [1, 5, 64, 256])
def test_every_rank_has_pefts_gradient(models: dict, rank: int) -> None:
    compare(models["llama", True], "cross_entropy", LoraConfig(rank=rank, seed=3))


@pytest.mark.parametrize(
    "flags", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_the_modules_asked_for_are_trained(models: dict, flags: tuple[bool, bool, bool]) -> None:
    attn, mlp, unembed = flags
    lora = LoraConfig(rank=4, seed=4, train_attn=attn, train_mlp=mlp, train_unembed=unembed)
    compare(models["llama", True], "cross_entropy", lora)
