"""The API's types: both forms of the documentation and of the SDKs, and mistakes named."""

from __future__ import annotations

import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mint_engine import types
from mint_engine.errors import MintError, StorageError, UserError

FLOAT32 = st.floats(width=32, allow_nan=False)
SMALL_INTS = st.integers(-5, 5)


def datum(**inputs: object) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints([1, 2]), loss_fn_inputs=inputs)


# --- ModelInput


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda t: [np.int32(i) for i in t]])
def test_model_input_takes_any_sequence_of_integers(make):
    model_input = types.ModelInput.from_ints(make([5, 6, 7]))
    assert model_input.to_ints() == [5, 6, 7]
    assert all(type(token) is int for token in model_input.to_ints())
    assert model_input == types.ModelInput.from_ints(tokens=[5, 6, 7])


@given(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=4))
def test_model_input_lays_its_chunks_end_to_end(parts):
    model_input = types.ModelInput.empty()
    for part in parts:
        model_input = model_input.append(types.EncodedTextChunk(tokens=part))
    assert model_input.to_ints() == [token for part in parts for token in part]
    assert model_input.length == sum(map(len, parts)) == len(model_input.to_ints())
    assert model_input.append_int(3).to_ints() == [*model_input.to_ints(), 3]
    assert types.ModelInput.model_validate_json(model_input.model_dump_json()) == model_input


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("hello", "encode it with the tokenizer"),
        ({"input_ids": [1]}, "input_ids"),
        ([1.5], "integer"),
        ([[1, 2]], "flat list"),
        (None, "flat list"),
        (7, "flat list"),
    ],
)
def test_model_input_names_what_is_not_a_list_of_token_ids(tokens, message):
    with pytest.raises(ValueError, match=message):
        types.ModelInput.from_ints(tokens)


def test_image_and_audio_chunks_are_refused_by_name():
    text = {"type": "encoded_text", "tokens": [1]}
    with pytest.raises(ValueError, match=r"chunks\[1\].*image.*not supported"):
        types.ModelInput(chunks=[text, {"type": "image", "data": "", "format": "png"}])
    assert types.ModelInput(chunks=[text]).to_ints() == [1]


# --- TensorData


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), elements=FLOAT32))
def test_tensor_data_keeps_float_values_and_shape(array):
    tensor = types.TensorData.from_numpy(array)
    np.testing.assert_array_equal(tensor.to_numpy(), array)
    assert tensor.shape == list(array.shape)
    assert tensor.data == array.reshape(-1).tolist()
    assert tensor.tolist() == array.tolist()
    assert torch.equal(tensor.to_torch(), torch.from_numpy(array))
    assert types.TensorData(**tensor.to_dict()) == tensor
    assert pickle.loads(pickle.dumps(tensor)) == tensor


@given(
    hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=SMALL_INTS),
    st.sampled_from([0, -1]),
)
def test_sparse_and_dense_tensors_hold_the_same_values(array, pad):
    tensor = types.TensorData.from_torch_sparse(torch.from_numpy(array), pad_value=pad)
    np.testing.assert_array_equal(tensor.to_numpy(pad_value=pad), array)
    assert types.TensorData(**tensor.to_dict()).tolist(pad) == array.tolist()


