"""One server on a tiny model for all SDKs, and each SDK driven through it once, when the first test asks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import environments
import pytest
import serving
from command_line import run_commands

sys.path.append(str(serving.DRIVERS))  # the tests run the same scenario as the drivers


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, under a path that SDKs do not take for an organisation and a name."""
    from tiny_models import build_tiny
    from tiny_tokenizer import VOCAB, save_byte_tokenizer

    directory = build_tiny("qwen3", tmp_path_factory.mktemp("sdk-base"), tie_word_embeddings=True, vocab_size=VOCAB)
    save_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    home = tmp_path_factory.mktemp("sdk-home")
    with serving.serve(home, str(tiny_base), "--dtype", "float32", "--kv-cache-bytes", str(64 << 20)) as server:
        yield server


@pytest.fixture(scope="session")
def reports(
    tiny_base: Path, tiny_server: serving.Server, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """`reports(name)`: what `drivers/surface.py` reported in that environment; `["out"]` is its directory."""
    made: dict[str, dict[str, Any]] = {}

    def report(name: str) -> dict[str, Any]:
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            environment = environments.environment(name)
            made[name] = serving.drive(environment, "surface", out, tiny_server, str(tiny_base)) | {"out": out}
        return made[name]

    return report


@pytest.fixture(scope="session")
def surfaces() -> Callable[[str], str]:
    """`surfaces(name)`: what `drivers/names.py` says of that environment's package."""

    def of(name: str) -> str:
        package = "mint" if name.startswith("mindlab") else "tinker"
        command = [
            str(environments.environment(name).python),
            "-W",
            "ignore",
            str(serving.DRIVERS / "names.py"),
            package,
        ]
        done = subprocess.run(
            command, env=serving.sdk_environment(), capture_output=True, text=True, timeout=120, check=False
        )
        assert serving.ended_well(done, finished=done.stdout.endswith("}\n")), done.stderr[-4000:]
        return done.stdout

    return of


@pytest.fixture(scope="session")
def command_lines(
    reports: Callable[[str], dict[str, Any]], tiny_server: serving.Server, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, str]]:
    """`command_lines(name)`: that SDK's commands about runs and checkpoints, run once, and their outcome."""
    made: dict[str, dict[str, str]] = {}

    def outcomes(name: str) -> dict[str, str]:
        if name not in made:
            values = reports(name)["values"]
            made[name] = run_commands(name, tiny_server, values["made"], tmp_path_factory.mktemp("downloads"))
        return made[name]

    return outcomes


@pytest.fixture(scope="session")
def in_process(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The scenario's numbers through our own clients, in this process: `values`; and two adapters, `sampler` (the
    checkpoint of that name) and `final` (as the scenario ends)."""
    import scenario
    from reporting import Report

    import mint
    from mint_engine.engine import Engine

    home = tmp_path_factory.mktemp("in-process")
    report = Report()
    engine = Engine(home=home, dtype="float32")
    try:
        service = mint.ServiceClient(engine=engine)
        made = scenario.run(report, service, mint.types, str(tiny_base))
        paths = {"sampler": made.sampler_path, "final": made.training.save_weights_for_sampler("final").result().path}
        rest = service.create_rest_client()
        for name, path in paths.items():
            _unpack(rest.get_checkpoint_archive_url_from_tinker_path(path).result().url, home / name)
    finally:
        engine.close()
    return {"values": json.loads(json.dumps(report.values))} | {name: home / name for name in paths}


def _unpack(url: str, directory: Path) -> None:
    import tarfile
    from urllib.parse import urlparse
    from urllib.request import url2pathname

    with tarfile.open(url2pathname(urlparse(url).path)) as archive:
        archive.extractall(directory, filter="data")
