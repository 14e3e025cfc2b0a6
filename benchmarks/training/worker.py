"""A contender in a process of its own: python -m benchmarks.training.worker WORKLOAD CONTENDER THREADS ISA

Commands come on stdin, one a line; each is answered by one line of JSON on stdout.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) << 10


def _trim() -> None:
    """What was freed goes back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Worker:
    def __init__(self, workload: str, contender: str) -> None:
        import peft  # noqa: F401  what is imported counts for nobody
        import torch  # noqa: F401
        import transformers

        import mint  # noqa: F401
        from benchmarks.training.contenders import ALL
        from benchmarks.training.workloads import WORKLOADS

        transformers.utils.logging.disable_progress_bar()
        work = WORKLOADS[workload]()
        self._empty = _status("VmRSS")
        self._contender, self._long = ALL[contender].make(work), work.long
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def gradients(self, path: str) -> dict[str, Any]:
        from safetensors.torch import save_file

        loss, grads = self._contender.gradients()
        save_file({name: tensor.contiguous() for name, tensor in grads.items()}, path)
        if self._long:
            _trim()
        return {"loss": loss}

    def step(self) -> dict[str, Any]:
        if not self._long:
            self._contender.step()  # the others have had the caches, and the threads have slept
        wall, cpu = time.perf_counter(), time.process_time()
        self._contender.step()
        took = {"s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        if self._long:  # the others need the memory
            _trim()
        return took

    def memory(self) -> dict[str, Any]:
        """``above``: bytes of the peak beyond the imported libraries and the base model's weights."""
        weights = self._contender.weight_bytes
        return {"weights": weights, "above": _status("VmHWM") - self._empty - weights}

    def profile(self, steps: str) -> dict[str, Any]:
        from benchmarks.training.profile import profiled

        return {"share": profiled(self._contender, int(steps))}


def main() -> None:
    workload, contender, threads, isa = sys.argv[1:]
    import torch

    from benchmarks.timing import as_on

    torch.set_num_threads(int(threads))
    as_on(isa)
    answers, sys.stdout = sys.stdout, sys.stderr  # nobody else writes between the answers
    warnings.simplefilter("ignore")

    def answer(**document: Any) -> None:
        print(json.dumps(document), file=answers, flush=True)

    try:
        worker = Worker(workload, contender)
        answer(ready=True)
        for line in sys.stdin:
            command, *arguments = line.split()
            answer(**getattr(worker, command)(*arguments))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main()
