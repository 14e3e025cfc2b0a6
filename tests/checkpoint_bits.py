"""Whether two runs ended in the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def contents(directory: Path) -> dict[str, tuple[Any, bytes]]:
    """Of every safetensors file: what its header says, in any order, and every byte of its tensors."""
    return {file.name: _parts(file.read_bytes()) for file in sorted(directory.glob("*.safetensors"))}


def _parts(raw: bytes) -> tuple[Any, bytes]:
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def check_same(run: dict[str, Any], other: dict[str, Any]) -> None:
    """`values` and `saved` (a list of `contents`) to the last bit, `samples` nearly: see drivers/faults.py."""
    for before, after in zip(other["saved"], run["saved"], strict=True):
        assert list(before) == list(after) == ["adapter_model.safetensors", "optimizer.safetensors"][: len(before)]
        for name, (header, tensors) in before.items():
            assert after[name][0] == header, name
            assert after[name][1] == tensors, f"{name}: other bits"
    assert run["values"] == other["values"]
    _check_close(run["samples"], other["samples"])


def _check_close(got: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert set(got) == set(expected)
        for name, value in expected.items():
            _check_close(got[name], value)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            _check_close(one, other)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, abs=1e-4)
    else:
        assert got == expected
