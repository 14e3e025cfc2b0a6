"""Training and sampling with numbers to compare: the same calls through an SDK's clients and through our own.

`run` is given the clients' package (`tinker` or `mint`), and gives what a person would keep: log-probabilities, losses,
tokens. Ids differ between runs and are left out.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from reporting import Report

RANK, SEED = 8, 7


@dataclass
class Made:
    """What a run leaves behind, for the calls that come after it."""

    training: Any
    sampler: Any
    state_path: str
    sampler_path: str


def tokens(length: int, seed: int) -> list[int]:
    """Some token ids below 250: every tokenizer here has as many."""
    return np.random.default_rng(seed).integers(3, 250, length).tolist()


def supervised(types: Any, lengths: tuple[int, ...] = (5, 9, 13), seed: int = 0) -> list[Any]:
    """Datums for cross_entropy: the first third of each is prompt, with weight 0; another weight is a fraction."""
    data = []
    for i, length in enumerate(lengths):
        ids = tokens(length + 1, 100 * seed + i)
        weights = [0.0] * (length // 3) + [1.0] * (length - length // 3)
        weights[-1] = 0.5
        inputs = {"target_tokens": ids[1:], "weights": weights}
        data.append(types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs))
    return data


def rollouts(types: Any, lengths: tuple[int, ...] = (6, 11), seed: int = 1) -> list[Any]:
    """Datums for the policy losses, with zeros on the prompt as the cookbook writes them."""
    data = []
    for i, length in enumerate(lengths):
        ids, prompt = tokens(length + 1, 100 * seed + i), length // 3
        random = np.random.default_rng(seed + i)
        logprobs = [0.0] * prompt + random.normal(-5.5, 0.3, length - prompt).tolist()
        advantages = [0.0] * prompt + random.normal(0, 1, length - prompt).tolist()
        inputs = {"target_tokens": [0] * prompt + ids[prompt + 1 :], "logprobs": logprobs, "advantages": advantages}
        data.append(types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs))
    return data


def soft_targets(types: Any) -> list[Any]:
    """Two targets a position as torch tensors, zeros among them: an SDK may send these as CSR."""
    ids = tokens(7, 42)
    targets = torch.tensor([tokens(2, 50 + i) for i in range(6)])
    weights = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.7, 0.3], [1.0, 0.0], [0.0, 1.0], [0.5, 0.25]])
    inputs = {"target_tokens": targets, "weights": weights}
    return [types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs)]


def adam(types: Any, learning_rate: float, **others: float) -> Any:
    """Everything spelled out: our defaults are those of MinT's documentation, not the SDKs'."""
    return types.AdamParams(**{"learning_rate": learning_rate, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8} | others)


def squared_loss(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """A custom loss whose gradient is no constant, over every position."""
    loss = torch.stack([((lp + 4.0) ** 2).mean() for lp in logprobs]).sum()
    return loss, {"datums": float(len(data))}


def output(out: Any) -> dict[str, Any]:
    """A ForwardBackwardOutput as plain numbers."""
    logprobs = [np.asarray(o["logprobs"].to_numpy()).reshape(-1).tolist() for o in out.loss_fn_outputs]
    return {"loss": out.metrics["loss:sum"], "logprobs": logprobs}


def sampled(response: Any) -> dict[str, Any]:
    """A SampleResponse as plain numbers."""
    sequences = [
        {"tokens": list(map(int, s.tokens)), "logprobs": list(map(float, s.logprobs)), "stop": str(s.stop_reason)}
        for s in response.sequences
    ]
    return {"sequences": sequences, "prompt": response.prompt_logprobs, "topk": response.topk_prompt_logprobs}


def run(report: Report, service: Any, types: Any, base_model: str) -> Made:
    """Train, sample, save, load; the numbers go into `report.values`."""
    values = report.values
    training = report.call(service, "create_lora_training_client", base_model=base_model, rank=RANK, seed=SEED)
    data = supervised(types)
    values["at first"] = output(report.call(training, "forward", data, "cross_entropy"))
    _supervised_steps(report, training, types)
    _policy_steps(report, training, types)
    _custom_step(report, training, types)

    values["soft targets"] = output(report.call(training, "forward_backward", soft_targets(types), "cross_entropy"))
    clipped = adam(types, 3e-3, beta2=0.99, weight_decay=0.1, grad_clip_norm=0.5)
    values["grad norm"] = (report.call(training, "optim_step", clipped).metrics or {}).get("grad_norm")
    trained = values["trained"] = output(training.forward(data, "cross_entropy").result())

    sampler = report.call(training, "save_weights_and_get_sampling_client")
    _sample(report, sampler, types)
    state_path = report.call(training, "save_state", "state").path
    sampler_path = report.call(training, "save_weights_for_sampler", "sampler").path
    made = Made(training, sampler, state_path, sampler_path)
    _come_back(report, service, types, made, trained)
    _many_datums(report, training, types)
    return made


def _supervised_steps(report: Report, training: Any, types: Any) -> None:
    """Steps are submitted before the results of the ones before are read, as every training loop does."""
    pending = []
    for step in range(3):
        data = supervised(types, seed=step)
        forward_backward = training.forward_backward(data, "cross_entropy")
        optim = training.optim_step(adam(types, 1e-2))
        pending.append((forward_backward, optim))
    report.values["supervised"] = [output(forward_backward.result()) for forward_backward, _ in pending]
    for _, optim in pending:
        optim.result()


def _policy_steps(report: Report, training: Any, types: Any) -> None:
    losses: dict[str, Any] = {
        "importance_sampling": None,
        "ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.3},
        "cispo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.3},
        "dro": {"beta": 0.05},
    }
    for loss_fn, config in losses.items():
        result = report.call(training, "forward_backward", rollouts(types), loss_fn, config)
        report.values[loss_fn] = output(result)
        report.call(training, "optim_step", adam(types, 1e-3))


def _custom_step(report: Report, training: Any, types: Any) -> None:
    """Its gradient shows in what the step after it does to the log-probabilities."""
    result = report.call(training, "forward_backward_custom", supervised(types), squared_loss)
    report.call(training, "optim_step", adam(types, 1e-2))
    assert result.metrics["datums"] == 3.0
    report.values["custom"] = output(result)["logprobs"]
    report.values["after custom"] = output(training.forward(supervised(types), "cross_entropy").result())


def _sample(report: Report, sampler: Any, types: Any) -> None:
    values, prompt = report.values, types.ModelInput.from_ints(tokens(9, 5))
    params = types.SamplingParams(max_tokens=8, seed=3, temperature=4.0, top_k=40, top_p=0.95)
    asked = report.call(sampler, "sample", prompt, 3, params, include_prompt_logprobs=True, topk_prompt_logprobs=3)
    values["sampled"] = sampled(asked)
    greedy = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=6, temperature=0.0, stop=[])).result()
    values["greedy"] = sampled(greedy)
    stop = [values["greedy"]["sequences"][0]["tokens"][2]]
    stopped = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=6, temperature=0.0, stop=stop)).result()
    values["stopped"] = sampled(stopped)
    values["scored"] = report.call(sampler, "compute_logprobs", prompt)
    if "prompt_alt_tokens_k" in inspect.signature(type(sampler).sample).parameters:
        _sample_extras(report, sampler, types, prompt, params)


def _sample_extras(report: Report, sampler: Any, types: Any, prompt: Any, params: Any) -> None:
    """What the SDKs since 0.25 or so ask for besides."""
    targets = torch.full((8, 2), -1)
    targets[3, 0], targets[7, 1] = 17, 200
    options = {"topk_sample_logprobs": 2, "target_prompt_logprobs": types.TensorData.from_torch(targets)}
    response = sampler.sample(prompt, 2, params, prompt_alt_tokens_k=2, **options).result()
    last = sampler.sample(prompt, 1, params, include_prompt_logprobs=True, prompt_logprobs_last_n=4).result()
    report.values["extras"] = sampled(response) | {
        "targets": np.asarray(response.target_prompt_logprobs.to_numpy()).reshape(-1).tolist(),
        "alternatives": np.asarray(response.prompt_alt_tokens.tokens.to_numpy()).reshape(-1).tolist(),
        "their logprobs": np.asarray(response.prompt_alt_tokens.logprobs.to_numpy()).reshape(-1).tolist(),
        "last four": last.prompt_logprobs,
    }


def _come_back(report: Report, service: Any, types: Any, made: Made, trained: Any) -> None:
    """Every way to a saved version says what the live one said, and training goes on as it would have."""
    values, data = report.values, supervised(types)
    prompt, step = types.ModelInput.from_ints(tokens(9, 5)), adam(types, 1e-2)
    for name, client in (
        ("service", report.call(service, "create_sampling_client", model_path=made.sampler_path)),
        ("training", report.call(made.training, "create_sampling_client", made.sampler_path)),
    ):
        values[f"scored by {name}'s sampler"] = client.compute_logprobs(prompt).result()
    base = service.create_sampling_client(base_model=made.training.get_info().model_data.model_name)
    values["scored by the base model"] = getattr(base, "result", lambda: base)().compute_logprobs(prompt).result()

    weights_only = report.call(service, "create_training_client_from_state", made.state_path)
    resumed = report.call(service, "create_training_client_from_state_with_optimizer", made.state_path)
    for name, client in (("weights only", weights_only), ("resumed", resumed)):
        assert np.allclose(output(client.forward(data, "cross_entropy").result())["loss"], trained["loss"]), name
        client.forward_backward(data, "cross_entropy").result()
        client.optim_step(step).result()
        values[f"{name}, one step on"] = output(client.forward(data, "cross_entropy").result())
    report.call(weights_only, "load_state", made.state_path)
    values["state loaded"] = output(weights_only.forward(data, "cross_entropy").result())
    report.call(weights_only, "load_state_with_optimizer", made.state_path)
    weights_only.forward_backward(data, "cross_entropy").result()
    weights_only.optim_step(step).result()
    values["state loaded with optimizer, one step on"] = output(weights_only.forward(data, "cross_entropy").result())


def _many_datums(report: Report, training: Any, types: Any) -> None:
    """More than the 1024 that any SDK puts into one request: it sends two, and may send the second first."""
    data = [datum for i in range(206) for datum in supervised(types, (2, 3, 2, 3, 4), seed=i)]
    many = output(training.forward_backward(data, "cross_entropy").result())
    report.values["1030 datums"] = {"loss": many["loss"], "logprobs": many["logprobs"][::50]}
    training.optim_step(adam(types, 1e-3)).result()
    report.values["trained on 1030 datums"] = output(training.forward(supervised(types), "cross_entropy").result())
