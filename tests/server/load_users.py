"""A user who costs little: the protocol as the SDKs speak it, for tests with many users at once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import numpy as np

from mint import types
from mint_engine import wire

ADAM = types.AdamParams(learning_rate=2e-3, weight_decay=0.01, grad_clip_norm=1.0)
_PROTOBUF = {"Content-Type": wire.PROTOBUF}
_ACCEPT = {"Accept": f"{wire.PROTOBUF}, application/json"}


def connect(url: str) -> aiohttp.ClientSession:
    """For all users: as many connections as they have requests."""
    return aiohttp.ClientSession(
        f"{url}/api/v1/", connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)
    )


def batch(user: int, step: int) -> list[types.Datum]:
    """What a user trains on at a step."""
    rng = np.random.default_rng([user, step])
    data = []
    for length in rng.integers(4, 24, size=2):
        tokens = rng.integers(0, 199, size=length + 1).tolist()
        weights = rng.random(length).astype(np.float32)
        data.append(
            types.Datum(types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights})
        )
    return data


class User:
    """Trains one model. Any answer but 200 is an error, except the 408 of a poll.

    Attributes:
        losses, steps: of each training step, as the server answered them.
        promise_seconds: from sending each training request to having its promise.
    """

    def __init__(self, http: aiohttp.ClientSession, index: int) -> None:
        self.index = index
        self.losses: list[float] = []
        self.steps: list[float] = []
        self.promise_seconds: list[float] = []
        self._http, self._session, self._model, self._sampler, self._seq = http, "", "", "", 0

    async def create_model(self, base_model: str) -> None:
        session = {"type": "create_session", "tags": [], "sdk_version": "0.38.0"}
        self._session = (await self._json("create_session", session))["session_id"]
        lora = {"rank": 4, "seed": self.index, "train_mlp": True, "train_attn": True, "train_unembed": True}
        asked = {"session_id": self._session, "model_seq_id": 0, "base_model": base_model, "lora_config": lora}
        promise = await self._json("create_model", asked)
        self._model = (await self._result(promise["request_id"], self._as_json))["model_id"]

    async def train(self, until: float) -> None:
        """Steps as the cookbook makes them: both requests are sent before a result is waited for."""
        while time.monotonic() < until:
            data = batch(self.index, len(self.losses))
            request = wire.ForwardBackwardRequest(self._model, self._next(), data, "cross_entropy")
            passed = await self._promise(
                "forward_backward", data=wire.encode_forward_backward(request), headers=_PROTOBUF
            )
            step = {"model_id": self._model, "seq_id": self._next(), "adam_params": ADAM.model_dump()}
            stepped = await self._promise("optim_step", json=step)
            output, done = await asyncio.gather(
                self._result(passed, wire.parse_forward_backward_output), self._result(stepped, self._as_json)
            )
            self.losses.append(output.metrics["loss:sum"])
            self.steps.append(done["metrics"]["step"])

    async def create_sampler(self, base_model: str) -> None:
        asked = {"session_id": self._session, "sampling_session_seq_id": 0, "base_model": base_model}
        self._sampler = (await self._json("create_sampling_session", asked))["sampling_session_id"]

    async def sample(self, seq_id: int) -> list[int]:
        """Eight tokens."""
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
        params = {"max_tokens": 8, "seed": 1, "stop": []}
        asked = {"sampling_session_id": self._sampler, "seq_id": seq_id, "prompt": prompt, "sampling_params": params}
        promise = await self._json("asample", asked | {"num_samples": 1})
        result = await self._result(promise["request_id"], wire.parse_sample_response)
        return list(result.sequences[0].tokens)

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    async def _promise(self, path: str, **request: Any) -> str:
        sent = time.perf_counter()
        async with self._http.post(path, **request) as answer:
            body = await answer.json()
        self.promise_seconds.append(time.perf_counter() - sent)
        assert answer.status == 200, (path, body)
        found: str = body["request_id"]
        return found

    async def _json(self, path: str, body: dict[str, Any]) -> Any:
        async with self._http.post(path, json=body) as answer:
            content = await answer.json()
        assert answer.status == 200, (path, content)
        return content

    async def _result(self, request_id: str, parse: Any) -> Any:
        while True:
            async with self._http.post("retrieve_future", json={"request_id": request_id}, headers=_ACCEPT) as answer:
                body = await answer.read()
            if answer.status != 408 and b"try_again" not in body[:64]:
                assert answer.status == 200, body
                return parse(body)

    @staticmethod
    def _as_json(body: bytes) -> Any:
        return wire.parse_json(body)
