"""RestClient: runs, checkpoints, sessions and samplers, and that each user sees their own."""

from __future__ import annotations

import io
import json
import tarfile
import urllib.request
from typing import Any

from context import Context
from reporting import raised, settled


def run(ctx: Context) -> None:
    _read(ctx)
    _publish(ctx)
    _expire(ctx)
    _download(ctx)
    _copy_and_delete(ctx)
    _sessions(ctx)


def _both(ctx: Context, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method and its async twin, which must say the same."""
    result = ctx.report.call(ctx.rest, method, *args, **kwargs)
    if ctx.report.has(ctx.rest, f"{method}_async"):
        twin = ctx.report.call(ctx.rest, f"{method}_async", *args, **kwargs)
        assert str(twin) == str(result), f"{method}_async gave {twin}, {method} gave {result}"
    return result


def _read(ctx: Context) -> None:
    made, run_id = ctx.made, ctx.made.training.model_id
    run = _both(ctx, "get_training_run", run_id)
    assert (run.training_run_id, run.is_lora, run.lora_rank) == (run_id, True, 8), run
    assert run.base_model == made.training.get_info().model_data.model_name, run
    assert run.last_checkpoint.tinker_path == made.state_path, run
    assert run.last_sampler_checkpoint.tinker_path == made.sampler_path, run
    assert _both(ctx, "get_training_run_by_tinker_path", made.sampler_path).training_run_id == run_id
    info = _both(ctx, "get_weights_info_by_tinker_path", made.state_path)
    assert (info.base_model, info.is_lora, info.lora_rank) == (run.base_model, True, 8), info
    runs = _both(ctx, "list_training_runs", limit=100)
    assert run_id in [one.training_run_id for one in runs.training_runs], runs
    assert len(ctx.rest.list_training_runs(limit=1).result().training_runs) == 1
    assert runs.cursor.total_count == len(runs.training_runs), runs.cursor

    listed = {c.checkpoint_id: c for c in _both(ctx, "list_checkpoints", run_id).checkpoints}
    assert set(listed) == {"weights/state", "sampler_weights/sampler"}, listed
    state = listed["weights/state"]
    assert (state.checkpoint_type, state.tinker_path, state.public) == ("training", made.state_path, False), state
    assert state.size_bytes > 1000, state
    everything = _both(ctx, "list_user_checkpoints", limit=1000).checkpoints
    assert made.state_path in [checkpoint.tinker_path for checkpoint in everything], everything


def _publish(ctx: Context) -> None:
    """Another user's checkpoint is not there, until it is published, and again once it is withdrawn."""
    path, run_id = ctx.made.state_path, ctx.made.training.model_id
    other = ctx.other_service()
    theirs = settled(other.create_rest_client())
    for suffix in ("", "_async"):
        for refused in (
            raised(lambda: settled(theirs.get_training_run(run_id))),
            raised(lambda: settled(theirs.get_weights_info_by_tinker_path(path))),
        ):
            assert refused.startswith("NotFoundError"), refused
        ctx.report.call(ctx.rest, f"publish_checkpoint_from_tinker_path{suffix}", path)
        assert settled(theirs.get_weights_info_by_tinker_path(path)).lora_rank == 8
        seen = settled(theirs.list_training_runs(access_scope="accessible")).training_runs
        assert run_id in [run.training_run_id for run in seen], seen
        owned = settled(theirs.list_training_runs()).training_runs
        assert run_id not in [run.training_run_id for run in owned], owned
        if not suffix:
            assert settled(other.create_training_client_from_state(path)).get_info().lora_rank == 8
        ctx.report.call(ctx.rest, f"unpublish_checkpoint_from_tinker_path{suffix}", path)
    if hasattr(other, "close"):
        other.close("success").result()


def _expire(ctx: Context) -> None:
    def expires() -> Any:
        checkpoints = ctx.rest.list_checkpoints(ctx.made.training.model_id).result().checkpoints
        return next(c.expires_at for c in checkpoints if c.tinker_path == ctx.made.state_path)

    for method in ("set_checkpoint_ttl_from_tinker_path", "set_checkpoint_ttl_from_tinker_path_async"):
        ctx.report.call(ctx.rest, method, ctx.made.state_path, 7200)
        assert expires() is not None
        ctx.report.call(ctx.rest, method, ctx.made.state_path, None)
        assert expires() is None


def _download(ctx: Context) -> None:
    """The files of a checkpoint, by this SDK's way; the tests compare their numbers."""
    made, report = ctx.made, ctx.report
    if report.has(ctx.rest, "get_checkpoint_archive_url"):
        run_id = made.training.model_id
        for path, by in ((made.state_path, "weights/state"), (made.sampler_path, "sampler_weights/sampler")):
            for suffix in ("", "_async"):
                answer = report.call(ctx.rest, f"get_checkpoint_archive_url_from_tinker_path{suffix}", path)
                assert answer.url.startswith(ctx.url), answer
                answer = report.call(ctx.rest, f"get_checkpoint_archive_url{suffix}", run_id, by)
            with tarfile.open(fileobj=io.BytesIO(_get(answer.url)), mode="r:gz") as archive:
                archive.extractall(ctx.out / "downloaded" / by, filter="data")
    if report.has(made.training, "save_weights_external"):
        _external(ctx)


def _external(ctx: Context) -> None:
    from pyrage import decrypt, x25519

    identity = x25519.Identity.generate()
    plain = ctx.report.call(ctx.made.training, "save_weights_external", "plain", ttl_seconds=7200).path
    recipients = [str(identity.to_public())]
    secret = ctx.made.training.save_weights_external("secret", age_encryption_recipients=recipients).result().path
    files = {}
    for path in (plain, secret):
        # The URLs of two calls differ: they say until which second they are good.
        calls = [ctx.report.call(ctx.rest, f"get_external_weights_urls{suffix}", path) for suffix in ("", "_async")]
        files[path], twin = ({name: _get(url) for name, url in call.urls.items()} for call in calls)
        assert files[path] == twin, f"get_external_weights_urls_async: other files for {path}"
    folder = ctx.out / "downloaded" / "external"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files[plain].items():
        (folder / name).write_bytes(content)
        # The same bytes, but for the order of a safetensors header.
        decrypted = decrypt(files[secret][f"{name}.age"], [identity])
        assert sorted(decrypted) == sorted(content), f"{name} as decrypted"


def _get(url: str) -> bytes:
    """A signed URL needs no key."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read()


def _copy_and_delete(ctx: Context) -> None:
    report, training, run_id = ctx.report, ctx.made.training, ctx.made.training.model_id
    if report.has(ctx.rest, "copy_weights"):
        for method in ("copy_weights", "copy_weights_async"):
            copy = report.call(ctx.rest, method, ctx.made.state_path, ttl_seconds=7200)
            assert copy != ctx.made.state_path
            assert settled(ctx.rest.get_weights_info_by_tinker_path(copy)).lora_rank == 8
    for i, (method, by_path) in enumerate(
        [
            ("delete_checkpoint", False),
            ("delete_checkpoint_async", False),
            ("delete_checkpoint_from_tinker_path", True),
            ("delete_checkpoint_from_tinker_path_async", True),
        ]
    ):
        path = training.save_state(f"short-lived-{i}").result().path
        report.call(ctx.rest, method, *([path] if by_path else [run_id, f"weights/short-lived-{i}"]))
        left = settled(ctx.rest.list_checkpoints(run_id)).checkpoints
        assert path not in [checkpoint.tinker_path for checkpoint in left]
        gone = raised(lambda path=path: settled(ctx.rest.get_weights_info_by_tinker_path(path)))
        assert gone.startswith("NotFoundError"), gone


def _sessions(ctx: Context) -> None:
    report, rest = ctx.report, ctx.rest
    run_id = ctx.made.training.model_id
    session_id = run_id.split(":train:")[0]
    session = _both(ctx, "get_session", session_id)
    assert run_id in session.training_run_ids, session
    assert session_id in _both(ctx, "list_sessions", limit=1000).sessions
    sampler = _both(ctx, "get_sampler", session.sampler_ids[0])
    assert sampler.base_model == ctx.made.sampler.get_base_model(), sampler
    if report.has(rest, "assign_session_project"):
        report.call(rest, "assign_session_project", session_id, "a project")
        report.call(rest, "assign_session_project_async", session_id, "another project")
    if report.has(rest, "search_sessions"):
        request = ctx.types.SessionSearchRequest(user_metadata={"made by": "tests/sdk"}, limit=200)
        found = report.call(rest, "search_sessions", request).sessions
        assert session_id in [one.session_id for one in found], found
    if report.has(rest, "export_session_trace"):
        assert _get(_both_urls(ctx, session_id))
    if report.has(rest, "get_server_capabilities"):
        assert report.call(rest, "get_server_capabilities").supported_models
    _with_a_token(ctx, session_id)
    if report.has(rest, "whoami"):  # the SDK reads it off a token of its publisher's, and asks no server
        assert "JWT" in report.refused(rest, "whoami")
    hour = ("2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z")
    calls = {"get_audit_log": (), "get_billing_usage": hour, "get_current_checkpoint_storage_usage": ()}
    clients = [rest]
    if hasattr(ctx.sdk, "AdminClient"):
        assert session_id in settled(ctx.sdk.RestClient().list_sessions(limit=1000)).sessions
        clients.append(ctx.sdk.AdminClient())
        report.call(clients[1], "get_telemetry")
    for client in clients:
        for method, args in calls.items():
            for name in (method, f"{method}_async"):
                if report.has(client, name):
                    report.attempt(client, name, *args)


def _with_a_token(ctx: Context, session_id: str) -> None:
    """A key exchanged for a token, which then serves as the key."""
    request = urllib.request.Request(f"{ctx.url}/api/v1/auth/token", b"{}", {"X-API-Key": ctx.key}, method="POST")
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        token = json.load(answer)["jwt"]
    service = ctx.sdk.ServiceClient(api_key=token)
    rest = settled(service.create_rest_client())
    assert session_id in settled(rest.list_sessions(limit=1000)).sessions
    if hasattr(service, "close"):
        service.close("success").result()


def _both_urls(ctx: Context, session_id: str) -> str:
    """Signed URLs differ from call to call."""
    ctx.report.call(ctx.rest, "export_session_trace_async", session_id)
    return ctx.report.call(ctx.rest, "export_session_trace", session_id)
