"""Results whose bytes the SDKs have read: see `record_golden.py`."""

from __future__ import annotations

import math

import numpy as np

from mint_engine.types import (
    ForwardBackwardOutput,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    TensorData,
)


def logprobs(*values: object) -> dict[str, TensorData]:
    return {"logprobs": TensorData(list(values), "float32")}


FORWARD_BACKWARD = {
    "two datums": ForwardBackwardOutput(
        "TorchLossReturn", [logprobs(-0.5, -1.25, -0.0), logprobs(-3.5)], {"loss:sum": 5.25, "tokens:sum": 4.0}, 4.0
    ),
    "matrix and vector": ForwardBackwardOutput(
        "TorchLossReturn",
        [logprobs([-1.0, -2.0], [-3.0, -4.0]), logprobs(-5.0), logprobs(-6.0, -7.0)],
        {"loss:sum": math.nan},
    ),
    "no metrics": ForwardBackwardOutput("TorchLossReturn", [logprobs(-1.0)]),
    "nothing": ForwardBackwardOutput("TorchLossReturn", [], {}),
    "integers": ForwardBackwardOutput(
        "TorchLossReturn", [{"ranks": TensorData([3, 2**40], "int64")}], {"loss:sum": 0.0}
    ),
}

SAMPLES = {
    "plain": SampleResponse([SampledSequence("stop", [5, 6], [-0.5, -1.5]), SampledSequence("length", [7], [-0.25])]),
    "no logprobs": SampleResponse([SampledSequence("length", [5, 6])], prompt_cache_hit_tokens=3),
    "prompt": SampleResponse(
        [SampledSequence("stop", [1], [-1.0], [[(1, -1.0), (4, -2.0)]])],
        prompt_logprobs=[None, -2.5, -0.125],
        topk_prompt_logprobs=[None, [(3, -0.5), (1, -2.0)], [(2, -0.75)]],
    ),
    "targets": SampleResponse(
        [SampledSequence("stop", [1], [-1.0])],
        target_prompt_logprobs=TensorData([[-1.0, 0.0], [-2.0, -3.0]], "float32"),
        prompt_alt_tokens=PromptAltTokens(TensorData([[4], [5]], "int64"), TensorData([[-1.0], [-2.0]], "float32")),
    ),
    "sparse targets": SampleResponse(
        [SampledSequence("stop", [1], [-1.0])],
        target_prompt_logprobs=TensorData(np.float32([-1.5]), "float32", [2, 3], [0, 0, 1], [2]),
    ),
}
