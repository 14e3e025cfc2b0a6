"""The README's table of sampling speeds, from benchmarks/results/decode.json.

    python -m benchmarks.decode_table [--write]

prints it; ``--write`` also puts it between its two marks in README.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.timing import RESULTS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks.decode_table writes this -->", "<!-- the table of sampling ends here -->"


def table(document: dict[str, Any]) -> str:
    machine = document["machine"]
    lines = [
        f"On {machine['cpu']}, {machine['threads']} threads, {document['read_GBps']} GB/s at the last row; tokens a "
        "second, prompts included; medians of rounds, those of a row interleaved (`benchmarks/results/decode.json`).",
        "",
        "| model | work | ours | against | theirs | ours / theirs | wanted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        if "skipped" in row:
            lines.append(f"| {row['model']} | {row['work']} | | {row['skipped']} | | | |")
            continue
        speed, work = row["tokens_per_s"], row["work"]
        if "first_token_p99_s" in row:
            first = f"{row['first_token_p50_s']:.1f} and {row['first_token_p99_s']:.1f} s"
            work += f"; first token after {first} (median, p99); {row['failed']} failed"
        lines.append(
            f"| {row['model']} | {work} | {speed[row['ours']]:.0f} | {row['against']} | "
            f"{speed[row['against']]:.0f} | {row['ratio']:.2f} | {row['target']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also put the table into README.md")
    args = parser.parse_args()
    text = table(json.loads((RESULTS / "decode.json").read_text()))
    print(text)
    if args.write:
        before, _, rest = README.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