def test_a_mostly_empty_matrix_is_stored_sparse_and_agrees_with_torch():
    array = torch.zeros(4, 16, dtype=torch.float32)
    array[0, 3], array[2, 15] = 1.5, -2.0
    tensor = types.TensorData.from_torch_sparse(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that its CSR layout is in beta
        csr = array.to_sparse_csr()
    assert tensor.sparse_crow_indices == csr.crow_indices().tolist()
    assert tensor.sparse_col_indices == csr.col_indices().tolist()
    assert tensor.data == csr.values().tolist()
    assert torch.equal(tensor.to_torch(), array)


@given(
    st.lists(st.integers(-1, 4), min_size=1, max_size=5),
    st.lists(st.integers(-1, 4), max_size=5),
    st.integers(0, 4),
)
def test_csr_is_taken_exactly_when_its_rows_are_runs_of_rising_columns(crow, col, columns):
    rows = [col[start:end] for start, end in itertools.pairwise(crow)]
    good = crow[0] == 0 and crow[-1] == len(col) and crow == sorted(crow)
    good = good and all(row == sorted(set(row)) and set(row) <= set(range(columns)) for row in rows)
    arguments = {"dtype": "int64", "shape": [len(crow) - 1, columns], "sparse_crow_indices": crow}
    if good:
        tensor = types.TensorData([1] * len(col), **arguments, sparse_col_indices=col)
        assert [np.flatnonzero(row).tolist() for row in tensor.to_numpy()] == rows
    else:
        with pytest.raises(UserError, match=r"sparse_(crow|col)_indices: expected"):
            types.TensorData([1] * len(col), **arguments, sparse_col_indices=col)


def test_one_dimensional_tensor_data_reads_like_a_list():
    tensor = types.TensorData(data=[1.0, 2.0, 3.0], dtype="float32")
    assert len(tensor) == 3
    assert tensor[1] == 2.0
    assert isinstance(tensor[1], float)
    assert tensor[1:] == [2.0, 3.0]
    assert list(tensor) == [1.0, 2.0, 3.0]
    assert sum(tensor) == 6.0
    np.testing.assert_array_equal(np.asarray(tensor), np.float32([1, 2, 3]))


def test_tensor_data_does_not_share_memory_with_its_source():
    array, tensor = np.ones(3, np.float32), torch.ones(3)
    copies = [types.TensorData.from_numpy(array), types.TensorData.from_torch(tensor)]
    array[:], tensor[:] = 9, 9
    assert [copy.tolist() for copy in copies] == [[1.0, 1.0, 1.0]] * 2


def test_tensor_data_widens_half_precision_and_detaches():
    tensor = torch.tensor([0.5, -2.0], dtype=torch.bfloat16, requires_grad=True)
    data = types.TensorData.from_torch(tensor)
    assert data.dtype == "float32"
    assert data.tolist() == [0.5, -2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": [1]}, "dtype is required"),
        ({"data": [1], "dtype": "int32"}, "expected dtype"),
        ({"data": [1, 2, 3], "dtype": "int64", "shape": [2, 2]}, r"\[2, 2\] to hold the 3 values"),
        ({"data": [[1], [1, 2]], "dtype": "int64"}, "ragged"),
        ({"data": ["a"], "dtype": "int64"}, "expected numbers"),
        ({"data": [None, 1.0], "dtype": "float32"}, "expected numbers, got list of NoneType"),
        ({"data": [1.5], "dtype": "int64"}, "expected integers, got fractions"),
        ({"data": [math.nan], "dtype": "int64"}, "NaN"),
        ({"data": [1e30], "dtype": "int64"}, "out of range"),
        ({"data": np.array([2**63], np.uint64), "dtype": "int64"}, "out of range"),
        ({"data": [1], "dtype": "int64", "sparse_crow_indices": [0, 1]}, "a sparse tensor needs"),
        (
            {"data": [1], "dtype": "int64", "shape": [1, 2], "sparse_crow_indices": [0, 2], "sparse_col_indices": [0]},
            "rising from 0 to 1",
        ),
        (
            {"data": [1], "dtype": "int64", "shape": [1, 2], "sparse_crow_indices": [0, 1], "sparse_col_indices": [2]},
            r"columns rising in 0\.\.1",
        ),
        (
            {
                "data": [1, 1],
                "dtype": "int64",
                "shape": [1, 2],
                "sparse_crow_indices": [0, 2],
                "sparse_col_indices": [1, 1],
            },
            "columns rising",
        ),
        (
            {"data": [1], "dtype": "int64", "shape": [1, 2], "sparse_crow_indices": [0, 1], "sparse_col_indices": []},
            "expected 1 values",
        ),
    ],
)
def test_malformed_tensor_data_is_refused_with_the_reason(arguments, message):
    with pytest.raises(UserError, match=message):
        types.TensorData(**arguments)


# --- Datum


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_datum_gives_known_inputs_their_dtype_whatever_they_come_as(make):
    inputs = datum(target_tokens=make([3, 4]), weights=make([0, 1]), other=make([1, 2])).loss_fn_inputs
    assert {name: value.dtype for name, value in inputs.items()} == {
        "target_tokens": "int64",
        "weights": "float32",
        "other": "int64",
    }
    assert inputs["weights"].tolist() == [0.0, 1.0]


def test_datum_recasts_tensor_data_of_the_other_dtype():
    inputs = datum(
        weights=types.TensorData([0, 1], "int64"),
        target_tokens=types.TensorData([3.0, 4.0], "float32"),
        mask=types.TensorData([1.0, 0.0], "float32"),
    ).loss_fn_inputs
    assert [inputs[name].dtype for name in ("weights", "target_tokens", "mask")] == ["float32", "int64", "float32"]


