"""The SDKs as they are on PyPI, each in its own environment, against a server: every call works, and the numbers are
those of the engine in one's own process. Their `tinker` command lines, and the page that says what works with which.

One file, because all of it looks at the same reports, and a file's tests stay in one process (Makefile)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compatibility import CALLED_BY_THE_SDK, COMMAND_LINES, SDKS, TABLE, table
from environments import ROOT
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow
SURFACES = sorted((Path(__file__).parents[1] / "client" / "surfaces").glob("*.json"))
each_sdk = pytest.mark.parametrize("sdk", SDKS)


@each_sdk
def test_everything_the_driver_did_worked(reports, sdk):
    report = reports(sdk)
    assert not report["failures"], "\n\n".join(report["failures"])
    version = "0.22.0" if sdk == "mindlab-toolkit-0.2.0" else sdk.removeprefix("tinker-")
    assert report["values"]["tinker"] == version


@each_sdk
def test_every_public_method_was_called(reports, sdk):
    report = reports(sdk)
    called = set(report["methods"]) | CALLED_BY_THE_SDK
    assert sorted(set(report["values"]["public methods"]) - called) == []


@each_sdk
def test_numbers_equal_those_of_the_engine_in_process(reports, in_process, sdk):
    served, expected = reports(sdk)["values"], in_process["values"]
    compared = set(expected) & set(served)
    assert set(expected) - compared <= {"extras"}  # which SDKs before 0.38 cannot ask for
    for name in sorted(compared):
        _check_close(served[name], expected[name], name)


@each_sdk
def test_downloaded_adapters_are_those_in_process(reports, in_process, sdk):
    """Archives before 0.28, files of `save_weights_external` since: the same PEFT adapter."""
    downloaded = reports(sdk)["out"] / "downloaded"
    expected = {"sampler_weights/sampler": "sampler", "weights/state": "sampler", "external": "final"}
    folders = [folder for folder in expected if (downloaded / folder).exists()]
    assert folders, "nothing was downloaded"
    for folder in folders:
        ours, theirs = in_process[expected[folder]], downloaded / folder
        configs = [json.loads((place / "adapter_config.json").read_text()) for place in (ours, theirs)]
        assert configs[0] == configs[1], folder
        adapters = [load_file(place / "adapter_model.safetensors") for place in (ours, theirs)]
        assert set(adapters[0]) == set(adapters[1]), folder
        for name, tensor in adapters[0].items():
            np.testing.assert_allclose(adapters[1][name], tensor, atol=1e-5, err_msg=f"{folder}, {name}")


@pytest.mark.parametrize("sdk", COMMAND_LINES)
def test_every_command_about_runs_and_checkpoints(command_lines, sdk):
    assert len(command_lines(sdk)) == 9


@pytest.mark.parametrize("recorded", SURFACES, ids=lambda path: path.stem)
def test_what_our_own_client_is_held_to_is_what_the_sdk_has(surfaces, recorded):
    """If this fails, look at the difference; if it is as it should be, copy the new file over the old one."""
    new: Path = ROOT / recorded.name
    new.write_text(surfaces(recorded.stem))
    assert recorded.read_text() == new.read_text(), f"cp {new} {recorded}"


def test_the_compatibility_page_says_what_was_run(reports, command_lines):
    """If this fails, look at the difference; if it is as it should be, copy the new page over the old one."""
    page = table({sdk: reports(sdk) for sdk in SDKS}, {sdk: command_lines(sdk) for sdk in COMMAND_LINES})
    new: Path = ROOT / TABLE.name
    new.write_text(page)
    committed = TABLE.read_text() if TABLE.exists() else ""
    assert committed == page, f"cp {new} {TABLE}"


def _check_close(served: Any, expected: Any, where: str) -> None:
    """Numbers to 1e-5 (relative, for losses that are large), everything else equal."""
    if isinstance(expected, dict):
        assert set(served) == set(expected), where
        for key in expected:
            _check_close(served[key], expected[key], f"{where}, {key}")
    elif isinstance(expected, list):
        assert len(served) == len(expected), where
        for i, (one, other) in enumerate(zip(served, expected, strict=True)):
            _check_close(one, other, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert served == pytest.approx(expected, rel=1e-5, abs=1e-5), where
    else:
        assert served == expected, where
