"""What every test gets from conftest.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

seen: set[Path] = set()


@pytest.mark.parametrize("time", ["first", "second"])
def test_a_home_is_nobody_else_s_and_is_not_made_for_those_who_need_none(time: str) -> None:
    home = Path(os.environ["MINT_HOME"])
    assert home.parent.is_dir()
    assert not home.exists()
    assert home not in seen
    seen.add(home)