def test_datum_takes_the_json_form():
    value = types.Datum(
        model_input={"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        loss_fn_inputs={"weights": {"data": [1, 2, 3, 4], "dtype": "float32", "shape": [2, 2]}},
    )
    assert value.model_input.to_ints() == [1, 2]
    assert value.loss_fn_inputs["weights"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_datum_takes_soft_targets_in_two_dimensions():
    inputs = datum(target_tokens=[[1, 2], [3, 4]], weights=[[0.5, 0.5], [1, 0]]).loss_fn_inputs
    assert inputs["target_tokens"].shape == inputs["weights"].shape == [2, 2]


def test_datum_keeps_nan_weights_for_the_engine_to_name():
    assert math.isnan(datum(weights=[math.nan, 1.0]).loss_fn_inputs["weights"][0])
    assert datum(weights=[1e300, 1.0]).loss_fn_inputs["weights"][0] == math.inf


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"target_tokens": [1.5, 2]}, "target_tokens: expected integers"),
        ({"weights": "ab"}, "weights: expected a list"),
        ({"weights": [[1], [1, 2]]}, "weights: expected a rectangular"),
        ({"extra": [[1], [1, 2]]}, "extra: expected a rectangular"),
        ({"weights": ["a", "b"]}, "weights: expected numbers"),
    ],
)
def test_datum_names_the_input_that_is_wrong(inputs, message):
    with pytest.raises(UserError, match=message):
        datum(**inputs)


def test_datum_wants_a_model_input():
    with pytest.raises(UserError, match=r"model_input: expected a ModelInput, got list; use ModelInput\.from_ints"):
        types.Datum(model_input=[1, 2], loss_fn_inputs={})


# --- Parameters


def test_defaults_are_those_of_the_documentation():
    adam = types.AdamParams()
    assert (adam.learning_rate, adam.betas, adam.eps, adam.weight_decay) == (5e-5, (0.9, 0.999), 1e-8, 0.0)
    lora = types.LoraConfig()
    assert (lora.rank, lora.train_mlp, lora.train_attn, lora.train_unembed) == (16, True, True, True)
    sampling = types.SamplingParams()
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.stop) == (1.0, -1, 1.0, None)


def test_adam_params_takes_betas_in_both_forms():
    both = types.AdamParams(betas=(0.8, 0.95)), types.AdamParams(beta1=0.8, beta2=0.95)
    assert both[0] == both[1]
    assert both[0].betas == (0.8, 0.95)
    assert types.AdamParams.model_validate({"betas": [0.8, 0.95]}) == both[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"learning_rate": -1.0}, {"learning_rate": math.nan}, {"learning_rate": math.inf}, {"beta1": 1.0},
        {"beta2": -0.1}, {"eps": 0.0}, {"weight_decay": -1e-3}, {"grad_clip_norm": -1.0}, {"betas": 0.9},
        {"betas": (0.9, 0.99, 0.999)}, {"betas": (0.9, 0.99), "beta1": 0.9}, {"betas": (0.9, 1.0)}, {"lr": 1e-4},
    ],
)  # fmt: skip
def test_adam_params_refuses_values_out_of_range_and_unknown_fields(arguments):
    with pytest.raises(ValueError, match=r"betas|" + next(iter(arguments)) + "|beta2"):
        types.AdamParams(**arguments)


@pytest.mark.parametrize("rank", [0, 257, -1, "x", None, 2.5])
def test_lora_rank_is_1_to_256(rank):
    with pytest.raises(ValueError, match="rank"):
        types.LoraConfig(rank=rank)


def test_lora_scale_is_alpha_32_over_rank_and_something_must_be_trained():
    assert [types.LoraConfig(rank=r).scale for r in (1, 16, 256)] == [32.0, 2.0, 0.125]
    with pytest.raises(ValueError, match="nothing to train"):
        types.LoraConfig(train_mlp=False, train_attn=False, train_unembed=False)


