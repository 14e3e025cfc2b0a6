"""A LoRA training step, ours against PEFT + transformers, in one run: time, memory, share of the peaks, time by op.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.training [--only demo] [--short] [--rounds 7] [--save]

Every contender is a process of its own and trains the same modules of the same model on the same batch from the same
adapter. First the gate: losses and gradients of ours against PEFT's in float32 (in float64, where float32 is too
coarse); if they differ, nothing is timed and the exit status is 1. Then rounds A B C A B C; all but the one that
computes are stopped, and who takes tens of seconds and ten times the fastest is timed once. A turn on a short batch is
two steps, of which the second counts: in a training loop nobody else empties the caches. Memory is the peak beyond the
libraries and the base model's weights. Last line: one JSON document.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from benchmarks import packed_clients
from benchmarks.timing import add_isa, as_on, fma_peak, machine, read_bandwidth, report, write
from benchmarks.training import render
from benchmarks.training.contenders import KINDS
from benchmarks.training.gate import GateClosedError, Result
from benchmarks.training.measure import Rows, measure, median, merge, quartiles
from benchmarks.training.targets import targets
from benchmarks.training.workloads import TITLES, WORKLOADS, Workload
from mint_engine.models.config import load_config

# Who is measured together. All of a group stay loaded, so the long batch, where PEFT takes 13 GB, has two groups. A
# round of it takes a minute, so the others have the contenders that they are about; torch.compile compiles for minutes,
# so it is tried on the short batch only.
OURS, SKIPPING = "ours bf16", "ours bf16, masked rows skipped"
PEFT_FP32, AUTOCAST, PEFT_BF16 = "PEFT float32", "PEFT bf16 autocast", "PEFT all bf16"
GROUPS = {
    "demo": [list(KINDS)],
    "long": [[OURS, SKIPPING, PEFT_FP32, PEFT_BF16], ["ours float32", PEFT_FP32, AUTOCAST]],
    "qwen": [[OURS, SKIPPING, PEFT_FP32, PEFT_BF16], ["ours float32", PEFT_FP32]],
    "ragged": [[OURS, PEFT_FP32, PEFT_BF16, "PEFT all bf16, packed"]],
}
SHORT = [OURS, "ours float32", PEFT_FP32, AUTOCAST, PEFT_BF16]
ROUNDS, LONG_ROUNDS = 9, 3
CLOSED = "the gate is closed"  # among those left out: for the rest of a workload's groups


def row(work: Workload, name: str, measured: dict[str, Any], peaks: dict[str, float]) -> dict[str, Any]:
    """What is reported of a contender. The floor is that of the work it is asked for, at the measured peak."""
    kind, seconds = KINDS[name], median(measured)
    flops = work.flops(load_config(work.model), masked_logprobs=kind.masked_logprobs)
    low, high = quartiles(measured)
    traffic = 2 * measured["weights"] / seconds  # forward and backward read each weight at least once
    return {
        "median_ms": round(seconds * 1e3, 1),
        "quartiles_ms": [round(low * 1e3, 1), round(high * 1e3, 1)],
        "rounds": len(measured["seconds"]),
        "cpu_ms": round(median({"seconds": measured["cpu_seconds"]}) * 1e3, 1),
        "tokens_per_s": round(work.tokens / seconds, 1),
        "floor_ms": round(flops / peaks[kind.dtype] * 1e3, 1),
        "peak_share": round(flops / seconds / peaks[kind.dtype], 4),
        "bandwidth_share": round(traffic / peaks["read"], 4),
        "above_weights_mb": round(measured["above"] / 1e6, 1),
        **({"share_by_op": measured["share"]} if "share" in measured else {}),
    }


def one(name: str, args: argparse.Namespace, peaks: dict[str, float]) -> dict[str, Any]:
    work = WORKLOADS[name]()
    rounds = args.rounds or (LONG_ROUNDS if work.long else ROUNDS)
    measured: Rows = {}
    out: dict[str, str] = {}
    known: dict[str, Result] = {}
    for group in GROUPS[name]:
        chosen = [c for c in group if (c in SHORT or not args.short) and not (args.no_compile and KINDS[c].compiled)]
        try:
            rows, left_out = measure(name, chosen, rounds, args.threads, say, known)
        except GateClosedError as closed:
            if not measured:
                raise
            rows, left_out = {}, {CLOSED: str(closed)}  # what the gate let through before is right all the same
        merge(measured, rows)
        out |= left_out
    return {
        "title": TITLES[name], "tokens": work.tokens, "weighted": work.weighted, "rounds": rounds, "note": work.note,
        "contenders": {c: row(work, c, found, peaks) for c, found in measured.items()}, "left_out": out,
    }  # fmt: skip


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*WORKLOADS, "clients"], action="append", help="leave the others out")
    parser.add_argument(
        "--short",
        action="store_true",
        help="the demo's batch, no torch.compile, clients: two minutes where bf16 has instructions",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it compiles for minutes")
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS}, long workloads {LONG_ROUNDS}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_isa(parser)
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    as_on(args.isa)
    chosen = args.only or (["demo", "clients"] if args.short else [*WORKLOADS, "clients"])
    peaks = {"bfloat16": fma_peak(torch.bfloat16), "float32": fma_peak(torch.float32), "read": read_bandwidth()}
    document: dict[str, Any] = {"peaks": {name: round(value / 1e9, 1) for name, value in peaks.items()}}
    result = "training_short" if args.short else "training"
    document["workloads"] = {}
    for name in chosen:
        try:
            if name == "clients":
                document["clients"] = packed_clients.measure(args.rounds or (5 if args.short else 7))
            else:
                document["workloads"][name] = one(name, args, peaks)
        except GateClosedError as closed:
            sys.exit(f"the gate is closed, {name} was not measured: {closed}")
        document["targets"] = [target.document for target in targets(document)]
        if args.save:
            write(result, document)  # a run takes long: what is measured stays, whatever ends it
    print(render.text({**document, "machine": machine()}))
    report(result, document, args.save)
    if closed := [name for name, work in document["workloads"].items() if CLOSED in work["left_out"]]:
        sys.exit(f"{CLOSED} to some of {', '.join(closed)}")


if __name__ == "__main__":
    main()
