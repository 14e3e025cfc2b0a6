"""Shared by the tests: a small base model in memory, data for every loss, and the same adapter inside PEFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from mint_engine.adapters import Adapter, TrainState
from mint_engine.datums import Limits, check_data
from mint_engine.losses import get_loss
from mint_engine.models.config import load_config
from mint_engine.models.decoder import Decoder
from mint_engine.models.weights import WeightReader
from mint_engine.types import Datum, LoraConfig, ModelInput

ATTN = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
HEAD = ["lm_head"]


def load_decoder(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(load_config(directory), WeightReader(directory), dtype)


def limits_of(decoder: Decoder) -> Limits:
    return Limits(decoder.config.vocab_size, decoder.config.max_context_length)


def trained_adapter(decoder: Decoder, lora: LoraConfig, scale: float = 0.05) -> Adapter:
    """An adapter whose B is not zero any more, so that every gradient is alive."""
    adapter = Adapter(decoder.groups, lora)
    generator = torch.Generator().manual_seed(7)
    for factors in adapter.factors.values():
        for b in factors.b:
            b.normal_(0.0, scale, generator=generator)
    adapter.version += 1
    return adapter


def make_data(loss_fn: str, lengths: tuple[int, ...], vocab: int, seed: int = 0, columns: int = 0) -> list[Datum]:
    """Random datums with the inputs of a loss; ``columns`` > 0 makes (N, K) soft targets for cross_entropy."""
    rng = np.random.default_rng(seed)
    data = []
    for n in lengths:
        shape = (n, columns) if columns else (n,)
        inputs: dict[str, np.ndarray] = {"target_tokens": rng.integers(0, vocab, shape)}
        if loss_fn == "cross_entropy":
            # Any sign, and zeros for a masked prompt.
            inputs["weights"] = (rng.normal(size=shape) * (rng.random(shape) < 0.7)).astype(np.float32)
        else:
            inputs["logprobs"] = rng.normal(-5.0, 0.5, shape).astype(np.float32)
            inputs["advantages"] = (rng.normal(size=shape) * (rng.random(shape) < 0.7)).astype(np.float32)
        data.append(Datum(model_input=ModelInput.from_ints(rng.integers(0, vocab, n).tolist()), loss_fn_inputs=inputs))
    return data


def checked(data: list[Datum], loss_fn: str, decoder: Decoder, config: dict | None = None) -> tuple:
    """(checked data, loss, resolved config): what trainer.run takes."""
    loss = get_loss(loss_fn)
    resolved = loss.resolve_config(config)
    return check_data(data, loss, resolved, limits_of(decoder)), loss, resolved


def peft_model(directory: Path, adapter: Adapter, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    """transformers + PEFT with the same base and the same adapter weights."""
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    config = peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.lora.alpha, target_modules=adapter.target_modules, lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    parameters = peft_parameters(model)
    with torch.no_grad():
        for name, tensor in adapter.named(adapter.params):
            parameters[name].copy_(tensor)
    return model.eval()


def peft_parameters(model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    return {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}


def peft_logprobs(model: peft.PeftModel, data: list[Datum]) -> list[torch.Tensor]:
    """Per datum, fp32 (or wider) log-probabilities of the targets, [N] or [N, K], differentiable."""
    out = []
    for datum in data:
        logits = model(torch.tensor([datum.model_input.to_ints()])).logits[0]
        lp = torch.log_softmax(logits.float() if logits.dtype == torch.bfloat16 else logits, -1)
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()
        out.append(lp.gather(1, targets.reshape(len(targets), -1)).reshape(targets.shape))
    return out


def our_gradients(adapter: Adapter, state: TrainState) -> dict[str, torch.Tensor]:
    return dict(adapter.named(state.grads))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """L2 distance relative to b."""
    return float(
        torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double()).clamp(min=1e-30)
    )
