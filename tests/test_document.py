"""The SFT document's program, verbatim but for the model's name, runs and learns: in process, and over HTTP."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from server_fixture import live_server
from tiny_models import build_tiny
from tiny_tokenizer import VOCAB, save_byte_tokenizer

import mint
from mint import types
from mint_engine.client.remote import close_connections

# The code of the document, snippet after snippet; the marked line is the only one we add.
PROGRAM = """
import re

import mint
from mint import types
service_client = mint.ServiceClient()
training_client = service_client.create_lora_training_client(
    base_model="Qwen/Qwen3-0.6B",
    rank=16,
    train_mlp=True,
    train_attn=True,
    train_unembed=True,
)
tokenizer = training_client.get_tokenizer()
adam_params = types.AdamParams(learning_rate=5e-5)

def process_sft_example(ex: dict, tokenizer) -> types.Datum:
    # ex = {"question": "What is 3 * 4?"}
    a, b = map(int, re.findall(r"\\d+", ex["question"]))
    answer = str(a * b)
    prompt = f"Question: {ex['question']}\\nAnswer:"
    completion = f" {answer}"
    prompt_tokens = tokenizer.encode(prompt, add_special_tokens=True)
    completion_tokens = tokenizer.encode(completion, add_special_tokens=False)
    completion_tokens.append(tokenizer.eos_token_id)
    all_tokens = prompt_tokens + completion_tokens
    all_weights = [0] * len(prompt_tokens) + [1] * len(completion_tokens)
    # Shift for teacher-forcing: input = all_tokens[:-1], target = all_tokens[1:]
    input_tokens = all_tokens[:-1]
    target_tokens = all_tokens[1:]
    weights = all_weights[1:]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens=input_tokens),
        loss_fn_inputs={"target_tokens": target_tokens, "weights": weights},
    )

batches = [[process_sft_example(ex, tokenizer) for ex in examples] for examples in BATCHES]  # the test's examples

adam_params = types.AdamParams(
    learning_rate=5e-5,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
)
for step, batch in enumerate(batches):
    result = training_client.forward_backward(batch, loss_fn="cross_entropy").result()
    training_client.optim_step(adam_params).result()
    print(f"Step {step}: loss={result.loss:.4f}")

# After SFT training completes:
checkpoint = training_client.save_weights_and_get_sampling_client(name="my-sft-v1")
prompt_ids = tokenizer.encode("3 * 7 =")
samples = checkpoint.sample(
    prompt=types.ModelInput.from_ints(prompt_ids),
    sampling_params=types.SamplingParams(max_tokens=16, temperature=0.7),
    num_samples=4,
)
for seq in samples.sequences:
    print(tokenizer.decode(seq.tokens))
"""


def batches(n: int, size: int = 8) -> list[list[dict[str, str]]]:
    rng = random.Random(0)
    return [
        [{"question": f"What is {rng.randint(10, 99)} * {rng.randint(10, 99)}?"} for _ in range(size)] for _ in range(n)
    ]


def run_document(model: str, program: str, capsys: pytest.CaptureFixture, steps: int) -> dict[str, Any]:
    scope: dict[str, Any] = {"BATCHES": batches(steps)}
    exec(compile(program.replace("Qwen/Qwen3-0.6B", model), "document", "exec"), scope)
    printed = capsys.readouterr().out
    losses = [float(line.split("loss=")[1]) for line in printed.splitlines() if line.startswith("Step ")]
    assert len(losses) == steps
    assert losses[-1] < losses[0]
    outputs = scope["result"].loss_fn_outputs
    for datum, output in zip(scope["batches"][-1], outputs, strict=True):
        assert len(output["logprobs"].tolist()) == datum.model_input.length
    sequences = scope["samples"].sequences
    assert len(sequences) == 4
    for seq in sequences:
        assert 1 <= len(seq.tokens) <= 16
        ended = seq.tokens[-1] == scope["tokenizer"].eos_token_id
        assert seq.stop_reason == ("stop" if ended else "length")
    return scope


@pytest.fixture(scope="module")
def tiny_with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = build_tiny(
        "qwen3", tmp_path_factory.mktemp("doc"), tie_word_embeddings=True, vocab_size=VOCAB, eos_token_id=256
    )
    save_byte_tokenizer(directory)
    return directory


@pytest.fixture(params=["local", "http"])
def serve(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`serve(model)`: with "http", from now on MINT_BASE_URL leads to a server of that model."""
    with ExitStack() as stack:

        def start(model: str) -> None:
            if request.param == "http":
                server = stack.enter_context(live_server(models=[model]))
                monkeypatch.setenv("MINT_BASE_URL", server.url)
                stack.callback(close_connections)

        yield start


