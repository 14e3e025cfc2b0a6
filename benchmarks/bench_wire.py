"""What the wire costs: 64 datums of 1024 tokens, cross_entropy (target_tokens int64, weights float32).

python -m pytest benchmarks/bench_wire.py --benchmark-enable --benchmark-only --benchmark-columns=median,iqr,rounds
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mint_engine import wire
from mint_engine.types import Datum, ForwardBackwardOutput, TensorData

DATUMS, TOKENS = 64, 1024


def _request() -> wire.ForwardBackwardRequest:
    rng = np.random.default_rng(0)
    data = [
        Datum.of_arrays(
            rng.integers(0, 49152, TOKENS),
            {
                "target_tokens": TensorData.wrap(rng.integers(0, 49152, TOKENS)),
                "weights": TensorData.wrap(rng.random(TOKENS, dtype=np.float32)),
            },
        )
        for _ in range(DATUMS)
    ]
    return wire.ForwardBackwardRequest("session:train:0", 1, data, "cross_entropy")


def _as_json(request: wire.ForwardBackwardRequest) -> bytes:
    data = [
        {
            "model_input": datum.model_input.model_dump(),
            "loss_fn_inputs": {name: tensor.to_dict() for name, tensor in datum.loss_fn_inputs.items()},
        }
        for datum in request.data
    ]
    inner = {"data": data, "loss_fn": request.loss_fn}
    return json.dumps({"model_id": request.model_id, "seq_id": 1, "forward_backward_input": inner}).encode()


def _cases() -> dict[str, tuple[Callable[[Any], Any], Any]]:
    request = _request()
    body = wire.encode_forward_backward(request)
    logprobs = [{"logprobs": datum.loss_fn_inputs["weights"]} for datum in request.data]
    out = ForwardBackwardOutput("TorchLossReturn", logprobs, {"loss:sum": 1.0}, 1.0)
    return {
        "server: parse request": (wire.parse_forward_backward, body),
        "server: parse request, JSON": (
            lambda b: wire.forward_backward_from_json(wire.parse_json(b)),
            _as_json(request),
        ),
        "server: unzstd request": (lambda b: wire.decode_body(b, "zstd", 1 << 28), wire.compress_body(body)),
        "server: encode output": (wire.encode_forward_backward_output, out),
        "client: encode request": (wire.encode_forward_backward, request),
        "client: parse output": (wire.parse_forward_backward_output, wire.encode_forward_backward_output(out)),
    }


@pytest.mark.parametrize("case", _cases())
def test_wire(benchmark: Any, case: str) -> None:
    run, value = _cases()[case]
    benchmark(run, value)
