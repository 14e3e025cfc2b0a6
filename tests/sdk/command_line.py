"""The `tinker` commands about runs and checkpoints, as a person types them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import environments
import httpx
import serving


class CommandLine:
    """An SDK's command `tinker` for one server. Context manager."""

    def __init__(self, sdk: str, server: serving.Server, out: Path) -> None:
        self._streams = {name: out / name for name in ("stdout", "stderr")}
        variables = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": server.key, "COLUMNS": "300"}
        command = [str(environments.environment(sdk).python), "-W", "ignore", str(serving.DRIVERS / "commands.py")]
        self._process = subprocess.Popen(
            command, env=serving.sdk_environment() | variables, text=True, bufsize=1, cwd=out,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *arguments: str) -> str:
        """What the command prints. It must succeed; that it did its work is for the caller to see, by what it prints or
        by what the server says: some commands print nothing, also when they abort at their very end
        (`serving.ended_well`)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        paths = {name: str(path) for name, path in self._streams.items()}
        self._process.stdin.write(json.dumps({"arguments": arguments, **paths}) + "\n")
        answer = self._process.stdout.readline()
        assert answer, f"{' '.join(arguments)}: the process that runs commands has ended"
        status = int(answer)
        printed = {name: path.read_text() for name, path in self._streams.items()}
        well = serving.ended_well(subprocess.CompletedProcess(arguments, status, **printed), finished=True)
        assert well, f"{' '.join(arguments)} ended with {status}:\n{printed['stdout']}{printed['stderr']}"
        return printed["stdout"]

    def __enter__(self) -> CommandLine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)


def run_commands(sdk: str, server: serving.Server, made: dict[str, str], out: Path) -> dict[str, str]:
    """Every command about runs and checkpoints once, each checked by what it prints or by what the server says after
    it. `made`: a run and two of its checkpoints."""
    with CommandLine(sdk, server, out) as tinker:
        return _run_commands(tinker, sdk, server, made, out / "downloaded")


def _run_commands(
    tinker: CommandLine, sdk: str, server: serving.Server, made: dict[str, str], out: Path
) -> dict[str, str]:
    run, state, short_lived = made["run"], made["state"], made["short-lived"]
    outcomes: dict[str, str] = {}

    def call(command: str, *arguments: str) -> str:
        printed = tinker("--format", "json", *command.split(), *arguments)
        outcomes[command] = "ok"
        return printed

    def listed() -> dict[str, dict[str, Any]]:
        answer = httpx.get(
            f"{server.url}/api/v1/training_runs/{run}/checkpoints", headers={"X-API-Key": server.key}
        ).raise_for_status()
        return {checkpoint["tinker_path"]: checkpoint for checkpoint in answer.json()["checkpoints"]}

    assert run in json.dumps(json.loads(call("run list", "--limit", "0")))
    assert run in json.dumps(json.loads(call("run info", run)))

    assert state in json.dumps(json.loads(call("checkpoint list", "--limit", "0")))
    assert short_lived in json.dumps(json.loads(call("checkpoint list", "--run-id", run)))
    assert state in json.dumps(json.loads(call("checkpoint info", state)))

    call("checkpoint publish", state)
    assert listed()[state]["public"] is True
    call("checkpoint unpublish", state)
    assert listed()[state]["public"] is False

    call("checkpoint set-ttl", state, "--ttl", "7200")
    assert listed()[state]["expires_at"] is not None
    call("checkpoint set-ttl", state, "--remove")
    assert listed()[state]["expires_at"] is None

    call("checkpoint download", state, "--output", str(out))
    assert list(out.rglob("adapter_model.safetensors*")), list(out.rglob("*"))

    if sdk == "tinker-0.22.0":
        # Its module's own command `list` hides Python's, which deleting by path needs.
        call("checkpoint delete", "--run-id", run, "--type", "sampler_weights", "--yes")
        outcomes["checkpoint delete"] = "but by --run-id only: by path the SDK fails before it asks the server"
        assert not [path for path in listed() if "/sampler_weights/" in path]
    else:
        call("checkpoint delete", short_lived, "--yes")
        assert short_lived not in listed()
    return outcomes
