"""A client of the bare protocol, for tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np

from mint_engine import wire
from mint_engine.types import Datum, ModelInput, TensorData
from mint_engine.wire import ForwardBackwardRequest


class Api:
    """`post("optim_step", model_id=...)`: the response. `ok(...)`: its JSON. `result(...)`: what its promise gives."""

    def __init__(self, url: str, key: str | None = None, **headers: str) -> None:
        if key is not None:
            headers["X-API-Key"] = key
        self.http = httpx.Client(base_url=f"{url}/api/v1/", headers=headers, timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: TracebackType | None) -> None:
        self.http.close()

    def post(self, path: str, headers: dict[str, str] | None = None, /, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body, headers=headers)

    def ok(self, path: str, headers: dict[str, str] | None = None, /, **body: Any) -> dict[str, Any]:
        response = self.post(path, headers, **body)
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text}"
        return response.json()

    def retrieve(self, request_id: str, accept: str = "application/json") -> httpx.Response:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            response = self.post("retrieve_future", {"Accept": accept}, request_id=request_id)
            if response.status_code != 200 or b"try_again" not in response.content:
                return response
        raise TimeoutError(f"no result of {request_id}")

    def result(self, path: str, /, **body: Any) -> dict[str, Any]:
        response = self.retrieve(self.ok(path, **body)["request_id"])
        assert response.status_code == 200, response.text
        return response.json()

    def proto(self, request: ForwardBackwardRequest, **headers: str) -> httpx.Response:
        body = wire.encode_forward_backward(request)
        return self.http.post("forward_backward", content=body, headers={"Content-Type": wire.PROTOBUF, **headers})

    # ---- a session, a model, a sampler

    def session(self) -> str:
        return self.ok("create_session", tags=[], sdk_version="test")["session_id"]

    def model(self, base: str, session: str | None = None, number: int = 0, rank: int = 8) -> str:
        lora = {"rank": rank, "seed": 1}
        made = self.result(
            "create_model", session_id=session or self.session(), model_seq_id=number, base_model=base, lora_config=lora
        )
        return made["model_id"]

    def sampler(self, model: str, seq_id: int, number: int = 0) -> str:
        saved = self.result("save_weights_for_sampler", model_id=model, seq_id=seq_id, sampling_session_seq_id=number)
        return saved["sampling_session_id"]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what a server does by itself."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sample(sampler: str, seq_id: int | None = 0, **more: object) -> dict[str, Any]:
    """The body of a request for two samples."""
    return {"sampling_session_id": sampler, "seq_id": seq_id, "prompt": prompt(1, 2, 3), "num_samples": 2, **more}


def prompt(*tokens: int) -> dict[str, Any]:
    return {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]}


def datum(n: int = 6, seed: int = 0, vocab: int = 199) -> Datum:
    tokens = np.random.default_rng(seed).integers(3, vocab, n + 1)
    inputs = {"target_tokens": TensorData(tokens[1:], "int64"), "weights": TensorData(np.ones(n), "float32")}
    return Datum(ModelInput.from_ints(tokens[:-1].tolist()), inputs)


def batch(model: str, seq_id: int | None, sizes: tuple[int, ...] = (6, 9), **fields: Any) -> ForwardBackwardRequest:
    data = [datum(n, seed=i) for i, n in enumerate(sizes)]
    return ForwardBackwardRequest(model, seq_id, data, fields.pop("loss_fn", "cross_entropy"), **fields)


def batch_json(model: str, seq_id: int | None, key: str = "forward_backward_input", **more: Any) -> dict[str, Any]:
    tensor = {"data": [1, 2, 3], "dtype": "int64", "shape": [3]}
    weights = {"data": [0.0, 1.0, 1.0], "dtype": "float32"}
    entry = {"model_input": prompt(0, 1, 2), "loss_fn_inputs": {"target_tokens": tensor, "weights": weights}}
    return {key: {"data": [entry], "loss_fn": "cross_entropy", **more}, "model_id": model, "seq_id": seq_id}
