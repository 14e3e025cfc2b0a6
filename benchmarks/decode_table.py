"""The README's table of sampling speeds, from benchmarks/results/decode.json: ``python -m benchmarks.decode_table``."""

from __future__ import annotations

import json

from benchmarks.timing import RESULTS


def main() -> None:
    document = json.loads((RESULTS / "decode.json").read_text())
    print(
        "| model | work | ours, tokens/s | against | theirs | ours / theirs | wanted |\n|---|---|---|---|---|---|---|"
    )
    for row in document["rows"]:
        if "skipped" in row:
            print(f"| {row['model']} | {row['work']} | | {row['skipped']} | | | |")
            continue
        speed = row["tokens_per_s"]
        print(
            f"| {row['model']} | {row['work']} | {speed[row['ours']]:.0f} | {row['against']} | "
            f"{speed[row['against']]:.0f} | {row['ratio']:.2f} | {row['target']:.2f} |"
        )


if __name__ == "__main__":
    main()
