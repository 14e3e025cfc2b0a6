"""config.json is read in both spellings; what we cannot compute is refused by name."""

import json

import pytest
from tiny_models import FAMILIES, build_tiny

from mint_engine.errors import ModelError
from mint_engine.models.config import ModelConfig, load_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 199, "hidden_size": 64,
    "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_directories_written_by_transformers_are_read(family, tmp_path):
    config = load_config(build_tiny(family, tmp_path))
    assert config.family == family.split("-")[0].replace("llama3", "llama")
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers) == (199, 64, 112, 3)
    assert (config.num_heads, config.num_kv_heads, config.max_context_length) == (4, 2, 512)
    assert config.head_dim == (24 if "qwen3" in family else 16)
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings is family.endswith("tied")
    assert config.qkv_bias is (family == "llama-bias" or "qwen2" in family)
    assert config.o_bias is (family == "llama-bias")
    assert config.qk_norm is ("qwen3" in family)
    variant = family.split("-")[-1]
    assert config.rope.kind == (variant if variant in ("llama3", "linear", "yarn") else "default")
    assert (config.eos_token_ids, config.bos_token_id, config.dtype) == ((2,), 1, "float32")


def test_absent_keys_take_the_family_defaults_of_transformers():
    llama = ModelConfig.from_hf(LLAMA)
    assert (llama.num_kv_heads, llama.head_dim, llama.rms_norm_eps) == (4, 16, 1e-6)
    assert (llama.rope.theta, llama.tie_word_embeddings, llama.dtype) == (10000.0, False, "bfloat16")
    assert ModelConfig.from_hf(QWEN2).head_dim == 16
    assert ModelConfig.from_hf(QWEN3).head_dim == 128
    assert ModelConfig.from_hf(QWEN3 | {"num_key_value_heads": None}).num_kv_heads == 4
    assert ModelConfig.from_hf(LLAMA | {"architectures": None}).architecture == "LlamaForCausalLM"


def test_end_tokens_are_those_of_both_files_each_once():
    config = ModelConfig.from_hf(LLAMA | {"eos_token_id": 7}, {"eos_token_id": [9, 7], "bos_token_id": 3})
    assert config.eos_token_ids == (7, 9)
    assert config.bos_token_id == 3
    assert ModelConfig.from_hf(LLAMA).eos_token_ids == ()


def test_a_sliding_window_that_is_switched_off_or_never_reached_is_no_obstacle():
    off = {"use_sliding_window": False, "sliding_window": 128, "max_window_layers": 1}
    assert ModelConfig.from_hf(QWEN2 | off).family == "qwen2"
    beyond = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 3}
    assert ModelConfig.from_hf(QWEN2 | beyond).family == "qwen2"
    longer = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1}
    assert ModelConfig.from_hf(QWEN2 | longer).family == "qwen2"


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA, {"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM' is not .*LlamaForCausalLM, Qwen2ForC"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (LLAMA, {"architectures": [], "model_type": "gpt2"}, "model type 'gpt2' is not supported .*Qwen3ForCausalLM"),
        (LLAMA, {"model_type": "mistral"}, "'LlamaForCausalLM' with model type 'mistral'"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias = True is not supported"),
        (LLAMA, {"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (QWEN3, {"num_experts": 128}, "num_experts = 128 is not supported"),
        (QWEN3, {"vision_config": {"depth": 2}}, "vision_config"),
        (LLAMA, {"sliding_window": 128}, "sliding_window = 128 in use"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2}, "sliding_window = 128"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layers of type sliding_attention"),
        (QWEN2, {"attention_bias": False}, "Qwen2 has biases"),
        (LLAMA, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic'"),
        (LLAMA, {"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads = 3, got 4"),
        (LLAMA, {"head_dim": 15}, "head_dim: expected an even number"),
        (LLAMA, {"hidden_size": None}, "hidden_size: expected a positive integer in config.json, got None"),
        (LLAMA, {"num_hidden_layers": -1}, "num_hidden_layers: expected a positive integer in config.json, got -1"),
        (LLAMA, {"rms_norm_eps": "tiny"}, "rms_norm_eps: expected a number >= 0, got 'tiny'"),
    ],
)
def test_what_we_cannot_compute_is_refused_by_name(base, change, message):
    ModelConfig.from_hf(base)
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_hf(base | change)


def test_a_missing_key_is_named():
    with pytest.raises(ModelError, match=r"vocab_size: expected a positive integer in config.json, got no such key"):
        ModelConfig.from_hf({k: v for k, v in LLAMA.items() if k != "vocab_size"})


def test_file_problems_name_the_file(tmp_path):
    with pytest.raises(ModelError, match=r"config.json: no such file"):
        load_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ModelError, match=r"config.json: cannot be read as JSON"):
        load_config(tmp_path)
    path.write_text("[]")
    with pytest.raises(ModelError, match="expected a JSON object, got list"):
        load_config(tmp_path)
    path.write_text(json.dumps(LLAMA | {"architectures": ["T5Model"]}))
    with pytest.raises(ModelError, match=f"{tmp_path}.*'T5Model' is not supported"):
        load_config(tmp_path)