def test_the_document_s_program_runs_and_learns(
    tiny_with_tokenizer: Path, capsys: pytest.CaptureFixture, serve: Callable[[str], None]
) -> None:
    serve(str(tiny_with_tokenizer))
    scope = run_document(str(tiny_with_tokenizer), PROGRAM, capsys, steps=12)
    # The name given to save_weights_and_get_sampling_client is a checkpoint that can be found again.
    rest = scope["service_client"].create_rest_client()
    paths = [c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints]
    assert f"tinker://{scope['training_client'].model_id}/sampler_weights/my-sft-v1" in paths


def test_the_model_s_name_comes_from_the_environment(
    tiny_with_tokenizer: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    serve: Callable[[str], None],
) -> None:
    serve(str(tiny_with_tokenizer))
    monkeypatch.setenv("MINT_BASE_MODEL", str(tiny_with_tokenizer))
    monkeypatch.setenv("MINT_LORA_RANK", "8")
    program = PROGRAM.replace('    base_model="Qwen/Qwen3-0.6B",\n    rank=16,\n', "")
    scope = run_document("unused", program, capsys, steps=12)
    assert scope["training_client"].get_info().lora_rank == 8


@pytest.mark.parametrize("form", ["0.22", "0.38"])
def test_the_sdks_forms_run_too(tiny_with_tokenizer: Path, form: str, serve: Callable[[str], None]) -> None:
    """Keyword names and result handling as the tinker cookbook writes them."""
    serve(str(tiny_with_tokenizer))
    service = mint.ServiceClient()
    trainer = service.create_lora_training_client(str(tiny_with_tokenizer), 4)
    if form == "0.38":
        trainer = trainer.result()
    datum = types.Datum(
        model_input=types.ModelInput(
            chunks=[types.EncodedTextChunk(tokens=[1, 2]), types.EncodedTextChunk(tokens=[3])]
        ),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=[2, 3, 4], dtype="int64", shape=[3]),
            "weights": types.TensorData(data=[0.0, 1.0, 1.0], dtype="float32", shape=[3]),
        },
    )
    pending = (
        trainer.forward_backward([datum], "cross_entropy"),
        trainer.optim_step(types.AdamParams(learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-12)),
    )
    first, step = (p.result() for p in pending)
    assert first.metrics["loss:sum"] == pytest.approx(2 * first.loss)
    assert step.metrics["grad_norm"] > 0
    path = trainer.save_weights_for_sampler(name="v1").result().path
    sampler = service.create_sampling_client(model_path=path)
    response = sampler.sample(types.ModelInput.from_ints([1, 2, 3]), 2, types.SamplingParams(max_tokens=3)).result()
    assert len(response.sequences) == 2
    scores = sampler.compute_logprobs(types.ModelInput.from_ints([1, 2, 3, 4])).result()
    forward = trainer.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    assert scores[0] is None
    assert scores[1:] == pytest.approx(forward.tolist(), abs=2e-2)  # bf16 batches of other shapes
    assert trainer.save_state("s1").result().path == f"tinker://{trainer.model_id}/weights/s1"


@pytest.mark.slow
def test_the_document_s_program_on_a_real_model(
    smollm2_home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, serve: Callable[[str], None]
) -> None:
    monkeypatch.setenv("MINT_HOME", str(smollm2_home))
    serve("smollm2-135m")
    scope = run_document("smollm2-135m", PROGRAM, capsys, steps=12)
    text = [scope["tokenizer"].decode(s.tokens) for s in scope["samples"].sequences]
    assert all(text)
