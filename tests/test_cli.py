"""The mint-engine command: checkpoints are listed, resolved, exported and deleted; the demo runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from tiny_models import build_tiny
from tiny_tokenizer import VOCAB, save_byte_tokenizer
from typer.testing import CliRunner

import mint
from mint_engine import cli, demo
from mint_engine.cli import checkpoints
from mint_engine.errors import UserError
from mint_engine.server import Settings
from mint_engine.store import Store


def run(*args: str, code: int = 0, stdin: str = "") -> str:
    result = CliRunner().invoke(cli.app, list(args), input=stdin)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def saved(tiny_tied: Path) -> list[str]:
    """A sampler checkpoint and a training checkpoint in MINT_HOME."""
    client = mint.ServiceClient(dtype="float32").create_lora_training_client(str(tiny_tied), rank=4)
    return [client.save_weights_for_sampler("one").result().path, client.save_state("two").result().path]


def test_checkpoints_are_listed_resolved_exported_and_deleted(saved: list[str], tmp_path: Path) -> None:
    listed = [line.split("\t")[0] for line in run("checkpoint", "list").splitlines()]
    assert sorted(listed) == sorted(saved)
    sampler = saved[0]
    directory = Path(run("checkpoint", "path", sampler.replace("tinker://", "mint://")).strip())
    assert (directory / "adapter_model.safetensors").is_file()

    target = tmp_path / "out" / "adapter"
    run("checkpoint", "export", sampler, str(target))
    assert sorted(p.name for p in target.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (target / "adapter_model.safetensors").read_bytes() == (directory / "adapter_model.safetensors").read_bytes()

    run("checkpoint", "delete", sampler, code=1, stdin="n\n")
    assert directory.is_dir()
    run("checkpoint", "delete", "--yes", sampler)
    assert not directory.exists()
    assert [line.split("\t")[0] for line in run("checkpoint", "list").splitlines()] == [saved[1]]


def test_paths_are_printed_whole_on_a_narrow_terminal(saved: list[str]) -> None:
    console = Console(record=True, width=60, file=io.StringIO())
    console.print(checkpoints._table(mint.RestClient().list_user_checkpoints().result().checkpoints))
    folded = "".join(line.split("│")[1].strip() for line in console.export_text().splitlines() if "│" in line)
    for path in saved:
        assert path in folded


def test_a_mistake_is_one_line_and_a_failing_exit_code(
    saved: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for arguments in (["path", saved[0] + "x"], ["export", saved[0], str(tmp_path)]):
        monkeypatch.setattr("sys.argv", ["mint-engine", "checkpoint", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "Traceback" not in error


def test_the_demo_trains_samples_and_leaves_an_adapter_and_a_plot(tmp_path: Path) -> None:
    directory = build_tiny("qwen3", tmp_path / "model", tie_word_embeddings=True, vocab_size=VOCAB, eos_token_id=256)
    save_byte_tokenizer(directory)
    console = Console(record=True, width=120, force_terminal=False)
    out = demo.run(str(directory), steps=6, batch_size=4, learning_rate=1e-3, output=tmp_path / "out", console=console)
    assert out.losses[-1] < out.losses[0]
    assert out.plot.read_bytes().startswith(b"\x89PNG")
    assert (out.adapter / "adapter_config.json").is_file()
    text = console.export_text()
    for expected in ("before", "after", out.checkpoint, "tokens/s"):
        assert expected in text


def test_a_key_is_shown_once_listed_without_its_secret_and_revoked() -> None:
    secret = run("keys", "create", "ada").splitlines()[-1]
    assert secret.startswith("tml-")
    listed = run("keys", "list")
    assert "ada" in listed
    assert "active" in listed
    assert secret not in listed
    key_id = listed.split("\t")[0]
    run("keys", "revoke", key_id)
    assert "revoked" in run("keys", "list")


def test_runs_are_listed_and_shown(saved: list[str]) -> None:
    run_id = saved[0].removeprefix("tinker://").split("/")[0]
    assert run("runs", "list").split("\t")[0] == run_id
    assert '"lora_rank": 4' in run("runs", "info", run_id)


def test_serve_explains_every_setting_and_refuses_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert "--config" in run("serve", "--help")
    command: Any = typer.main.get_command(cli.app)
    options = {option.name: option for option in command.commands["serve"].params}
    for name, setting in Settings.model_fields.items():
        assert setting.description in options[name].help, name
    assert "--model" in options["models"].opts
    monkeypatch.setattr("sys.argv", ["mint-engine", "serve", "--port", "70000"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert "port" in capsys.readouterr().err


def test_keys_go_where_the_server_looks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same settings as `serve`: a key in another home would be refused, or leave the server open."""
    homes = {name: tmp_path / name for name in ("server", "file", "flag", "mint")}
    config = tmp_path / "server.toml"
    config.write_text(f"home = '{homes['file']}'\n")
    monkeypatch.setenv("MINT_HOME", str(homes["mint"]))
    run("keys", "create", "of mint")
    run("keys", "create", "of file", "--config", str(config))
    monkeypatch.setenv("MINT_SERVER_CONFIG", str(config))
    run("keys", "create", "of file too")
    monkeypatch.setenv("MINT_SERVER_HOME", str(homes["server"]))
    run("keys", "create", "of server")
    run("keys", "create", "of flag", "--home", str(homes["flag"]))
    found = {name: {key.name for key in Store(home).keys.list()} for name, home in homes.items()}
    assert found == {
        "mint": {"of mint"}, "file": {"of file", "of file too"}, "server": {"of server"}, "flag": {"of flag"},
    }  # fmt: skip
    assert "of server" in run("keys", "list")
    monkeypatch.setenv("MINT_SERVER_PORT", "a port")
    with pytest.raises(UserError, match=r"port: .*, got 'a port'"):
        CliRunner().invoke(cli.app, ["keys", "list"], catch_exceptions=False)
