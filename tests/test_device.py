"""Naming a device, and saying so where it is not there."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mint_engine import device
from mint_engine.device import computing_on, resolve, upload
from mint_engine.engine import Engine
from mint_engine.errors import UserError
from mint_engine.kv_cache import default_bytes
from mint_engine.server.settings import Settings

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("there", [False, True])
def test_the_cpu_is_the_device_unless_another_is_asked_for(
    there: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU that is there and not used is spoken of, once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device._say_that_there_is_a_gpu.cache_clear()
    assert resolve() == resolve() == resolve("cpu") == torch.device("cpu")
    assert [r.message.count("MINT_DEVICE=cuda") for r in caplog.records] == [1] * there
    if there:
        assert resolve("cuda") == torch.device("cuda", 0)


@without_gpu
@pytest.mark.parametrize("asked", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_an_error(asked: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"device: expected one this machine has, got '{asked}'; it has no GPU"):
        Engine(device=asked, home=tmp_path)
    monkeypatch.setenv("MINT_DEVICE", asked)
    with pytest.raises(UserError, match=f"got '{asked}'"):
        resolve()


@pytest.mark.parametrize("asked", ["gpu", "meta", "cuda:x", "mps"])
def test_another_name_is_an_error(asked: str) -> None:
    with pytest.raises(UserError, match=f"device: expected .* got '{asked}'"):
        resolve(asked)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b", {"a/b/memory.max": "4096", "a/memory.max": "8192", "memory.max": "max"}, [4096, 8192]),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "8192"}, [8192]),
        ("0::/", {"memory.max": "4096"}, [4096]),
        ("0::/of/the/host", {"memory.max": "4096"}, [4096]),
        ("0::/../beside", {"memory.max": "4096"}, [4096]),
        ("5:cpu,memory:/a\n1:cpu:/c\n0::/", {"memory/a/memory.limit_in_bytes": "4096"}, [4096]),
        ("5:memory:/docker/1f", {"memory/memory.limit_in_bytes": "4096"}, [4096]),
        ("0::/a", {"a/memory.max": "max"}, []),
        ("0::/a", {"a/memory.max": "0", "memory.max": ""}, []),
        ("", {"memory.max": "4096"}, []),
        (None, {"memory.max": "4096"}, []),
    ],
)
def test_the_limits_of_a_container_are_those_of_its_groups(
    groups: str | None, files: dict[str, str], expected: list[int], tmp_path: Path
) -> None:
    mount = tmp_path / "cgroup"
    for name, content in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(f"{content}\n")
    if groups is not None:
        (tmp_path / "groups").write_text(f"{groups}\n")
    assert device.cgroup_limits(tmp_path / "groups", mount) == expected


def test_memory_is_counted_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 says a number that no machine has where there is no limit."""
    monkeypatch.setattr(device, "cgroup_limits", lambda: [9223372036854771712])
    machine = device.machine_bytes()
    assert 1 << 20 < machine < 1 << 60
    monkeypatch.setattr(device, "cgroup_limits", lambda: [9223372036854771712, 1 << 20, 1 << 21])
    assert device.machine_bytes() == 1 << 20
    assert default_bytes(device.CPU) == 1 << 18


def test_the_server_takes_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(models=["m"]).device is None
    monkeypatch.setenv("MINT_SERVER_DEVICE", "cuda:1")
    assert Settings(models=["m"]).device == "cuda:1"


def test_a_tensor_that_is_on_the_cpu_stays_itself() -> None:
    tensor = torch.arange(3)
    assert upload(tensor, torch.device("cpu")) is tensor


def test_products_on_a_gpu_are_summed_in_fp32_all_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting is the process's own again afterwards, also after an error."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    settings = torch.backends.cuda.matmul
    default = settings.allow_bf16_reduced_precision_reduction
    for before in (False, default):
        settings.allow_bf16_reduced_precision_reduction = before

        def fails() -> None:
            with computing_on(torch.device("cuda", 0)):
                assert not settings.allow_bf16_reduced_precision_reduction
                raise RuntimeError("boom")

        with pytest.raises(RuntimeError, match="boom"):
            fails()
        assert settings.allow_bf16_reduced_precision_reduction == before
