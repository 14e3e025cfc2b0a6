"""One command for the GPU.

    python -m benchmarks.gpu --out DIR [--only PART ...] [--budget SECONDS] [--write-plans] [--dry-run]

Checks, tunes and measures, part by part, the most important first. Each part is one JSON in DIR, written when it is
known: called again after an interruption, it does what is missing (same sources, device and versions). ``--budget``:
no part is begun that would not fit any more. At the end ``gpu.json`` and ``gpu.txt`` hold all parts; the last line
printed is one JSON document. ``--dry-run``: every path on the CPU, a toy model and Triton's interpreter; numbers are
left out, and it cannot be saved among the results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts (and peaks)")
    parser.add_argument("--budget", type=float, default=570.0, metavar="SECONDS", help="default 570")
    parser.add_argument("--write-plans", action="store_true", help="put better tile rows into kernels/plans")
    parser.add_argument("--dry-run", action="store_true", help="every path on the CPU; measures nothing")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

    import torch

    from benchmarks.gpu import parts as all_parts
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.store import Store, identity

    if args.dry_run and args.write_plans:
        parser.error("--write-plans: a dry run measures nothing that could be written")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no GPU that torch can use; --dry-run goes through everything without one")
    device = torch.device("cpu") if args.dry_run else torch.device("cuda", torch.cuda.current_device())
    arch = 90 if args.dry_run else 10 * torch.cuda.get_device_capability(device)[0]
    try:
        store = Store(args.out, identity(device, dry=args.dry_run))
    except ValueError as error:
        parser.error(str(error))
    everything = all_parts.parts(dry=args.dry_run, arch=arch)
    unknown = set(args.only or ()) - {part.name for part in everything}
    if unknown:
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in everything)}")
    bench = (
        Bench(device, torch.float32, True, rows=32, rounds=1, write_plans=False)
        if args.dry_run
        else Bench(device, torch.bfloat16, False, rows=8192, rounds=20, write_plans=args.write_plans)
    )

    results: dict[str, dict[str, Any]] = {}
    broken = False
    for part in everything:
        if args.only and part.name not in (*args.only, "peaks"):
            continue
        done = store.read(part.name)
        left = args.budget - (time.monotonic() - begun)
        if part.name == "peaks" and (done is None or args.dry_run):
            done = None  # what others are set against
        if done is not None:
            results[part.name] = done
        elif broken:
            results[part.name] = {"not_measured": "the device failed in a part before"}
            continue
        elif (part.seconds > left and not args.dry_run) or left <= 0:
            results[part.name] = {"not_measured": f"the budget of {args.budget:.0f} s was spent; call again"}
            continue
        else:
            results[part.name], broken = _run(part, bench, store, begun + args.budget)
        if part.name == "peaks" and "failed" not in results["peaks"]:
            bench.peaks = results["peaks"]
        shown = "there already" if done is not None else "done"
        print(f"{time.monotonic() - begun:6.0f} s  {part.name}: {results[part.name].get('failed', shown)}", flush=True)
    return _finish(store, results)


def _run(part: Any, bench: Any, store: Any, deadline: float) -> tuple[dict[str, Any], bool]:
    """(results, whether the device is lost). A part that fails is tried again by the next call."""
    try:
        bench.free()  # what the part before has left
        found = part.run(bench, deadline)
        store.write(part.name, found)
        return found, False
    except Exception as error:
        traceback.print_exc()
        failure = {"failed": f"{type(error).__name__}: {error}"[:500]}
    try:
        bench.free()
        bench.synchronize()
    except Exception:
        return failure, True
    return failure, False


def _finish(store: Any, results: dict[str, dict[str, Any]]) -> int:
    from benchmarks.gpu.table import lines

    document = store.merge(results)
    text = "\n".join(lines(document))
    store.text("gpu.txt", text + "\n")
    print(text)
    print(json.dumps(document))
    return 1 if any("failed" in found for found in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
