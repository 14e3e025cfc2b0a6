"""`mint-engine doctor` tells what is there, and fails when something needed is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mint_engine import cli, doctor, kernels


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


def test_a_half_downloaded_model_is_shown_as_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(doctor.constants, "HF_HUB_CACHE", str(tmp_path))
    lines = {line.name: line.value for line in doctor._hub_models()}
    assert lines["org/name"].startswith("incomplete, lacks model.safetensors")
