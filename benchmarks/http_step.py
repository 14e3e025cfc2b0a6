"""What HTTP costs: the demo's training step in process, through our client on loopback, and through the tinker SDK.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.http_step [--rounds 10] [--model smollm2-135m] [--save]

The server is a process of its own, as a user starts it; the SDK is the unmodified one from PyPI in an environment of
its own (``tests/sdk/environments.py`` makes it on first use). All steps are interleaved in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mint
from benchmarks.timing import interleaved, medians, report
from mint import types
from mint_engine.demo import process_sft_example, questions
from mint_engine.models.gguf import smollm2_directory
from mint_engine.models.hub import SMOLLM2

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "sdk"))
from environments import environment

SDK = "tinker-0.38.0"
MINE = "in process"


@contextmanager
def server(model: str) -> Iterator[str]:
    """`mint-engine serve` on a free port; yields its URL."""
    command = [str(Path(sys.executable).with_name("mint-engine")), "serve", "--model", model, "--port", "0"]
    process = subprocess.Popen([*command, "--log-level", "warning"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield next(line.split()[-1] for line in process.stdout if " is ready on " in line)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def through_mint(url: str | None, model: str, data: list[types.Datum]) -> Callable[[], object]:
    service = mint.ServiceClient(base_url=url, api_key="tml-local") if url else mint.ServiceClient(dtype="bfloat16")
    client = service.create_lora_training_client(model, 16, seed=0)
    adam = types.AdamParams(learning_rate=5e-5)

    def step() -> object:
        result = client.forward_backward(data, "cross_entropy")
        client.optim_step(adam).result()
        return result.result()

    return step


@contextmanager
def through_sdk(url: str, model: str, data: list[types.Datum]) -> Iterator[Callable[[], object]]:
    rows = [
        (d.model_input.to_ints(), *(d.loss_fn_inputs[name].tolist() for name in ("target_tokens", "weights")))
        for d in data
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(rows, file)
        file.flush()
        driver = [environment(SDK).python, Path(__file__).with_name("http_step_driver.py"), file.name, url, "tml-local"]
        quiet = {**os.environ, "TINKER_TELEMETRY": "0"}
        with subprocess.Popen(
            [*map(str, driver), model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=quiet
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

            def step() -> object:
                process.stdin.write("\n")
                return json.loads(process.stdout.readline())

            yield step
            process.stdin.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--save", action="store_true", help="keep the JSON under benchmarks/results/")
    args = parser.parse_args()

    import transformers

    home = Path(os.environ.get("MINT_HOME") or Path.home() / ".mint-engine")
    directory = smollm2_directory(home) if args.model == SMOLLM2 else Path(args.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    data = [process_sft_example(ex, tokenizer) for ex in questions(16, seed=0)]
    with ExitStack() as stack:
        url = stack.enter_context(server(args.model))
        steps = {
            MINE: through_mint(None, args.model, data),
            "import mint over HTTP": through_mint(url, args.model, data),
            f"{SDK} over HTTP": stack.enter_context(through_sdk(url, args.model, data)),
        }
        median = medians(interleaved(steps, rounds=args.rounds, warmup=2))
    for name, seconds in median.items():
        print(f"{name:24s} {seconds * 1e3:7.1f} ms  {seconds / median[MINE]:5.3f} x in process")
    report("http_step", {
        "tokens": sum(d.model_input.length for d in data), "rounds": args.rounds,
        "median_ms": {name: round(seconds * 1e3, 1) for name, seconds in median.items()},
        "ratio": {name: round(seconds / median[MINE], 3) for name, seconds in median.items()},
    }, args.save)  # fmt: skip


if __name__ == "__main__":
    main()
