"""Processes from a nursery end as others do, and nothing of what they printed is lost or added."""

from __future__ import annotations

import os
import signal

import pytest
from nursery import Nursery, nursery

HALF = """
import os, signal, sys
print("whole", flush=True)
print(sys.argv[1], end="", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def said(child: Nursery) -> list[str | int]:
    lines = [child.line()]
    while isinstance(lines[-1], str):
        lines.append(child.line())
    return lines


def test_a_killed_process_leaves_its_lines_the_last_one_cut_off() -> None:
    child = nursery("import json")
    child.start(HALF, "half")
    assert said(child) == ["whole\n", "half", -signal.SIGKILL]
    child.start("import json, sys; print(json.dumps(sys.argv[1:]))", "a", "b")
    assert said(child) == ['["a", "b"]\n', 0]


def test_an_error_is_one_of_the_process_and_not_of_the_nursery() -> None:
    child = nursery("import json")
    for _ in range(2):
        child.start("print(1 / 0)")
        *lines, code = said(child)
        assert (lines[-1], code) == ("ZeroDivisionError: division by zero\n", 1)


def test_one_at_a_time() -> None:
    child = nursery("import json")
    pid = child.start("import signal; signal.pause()")
    with pytest.raises(AssertionError, match=f"process {pid} has not ended"):
        child.start("")
    os.kill(pid, signal.SIGTERM)
    assert said(child) == [-signal.SIGTERM]
