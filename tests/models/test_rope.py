"""RoPE frequencies and tables equal transformers' own, bit for bit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mint_engine.errors import ModelError
from mint_engine.models.config import ModelConfig
from mint_engine.models.rope import RopeConfig, RopeTable, inverse_frequencies

PARAMETERS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default-1e6": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    "llama3.1": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3.2": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn-qwen": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-implicit-original": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},
    "yarn-betas": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 4096,
        "beta_fast": 24.0, "beta_slow": 2.0, "attention_factor": 1.25,
    },
    "yarn-mscale": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
        "mscale": 1.0, "mscale_all_dim": 0.7,
    },
    "yarn-exact-ends": {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}  # fmt: skip


def hf_config(params: dict, head_dim: int = 64) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=dict(params),
    )


def ours(hf: LlamaConfig) -> ModelConfig:
    return ModelConfig.from_hf(hf.to_dict() | {"architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", PARAMETERS)
def test_frequencies_and_attention_factor_equal_transformers(name, head_dim):
    hf = hf_config(PARAMETERS[name], head_dim)
    rope = ours(hf).rope
    if rope.kind == "default":
        expected, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(hf)
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[rope.kind](hf, torch.device("cpu"))
    actual = inverse_frequencies(rope, head_dim)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert rope.attention_factor == scale


@pytest.mark.parametrize("name", PARAMETERS)
def test_table_rows_equal_transformers_cos_and_sin(name):
    hf = hf_config(PARAMETERS[name])
    positions = torch.tensor([0, 1, 2, 63, 64, 4095, 8191, 100, 100, 0])
    cos, sin = RopeTable(ours(hf)).rows(positions)
    hf_cos, hf_sin = LlamaRotaryEmbedding(hf)(torch.zeros(1), positions[None])
    assert cos.shape == sin.shape == (10, 32)
    assert torch.equal(cos, hf_cos[0, :, :32])
    assert torch.equal(cos, hf_cos[0, :, 32:])
    assert torch.equal(sin, hf_sin[0, :, :32])


@given(st.lists(st.lists(st.integers(0, 3000), max_size=8), min_size=1, max_size=5))
def test_rows_do_not_depend_on_what_was_asked_before(calls):
    config = ours(hf_config(PARAMETERS["llama3.1"], 16))
    grown = RopeTable(config)
    for positions in calls:
        wanted = torch.tensor(positions, dtype=torch.int64)
        cos, sin = grown.rows(wanted)
        fresh_cos, fresh_sin = RopeTable(config).rows(wanted, length=3001)
        assert torch.equal(cos, fresh_cos)
        assert torch.equal(sin, fresh_sin)
        angles = wanted[:, None].double() * inverse_frequencies(config.rope, 16).double()
        # The angle is rounded once to fp32: at 3000 that moves cos by at most 2^-24 * 4096 = 2.5e-4.
        torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=2.5e-4)


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="positions: expected values >= 0, got -2"):
        RopeTable(ours(hf_config(PARAMETERS["default"]))).rows(torch.tensor([3, -2]))


def test_old_and_new_spelling_mean_the_same():
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert RopeConfig.from_hf(new) == RopeConfig.from_hf(old) == RopeConfig(theta=5e5, kind="linear", factor=2.0)
    assert RopeConfig.from_hf({"rope_theta": 1e6, "rope_scaling": None}) == RopeConfig(theta=1e6)


def test_yarn_without_a_factor_takes_it_from_the_two_context_lengths():
    params = {"rope_type": "yarn", "original_max_position_embeddings": 1024, "factor": None}
    rope = RopeConfig.from_hf({"rope_parameters": params, "max_position_embeddings": 8192})
    assert rope.factor == 8.0
    assert rope.attention_factor == 0.1 * math.log(8.0) + 1.0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not supported .*default, linear, llama3, yarn"),
        ({"rope_type": "longrope"}, "'longrope' is not supported"),
        ({"rope_type": "linear"}, "factor: expected a positive number, got None"),
        ({"rope_type": "linear", "factor": -1.0}, "factor: expected a positive number, got -1.0"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor: expected a positive number, got nan"),
        ({"rope_type": "default", "rope_theta": 0}, "rope_theta: expected a positive number, got 0"),
        ({"rope_type": "default", "mrope_section": [8, 8]}, "not understood for RoPE type 'default': mrope_section"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "different RoPE per layer type .full_attention"),
        (
            PARAMETERS["llama3.1"] | {"high_freq_factor": 1.0},
            "expected high_freq_factor > low_freq_factor, got 1.0 and 1.0",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(params, message):
    with pytest.raises(ModelError, match=message):
        RopeConfig.from_hf({"rope_parameters": params, "max_position_embeddings": 4096})
