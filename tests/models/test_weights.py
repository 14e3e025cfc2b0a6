"""Weights are read as stored, sharded or not; every way a directory can be broken has its own message."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, build_tiny
from transformers import AutoModelForCausalLM

from mint_engine.errors import ModelError
from mint_engine.models.config import load_config
from mint_engine.models.weights import EMBEDDING, HEAD, WeightReader, expected_tensors, validate


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def sharded(tmp_path):
    return build_tiny("llama", tmp_path, sharded=True)


def rewrite(directory, change):
    """Load the single file, let ``change`` edit the dict of tensors, save it again."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_tensors_are_exactly_those_transformers_writes(family, tmp_path):
    directory = build_tiny(family, tmp_path)
    config, reader = load_config(directory), WeightReader(directory)
    assert {name: reader.shape(name) for name in reader.names()} == expected_tensors(config)
    validate(reader, config)
    parameters = dict(AutoModelForCausalLM.from_pretrained(directory).named_parameters())
    assert set(parameters) - {HEAD} == set(reader.names()) - {HEAD}
    for name in reader.names():
        assert torch.equal(reader.get(name), parameters[name])


def test_a_sharded_model_reads_as_the_single_file_does(llama, sharded):
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    one, many = WeightReader(llama), WeightReader(sharded)
    validate(many, load_config(sharded))
    assert one.names() == many.names()
    for name in one.names():
        assert one.shape(name) == many.shape(name)
        assert one.dtype(name) == many.dtype(name)
        assert torch.equal(one.get(name), many.get(name))


def test_the_stored_dtype_is_kept(tmp_path):
    reader = WeightReader(build_tiny("qwen3", tmp_path, dtype=torch.bfloat16))
    assert reader.dtype(EMBEDDING) == "BF16"
    assert reader.get(EMBEDDING).dtype == torch.bfloat16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_tensor_that_is_kept_does_not_keep_its_file_in_memory(tmp_path):
    directory = build_tiny("qwen3", tmp_path)
    reader = WeightReader(directory)
    norm = reader.get("model.norm.weight")
    del reader
    assert norm.isfinite().all()
    assert str(directory) not in Path("/proc/self/maps").read_text()


def test_a_missing_shard_is_named(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"1 of {len(shards)} shards are missing: {shards[1].name}"):
        WeightReader(sharded)


def test_an_index_that_lists_an_absent_tensor_is_refused(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"do not hold: model\.layers\.9\.mlp\.up_proj\.weight"):
        WeightReader(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}'])
def test_a_damaged_index_is_refused(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model.safetensors.index.json: expected"):
        WeightReader(sharded)


def test_an_index_cannot_point_outside_the_directory(sharded):
    path = sharded / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ModelError, match=r"expected names of files in this directory, got '../model.safetensors'"):
        WeightReader(sharded)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_a_cut_off_file_is_refused(tmp_path, keep):
    path = build_tiny("llama", tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model.safetensors: damaged or not a safetensors file"):
        WeightReader(path.parent)


def test_absent_weights_are_explained(tmp_path):
    with pytest.raises(ModelError, match="nowhere: no such directory"):
        WeightReader(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no weights: expected model.safetensors or model.safetensors.index.json$"):
        WeightReader(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ModelError, match=r"found model-00001-of-00002.safetensors, but no index"):
        WeightReader(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained"):
        WeightReader(tmp_path)


def test_asking_for_an_unknown_tensor_names_it(llama):
    with pytest.raises(ModelError, match=r"no tensor 'model.nothing'"):
        WeightReader(llama).get("model.nothing")


def test_all_differences_are_listed_at_once(tmp_path):
    directory = build_tiny("llama", tmp_path)

    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(64, 64)
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors[EMBEDDING] = tensors[EMBEDDING].to(torch.int32)

    rewrite(directory, change)
    with pytest.raises(ModelError) as caught:
        validate(WeightReader(directory), load_config(directory))
    for problem in (
        "missing model.norm.weight [64]",
        "model.layers.0.self_attn.k_proj.weight: expected shape [32, 64], got [64, 64]",
        "unexpected model.layers.1.self_attn.q_proj.bias [64]",
        f"{EMBEDDING}: expected a dtype of BF16, F16, F32, F64, got I32",
    ):
        assert problem in str(caught.value)


def test_the_frequencies_old_llama_files_carry_are_no_difference(tmp_path):
    directory = build_tiny("llama", tmp_path)
    rewrite(directory, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    validate(WeightReader(directory), load_config(directory))


def test_a_tied_model_may_store_its_head_only_if_it_is_the_embedding(tmp_path):
    directory = build_tiny("qwen3-tied", tmp_path)
    config = load_config(directory)
    assert HEAD not in expected_tensors(config)
    rewrite(directory, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    validate(WeightReader(directory), config)
    rewrite(directory, lambda tensors: tensors[HEAD][3, 5].add_(1.0))
    with pytest.raises(ModelError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        validate(WeightReader(directory), config)
