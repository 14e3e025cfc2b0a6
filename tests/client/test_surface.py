"""`import mint` has what the SDKs have: every name, every method, every argument, or it is listed here with the reason.

`surfaces/` holds what the SDKs have, as `tests/sdk/drivers/names.py` reads it off the packages; the tests in
`tests/sdk` see to it that it is still so.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mint
from mint import types

SURFACES = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "surfaces").glob("*"))}

_WIRE = "a body between the SDK and a server: no method of a client takes or gives it"
_LOGIN = "the SDK's login at its publisher's"
_INSIDE = "public for the SDK's own use"
_PATCH = "changes the installed tinker package"
_CONSOLE = (
    "an answer does not know its server, and there is no console; the clients' get_console_url says where to look"
)
_UNION = "an annotation of a union; its members are here"
_CUSTOM = "how the SDK sends a custom loss to a server; here it runs where it was written"
_REFUSED = "a type of what is not here: to make one is refused"
_SPANS = "only the loss stable_reinforce reads where tokens come from, and it is not here"
_STATUS = "SessionStatus, SessionStatusQuery and SessionFinishReason are one class each, whatever the status"
_ONE_STEP = "the server does it in one step"

MISSING = {
    "auth": _LOGIN, "OptimStepRequest": _WIRE, "SampleRequest": _WIRE,
    "mint.mint.EXPECTED_TINKER_VERSION": _PATCH, "mint.mint.MintApiKeyAuthProvider": _PATCH,
    "mint.mint.apply_auth_patch": _PATCH, "mint.mint.apply_mint_patches": _PATCH, "mint.mint.sync_env": _PATCH,
    "mint.mint.MINT_VERSION": "the version of the package mindlab-toolkit; ours is mint.__version__",
    "mint.mint.ForwardBackwardReverseKLRequest": _WIRE, "mint.mint.InterpolateCheckpointsRequest": _WIRE,
    "ServiceClient.holder": _INSIDE, "SamplingClient.create": _INSIDE, "SamplingClient.on_queue_state_change": _INSIDE,
    "types.Datum.model_input_spans": _SPANS, "types.Datum.loss_fn_input_spans": _SPANS,
    "types.Datum.with_provenance": _SPANS,
    "types.SaveWeightsResponse.get_console_url": _CONSOLE,
    "types.SaveWeightsForSamplerResponse.get_console_url": _CONSOLE,
    "types.SaveWeightsForSamplerResponse.get_playground_url": _CONSOLE,
}  # fmt: skip
"""Names that are not here, and why."""

MISSING_TYPES = {
    _WIRE: """AuthTokenResponse ClientConfigResponse ClientDynamicConfigResponse CopyWeightsResponse CreateModelResponse
        CreateSamplingSessionResponse CreateSessionResponse EventType ForwardBackwardInput FutureCompletion FutureFailed
        FutureFinished FutureRetrieveResponse FuturesRetrieveResponse HealthResponse JoinSamplingSessionResponse
        RequestErrorCategory RequestFailedResponse RequestID SamplingClientKind SamplingSessionFuturesTarget
        SessionEndEvent SessionHeartbeatResponse SessionStartEvent Severity TelemetryBatch TelemetryEvent
        TelemetryResponse UnhandledExceptionEvent UnloadModelResponse UntypedAPIFuture
        SaveWeightsExternalResponseInternal SaveWeightsForSamplerResponseInternal""",
    _CUSTOM: "CreateCustomLossResponse CustomLossGraph CustomLossInput CustomLossInputRank CustomLossNode",
    _SPANS: "ProvenanceSpans",
    _UNION: "OptimizerConfig",
    _STATUS: """ActiveSessionStatusQuery CancelledSessionStatusQuery ClientFinishedSessionStatusQuery
        ClientSessionFinishErrored ClientSessionFinishInterrupted ClientSessionFinishReason
        ClientSessionFinishReasonType ClientSessionFinishSuccess ClientSessionFinished FailedSessionStatusQuery
        SessionActive SessionCancelled SessionFailed SessionFailedReason SessionFailedRequestReason
        SessionFailedSamplingSessionReason SessionFailedTrainingRunReason""",
}
MISSING |= {f"types.{name}": reason for reason, names in MISSING_TYPES.items() for name in names.split()}

_OURS = "MinT's documentation has this default"
OTHER = {
    "ServiceClient.create_lora_training_client: rank": _OURS,
    "ServiceClient.create_training_client_from_state: position 2": "a dict there is taken as user_metadata",
    "ServiceClient.create_training_client_from_state: position 3": "a string there is taken as the token",
    "ServiceClient.create_training_client_from_state_with_optimizer: position 2": "as above",
    "ServiceClient.create_training_client_from_state_with_optimizer: position 3": "as above",
    "TrainingClient.optim_step: position 1": "MinT's documentation calls it optim_params",
    "TrainingClient.forward_backward_custom: loss_type_input": "None is the same",
}
"""Arguments that are not as in the SDKs, and why; an `_async` twin is as its original."""


def reason(name: str) -> str | None:
    if name.startswith("types.") and name.count(".") == 1 and name.endswith("Request"):
        return MISSING.get(name, _WIRE)
    if name.startswith("types.") and hasattr(getattr(types, name.split(".")[1], None), "because"):
        return _REFUSED
    return MISSING.get(name)


def names_of(sdk: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """(a name of the SDK's, whether it is here)."""
    for package, names in sdk["modules"].items():
        ours = importlib.import_module("mint" if package == "tinker" else package)
        for name in names:
            yield (f"{package}.{name}" if package == "mint.mint" else name), hasattr(ours, name)
    yield from ((f"types.{name}", hasattr(types, name)) for name in sdk["types"])
    for cls, members in sdk["classes"].items():
        if (ours := our_class(cls)) is not None:
            fields = {*getattr(ours, "model_fields", ()), *getattr(ours, "__dataclass_fields__", ())}
            yield from ((f"{cls}.{name}", name in fields or hasattr(ours, name)) for name in members)


def our_class(name: str) -> type | None:
    return getattr(types, name.removeprefix("types."), None) if name.startswith("types.") else getattr(mint, name, None)


@pytest.mark.parametrize("sdk", SURFACES.values(), ids=SURFACES)
def test_every_name_is_here_or_it_is_said_why_not(sdk):
    assert [name for name, here in names_of(sdk) if not here and reason(name) is None] == []


def test_what_is_said_to_be_missing_is_missing():
    there = {name: here for sdk in SURFACES.values() for name, here in names_of(sdk)}
    assert [name for name in MISSING if there.get(name, True)] == []


def differences(name: str, theirs: str, ours: Any) -> Iterator[str]:
    """Arguments of which a call of theirs would mean something else here, or nothing."""
    mine = inspect.signature(ours).parameters
    if not inspect.isroutine(ours) or inspect.ismethod(ours):  # of a class, self is not shown
        mine = {"self": inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), **mine}
    order = [p.name for p in mine.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    anything = any(p.kind is p.VAR_KEYWORD for p in mine.values())
    expected = inspect.signature(eval(f"lambda {theirs}: None")).parameters
    for i, parameter in enumerate(expected.values()):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name in ("self", "cls"):
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY and order[i : i + 1] != [parameter.name]:
            yield f"{name}: position {i}"
        if (found := mine.get(parameter.name)) is None:
            if not anything:
                yield f"{name}: {parameter.name}"
        elif parameter.default not in (parameter.empty, ..., found.default):
            yield f"{name}: {parameter.name}"
    required = (p for p in mine.values() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    yield from (f"{name}: {p.name} is required" for p in required if p.name not in {*expected, "self"})


def all_differences() -> set[str]:
    found: set[str] = set()
    for sdk in SURFACES.values():
        for cls, members in sdk["classes"].items():
            for name, theirs in members.items():
                ours = getattr(our_class(cls), name, None)
                if callable(ours) and theirs is not None and reason(f"{cls}.{name}") is None:
                    found.update(differences(f"{cls}.{name}".removesuffix("_async"), theirs, ours))
    return found


def test_every_call_means_the_same_or_it_is_said_why_not():
    assert sorted(all_differences()) == sorted(OTHER)


def test_the_packages_of_the_toolkit_are_all_here():
    from mint import tinker
    from mint.tinker import types as same_types

    assert same_types is types
    assert all(getattr(tinker, name) is getattr(mint, name) for name in tinker.__all__)
    assert {"Timeout", "RequestOptions", "RestClient"} <= set(tinker.__all__) <= set(mint.__all__)


@pytest.mark.parametrize("name", ["ImageChunk", "DmelChunk", "DimuonParams", "PromptProvenanceSpan"])
def test_what_is_not_here_can_be_named_and_not_made(name):
    assert not isinstance(types.EncodedTextChunk(tokens=[1]), getattr(types, name))
    with pytest.raises(mint.UserError, match=f"{name}: .*not (supported|here)"):
        getattr(types, name)(b"data", type="any")


def test_mint_has_what_scripts_import():
    assert importlib.import_module("mint.types").AdamParams is mint.AdamParams is types.AdamParams
    assert all(hasattr(mint, name) for name in mint.__all__)
    assert all(hasattr(types, name) for name in types.__all__)
    assert isinstance(mint.__version__, str)


def test_scripts_may_catch_the_sdk_s_errors():
    sdk = """TinkerError APIError APIStatusError APITimeoutError APIConnectionError APIResponseValidationError
        RequestFailedError BadRequestError AuthenticationError PermissionDeniedError NotFoundError ConflictError
        UnprocessableEntityError RateLimitError InternalServerError BillingError SidecarError SidecarDiedError"""
    assert all(issubclass(getattr(mint, name), mint.TinkerError) for name in sdk.split())


@pytest.mark.parametrize("client", [mint.ServiceClient, mint.TrainingClient, mint.SamplingClient, mint.RestClient])
def test_every_call_that_may_wait_has_an_async_twin(client):
    local = {"close", "get_tokenizer", "get_telemetry", "create_rest_client", "result", "zero_grad"}
    local |= {"get_sampler_handle", "from_sampler_handle", "stream", "get_console_url", "create_custom_loss"}
    methods = {name for name, member in inspect.getmembers(client, inspect.isfunction) if not name.startswith("_")}
    twins = {name for name in methods if name.endswith("_async")}
    missing = {name for name in methods - twins if f"{name}_async" not in twins} - local
    assert missing == set()
    for name in twins & {f"{name}_async" for name in methods}:
        original, twin = getattr(client, name.removesuffix("_async")), getattr(client, name)
        assert list(inspect.signature(original).parameters) == list(inspect.signature(twin).parameters)