@pytest.mark.parametrize(
    ("arguments", "strings", "ids", "eos"),
    [
        ({}, [], [], True),
        ({"stop": []}, [], [], False),
        ({"stop": "\n"}, ["\n"], [], False),
        ({"stop": ["a", "b"]}, ["a", "b"], [], False),
        ({"stop": (1, 2)}, [], [1, 2], False),
        ({"stop_token_ids": [7]}, [], [7], False),
        ({"stop_token_ids": []}, [], [], True),
        ({"stop": "\n", "stop_token_ids": [7]}, ["\n"], [7], False),
        ({"stop": [3], "stop_token_ids": (7,)}, [], [3, 7], False),
    ],
)
def test_stop_is_read_the_same_in_every_form(arguments, strings, ids, eos):
    params = types.SamplingParams(**arguments)
    assert (params.stop_strings, params.stop_token_ids, params.stops_at_eos) == (strings, ids, eos)
    assert types.SamplingParams.model_validate_json(params.model_dump_json()) == params


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}, {"top_k": -2},
        {"max_tokens": 0}, {"stop": [""]}, {"stop": ""}, {"stop": [-1]}, {"stop": [1.5]}, {"min_p": 0.1},
    ],
)  # fmt: skip
def test_sampling_params_refuse_values_out_of_range_and_unknown_fields(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        types.SamplingParams(**arguments)


@pytest.mark.parametrize("value", [types.AdamParams(), types.LoraConfig(), types.SamplingParams()])
def test_parameters_cannot_be_changed_after_they_were_checked(value):
    with pytest.raises(ValueError, match="frozen"):
        setattr(value, next(iter(type(value).model_fields)), 1)


# --- Results


def output(total: float, weight_sum: float | None) -> types.ForwardBackwardOutput:
    return types.ForwardBackwardOutput("TorchLossReturn", [], {"loss:sum": total}, weight_sum)


def test_loss_is_the_weighted_mean_for_cross_entropy_and_the_sum_otherwise():
    assert output(6.0, 4.0).loss == 1.5
    assert output(6.0, 0.0).loss == 0.0
    assert output(6.0, None).loss == 6.0
    assert types.ForwardBackwardResult is types.ForwardBackwardOutput


def test_sampled_logprobs_are_available_as_lists_and_as_arrays():
    sequence = types.SampledSequence("stop", [1, 2], [-0.5, -1.0])
    assert sequence.tokens_np.dtype == np.int32
    np.testing.assert_array_equal(sequence.logprobs_np, np.float32([-0.5, -1.0]))
    response = types.SampleResponse([sequence], prompt_logprobs=[None, -2.0])
    np.testing.assert_array_equal(response.prompt_logprobs_np, np.float32([math.nan, -2.0]))


# --- Checkpoint paths


@pytest.mark.parametrize("scheme", ["tinker://", "mint://", ""])
def test_checkpoint_paths_parse_with_every_scheme_and_are_written_as_tinker(scheme):
    parsed = types.ParsedCheckpointTinkerPath.from_tinker_path(f"{scheme}s:train:0/sampler_weights/a b")
    assert parsed.tinker_path == "tinker://s:train:0/sampler_weights/a b"
    assert (parsed.training_run_id, parsed.checkpoint_type, parsed.checkpoint_id) == (
        "s:train:0",
        "sampler",
        "sampler_weights/a b",
    )
    assert (parsed.kind, parsed.name) == ("sampler_weights", "a b")


@pytest.mark.parametrize(
    "path", ["", "tinker://", "tinker://r/weights", "tinker://r/other/x", "r/weights/a/b", "r/weights/", 3]
)
def test_other_checkpoint_paths_are_refused(path):
    with pytest.raises(ValueError, match="path: expected"):
        types.ParsedCheckpointTinkerPath.from_tinker_path(path)


# --- Errors


def test_errors_are_what_callers_already_catch():
    assert issubclass(UserError, ValueError)
    assert issubclass(UserError, MintError)
    error = StorageError(28, "no space left")
    assert isinstance(error, OSError)
    assert error.errno == 28
    assert pickle.loads(pickle.dumps(error)).errno == 28


def test_the_most_likely_tokens_are_also_matrices():
    rows: types.TopkLists = [None, [(5, -0.25), (6, -1.5)], [(7, -0.5)]]
    sequence = types.SampledSequence("stop", [5, 7], topk_logprobs=rows)
    response = types.SampleResponse([sequence], topk_prompt_logprobs=rows)
    for topk in (sequence.topk_logprobs_np, response.topk_prompt_logprobs_np):
        assert topk is not None
        assert (topk.token_ids.dtype, topk.logprobs.dtype) == (np.int32, np.float32)
        np.testing.assert_array_equal(topk.token_ids, [[0, 0], [5, 6], [7, 0]])
        np.testing.assert_array_equal(topk.logprobs, np.float32([[-99999, -99999], [-0.25, -1.5], [-0.5, -99999]]))
    assert types.SampleResponse([types.SampledSequence("stop", [])]).topk_prompt_logprobs_np is None
