"""The dispatcher: the only place that chooses which face of an op runs.

An op is a folder with a public function and up to three faces, each a module with functions of the same names:
``reference`` (plain torch, the specification), ``cpu`` (C++ through ``mint_engine._native``) and ``triton`` (GPU).
Every face but the reference has ``supports(*tensors) -> None | str``: ``None``, or the reason why it cannot run.

A face asked for by name runs or raises; it is never replaced. Without a name the tensors' device decides: ``triton``
on a GPU, ``cpu`` elsewhere, and the reference where that face does not support them. Triton's interpreter runs on CPU
tensors only if ``triton`` is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch  # before _native: both must share torch's OpenMP runtime

FACES = ("triton", "cpu", "reference")

try:
    native: Any = import_module("mint_engine._native")
except ModuleNotFoundError as error:
    if error.name != "mint_engine._native":
        raise
    native = None

NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_ops: dict[str, Op] = {}
_forced: str | None = None


class Op:
    """The faces of one op. ``name`` is the op's folder in ``mint_engine.kernels``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reference: ModuleType = import_module(f"mint_engine.kernels.{name}.reference")
        self.cpu: ModuleType = import_module(f"mint_engine.kernels.{name}.cpu")
        self._triton: ModuleType | str | None = None
        _ops[name] = self

    def triton(self) -> ModuleType | str:
        """The Triton face, imported when first asked for (Triton takes a second to import), or why there is none."""
        if self._triton is None:
            module = f"mint_engine.kernels.{self.name}.triton"
            if find_spec("triton") is None:
                self._triton = "triton is not installed"
            elif find_spec(module) is None:
                self._triton = "it has no Triton kernel yet"
            else:
                self._triton = import_module(module)
        return self._triton

    def pick(self, face: str | None, *tensors: torch.Tensor | None) -> Any:
        """The module of the face that runs.

        Raises:
            ValueError: ``face`` (or the forced face) is unknown, or does not support these tensors.
        """
        face = face or _forced
        if face is None:
            if self.cpu.supports(*tensors) is None:  # which asks for the device too
                return self.cpu
            on_cpu = all(t is None or t.is_cpu for t in tensors)
            fast: Any = "" if on_cpu else self.triton()
            return fast if not isinstance(fast, str) and fast.supports(*tensors) is None else self.reference
        if face == "reference":
            return self.reference
        if face not in FACES:
            raise ValueError(f"face: expected one of {list(FACES)} for {self.name}, got {face!r}")
        chosen = self.cpu if face == "cpu" else self.triton()
        reason = chosen if isinstance(chosen, str) else chosen.supports(*tensors)
        if reason is not None:
            raise ValueError(f"face: {self.name} cannot run on {face!r}: {reason}")
        return chosen


def native_reason(*tensors: torch.Tensor | None) -> str | None:
    """``None`` if the C++ kernels can take these tensors, else why not. ``None`` tensors are skipped.

    The first tensor gives the dtype; tensors with another meaning (fp32 statistics, indices) are not passed here.
    """
    if native is None:
        return "mint_engine._native is not built"
    dtype = None
    for t in tensors:
        if t is None:
            continue
        if dtype is None:
            dtype = t.dtype
            if dtype not in NATIVE_DTYPES:
                return f"dtype {dtype} (float32 and bfloat16 only)"
        elif t.dtype is not dtype:
            return f"mixed dtypes {dtype} and {t.dtype}"
        if not t.is_cpu:
            return f"device {t.device} (cpu only)"
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            return f"last dimension has stride {t.stride(-1)}, not 1"
    return None


def in_native(*tensors: torch.Tensor | None) -> bool:
    """Whether ops on these tensors whose callers name no face run in C++, so that several of them may be one call."""
    return _forced in (None, "cpu") and native_reason(*tensors) is None


@contextmanager
def force_face(name: str) -> Iterator[None]:
    """Run every op whose caller names no face on ``name``, process-wide, until the block ends.

    Raises:
        ValueError: ``name`` is not a face.
    """
    global _forced
    if name not in FACES:
        raise ValueError(f"name: expected one of {list(FACES)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def faces() -> dict[str, list[str]]:
    """Op name -> the faces that can run on this machine, first the one that tensors on the CPU get.

    Triton counts where there is a GPU, its interpreter does not.
    """
    found = {name: ["reference"] if native is None else ["cpu", "reference"] for name in sorted(_ops)}
    if torch.cuda.is_available():
        for name, available in found.items():
            if not isinstance(_ops[name].triton(), str):
                available.append("triton")
    return found


def isa() -> str:
    """The instruction set of the C++ kernels: amx, avx512_bf16, avx512, avx2, scalar, or none (not built)."""
    return "none" if native is None else str(native.isa())


def without_team() -> None:
    """OpenMP work of the calling thread is done by itself alone, in torch and here.

    For threads beside the one that computes. Each thread that does parallel work gets a team of its own, and with
    OMP_WAIT_POLICY=active an idle team spins: a step took twice as long beside the one that had loaded the model.
    """
    torch.get_num_threads()  # torch sets each thread's number when the thread first asks
    if native is not None:
        native.one_thread()


def dismiss_team() -> None:
    """End the idle threads of the calling thread's OpenMP team, if it has one. Its next parallel work makes a new one.

    While a program has more OpenMP threads than cores, libgomp's teams go to sleep a microsecond after each parallel
    region, and waking them takes longer than most regions: beside an idle team of the caller's, from its own work in
    torch, a training step took 1.5 times as long.
    """
    if native is not None:
        native.dismiss_team()
