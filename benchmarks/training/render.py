"""A measured document as text for a terminal, and as the README's table."""

from __future__ import annotations

from typing import Any

from benchmarks.packed_clients import lines
from benchmarks.training.targets import OURS, Target


def text(document: dict[str, Any]) -> str:
    peaks, machine = document["peaks"], document["machine"]
    out = [
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; measured peaks: "
        f"bf16 {peaks['bfloat16']:.0f} GFLOP/s, float32 {peaks['float32']:.0f}, reading {peaks['read']:.1f} GB/s"
    ]
    for work in document["workloads"].values():
        out += ["", *_workload(work)]
    if "clients" in document:
        out += ["", *lines(document["clients"])]
    found = [Target(**{k: v for k, v in target.items() if k != "met"}) for target in document["targets"]]
    return "\n".join([*out, "", *map(str, found)])


def _workload(work: dict[str, Any]) -> list[str]:
    rows = work["contenders"]
    mine = rows.get(OURS, next(iter(rows.values())))["median_ms"]
    note = f" ({work['note']})" if work["note"] else ""
    out = [f"{work['title']}: {work['tokens']} tokens, {work['weighted']} in the loss, {work['rounds']} rounds{note}"]
    for name, row in rows.items():
        low, high = row["quartiles_ms"]
        out.append(
            f"  {name:31s} {row['median_ms']:8.0f} ms ({low:.0f} to {high:.0f}) {row['tokens_per_s']:7.0f} tokens/s "
            f"{row['median_ms'] / mine:6.2f} x ours  floor {row['floor_ms']:6.0f} ms  {row['peak_share']:4.0%} of peak "
            f"{row['bandwidth_share']:4.0%} of bandwidth  {row['above_weights_mb']:6.0f} MB above the weights"
        )
    out += [f"  {name}: not compared: {reason}" for name, reason in work["left_out"].items()]
    for name, row in rows.items():
        if "share_by_op" in row:
            shares = ", ".join(f"{op} {share:.0%}" for op, share in row["share_by_op"].items() if share >= 0.005)
            out.append(f"  time of {name} (profiled): {shares}")
    return out


def markdown(document: dict[str, Any]) -> str:
    """The README's table: a row for each workload and contender, and the chart of the same name."""
    machine = document["machine"]
    out = [
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}:",
        "",
        "| work | | ms a step | tokens/s | against ours in bf16 | MB above the weights |",
        "|---|---|---|---|---|---|",
    ]
    for work in document["workloads"].values():
        rows, title = work["contenders"], work["title"]
        mine = rows[OURS]["median_ms"]
        for name, row in rows.items():
            ratio = "" if name == OURS else f"{row['median_ms'] / mine:.1f} ×"
            out.append(
                f"| {title} | {name} | {row['median_ms']:.0f} | {row['tokens_per_s']:.0f} | {ratio} "
                f"| {row['above_weights_mb']:.0f} |"
            )
            title = ""
        floor = rows[OURS]
        out.append(f"| | floor at the measured bf16 peak | {floor['floor_ms']:.0f} | | {floor['peak_share']:.0%} | |")
    out += ["", f"![milliseconds a step](benchmarks/results/{document['benchmark']}.png)"]
    return "\n".join(out)
