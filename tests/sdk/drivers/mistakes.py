"""Bad requests end in the SDK's own exception, with the server's sentence in it; what comes after still works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scenario
from context import Context
from reporting import raised, settled


def run(ctx: Context) -> None:
    training, service, types = ctx.made.training, ctx.service, ctx.types
    good = scenario.supervised(types)
    before = scenario.output(settled(training.forward(good, "cross_entropy")))

    def datum(tokens: list[int], **inputs: Any) -> Any:
        return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)

    def backward(data: Any, loss: str = "cross_entropy") -> Callable[[], Any]:
        return lambda: settled(training.forward_backward([good[0], data], loss))

    image = types.ImageChunk(data=b"x", format="png", expected_tokens=4)
    picture = types.ModelInput(chunks=[image, *types.ModelInput.from_ints([5, 6]).chunks])
    rl = {"target_tokens": [6, 7], "logprobs": [-1.0, -1.0]}
    short = datum([5, 6, 7], target_tokens=[6, 7], weights=[1.0, 1.0])
    cases: dict[str, tuple[Callable[[], Any], list[str]]] = {
        "a length that does not fit": (backward(short), ["datum 1"]),
        "a token beyond the vocabulary": (
            backward(datum([5, 6], target_tokens=[6, 99999], weights=[1.0, 1.0])),
            ["99999", "datum 1"],
        ),
        "a missing tensor": (backward(datum([5, 6], **rl), "importance_sampling"), ["advantages"]),
        "an image": (backward(types.Datum(model_input=picture, loss_fn_inputs=good[0].loss_fn_inputs)), ["image"]),
        "too long": (backward(scenario.supervised(types, (600,))[0]), ["512"]),
        "an unknown base model": (
            lambda: settled(service.create_lora_training_client("no/such-model")),
            ["no/such-model"],
        ),
        "rank 0": (lambda: settled(service.create_lora_training_client(ctx.base_model, rank=0)), ["rank"]),
        "an unknown checkpoint": (
            lambda: settled(service.create_training_client_from_state("tinker://nobody/weights/nothing")),
            ["NotFoundError", "nobody"],
        ),
        "an unknown sampler": (
            lambda: settled(settled(service.create_sampling_client("tinker://nobody/sampler_weights/nothing"))),
            ["NotFoundError", "nobody"],
        ),
        "a name in use": (lambda: settled(training.save_state("state")), ["state", "overwrite"]),
        "a name with a slash": (lambda: settled(training.save_state("a/b")), ["a/b"]),
        "a prompt that is too long": (
            lambda: settled(
                ctx.made.sampler.sample(types.ModelInput.from_ints([5] * 600), 1, types.SamplingParams(max_tokens=4))
            ),
            ["512"],
        ),
        "a wrong key": (
            lambda: settled(ctx.sdk.ServiceClient(api_key=ctx.key + "x").get_server_capabilities()),
            ["AuthenticationError", "key"],
        ),
    }
    if ctx.version >= (0, 38):
        cases["a loss that is not ours"] = (backward(good[1], "stable_reinforce"), ["stable_reinforce"])
        dimuon = ctx.types.DimuonOptimizerConfig()
        cases["another optimizer"] = (
            lambda: settled(service.create_lora_training_client(ctx.base_model, optimizer=dimuon)),
            ["dimuon"],
        )
    said = ctx.report.values["mistakes"] = {}
    wrong = []
    for name, (act, words) in cases.items():
        said[name] = raised(act)
        wrong += [f"{name}: {word!r} is not in {said[name]!r}" for word in words if word not in said[name]]
    after = scenario.output(settled(training.forward(good, "cross_entropy")))
    np.testing.assert_allclose(after["loss"], before["loss"], rtol=1e-6)
    assert not wrong, "\n".join(wrong)
