"""What the protocol costs when the compute costs nothing: a POST that promises, and the poll that gets the result.

    python -m benchmarks.protocol_overhead [--rounds 300]

The server is a process of its own, uvicorn as `mint-engine serve` runs it, around an engine whose futures are done at
once. The client is http.client on one kept connection, so that its own part is small; `healthz` is the floor of one
request. Prints a table, and a JSON document last.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mint_engine import wire
from mint_engine.types import Datum, ModelInput, TensorData
from mint_engine.wire import ForwardBackwardRequest, messages

_SEQ_ID: int = messages.ForwardBackwardRequest.DESCRIPTOR.fields_by_name["seq_id"].number
ROOT = Path(__file__).parent.parent
TARGETS_MS = {"optim_step": 3.0, "forward_backward 4 x 32": 3.0, "forward_backward 64 x 1024": 25.0}


def serve(port_file: str) -> None:
    """The server's process."""
    sys.path.insert(0, str(ROOT / "tests"))
    import uvicorn
    from stub_engine import BASE, StubEngine

    from mint_engine.server import Settings, create_app

    class Quick(StubEngine):
        """Remembers nothing, so that it does not grow."""

        def _call(self, *args: Any, **kwargs: Any) -> Any:
            future = super()._call(*args, **kwargs)
            self.calls.clear()
            for steps in self.steps.values():
                steps.clear()
            return future

    app = create_app(Quick(Path(tempfile.mkdtemp())), Settings(models=[BASE], park_on_shutdown=False))  # type: ignore[arg-type]
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    Path(port_file).write_text(str(listener.getsockname()[1]))
    config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_keep_alive=75)
    uvicorn.Server(config).run(sockets=[listener])


class Client:
    """One kept connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def post(self, path: str, body: bytes, **headers: str) -> bytes:
        sent = {"Content-Type": "application/json", "X-API-Key": "tml-bench", **headers}
        self._connection.request("POST", f"/api/v1/{path}", body, {k.replace("_", "-"): v for k, v in sent.items()})
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {content[:500]!r}")
        return content

    def get(self, path: str) -> bytes:
        self._connection.request("GET", path)
        return self._connection.getresponse().read()

    def json(self, path: str, **body: Any) -> Any:
        return json.loads(self.post(path, json.dumps(body).encode()))

    def result(self, promise: bytes, accept: str) -> bytes:
        request = json.dumps({"request_id": json.loads(promise)["request_id"], "allow_metadata_only": True})
        return self.post("retrieve_future", request.encode(), Accept=accept)


class Session:
    """A model, and its next seq_id."""

    def __init__(self, client: Client) -> None:
        self.client, self._seq = client, 0
        session = client.json("create_session", tags=[])["session_id"]
        made = client.json("create_model", session_id=session, model_seq_id=0, base_model="stub/base")
        self.model: str = client.json("retrieve_future", request_id=made["request_id"])["model_id"]

    def next(self) -> int:
        self._seq += 1
        return self._seq

    def optim_step(self) -> bytes:
        adam = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0}
        body = {"model_id": self.model, "seq_id": self.next(), "adam_params": adam, "type": "optim_step"}
        return self.client.result(self.client.post("optim_step", json.dumps(body).encode()), "application/json")

    def forward_backward(self, data: list[Datum]) -> Callable[[], bytes]:
        request = ForwardBackwardRequest(self.model, None, data, "cross_entropy")
        body, tag = wire.encode_forward_backward(request), bytes([_SEQ_ID << 3])

        def run() -> bytes:
            # Fields of protobuf may come in any order: encoding the batch anew is the client's time, not the server's.
            numbered = body + tag + _varint(self.next())
            promise = self.client.post("forward_backward", numbered, Content_Type=wire.PROTOBUF)
            return self.client.result(promise, wire.PROTOBUF)

        return run


def _varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def datums(count: int, length: int) -> list[Datum]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        tokens = rng.integers(0, 50_000, length + 1)
        inputs = {"target_tokens": TensorData(tokens[1:], "int64"), "weights": TensorData(np.ones(length), "float32")}
        found.append(Datum(ModelInput.from_ints(tokens[:-1].tolist()), inputs))
    return found


def measure(run: Callable[[], Any], rounds: int) -> list[float]:
    times = []
    for i in range(rounds + 10):
        begun = time.perf_counter()
        run()
        if i >= 10:
            times.append(1000 * (time.perf_counter() - begun))
    return sorted(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--serve", metavar="PORT_FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        command = [sys.executable, "-m", "benchmarks.protocol_overhead", "--serve", str(port_file)]
        server = subprocess.Popen(command, cwd=ROOT)
        try:
            while not (port_file.exists() and port_file.read_text()):
                if server.poll() is not None:
                    raise RuntimeError("the server did not start")
                time.sleep(0.05)
            report = run_all(Client(int(port_file.read_text())), options.rounds)
        finally:
            server.terminate()
            server.wait()
    print(json.dumps(report))


def run_all(client: Client, rounds: int) -> dict[str, Any]:
    from benchmarks.timing import machine

    session = Session(client)
    cases: dict[str, Callable[[], Any]] = {
        "healthz": lambda: client.get("/healthz"),
        "optim_step": session.optim_step,
        "forward_backward 4 x 32": session.forward_backward(datums(4, 32)),
        "forward_backward 64 x 1024": session.forward_backward(datums(64, 1024)),
    }
    print(f"{'milliseconds, promise and result':34} {'p50':>7} {'p90':>7} {'p99':>7} {'target p50':>11}")
    rows = {}
    for name, run in cases.items():
        times = measure(run, rounds if "1024" not in name else max(30, rounds // 5))
        p50, p90, p99 = statistics.median(times), times[int(0.9 * len(times))], times[int(0.99 * len(times))]
        target = TARGETS_MS.get(name)
        print(f"{name:34} {p50:7.2f} {p90:7.2f} {p99:7.2f} {'' if target is None else f'< {target:g}':>11}")
        rows[name] = {"p50_ms": round(p50, 3), "p90_ms": round(p90, 3), "p99_ms": round(p99, 3), "target_ms": target}
    load = os.getloadavg()[0]
    return {"benchmark": "protocol_overhead", "rounds": rounds, "rows": rows, "load": load, "machine": machine()}


if __name__ == "__main__":
    main()
