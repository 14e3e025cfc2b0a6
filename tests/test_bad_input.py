"""Every mistake of the issue's table: a clear exception on that call or its future, everything else unharmed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_models import build_tiny

import mint
from mint import types
from mint_engine.engine import get_engine
from mint_engine.types import Datum

VOCAB = 199
CONTEXT = 128


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama-tied", tmp_path_factory.mktemp("bad"), max_position_embeddings=CONTEXT)


@pytest.fixture
def trainer(base: Path) -> mint.TrainingClient:
    return mint.ServiceClient(dtype="float32").create_lora_training_client(str(base), rank=4, seed=0)


def datum(tokens: list[int] | None = None, **inputs) -> Datum:
    tokens = [1, 2, 3] if tokens is None else tokens
    given = {"target_tokens": [t + 1 for t in tokens], "weights": [1.0] * len(tokens), **inputs}
    return types.Datum(types.ModelInput.from_ints(tokens), {k: v for k, v in given.items() if v is not None})


GOOD = datum()


def state_of(trainer: mint.TrainingClient) -> tuple[np.ndarray, float]:
    """What the model says, and whether gradients are waiting."""
    out = trainer.forward([GOOD], "cross_entropy").result()
    return out.loss_fn_outputs[0]["logprobs"].to_numpy(), trainer.optim_step(
        types.AdamParams(learning_rate=0.0)
    ).result().metrics["grad_norm"]


CALLS: dict[str, tuple[Callable[[mint.TrainingClient], mint.APIFuture], str]] = {
    "weights too short": (
        lambda t: t.forward_backward([GOOD, datum(weights=[1.0, 1.0])], "cross_entropy"),
        r"weights: expected 3 values to match target_tokens, got 2 \(datum 1\)",
    ),
    "targets too long": (
        lambda t: t.forward_backward([datum(target_tokens=[1, 2, 3, 4], weights=[1.0] * 4)], "cross_entropy"),
        r"target_tokens: expected 3 values to match model_input, got 4 \(datum 0\)",
    ),
    "empty batch": (lambda t: t.forward_backward([], "cross_entropy"), "data: expected at least one datum"),
    "empty sequence": (
        lambda t: t.forward_backward([GOOD, datum([])], "cross_entropy"),
        r"model_input \(datum 1\): expected at least one token",
    ),
    "token beyond the vocabulary": (
        lambda t: t.forward_backward([datum([1, VOCAB, 3], target_tokens=[1, 2, 3])], "cross_entropy"),
        r"model_input \(datum 0\): expected token ids in \[0, 199\), got 199 at index 1",
    ),
    "token beyond 64 bits": (
        lambda t: t.forward_backward([datum([1, 2**70, 3], target_tokens=[1, 2, 3])], "cross_entropy"),
        r"model_input \(datum 0\): expected token ids in \[0, 199\), got one beyond 64 bits",
    ),
    "negative token": (
        lambda t: t.forward_backward([datum([1, -2, 3])], "cross_entropy"),
        r"expected token ids in \[0, 199\), got -2 at index 1",
    ),
    "negative target": (
        lambda t: t.forward_backward([datum(target_tokens=[1, 2, -1])], "cross_entropy"),
        r"target_tokens \(datum 0\): expected token ids in \[0, 199\), got -1 at index 2",
    ),
    "NaN weight": (
        lambda t: t.forward_backward([datum(weights=[1.0, float("nan"), 1.0])], "cross_entropy"),
        r"weights: expected finite numbers, got nan at index 1 \(datum 0\)",
    ),
    "infinite weight": (
        lambda t: t.forward_backward([datum(weights=[1.0, 1.0, float("inf")])], "cross_entropy"),
        r"weights: expected finite numbers, got inf at index 2",
    ),
    "missing weights": (
        lambda t: t.forward_backward([datum(weights=None)], "cross_entropy"),
        r"cross_entropy needs weights \(datum 0\)",
    ),
    "missing advantages": (
        lambda t: t.forward_backward([datum(logprobs=[0.0] * 3)], "ppo"),
        r"ppo needs advantages \(datum 0\)",
    ),
    "matrix targets for a policy loss": (
        lambda t: t.forward_backward(
            [datum(target_tokens=np.ones((3, 2), int), logprobs=[0.0] * 3, advantages=[0.0] * 3)], "ppo"
        ),
        r"target_tokens: ppo expects shape \[N\], got \[3, 2\]",
    ),
    "unknown loss": (lambda t: t.forward_backward([GOOD], "gspo"), "unknown loss 'gspo'; supported: cross_entropy"),
    "unknown config key": (
        lambda t: t.forward_backward([GOOD], "cross_entropy", {"beta": 0.1}),
        "cross_entropy has no key 'beta'",
    ),
    "longer than the context": (
        lambda t: t.forward_backward([datum([1] * (CONTEXT + 1))], "cross_entropy"),
        rf"expected at most {CONTEXT} tokens \(the model's context\), got {CONTEXT + 1}",
    ),
    "loss that is not finite": (
        lambda t: t.forward_backward(
            [GOOD, datum(logprobs=[-3e4, 0.0, 0.0], advantages=[1.0, 1.0, 1.0])][1:], "importance_sampling"
        ),
        r"loss: importance_sampling is -inf \(datum 0, position 0\).*the adapter is as it was",
    ),
    "unknown checkpoint": (
        lambda t: t.load_state(f"tinker://{t.model_id}/weights/nothing"),
        "nothing",
    ),
    "a name that is a path": (lambda t: t.save_state("../escape"), "name"),
    "a step that overflows": (lambda t: t.optim_step(types.AdamParams(learning_rate=1e38)), "beyond fp32"),
}


@pytest.mark.parametrize("mistake", CALLS)
def test_a_mistake_fails_its_own_future_and_nothing_else(trainer: mint.TrainingClient, mistake: str) -> None:
    call, message = CALLS[mistake]
    before, _ = state_of(trainer)
    good_before = trainer.forward([GOOD], "cross_entropy")
    bad = call(trainer)
    good_after = trainer.forward([GOOD], "cross_entropy")
    with pytest.raises(ValueError, match=message):
        bad.result()
    for good in (good_before, good_after):
        assert np.array_equal(good.result().loss_fn_outputs[0]["logprobs"].to_numpy(), before)
    after, waiting = state_of(trainer)
    assert np.array_equal(after, before)
    assert waiting == 0.0, "no half-applied gradient is left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 257}, "rank"),
        ({"train_mlp": False, "train_attn": False, "train_unembed": False}, "nothing to train"),
        ({"base_model": "no/such-model"}, "no/such-model"),
        ({"base_model": "/no/such/directory"}, "no such directory"),
    ],
)
def test_a_client_that_cannot_be_is_refused_when_it_is_made(base: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mint.ServiceClient(dtype="float32").create_lora_training_client(**{"base_model": str(base), **arguments})


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt: expected at least one token"),
        ([VOCAB], {}, "expected token ids in"),
        ([1] * CONTEXT, {}, "leave no room"),
        ([1] * (CONTEXT + 1), {}, "expected at most"),
        ([1], {"num_samples": 10**6}, "num_samples|KV cache"),
    ],
)
def test_a_bad_sample_call_fails_alone(trainer: mint.TrainingClient, prompt: list, params: dict, message: str) -> None:
    sampler = trainer.save_weights_and_get_sampling_client()
    good = {"sampling_params": types.SamplingParams(max_tokens=3, seed=1), "num_samples": 1}
    expected = sampler.sample(types.ModelInput.from_ints([1]), **good).result().sequences
    bad = sampler.sample(types.ModelInput.from_ints(prompt), **{**good, **params})
    beside = sampler.sample(types.ModelInput.from_ints([1]), **good)
    with pytest.raises(ValueError, match=message):
        bad.result()
    assert [s.tokens for s in beside.result().sequences] == [s.tokens for s in expected]


def test_a_model_directory_with_a_missing_shard_names_it(tmp_path: Path) -> None:
    whole = build_tiny("llama", tmp_path / "whole", sharded=True)
    broken = Path(shutil.copytree(whole, tmp_path / "broken"))
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    service = mint.ServiceClient(dtype="float32")
    with pytest.raises(ValueError, match=shard.name):
        service.create_lora_training_client(str(broken), rank=4)
    # Once the file is there, the same engine loads the same directory.
    shutil.copyfile(whole / shard.name, shard)
    assert service.create_lora_training_client(str(broken), rank=4).get_info().lora_rank == 4


def test_a_damaged_checkpoint_names_its_file(trainer: mint.TrainingClient, tmp_path: Path) -> None:
    path = trainer.save_weights_for_sampler("v1").result().path
    directory = get_engine("float32").store.resolve(path).directory
    (directory / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        trainer.create_sampling_client(path).result()
