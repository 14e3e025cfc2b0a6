"""The saved results of benchmarks.training as the README's table and as a bar chart.

    python -m benchmarks.report [--short] [--write]

draws the chart beside the JSON (benchmarks/results/training.png) and prints the table in Markdown; ``--write`` also
puts it into README.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.timing import RESULTS
from benchmarks.training.render import markdown

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks.report writes this -->", "<!-- to here -->"


def chart(document: dict[str, Any], path: Path) -> None:
    """A panel for each workload, a bar for each contender: milliseconds a step, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    works = list(document["workloads"].values())
    height = 0.8 + sum(0.9 + 0.32 * len(work["contenders"]) for work in works)
    sizes = [len(work["contenders"]) + 1 for work in works]
    figure, panels = plt.subplots(
        len(works), figsize=(9, height), layout="constrained", squeeze=False, gridspec_kw={"height_ratios": sizes}
    )
    for axes, work in zip(panels[:, 0], works, strict=True):
        rows = work["contenders"]
        names = list(rows)[::-1]
        values = [rows[name]["median_ms"] for name in names]
        colors = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
        axes.bar_label(axes.barh(names, values, color=colors), fmt="%.0f", padding=3, fontsize=8)
        floor = rows.get("ours bf16", rows[names[-1]])["floor_ms"]
        axes.axvline(floor, color="tab:red", linewidth=1, label=f"floor of ours in bf16, {floor:.0f} ms")
        axes.set_title(f"{work['title']}: ms a step", fontsize=10, loc="left")
        axes.set_xlim(0, max(values) * 1.1)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7, loc="lower right")
    machine = document["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(table: str, readme: Path) -> None:
    """Replace what is between the two marks."""
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="of the short form that make bench runs")
    parser.add_argument("--write", action="store_true", help="also put the table into README.md")
    args = parser.parse_args()
    name = "training_short" if args.short else "training"
    document = json.loads((RESULTS / f"{name}.json").read_text())
    chart(document, RESULTS / f"{name}.png")
    table = markdown(document)
    print(table)
    if args.write:
        write(table, README)


if __name__ == "__main__":
    main()
