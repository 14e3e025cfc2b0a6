"""MinT's quickstart, as its documentation describes it: `python quickstart.py request.json`, in mindlab-toolkit's
environment with an sk- key.

Supervised training on arithmetic examples, ten steps on all of them; then reinforcement learning, some samples for each
of eight prompts, with importance sampling; both stages end with `save_state`. For the sake of slow machines it has 16
examples (the document 100), 4 samples (8) and 5 steps (10). The questions are small and the reward has steps, so that a
small model gets different rewards within a group and every step trains.
"""

from __future__ import annotations

import random
import re
import sys
from typing import Any

import context
import numpy as np

SUPERVISED_STEPS, EXAMPLES, RL_STEPS, PROMPTS, SAMPLES = 10, 16, 5, 8, 4


def question(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 19), rng.randint(2, 19)
    return f"Question: What is {a} * {b}?\nAnswer:", str(a * b)


def example(types: Any, tokenizer: Any, prompt: str, answer: str) -> Any:
    """The document's datum: int weights, prompt masked, end-of-sequence token trained."""
    prompt_tokens = tokenizer.encode(prompt, add_special_tokens=True)
    completion = [*tokenizer.encode(f" {answer}", add_special_tokens=False), tokenizer.eos_token_id]
    tokens, weights = prompt_tokens + completion, [0] * len(prompt_tokens) + [1] * len(completion)
    inputs = {"target_tokens": tokens[1:], "weights": weights[1:]}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens=tokens[:-1]), loss_fn_inputs=inputs)


def supervised(ctx: context.Context, training: Any, tokenizer: Any, rng: random.Random) -> list[float]:
    """The mean loss of every step, computed from the log-probabilities as the quickstart does."""
    data = [example(ctx.types, tokenizer, *question(rng)) for _ in range(EXAMPLES)]
    losses = []
    for _ in range(SUPERVISED_STEPS):
        result = training.forward_backward(data, loss_fn="cross_entropy").result()
        total = weight = 0.0
        for datum, out in zip(data, result.loss_fn_outputs, strict=True):
            weights = np.array(datum.loss_fn_inputs["weights"].tolist())
            total -= float(np.dot(out["logprobs"].tolist(), weights))
            weight += float(weights.sum())
        training.optim_step(ctx.types.AdamParams(learning_rate=1e-4)).result()
        losses.append(total / weight)
    return losses


def reward(text: str, answer: str) -> float:
    """1 for the product, less the further the first number is from it, 0 for no number."""
    number = re.search(r"\d+", text)
    return 1 / (1 + abs(int(number[0][:6]) - int(answer))) if number else 0.0


def rollouts(ctx: context.Context, sampler: Any, tokenizer: Any, rng: random.Random) -> tuple[list[Any], float]:
    """Datums of one step, with `weights` besides what the loss reads, and the mean reward."""
    types, data, rewards = ctx.types, [], []
    params = types.SamplingParams(max_tokens=16, temperature=0.7, stop_token_ids=[tokenizer.eos_token_id])
    questions = [question(rng) for _ in range(PROMPTS)]
    prompts = [tokenizer.encode(prompt) for prompt, _ in questions]
    futures = [
        sampler.sample(prompt=types.ModelInput.from_ints(tokens=p), num_samples=SAMPLES, sampling_params=params)
        for p in prompts
    ]
    for (_, answer), prompt_tokens, future in zip(questions, prompts, futures, strict=True):
        response = future.result()
        group = [reward(tokenizer.decode(s.tokens), answer) for s in response.sequences]
        rewards += group
        masked = len(prompt_tokens) - 1
        for sequence, r in zip(response.sequences, group, strict=True):
            tokens, n = prompt_tokens + list(sequence.tokens), len(sequence.tokens)
            inputs = {
                "target_tokens": tokens[1:],
                "weights": [0.0] * masked + [1.0] * n,
                "logprobs": [0.0] * masked + list(sequence.logprobs),
                "advantages": [0.0] * masked + [r - float(np.mean(group))] * n,
            }
            data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return data, float(np.mean(rewards))


def main(path: str) -> None:
    ctx = context.opened(path)
    values, rng = ctx.report.values, random.Random(42)
    with ctx.report.section("quickstart"):
        service = ctx.sdk.ServiceClient()
        training = service.create_lora_training_client(
            base_model=ctx.base_model, rank=16, train_mlp=True, train_attn=True, train_unembed=True
        )
        tokenizer = training.get_tokenizer()
        values["losses"] = supervised(ctx, training, tokenizer, rng)
        values["supervised checkpoint"] = training.save_state(name="quickstart-sft").result().path
        values["rewards"], values["finite"], values["advantages"] = [], [], []
        for step in range(RL_STEPS):
            sampler = training.save_weights_and_get_sampling_client(name=f"quickstart-rl-{step}")
            data, mean = rollouts(ctx, sampler, tokenizer, rng)
            result = training.forward_backward(data, loss_fn="importance_sampling").result()
            training.optim_step(ctx.types.AdamParams(learning_rate=2e-5)).result()
            values["rewards"].append(mean)
            values["finite"].append(_finite(data, result))
            values["advantages"].append(sum(any(d.loss_fn_inputs["advantages"].tolist()) for d in data))
        values["final checkpoint"] = training.save_state(name="quickstart-rl-final").result().path
    ctx.report.write(ctx.out / "report.json")


def _finite(data: list[Any], result: Any) -> bool:
    """Every sampled token has a finite log-probability, one for each."""
    good = True
    for datum, out in zip(data, result.loss_fn_outputs, strict=True):
        sampled = np.array(datum.loss_fn_inputs["weights"].tolist()) > 0
        good &= bool(np.isfinite(np.array(out["logprobs"].tolist())[sampled]).all())
    return good


if __name__ == "__main__":
    main(sys.argv[1])
