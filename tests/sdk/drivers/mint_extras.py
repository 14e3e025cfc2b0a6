"""The two calls that mindlab-toolkit adds to tinker's: `mint.mint.interpolate_checkpoints` and
`mint.mint.forward_backward_reverse_kl`."""

from __future__ import annotations

from typing import Any

import numpy as np
import scenario
from context import Context
from reporting import settled


def run(ctx: Context) -> None:
    _interpolate(ctx)
    _reverse_kl(ctx)


def _interpolate(ctx: Context) -> None:
    """A mix of a checkpoint with itself is that checkpoint; with another, it is between them."""
    mint, types = ctx.sdk.mint, ctx.types
    step = types.AdamParams(learning_rate=1e-2)
    training = ctx.made.training
    training.forward_backward(scenario.supervised(types), "cross_entropy").result()
    training.optim_step(step).result()
    first = ctx.made.sampler_path
    second = training.save_weights_for_sampler("second").result().path
    same = mint.interpolate_checkpoints(ctx.service, source_paths=[first, first], coefficients=[0.9, 0.1])
    assert same.path.startswith("tinker://"), same
    assert (same.checkpoint_type, same.coefficients) == ("sampler", [0.9, 0.1]), same
    np.testing.assert_allclose(_scores(ctx, same.path), _scores(ctx, first), atol=1e-4)
    ctx.report.methods["mint.interpolate_checkpoints"] = "ok"

    options = {"coefficients": [0.75, 0.25], "output_path": "ema"}
    mixed = _on_the_sdk_s_loop(
        ctx, mint.interpolate_checkpoints_async(ctx.service, source_paths=[first, second], **options)
    ).path
    assert mixed.endswith("/sampler_weights/ema"), mixed
    ctx.report.values["interpolated"] = _scores(ctx, mixed).tolist()
    ctx.report.methods["mint.interpolate_checkpoints_async"] = "ok"


def _on_the_sdk_s_loop(ctx: Context, coroutine: Any) -> Any:
    """mindlab-toolkit's async functions run on tinker's event loop only: elsewhere tinker itself refuses."""
    return settled(ctx.service.holder.run_coroutine_threadsafe(coroutine))


def _scores(ctx: Context, path: str) -> np.ndarray:
    sampler = ctx.service.create_sampling_client(model_path=path)
    prompt = ctx.types.ModelInput.from_ints(scenario.tokens(9, 5))
    return np.array(sampler.compute_logprobs(prompt).result()[1:])


def _reverse_kl(ctx: Context) -> None:
    """Zero against itself under the same prompt; against another version it falls when it is trained on."""
    mint, types = ctx.sdk.mint, ctx.types
    student = ctx.service.create_training_client_from_state(ctx.made.state_path)
    other = ctx.made.training.save_weights_for_sampler("further on").result().path
    data = _distilled(ctx)

    def loss(path: str, **options: Any) -> float:
        answer = mint.forward_backward_reverse_kl(student, reference_model_path=path, data=data, **options)
        assert len(answer.outputs) == len(data), answer
        return float(sum(np.sum(output.loss.data) for output in answer.outputs))

    assert abs(loss(ctx.made.sampler_path, temperature=1.5)) < 1e-4
    student.optim_step(types.AdamParams(learning_rate=0.0)).result()  # clears the gradients
    before = loss(other)
    student.optim_step(types.AdamParams(learning_rate=1e-4)).result()
    after = loss(other)
    assert 0 < after < before, f"reverse KL was {before}, and {after} after a step"
    ctx.report.methods["mint.forward_backward_reverse_kl"] = "ok"
    again = mint.forward_backward_reverse_kl_async(student, reference_model_path=other, data=data)
    assert len(_on_the_sdk_s_loop(ctx, again).outputs) == len(data)
    ctx.report.methods["mint.forward_backward_reverse_kl_async"] = "ok"


def _distilled(ctx: Context) -> list[Any]:
    """Completions of four tokens under the student's own prompt; the reference sees the same here."""
    from tinker.types import TensorData

    data = []
    for i in range(2):
        tokens = scenario.tokens(9 + i, 70 + i)
        whole = ctx.types.ModelInput.from_ints(tokens[:-1])
        data.append(
            ctx.sdk.mint.ReverseKLDatum(
                student_input=whole,
                reference_input=whole,
                target_tokens=TensorData(data=tokens[-4:], dtype="int64", shape=[4]),
                weights=TensorData(data=[1.0, 1.0, 0.5, 1.0], dtype="float32", shape=[4]),
            )
        )
    return data
