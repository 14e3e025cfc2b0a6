"""The JSON request bodies of the API, as pydantic models: lenient about what is extra, clear about what is wrong.

`parse_request(Model, obj)` gives one readable sentence instead of pydantic's list. A model can be a FastAPI body, too;
`wire.explain(error.errors())` makes the same sentence there.
"""

from mint_engine.wire.requests.base import WireRequest, parse_request
from mint_engine.wire.requests.checkpoints import (
    CopyWeightsRequest,
    LoadWeightsRequest,
    SaveWeightsExternalRequest,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
    SetTtlRequest,
    WeightsInfoRequest,
)
from mint_engine.wire.requests.mint import InterpolateCheckpointsRequest, ReverseKLDatumRequest, ReverseKLRequest
from mint_engine.wire.requests.sampling import (
    CancelFutureRequest,
    CreateSamplingSessionRequest,
    FuturesTarget,
    JoinSamplingSessionRequest,
    RetrieveFutureRequest,
    RetrieveFuturesRequest,
    SampleRequest,
    WireSamplingParams,
)
from mint_engine.wire.requests.sessions import (
    AssignProjectRequest,
    AuthTokenRequest,
    ClientConfigRequest,
    CreateSessionRequest,
    FinishSessionRequest,
    SessionHeartbeatRequest,
    SessionSearchRequest,
    TelemetryRequest,
)
from mint_engine.wire.requests.training import (
    CreateCustomLossRequest,
    CreateModelRequest,
    ForwardBackwardBody,
    ForwardBody,
    GetInfoRequest,
    OptimizerChoice,
    OptimStepRequest,
    UnloadModelRequest,
    WireLoraConfig,
    WireOptimParams,
)

__all__ = [
    "AssignProjectRequest",
    "AuthTokenRequest",
    "CancelFutureRequest",
    "ClientConfigRequest",
    "CopyWeightsRequest",
    "CreateCustomLossRequest",
    "CreateModelRequest",
    "CreateSamplingSessionRequest",
    "CreateSessionRequest",
    "FinishSessionRequest",
    "ForwardBackwardBody",
    "ForwardBody",
    "FuturesTarget",
    "GetInfoRequest",
    "InterpolateCheckpointsRequest",
    "JoinSamplingSessionRequest",
    "LoadWeightsRequest",
    "OptimStepRequest",
    "OptimizerChoice",
    "RetrieveFutureRequest",
    "RetrieveFuturesRequest",
    "ReverseKLDatumRequest",
    "ReverseKLRequest",
    "SampleRequest",
    "SaveWeightsExternalRequest",
    "SaveWeightsForSamplerRequest",
    "SaveWeightsRequest",
    "SessionHeartbeatRequest",
    "SessionSearchRequest",
    "SetTtlRequest",
    "TelemetryRequest",
    "UnloadModelRequest",
    "WeightsInfoRequest",
    "WireLoraConfig",
    "WireOptimParams",
    "WireRequest",
    "WireSamplingParams",
    "parse_request",
]
