"""The SDKs' `tinker` command lines, and the page that says what works with which SDK."""

from __future__ import annotations

from pathlib import Path

import pytest
from compatibility import COMMAND_LINES, SDKS, TABLE, table
from environments import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("sdk", COMMAND_LINES)
def test_every_command_about_runs_and_checkpoints(command_lines, sdk):
    assert len(command_lines(sdk)) == 9


def test_the_compatibility_page_says_what_was_run(reports, command_lines):
    """If this fails, look at the difference; if it is as it should be, copy the new page over the old one."""
    page = table({sdk: reports(sdk) for sdk in SDKS}, {sdk: command_lines(sdk) for sdk in COMMAND_LINES})
    new: Path = ROOT / TABLE.name
    new.write_text(page)
    committed = TABLE.read_text() if TABLE.exists() else ""
    assert committed == page, f"cp {new} {TABLE}"
