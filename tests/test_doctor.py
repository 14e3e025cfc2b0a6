"""`mint-engine doctor` tells what is there, and fails when something needed is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mint_engine import cli, doctor, kernels
from mint_engine.store import Store


def test_it_names_the_instruction_set_every_op_and_the_store(tmp_path: Path) -> None:
    report = doctor.examine(tmp_path / "home")
    assert report.healthy, report.to_text()
    text = report.to_text()
    assert kernels.isa() in text
    for op in kernels.faces():
        assert op in text
    assert str(tmp_path / "home") in text
    assert "none: a server listens on this machine only" in text


def test_json_is_one_document_with_the_same_findings() -> None:
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["healthy"] is True
    assert {"machine", "GPU", "packages", "store"} <= set(found["sections"])


def test_a_gpu_is_named_with_the_attention_that_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "is_available": True, "device_count": 1, "get_device_capability": (9, 0), "get_device_name": "H",
    }.items():  # fmt: skip
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    found, attention, used = doctor._gpu()
    assert (found.name, found.value) == ("cuda:0", "H, compute capability 9.0")
    assert "torch.nn.attention.varlen" in attention.value
    assert "MINT_DEVICE=cuda" in used.value


def test_a_home_that_cannot_be_written_fails_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MINT_HOME", str(blocked / "home"))
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "! database" in result.output


def test_it_looks_where_the_server_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's home may be named by its own variable, its file or a flag: else its keys are not found."""
    homes = {name: tmp_path / name for name in ("variable", "file", "flag")}
    for name, home in homes.items():
        Store(home).keys.create(name)
    config = tmp_path / "server.toml"
    config.write_text(f"home = '{homes['file']}'\n")

    def looked(*flags: str) -> tuple[str, str]:
        result = CliRunner().invoke(cli.app, ["doctor", "--json", *flags])
        assert result.exit_code == 0, result.output
        found = {line["name"]: line["value"] for line in json.loads(result.output)["sections"]["store"]}
        return found["home"], found["keys"]

    assert looked("--config", str(config)) == (str(homes["file"]), "1 active")
    monkeypatch.setenv("MINT_SERVER_HOME", str(homes["variable"]))
    assert looked() == (str(homes["variable"]), "1 active")
    assert looked("--home", str(homes["flag"])) == (str(homes["flag"]), "1 active")


def test_a_half_downloaded_model_is_shown_as_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(doctor.constants, "HF_HUB_CACHE", str(tmp_path))
    lines = {line.name: line.value for line in doctor._hub_models()}
    assert lines["org/name"].startswith("incomplete, lacks model.safetensors")
