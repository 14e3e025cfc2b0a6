"""Drives one SDK through everything a server answers: `python surface.py request.json`.

The request holds url, key, other_key, base_model, package and out; `<out>/report.json` is what happened.
"""

from __future__ import annotations

import asyncio
import inspect
import sys

import chunks
import context
import mint_extras
import mistakes
import polling
import registry
import scenario
import service_calls
import shadows
import twins


def public_methods(ctx: context.Context) -> list[str]:
    """Every public method and property of the SDK's clients, read off their classes."""
    clients = [ctx.sdk.ServiceClient, ctx.sdk.TrainingClient, ctx.sdk.SamplingClient, type(ctx.rest)]
    if hasattr(ctx.sdk, "AdminClient"):
        clients.append(ctx.sdk.AdminClient)
    names = []
    for client in clients:
        for name, member in inspect.getmembers(client):
            if not name.startswith("_") and (callable(member) or isinstance(member, property)):
                names.append(f"{client.__name__}.{name}")
    if ctx.sdk.__name__ == "mint":
        own = ctx.sdk.mint.interpolate_checkpoints.__module__  # the others patch tinker at import
        functions = inspect.getmembers(ctx.sdk.mint, inspect.isfunction)
        names += [f"mint.{name}" for name, function in functions if function.__module__ == own]
    return names


def main(path: str) -> None:
    ctx = context.opened(path)
    report = ctx.report
    ctx.service = ctx.sdk.ServiceClient(user_metadata={"made by": "tests/sdk"})
    ctx.rest = report.call(ctx.service, "create_rest_client")
    report.values["public methods"] = public_methods(ctx)
    report.values["tinker"] = ".".join(map(str, ctx.version))
    with report.section("scenario"):
        ctx.made = scenario.run(report, ctx.service, ctx.types, ctx.base_model)
    if ctx.made is not None:
        for part in (service_calls, registry, shadows, polling, chunks, mistakes):
            with report.section(part.__name__):
                part.run(ctx)
        with report.section("twins"):
            asyncio.run(twins.run(ctx))
        if ctx.sdk.__name__ == "mint":
            with report.section("mint_extras"):
                mint_extras.run(ctx)
        with report.section("for the command line"):
            short_lived = ctx.made.training.save_state("short-lived").result().path
            run, state = ctx.made.training.model_id, ctx.made.state_path
            report.values["made"] = {"run": run, "state": state, "short-lived": short_lived}
    if report.has(ctx.service, "close"):
        with report.section("close"):
            report.call(ctx.service, "close", "success", detail="all done")
    report.write(ctx.out / "report.json")


if __name__ == "__main__":
    main(sys.argv[1])
