"""Which device an engine computes on, and how what the host has made gets there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from mint_engine.errors import UserError

CPU = torch.device("cpu")
log = logging.getLogger(__name__)


def resolve(device: str | torch.device | None = None) -> torch.device:
    """The device by the name of ``device``: "cpu", "cuda" or "cuda:1". None: MINT_DEVICE, else the CPU.

    Raises:
        UserError: it is no such name, or the machine does not have it.
    """
    asked = device if device is not None else os.environ.get("MINT_DEVICE") or None
    if asked is None:
        if torch.cuda.is_available():
            _say_that_there_is_a_gpu()
        return CPU
    try:
        found = torch.device(asked)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UserError(f'device: expected "cpu", "cuda" or "cuda:<index>", got {str(asked)!r}')
    if found.type == "cpu":
        return CPU
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = found.index or 0
    if index >= count:
        has = "no GPU that torch can use" if count == 0 else f"{count} GPUs, cuda:0 to cuda:{count - 1}"
        raise UserError(f"device: expected one this machine has, got {str(asked)!r}; it has {has}")
    return torch.device("cuda", index)


def machine_bytes() -> int:
    """The machine's memory, or what this process may have of it (a container's limit); the GPU's not counted."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *cgroup_limits()])


def memory_bytes(device: torch.device) -> int:
    """The memory of a GPU, or what this process may have of the machine's."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else machine_bytes()


def cgroup_limits(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that this process's control groups may use, its own and those around it, of version 2 and 1.

    Those without a limit are not in the list, or with a number that no machine has. In a container ``groups`` may name
    a path of the host's; its own group is then at the root of ``mount``, which is looked at last.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    limits = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:
            root, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for directory in (group, *group.parents):
            with suppress(OSError, ValueError):  # ValueError: "max"
                limits.append(int((root / directory / name).read_text(encoding="ascii")))
    return [limit for limit in limits if limit > 0]


@cache
def _say_that_there_is_a_gpu() -> None:
    """Once. It becomes the default when a run of ``python -m benchmarks.gpu`` has found everything right on one."""
    log.warning(
        "computing on the CPU although there is a GPU: MINT_DEVICE=cuda uses it. It is not the default because no "
        "version of this engine has been run on one yet (docs/gpu.md)"
    )


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Inside, launches go to this device, and on a GPU products of bfloat16 are summed in fp32 all through: torch lets
    its libraries add up the parts of a split K in bfloat16 otherwise, for a whole process."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        with torch.cuda.device(device):
            yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on ``device``: itself if it is there, else a copy through pinned memory that nobody waits for."""
    if tensor.device.type == device.type:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
