"""Adapters and training states on disk: bit exact, read by PEFT, and damage is named."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny
from transformers import AutoModelForCausalLM

from mint_engine.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    OPTIMIZER_STATE,
    open_adapter,
    read_adapter,
    read_training_state,
    write_adapter,
    write_training_state,
)
from mint_engine.errors import CheckpointError, UserError

RANK = 3
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
DESCRIPTION = {"base_model": "tiny", "rank": RANK, "alpha": 32, "target_modules": MODULES, "tied": True}


def factors(seed: int = 0, modules: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(modules)]
    tensors = {f"{name}.lora_A.weight": torch.randn(RANK, 5, generator=generator) for name in names}
    return tensors | {f"{name}.lora_B.weight": torch.randn(7, RANK, generator=generator) for name in names}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.int32), b[k].view(torch.int32)) for k in a)


@pytest.fixture
def adapter(tmp_path):
    write_adapter(tmp_path, factors(), **DESCRIPTION)
    return tmp_path


@pytest.fixture
def state(tmp_path):
    write_training_state(
        tmp_path, factors(0), **DESCRIPTION, exp_avg=factors(1), exp_avg_sq=factors(2), step=9, gradients=factors(3)
    )
    return tmp_path


def test_an_adapter_comes_back_bit_for_bit(tmp_path):
    tensors = factors()
    flat = torch.cat([t.reshape(-1) for t in tensors.values()])
    flat[:3] = torch.tensor([float("nan"), -0.0, 1e-42])  # also what compares unequal to itself, or is subnormal
    pieces = flat.split([t.numel() for t in tensors.values()])
    views = {name: piece.view(t.shape) for (name, t), piece in zip(tensors.items(), pieces, strict=True)}
    write_adapter(tmp_path, views, **DESCRIPTION)
    meta, loaded = read_adapter(tmp_path)
    assert same_bits(loaded, views)
    assert (meta.base_model, meta.rank, meta.alpha, meta.scale) == ("tiny", RANK, 32, 32 / RANK)
    assert (list(meta.target_modules), meta.tied) == (MODULES, True)


@pytest.mark.parametrize("gradients", [None, factors(3)])
def test_a_training_state_comes_back_bit_for_bit(tmp_path, gradients):
    write_training_state(
        tmp_path, factors(0), **DESCRIPTION, exp_avg=factors(1), exp_avg_sq=factors(2), step=2**40, gradients=gradients
    )
    loaded = read_training_state(tmp_path)
    assert same_bits(loaded.tensors, factors(0))
    assert same_bits(loaded.exp_avg, factors(1))
    assert same_bits(loaded.exp_avg_sq, factors(2))
    assert loaded.step == 2**40
    assert loaded.gradients is None if gradients is None else same_bits(loaded.gradients, gradients)
    assert same_bits(read_adapter(tmp_path)[1], factors(0))  # the same directory also serves as an adapter


def test_loaded_tensors_outlive_their_file(adapter):
    _, loaded = read_adapter(adapter)
    (adapter / ADAPTER_MODEL).write_bytes(b"\0" * (adapter / ADAPTER_MODEL).stat().st_size)
    assert same_bits(loaded, factors())


def test_an_adapter_can_be_read_tensor_by_tensor(adapter):
    meta, shapes, read = open_adapter(adapter)
    assert meta == read_adapter(adapter)[0]
    assert {name: (t.shape, t.device.type) for name, t in shapes.items()} == {
        name: (t.shape, "meta") for name, t in factors().items()
    }
    for file in adapter.iterdir():
        file.unlink()
    assert same_bits({name: read(name) for name in shapes}, factors())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3-tied"])
@pytest.mark.parametrize("modules", [MODULES, MODULES[:4], ["lm_head"]], ids=["all", "attention", "head"])
def test_peft_loads_the_adapter_and_computes_the_same_logits(tmp_path, family, modules):
    base = build_tiny(family, tmp_path)
    tied = "tied" in family
    tokens = torch.arange(12).view(1, -1)
    torch.manual_seed(0)

    def load_base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(load_base(), PeftConfig(r=RANK, lora_alpha=32, target_modules=modules))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
            expected = model(tokens).logits
            plain = load_base()(tokens).logits
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        description = {**DESCRIPTION, "base_model": str(base), "target_modules": modules, "tied": tied}
        write_adapter(tmp_path, tensors, **description)
        loaded = PeftModel.from_pretrained(load_base(), tmp_path)
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, expected)
        assert not torch.allclose(expected, plain, atol=1e-2)
        assert same_bits(get_peft_model_state_dict(loaded, save_embedding_layers=False), read_adapter(tmp_path)[1])
    # PEFT tells whoever adapts a tied head that merging needs an untied one: true, and no matter for loading.
    # The libraries' notes to each other about renamed methods are none of ours either.
    ours = [w for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    assert [str(w.message) for w in ours if "tie_word_embeddings" not in str(w.message)] == []


def test_an_adapter_that_peft_saved_is_read(tmp_path):
    base = build_tiny("llama", tmp_path)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        PeftConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "up_proj"]),
    )
    model.save_pretrained(tmp_path / "adapter")
    meta, tensors = read_adapter(tmp_path / "adapter")
    assert (meta.rank, meta.alpha, set(meta.target_modules), meta.tied) == (RANK, 8, {"q_proj", "up_proj"}, None)
    assert same_bits(tensors, get_peft_model_state_dict(model))


def test_half_precision_adapters_are_widened(adapter):
    halves = {name: tensor.bfloat16() for name, tensor in factors().items()}
    save_file(halves, adapter / ADAPTER_MODEL)
    assert same_bits(read_adapter(adapter)[1], {name: tensor.float() for name, tensor in halves.items()})


# --- damage


@pytest.mark.parametrize("file", [ADAPTER_CONFIG, ADAPTER_MODEL, OPTIMIZER_STATE])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x80garbage" * 9),
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0\0\0"),
    ],
    ids=["removed", "emptied", "garbage", "cut short", "lengthened"],
)
def test_a_damaged_file_is_named(state, file, damage):
    damage(state / file)
    with pytest.raises(CheckpointError, match=rf"{file}: (missing|damaged)"):
        read_training_state(state)


def test_every_truncation_of_the_weights_is_noticed(adapter):
    whole = (adapter / ADAPTER_MODEL).read_bytes()
    for size in range(0, len(whole), 37):
        (adapter / ADAPTER_MODEL).write_bytes(whole[:size])
        for reading in (read_adapter, open_adapter):
            with pytest.raises(CheckpointError, match=ADAPTER_MODEL):
                reading(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "expected peft_type 'LORA', got 'IA3'"),
        ({"r": 0}, "r: expected an integer of at least 1, got 0"),
        ({"r": RANK + 1}, rf"expected shape \[{RANK + 1}, K\], got \[{RANK}, 5\]"),
        ({"lora_alpha": "x"}, "lora_alpha: expected a number"),
        ({"target_modules": None}, "target_modules"),
        ({"use_dora": True}, "use_dora = False, got True"),
        ({"use_rslora": True}, "use_rslora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_a_config_that_means_something_else_is_refused(adapter, change, message):
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        read_adapter(adapter)


A0, B0 = list(factors(modules=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({A0: None}, "expected lora_A and lora_B, got only one"),
        ({B0: torch.zeros(7, RANK + 1)}, rf"expected shape \[N, {RANK}\], got \[7, {RANK + 1}\]"),
        ({A0: torch.zeros(RANK)}, r"expected shape \[3, K\], got \[3\]"),
        ({"lm_head.weight": torch.zeros(2, 2)}, "expected LoRA factors named"),
        (dict.fromkeys(factors()), "holds no LoRA factors"),
    ],
)
def test_tensors_that_are_no_adapter_are_refused_on_both_sides(adapter, change, message):
    changed = {name: tensor for name, tensor in (factors() | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        write_adapter(adapter, changed, **DESCRIPTION)
    save_file(changed, adapter / ADAPTER_MODEL)
    for reading in (read_adapter, open_adapter):
        with pytest.raises(CheckpointError, match=message):
            reading(adapter)


def test_only_float32_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected float32, got torch\.bfloat16"):
        write_adapter(tmp_path, {name: tensor.bfloat16() for name, tensor in factors().items()}, **DESCRIPTION)


def test_moments_must_fit_the_adapter(state):
    moments = load_file(state / OPTIMIZER_STATE)
    for change, message in [
        ({f"exp_avg/{A0}": None}, "exp_avg/.*missing"),
        ({f"exp_avg_sq/{A0}": torch.zeros(RANK, 6)}, r"expected shape \[3, 5\], got \[3, 6\]"),
        ({"momentum/x": torch.zeros(1)}, "expected tensors of exp_avg"),
        ({}, "metadata"),
    ]:
        changed = {name: tensor for name, tensor in (moments | change).items() if tensor is not None}
        save_file(changed, state / OPTIMIZER_STATE, metadata={"step": "9"} if change else {})
        with pytest.raises(CheckpointError, match=message):
            read_training_state(state)


def test_a_sampler_checkpoint_has_no_optimizer_state_and_says_so(adapter):
    with pytest.raises(CheckpointError, match="weights only"):
        read_training_state(adapter)
    assert issubclass(CheckpointError, UserError)
