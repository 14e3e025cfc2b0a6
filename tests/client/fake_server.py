"""A server of the protocol in front of a FakeEngine, without sockets: what our client says, and what it bears."""

from __future__ import annotations

import asyncio
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from datetime import date
from typing import Any

import httpx
from fake_engine import FakeEngine

from mint_engine import wire
from mint_engine.errors import MintError, NotFoundError
from mint_engine.types import AdamParams, LoraConfig, ModelInput, ReverseKLDatum, SamplingParams, TensorData

Fault = Callable[[httpx.Request, "FakeServer"], Any]

CHECKPOINT = re.compile(r"training_runs/([^/]+)/checkpoints/(.+?)(/publish|/ttl|/archive|/external_weights_urls)?")
LONG_POLL = 0.3


class FakeServer(httpx.AsyncBaseTransport):
    """What RemoteEngine(wire=...) takes.

    `requests` counts the paths asked for; `applied` lists (model_id, seq_id, kind) as handed to the engine. `fault`
    sees every request first: it may raise, or return a response instead of the server's. `after` is called when it has
    been handled, before the answer goes out.
    """

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.requests: Counter[str] = Counter()
        self.seen: list[httpx.Request] = []
        self.applied: list[tuple[str, int, str]] = []
        self.config: dict[str, Any] = {"a key of the future": 1}
        self.finished: list[tuple[str, str]] = []
        self.unloaded: list[str] = []
        self.cancelled: list[str] = []
        self.traces: list[dict[str, Any]] = []  # what asking for a timeline answers, one after the other
        self.jwt: Any = None
        self.bill: dict[str, Any] = {"data": []}
        self.fault: Fault | None = None
        self.after: Fault | None = None
        self._promises: dict[str, tuple[str, Future[Any]]] = {}
        self._known: dict[tuple[str, int], dict[str, Any]] = {}
        self._results: dict[tuple[str, int], Future[Any]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        path = request.url.path.removeprefix("/api/v1/")
        self.requests[path] += 1
        self.seen.append(request)
        body = await request.aread()
        if self.fault is not None and (answer := self.fault(request, self)) is not None:
            return answer
        try:
            answer = await self._answer(request, path, body)
        except MintError as error:
            status = 404 if isinstance(error, NotFoundError) else 400
            answer = httpx.Response(status, json={"detail": str(error), "type": type(error).__name__})
        if self.after is not None:
            self.after(request, self)
        return answer

    def forget_promises(self) -> None:
        """As a server that was started anew, and whose models came back."""
        self._promises.clear()

    async def _answer(self, request: httpx.Request, path: str, body: bytes) -> httpx.Response:
        if path == "retrieve_future":
            return await self._retrieve(json.loads(body), request.headers["accept"])
        if path == "forward_backward":
            return httpx.Response(200, json=self._train(wire.parse_forward_backward(body)))
        sent = json.loads(body) if body and request.headers["content-type"] == "application/json" else {}
        handler = getattr(self, "_" + path.replace("/", "_"), None)
        if handler is not None:
            return httpx.Response(200, json=handler(sent))
        return self._registry(request, path, sent)

    # ---- promises ------------------------------------------------------------------------------------------------

    def _promise(self, kind: str, future: Future[Any], **more: Any) -> dict[str, Any]:
        request_id = f"req-{len(self._promises)}-{kind}"
        self._promises[request_id] = kind, future
        return {"request_id": request_id, **more}

    def _once(self, scope: str, number: int, kind: str, call: Callable[[], Future[Any]], **more: Any) -> dict[str, Any]:
        key = scope, number
        if key not in self._results:
            self.applied.append((scope, number, kind))
            self._results[key] = call()
        if key not in self._known or self._known[key]["request_id"] not in self._promises:
            self._known[key] = self._promise(kind, self._results[key], **more)
        return self._known[key]

    async def _retrieve(self, sent: dict[str, Any], accept: str) -> httpx.Response:
        request_id = sent["request_id"]
        if request_id not in self._promises:
            return httpx.Response(404, json={"detail": f"request_id: there is no request {request_id!r}"})
        kind, future = self._promises[request_id]
        waiter = asyncio.wrap_future(future)
        done, _ = await asyncio.wait([waiter], timeout=LONG_POLL)
        if not done:
            return httpx.Response(200, json={"type": "try_again", "request_id": request_id, "queue_state": "active"})
        if (error := waiter.exception()) is not None:
            failure = {"error": str(error), "category": "user" if isinstance(error, ValueError) else "server"}
            return httpx.Response(200, json=failure | {"type": type(error).__name__})
        value = future.result()
        headers = {"content-type": wire.PROTOBUF}
        if kind in ("Forward", "ForwardBackward"):
            assert wire.PROTOBUF in accept
            return httpx.Response(200, content=wire.encode_forward_backward_output(value), headers=headers)
        if kind == "Sample":
            return httpx.Response(200, content=wire.encode_sample_response(value), headers=headers)
        if kind == "MintForwardBackwardReverseKL":
            outputs = [{name: tensor.to_dict() for name, tensor in output.items()} for output in value.outputs]
            return httpx.Response(200, json={"outputs": outputs, "metrics": value.metrics, "type": value.type})
        if value is None or isinstance(value, str):
            return httpx.Response(200, json={"model_id": value} if value else {})
        return httpx.Response(200, json=value.model_dump(mode="json"))

    # ---- operations ----------------------------------------------------------------------------------------------

    def _train(self, sent: wire.ForwardBackwardRequest) -> dict[str, Any]:
        call = self.engine.forward if sent.forward_only else self.engine.forward_backward
        config = sent.loss_fn_config or None
        kind = "Forward" if sent.forward_only else "ForwardBackward"
        return self._once(
            sent.model_id, sent.seq_id, kind, lambda: call(sent.model_id, sent.data, sent.loss_fn, config)
        )

    def _operation(self, sent: dict[str, Any], kind: str, call: Callable[[], Future[Any]]) -> dict[str, Any]:
        return self._once(sent["model_id"], sent["seq_id"], kind, call)

    def _client_config(self, sent: dict[str, Any]) -> dict[str, Any]:
        return self.config

    def _create_session(self, sent: dict[str, Any]) -> dict[str, Any]:
        fields = {name: sent.get(name) for name in ("user_metadata", "project_id", "display_name")}
        return {"type": "create_session", "session_id": self.engine.create_session(tags=sent["tags"], **fields)}

    def _session_heartbeat(self, sent: dict[str, Any]) -> dict[str, Any]:
        return {"type": "session_heartbeat"}

    def _create_model(self, sent: dict[str, Any]) -> dict[str, Any]:
        lora = LoraConfig(**sent["lora_config"])
        made = self.engine.create_model(
            sent["session_id"], sent["base_model"], lora, user_metadata=sent.get("user_metadata")
        )
        return self._promise("CreateModel", made)

    def _get_info(self, sent: dict[str, Any]) -> dict[str, Any]:
        return self.engine.get_info(sent["model_id"]).model_dump(mode="json")

    def _unload_model(self, sent: dict[str, Any]) -> dict[str, Any]:
        self.unloaded.append(sent["model_id"])
        return self._promise("UnloadModel", self.engine.unload_model(sent["model_id"]))

    def _optim_step(self, sent: dict[str, Any]) -> dict[str, Any]:
        params = AdamParams(**sent["adam_params"])
        return self._operation(sent, "OptimStep", lambda: self.engine.optim_step(sent["model_id"], params))

    def _save_weights(self, sent: dict[str, Any]) -> dict[str, Any]:
        fields = {name: sent.get(name) for name in ("ttl_seconds", "overwrite", "user_metadata")}
        save = self.engine.save_weights
        return self._operation(sent, "SaveWeights", lambda: save(sent["model_id"], sent["path"], **fields))

    def _save_weights_external(self, sent: dict[str, Any]) -> dict[str, Any]:
        fields = {"ttl_seconds": sent.get("ttl_seconds"), "recipients": sent.get("age_encryption_recipients")}
        save = self.engine.save_weights_external
        return self._operation(sent, "SaveWeightsExternal", lambda: save(sent["model_id"], sent["path"], **fields))

    def _load_weights(self, sent: dict[str, Any]) -> dict[str, Any]:
        if "model_id" in sent:
            load = self.engine.load_weights
            return self._operation(
                sent, "LoadWeights", lambda: load(sent["model_id"], sent["path"], optimizer=sent["optimizer"])
            )
        fields = {name: sent.get(name) for name in ("base_model", "user_metadata")}
        made = self.engine.create_model_from_state(
            sent["session_id"], sent["path"], optimizer=sent["optimizer"], **fields
        )
        return self._promise("LoadWeights", made)

    def _save_weights_for_sampler(self, sent: dict[str, Any]) -> dict[str, Any]:
        save, fields = self.engine.save_weights_for_sampler, {"overwrite": sent.get("overwrite", False)}
        return self._operation(
            sent, "SaveWeightsForSampler",
            lambda: save(sent["model_id"], sent.get("path"), sampler="path" not in sent, **fields),
        )  # fmt: skip

    def _mint_forward_backward_reverse_kl(self, sent: dict[str, Any]) -> dict[str, Any]:
        data = [ReverseKLDatum(**datum) for datum in sent["data"]]
        return self._operation(
            sent, "MintForwardBackwardReverseKL",
            lambda: self.engine.forward_backward_reverse_kl(
                sent["model_id"], data, reference_model_path=sent["reference_model_path"],
                temperature=sent["temperature"],
            ),
        )  # fmt: skip

    def _mint_checkpoints_interpolate(self, sent: dict[str, Any]) -> dict[str, Any]:
        made = self.engine.interpolate_checkpoints(
            "local", sent["source_paths"], sent["coefficients"], output_name=sent["output_path"]
        )
        return self._promise("MintInterpolateCheckpoints", made)

    def _create_sampling_session(self, sent: dict[str, Any]) -> dict[str, Any]:
        made = self.engine.create_sampler(
            sent["session_id"], model_path=sent.get("model_path"), base_model=sent.get("base_model")
        )
        return {"sampling_session_id": made.result()}

    def _asample(self, sent: dict[str, Any]) -> dict[str, Any]:
        targets = sent.get("target_prompt_logprobs")
        ids = [f"{sent['sampling_session_id']}:seq:{sent['seq_id']}:{i}" for i in range(sent["num_samples"])]
        return self._once(
            sent["sampling_session_id"], sent["seq_id"], "Sample",
            lambda: self.engine.sample(
                sent["sampling_session_id"], ModelInput.model_validate(sent["prompt"]), sent["num_samples"],
                SamplingParams(**sent["sampling_params"]), include_prompt_logprobs=sent["prompt_logprobs"],
                topk_prompt_logprobs=sent["topk_prompt_logprobs"],
                topk_sample_logprobs=sent.get("topk_sample_logprobs", 0),
                target_prompt_logprobs=None if targets is None else TensorData(**targets),
                prompt_alt_tokens_k=sent.get("prompt_alt_tokens_k", 0),
                prompt_logprobs_last_n=sent.get("prompt_logprobs_last_n"),
            ),
            sample_sequence_ids=ids,
        )  # fmt: skip

    def _cancel_future(self, sent: dict[str, Any]) -> dict[str, Any]:
        self.cancelled.append(sent["request_id"])
        return {}

    # ---- what is stored ------------------------------------------------------------------------------------------

    def _get_server_capabilities(self, sent: dict[str, Any]) -> dict[str, Any]:
        return self.engine.capabilities().model_dump(mode="json")

    def _weights_info(self, sent: dict[str, Any]) -> dict[str, Any]:
        return self.engine.store.weights_info(sent["tinker_path"]).model_dump(mode="json")

    def _sessions_search(self, sent: dict[str, Any]) -> dict[str, Any]:
        return self.engine.store.search_sessions(sent).model_dump(mode="json")

    def _copy_weights(self, sent: dict[str, Any]) -> dict[str, Any]:
        copied = self.engine.copy_checkpoint(
            sent["source_path"], session_id=sent.get("session_id"), seq=sent.get("model_seq_id"),
            project_id=sent.get("destination_project_id"), ttl_seconds=sent.get("ttl_seconds"),
        )  # fmt: skip
        return {"tinker_path": copied.result()}

    def _registry(self, request: httpx.Request, path: str, sent: dict[str, Any]) -> httpx.Response:
        store, asked = self.engine.store, dict(request.url.params)
        page = int(asked.get("limit", 20)), int(asked.get("offset", 0))
        scope = asked.get("access_scope", "owned")
        match path.split("/"):
            case ["mint", "tokenizer"]:
                return self._tokenizer(asked["base_model"])
            case ["training_runs"]:
                return _json(store.list_runs(*page, asked.get("project_id"), scope))
            case ["training_runs", run_id]:
                return _json(store.get_run(run_id, scope))
            case ["training_runs", run_id, "checkpoints"]:
                return _json(store.list_checkpoints(run_id))
            case ["checkpoints"]:
                return _json(store.list_user_checkpoints(*page))
            case ["sessions"]:
                return _json(store.list_sessions(*page, scope))
            case ["sessions", session_id]:
                return _json(store.get_session(session_id, scope))
            case ["sessions", session_id, "project"]:
                return _json(store.update_session(session_id, project_id=sent["project_id"]))
            case ["sessions", session_id, "finish"]:
                self.finished.append((session_id, sent["reason"]["type"]))
                return _json(store.finish_session(session_id, sent["reason"]["type"], sent.get("detail")))
            case ["sessions", session_id, "trace_export"]:
                store.get_session(session_id)
                return httpx.Response(200, json=self.traces.pop(0))
            case ["auth", "token"]:
                return httpx.Response(200, json={"jwt": self.jwt})
            case ["audit"]:
                day = date.fromisoformat(asked["day"]) if "day" in asked else None
                return _json(store.audit_log(asked["event_type"], day))
            case ["billing", "usage", "events"]:
                return httpx.Response(200, json=self.bill)
            case ["billing", "usage", "checkpoints", "current"]:
                return _json(store.storage_usage(asked.get("project_id")))
            case ["samplers", sampler_id]:
                return _json(self.engine.get_sampler(sampler_id))
        found = CHECKPOINT.fullmatch(path)
        assert found is not None, path
        checkpoint = f"tinker://{found[1]}/{found[2]}"
        match request.method, found[3]:
            case "DELETE", None:
                return _json(store.delete_checkpoint(checkpoint))
            case "POST", "/publish":
                return _json(store.publish(checkpoint))
            case "DELETE", "/publish":
                return _json(store.unpublish(checkpoint))
            case "PUT", "/ttl":
                return _json(store.set_ttl(checkpoint, sent["ttl_seconds"]))
            case "GET", "/archive":
                return httpx.Response(200, json={"url": store.archive(checkpoint), "expires": "2030-01-01T00:00:00Z"})
            case "GET", "/external_weights_urls":
                directory = store.resolve(checkpoint).directory
                urls = {file.name: f"https://files/{file.name}" for file in directory.iterdir()}
                return httpx.Response(200, json={"urls": urls, "expires": "2030-01-01T00:00:00Z"})
        raise AssertionError((request.method, path))

    def _tokenizer(self, base_model: str) -> httpx.Response:
        files = self.engine.tokenizer_files.get(base_model)
        if files is None:
            return httpx.Response(404, json={"detail": f"base_model: there is no tokenizer of {base_model!r}"})
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return httpx.Response(200, content=buffer.getvalue(), headers={"content-type": "application/zip"})


def _json(value: Any) -> httpx.Response:
    return httpx.Response(200, json={} if value is None else value.model_dump(mode="json"))
