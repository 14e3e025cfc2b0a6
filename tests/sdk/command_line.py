"""The `tinker` commands about runs and checkpoints, as a person types them."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import environments
import httpx
import serving


def tinker(sdk: str, server: serving.Server, *arguments: str) -> str:
    """What the command prints. It must succeed; that it did its work is for the caller to see, by what it prints or by
    what the server says: some commands print nothing, also when they abort at their very end (`serving.ended_well`)."""
    variables = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": server.key, "COLUMNS": "300"}
    command = [str(environments.environment(sdk).tinker), *arguments]
    done = subprocess.run(
        command, env=serving.sdk_environment() | variables, capture_output=True, text=True, timeout=120
    )
    well = serving.ended_well(done, finished=True)
    assert well, f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def run_commands(sdk: str, server: serving.Server, made: dict[str, str], out: Path) -> dict[str, str]:
    """Every command about runs and checkpoints once, each checked by what it prints or by what the server says after
    it. Two at a time: most of a command's time is Python's imports. `made`: a run and two of its checkpoints."""
    run, state, short_lived = made["run"], made["state"], made["short-lived"]
    outcomes: dict[str, str] = {}

    def call(command: str, *arguments: str) -> str:
        printed = tinker(sdk, server, "--format", "json", *command.split(), *arguments)
        outcomes[command] = "ok"
        return printed

    def listed() -> dict[str, dict[str, Any]]:
        answer = httpx.get(
            f"{server.url}/api/v1/training_runs/{run}/checkpoints", headers={"X-API-Key": server.key}
        ).raise_for_status()
        return {checkpoint["tinker_path"]: checkpoint for checkpoint in answer.json()["checkpoints"]}

    def runs() -> None:
        assert run in json.dumps(json.loads(call("run list", "--limit", "0")))
        assert run in json.dumps(json.loads(call("run info", run)))

    def checkpoints() -> None:
        assert state in json.dumps(json.loads(call("checkpoint list", "--limit", "0")))
        assert short_lived in json.dumps(json.loads(call("checkpoint list", "--run-id", run)))
        assert state in json.dumps(json.loads(call("checkpoint info", state)))

    def publish() -> None:
        call("checkpoint publish", state)
        assert listed()[state]["public"] is True
        call("checkpoint unpublish", state)
        assert listed()[state]["public"] is False

    def expire() -> None:
        call("checkpoint set-ttl", state, "--ttl", "7200")
        assert listed()[state]["expires_at"] is not None
        call("checkpoint set-ttl", state, "--remove")
        assert listed()[state]["expires_at"] is None

    def download() -> None:
        call("checkpoint download", state, "--output", str(out))
        assert list(out.rglob("adapter_model.safetensors*")), list(out.rglob("*"))

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(part) for part in (runs, checkpoints, publish, expire, download)]:
            done.result()
    if sdk == "tinker-0.22.0":
        # Its module's own command `list` hides Python's, which deleting by path needs.
        call("checkpoint delete", "--run-id", run, "--type", "sampler_weights", "--yes")
        outcomes["checkpoint delete"] = "but by --run-id only: by path the SDK fails before it asks the server"
        assert not [path for path in listed() if "/sampler_weights/" in path]
    else:
        call("checkpoint delete", short_lived, "--yes")
        assert short_lived not in listed()
    return outcomes
