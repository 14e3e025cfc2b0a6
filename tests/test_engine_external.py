"""External weights: what PEFT loads, and what only the holder of the key can open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest
import torch
from engine_helpers import new_model, open_engine, train

from mint_engine.checkpoint import read_adapter
from mint_engine.engine import Engine
from mint_engine.errors import NotFoundError, UserError

SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHsKLqeplhpW+uObz5dvMgjz1OxfM/XXUB+VHtZ6isGN alice@rust"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with open_engine(tmp_path / "home") as made:
        yield made


@pytest.fixture
def model(engine: Engine, tiny_tied: Path) -> str:
    made = new_model(engine, engine.create_session(owner="alice"), tiny_tied)
    train(engine, made)
    return made


def directory(engine: Engine, path: str) -> Path:
    return engine.store.as_owner("alice").resolve(path).directory


def test_external_weights_are_the_adapter_as_peft_reads_it(engine: Engine, model: str) -> None:
    path = engine.save_weights_external(model, "out", ttl_seconds=3600, user_metadata={"a": "b"}).result().path
    assert path == f"tinker://{model}/external_weights/out"
    record = engine.store.as_owner("alice").resolve(path).record
    assert record.expires_at is not None
    assert record.user_metadata == {"a": "b"}
    sampler = engine.save_weights_for_sampler(model, "same").result().path or ""
    (meta, ours), (other, theirs) = (read_adapter(directory(engine, p)) for p in (path, sampler))
    assert meta == other
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(NotFoundError):
        engine.store.resolve(path)


def test_encrypted_weights_open_with_each_recipient_s_key_and_no_other(
    engine: Engine, model: str, tmp_path: Path
) -> None:
    identities = [pyrage.x25519.Identity.generate() for _ in range(3)]
    recipients = [str(identity.to_public()) for identity in identities[:2]] + [SSH_KEY]
    path = engine.save_weights_external(model, "secret", recipients=recipients).result().path
    files = {p.name: p for p in directory(engine, path).iterdir()}
    assert sorted(files) == ["adapter_config.json.age", "adapter_model.safetensors.age"], "nothing in the clear"
    sampler = engine.save_weights_for_sampler(model, "same").result().path or ""
    _, expected = read_adapter(directory(engine, sampler))
    for i, identity in enumerate(identities[:2]):
        opened = tmp_path / str(i)
        opened.mkdir()
        for name, file in files.items():
            pyrage.decrypt_file(str(file), str(opened / name.removesuffix(".age")), [identity])
        _, tensors = read_adapter(opened)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    for file in files.values():
        with pytest.raises(pyrage.DecryptError):
            pyrage.decrypt_file(str(file), str(tmp_path / "no"), [identities[2]])


@pytest.mark.parametrize(
    ("recipients", "message"),
    [
        ([], "expected a list of 1 to 10 public keys, got 0"),
        (["age1" + "q" * 58] * 11, "expected a list of 1 to 10 public keys, got 11"),
        ("age1abc", "expected a list of 1 to 10 public keys, got 'age1abc'"),
        (["age1abc"], r"expected 'age1...' or an SSH public key, got 'age1abc'.*\(recipient 0\)"),
        ([SSH_KEY, "ssh-ed25519 AAAA"], r"\(recipient 1\)"),
        ([3], r"expected a string, got int \(recipient 0\)"),
        ([str(pyrage.x25519.Identity.generate())], "expected a public key, got a secret one"),
    ],
)
def test_a_recipient_that_is_no_public_key_is_refused_and_nothing_is_written(
    engine: Engine, model: str, recipients: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        engine.save_weights_external(model, "secret", recipients=recipients).result()
    assert "SECRET" not in str(caught.value).upper().replace("A SECRET ONE", "")
    assert engine.store.as_owner("alice").list_user_checkpoints().checkpoints == []


def test_a_name_is_used_once_unless_overwriting_is_asked_for(engine: Engine, model: str) -> None:
    engine.save_weights_external(model, "out").result()
    with pytest.raises(UserError, match="out"):
        engine.save_weights_external(model, "out").result()
    engine.save_weights_external(model, "out", overwrite=True).result()
