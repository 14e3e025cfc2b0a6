"""The mint-engine command: checkpoints are listed, resolved, exported and deleted; the demo runs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import build_tiny
from tiny_tokenizer import VOCAB, save_byte_tokenizer
from typer.testing import CliRunner

import mint
from mint_engine import cli, demo


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
    console.print(cli._table(mint.RestClient().list_user_checkpoints().result().checkpoints))
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
