"""Log-probabilities as the sampler reports them and as the trainer computes them, of the same tokens.

    python -m benchmarks.logprob_agreement [--dtype bfloat16] [--save]

SmolLM2-135M with a LoRA adapter on everything, trained for a few steps; real prompts, sampled together at temperature
1 beside samples of the base model; then every sample goes through ``forward`` as a datum. Prints the mean absolute
difference (at most 2e-3 in bfloat16), the largest (at most 1e-5 in float32, relative to 1 where beyond it) and the mean
with its standard error, which shows a bias. ``--save`` keeps the JSON and a histogram under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

import mint
from benchmarks.prompts import PROMPTS
from benchmarks.timing import RESULTS, report
from mint import types

SAMPLES, TOKENS, STEPS = 4, 64, 5
EDGES = [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, np.inf]


def datum(prompt: list[int], sampled: list[int]) -> types.Datum:
    tokens = [*prompt, *sampled]
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(sampled)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )


def differences(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(sampled minus trained, trained log-probabilities) of every sampled token."""
    with mint.ServiceClient(dtype=dtype) as service:
        trained = service.create_lora_training_client(base_model="smollm2-135m", rank=16, seed=0)
        base = service.create_sampling_client(base_model="smollm2-135m")
        tokenizer = trained.get_tokenizer()
        prompts = [tokenizer.encode(text) for text in PROMPTS]
        lesson = [datum(prompt[:1], prompt[1:]) for prompt in prompts]
        for _ in range(STEPS):
            trained.forward_backward(lesson, "cross_entropy").result()
            trained.optim_step(types.AdamParams(learning_rate=5e-4)).result()
        sampler = trained.save_weights_and_get_sampling_client()
        params = types.SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=1)
        company = [base.sample(prompt, 1, params) for prompt in prompts]
        answers = [f.result() for f in [sampler.sample(prompt, SAMPLES, params) for prompt in prompts]]
        for future in company:
            future.result()
        found, truth = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            data = [datum(prompt, list(sequence.tokens)) for sequence in answer.sequences]
            outputs = trained.forward(data, "cross_entropy").result().loss_fn_outputs
            for sequence, output in zip(answer.sequences, outputs, strict=True):
                scored = output["logprobs"].to_numpy()[len(prompt) - 1 :]
                found.append(np.array(sequence.logprobs) - scored)
                truth.append(scored)
    return np.concatenate(found), np.concatenate(truth)


def plot(difference: np.ndarray, dtype: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.hist(difference, bins=61, color="#356")
    axes.set(xlabel="sampled minus trained log-probability", ylabel="tokens", yscale="log",
             title=f"SmolLM2-135M, {dtype}, {len(difference)} tokens")  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], action="append")
    parser.add_argument("--save", action="store_true", help="keep JSON and histogram under benchmarks/results/")
    args = parser.parse_args()
    os.environ.setdefault("MINT_KV_CACHE_BYTES", str(1 << 30))
    results = {}
    for dtype in args.dtype or ["bfloat16", "float32"]:
        difference, truth = differences(dtype)
        size = np.abs(difference)
        counts, _ = np.histogram(size, EDGES)
        error = difference.std() / len(difference) ** 0.5
        results[dtype] = {
            "tokens": len(difference), "mean_absolute": float(size.mean()), "largest": float(size.max()),
            "largest_relative": float((size / np.maximum(1, np.abs(truth))).max()), "equal": float((size == 0).mean()),
            "mean": float(difference.mean()), "standard_error": float(error),
            "histogram": {"edges": [*EDGES[:-1], None], "counts": counts.tolist()},
        }  # fmt: skip
        print(f"{dtype}: {len(size)} tokens, mean |difference| {size.mean():.2e}, largest {size.max():.2e}, "
              f"mean {difference.mean():+.1e} (standard error {error:.1e})")  # fmt: skip
        if args.save:
            plot(difference, dtype, RESULTS / f"logprob_agreement_{dtype}.png")
    report("logprob_agreement", {"model": "SmolLM2-135M", "dtypes": results}, args.save)


if __name__ == "__main__":
    main()
