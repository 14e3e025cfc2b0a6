"""Supervised fine-tuning as the MinT document writes it: two-digit multiplication, about a minute on two cores.

    python examples/sft.py                                  # smollm2-135m
    MINT_BASE_MODEL=/path/to/model python examples/sft.py   # any Llama, Qwen2 or Qwen3 directory or hub name

``mint-engine demo`` does the same with a progress bar, samples from before and after, and a plot.
"""

import os
import random
import re

import mint
from mint import types

STEPS, BATCH = 60, 16


def process_sft_example(ex: dict, tokenizer) -> types.Datum:
    # ex = {"question": "What is 3 * 4?"}
    a, b = map(int, re.findall(r"\d+", ex["question"]))
    prompt_tokens = tokenizer.encode(f"Question: {ex['question']}\nAnswer:", add_special_tokens=True)
    completion_tokens = tokenizer.encode(f" {a * b}", add_special_tokens=False)
    completion_tokens.append(tokenizer.eos_token_id)
    all_tokens = prompt_tokens + completion_tokens
    all_weights = [0] * len(prompt_tokens) + [1] * len(completion_tokens)
    # Shift for teacher forcing: position i of the input predicts position i + 1.
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens=all_tokens[:-1]),
        loss_fn_inputs={"target_tokens": all_tokens[1:], "weights": all_weights[1:]},
    )


def main() -> None:
    os.environ.setdefault("MINT_BASE_MODEL", "smollm2-135m")
    service_client = mint.ServiceClient()
    training_client = service_client.create_lora_training_client(rank=16)
    tokenizer = training_client.get_tokenizer()
    adam_params = types.AdamParams(learning_rate=5e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    rng = random.Random(0)
    for step in range(STEPS):
        examples = [{"question": f"What is {rng.randint(10, 99)} * {rng.randint(10, 99)}?"} for _ in range(BATCH)]
        batch = [process_sft_example(ex, tokenizer) for ex in examples]
        result = training_client.forward_backward(batch, loss_fn="cross_entropy").result()
        training_client.optim_step(adam_params).result()
        print(f"Step {step}: loss={result.loss:.4f}")

    checkpoint = training_client.save_weights_and_get_sampling_client(name="my-sft-v1")
    prompt_ids = tokenizer.encode("Question: What is 12 * 34?\nAnswer:")
    samples = checkpoint.sample(
        prompt=types.ModelInput.from_ints(prompt_ids),
        sampling_params=types.SamplingParams(max_tokens=16, temperature=0.7),
        num_samples=4,
    )
    for seq in samples.sequences:
        print(tokenizer.decode(seq.tokens))


if __name__ == "__main__":
    main()
