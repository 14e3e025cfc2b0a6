"""The settings of sampling: read when an engine is made, and refused by name when they make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mint_engine.engine import process
from mint_engine.errors import UserError


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What engines were asked for, none of which is made."""
    asked: list[dict[str, Any]] = []

    class Recorded:
        def __init__(self, **settings: Any) -> None:
            asked.append(settings)

        def close(self) -> None:
            pass

    monkeypatch.setattr(process, "Engine", Recorded)
    monkeypatch.setattr(process, "_engines", {})
    return asked


def test_they_reach_the_engine(made: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {"MINT_SAMPLING_SHARE": "0.8", "MINT_SPECULATION": "7", "MINT_WEIGHTS": "int8"}
    for name in settings:
        monkeypatch.delenv(name, raising=False)
    process.get_engine(home=tmp_path / "plain")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    process.get_engine(home=tmp_path / "set")
    found = [(asked["sampling_share"], asked["speculation"], asked["weights"]) for asked in made]
    assert found == [(0.5, 0, None), (0.8, 7, "int8")]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MINT_SAMPLING_SHARE", "half", "MINT_SAMPLING_SHARE: expected a number between 0 and 1, got 'half'"),
        ("MINT_SAMPLING_SHARE", "1", r"sampling_share: expected a number between 0 and 1, both excluded, got 1\.0"),
        ("MINT_SAMPLING_SHARE", "nan", "sampling_share: expected a number between 0 and 1, both excluded, got nan"),
        ("MINT_SPECULATION", "-1", "MINT_SPECULATION: expected a number of tokens, got '-1'"),
        ("MINT_SPECULATION", "some", "MINT_SPECULATION: expected a number of tokens, got 'some'"),
        ("MINT_WEIGHTS", "int4", "weights: expected None, 'int8', 'once' or 'twice', got 'int4'"),
    ],
)
def test_nonsense_is_refused(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        process.get_engine(home=tmp_path)
