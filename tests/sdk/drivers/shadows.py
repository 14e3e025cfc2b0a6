"""A SamplingClient handed to another process, pickled or (0.38) as a handle, says what the first one says."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import scenario
from context import Context


def run(ctx: Context) -> None:
    sampler = ctx.made.sampler
    pickled = ctx.out / "sampler.pickle"
    pickled.write_bytes(pickle.dumps(sampler))
    expected = answers(ctx.types, sampler)
    elsewhere = _in_another_process(ctx, "--pickle", str(pickled))
    assert elsewhere == expected, f"another process sampled {elsewhere}, this one {expected}"
    # Two copies in one process number their requests apart from the first client and from each other.
    copies = [pickle.loads(pickled.read_bytes()) for _ in range(2)]
    assert [answers(ctx.types, copy) for copy in copies] == [expected, expected]
    if ctx.report.has(sampler, "get_sampler_handle"):
        handle = ctx.report.call(sampler, "get_sampler_handle")
        assert _in_another_process(ctx, "--handle", handle) == expected
        assert answers(ctx.types, ctx.report.call(sampler, "from_sampler_handle", handle)) == expected


def answers(types: Any, sampler: Any) -> dict[str, Any]:
    """Tokens with a seed, and scores."""
    prompt = types.ModelInput.from_ints(scenario.tokens(9, 5))
    params = types.SamplingParams(max_tokens=8, seed=3, temperature=4.0)
    response = sampler.sample(prompt, 2, params).result()
    scores = [None if p is None else round(float(p), 4) for p in sampler.compute_logprobs(prompt).result()]
    return {"tokens": [list(map(int, s.tokens)) for s in response.sequences], "scores": scores}


def _in_another_process(ctx: Context, *which: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(Path(__file__)), ctx.sdk.__name__, *which]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    import importlib

    package, how, what = sys.argv[1:]
    sdk = importlib.import_module(package)
    if how == "--pickle":
        shadow = pickle.loads(Path(what).read_bytes())
    else:
        shadow = sdk.SamplingClient.from_sampler_handle(what)
    print(json.dumps(answers(sdk.types, shadow)))
