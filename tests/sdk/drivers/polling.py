"""What the newest SDK does besides polling for each sample: it polls for all at once, and gives samples up."""

from __future__ import annotations

from typing import Any

import scenario
from context import Context, configure
from reporting import settled


def run(ctx: Context) -> None:
    prompt = ctx.types.ModelInput.from_ints(scenario.tokens(9, 5))
    plain = _sampled(ctx, ctx.made.sampler, prompt)
    before = ctx.service.holder._client_config
    if configure(ctx.service, sample_use_retrieve_futures=True):
        together = settled(ctx.service.create_sampling_client(model_path=ctx.made.sampler_path))
        assert _sampled(ctx, together, prompt) == plain
        assert together._futures_poller is not None, "the SDK did not poll for all samples at once"
        ctx.service.holder._client_config = before
    if ctx.version >= (0, 38):
        long = ctx.types.SamplingParams(max_tokens=400, stop=[], seed=1)
        given_up = [ctx.made.sampler.sample(prompt, 4, long) for _ in range(8)]
        assert all(future.future().cancel() for future in given_up[1:])
        assert _sampled(ctx, ctx.made.sampler, prompt) == plain
        assert len(given_up[0].result().sequences) == 4


def _sampled(ctx: Context, sampler: Any, prompt: Any) -> list[Any]:
    """Six samples asked for at once."""
    params = [ctx.types.SamplingParams(max_tokens=8, seed=seed, temperature=4.0) for seed in range(6)]
    futures = [sampler.sample(prompt, 1, one) for one in params]
    return [list(map(int, settled(future).sequences[0].tokens)) for future in futures]
