"""The MinT API, on mint-engine: `import mint`.

The engine runs in this process, or on the server that MINT_BASE_URL names (`mint-engine serve`).

    service_client = mint.ServiceClient()
    training_client = service_client.create_lora_training_client(base_model="Qwen/Qwen3-0.6B", rank=16)

Names are those of MinT's and Tinker's Python clients. (PyPI's `mindlab-toolkit`, a client for MinT's servers, has this
import name too: install it in an environment of its own.)
"""

from mint import mint, types
from mint_engine import __version__
from mint_engine.client import APIFuture, RestClient, SamplingClient, ServiceClient, TrainingClient
from mint_engine.errors import (
    AuthenticationError,
    CheckpointError,
    EngineClosedError,
    MintError,
    ModelError,
    NonFiniteError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
    TransportError,
    UserError,
)
from mint_engine.types import (
    AdamOptimizerConfig,
    AdamParams,
    Checkpoint,
    CheckpointType,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ForwardBackwardResult,
    LoraConfig,
    ModelID,
    ModelInput,
    ModelInputChunk,
    OptimParams,
    OptimStepResponse,
    ParsedCheckpointTinkerPath,
    ReverseKLDatum,
    SampledSequence,
    SampledToken,
    SampleResponse,
    SamplingParams,
    StopReason,
    TensorData,
    TensorDtype,
    TrainingRun,
)

# The Tinker SDK's names for errors. It has a class for each status of an answer, and other bases; where these are one
# class here, they are the same, so that `except` catches at least what it catches there.
TinkerError = APIError = APIStatusError = RequestFailedError = MintError
BadRequestError = ConflictError = UnprocessableEntityError = UserError
APIConnectionError = APITimeoutError = APIResponseValidationError = TransportError
InternalServerError = RateLimitError = TransportError  # a server that cannot answer is asked for minutes before

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AdamOptimizerConfig",
    "AdamParams",
    "AuthenticationError",
    "BadRequestError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointType",
    "ConflictError",
    "Datum",
    "EncodedTextChunk",
    "EngineClosedError",
    "ForwardBackwardOutput",
    "ForwardBackwardResult",
    "InternalServerError",
    "LoraConfig",
    "MintError",
    "ModelError",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "NonFiniteError",
    "NotFoundError",
    "OptimParams",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestFailedError",
    "RestClient",
    "ReverseKLDatum",
    "SampleResponse",
    "SampledSequence",
    "SampledToken",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "StopReason",
    "StorageError",
    "TensorData",
    "TensorDtype",
    "TinkerError",
    "TrainingClient",
    "TrainingRun",
    "TransportError",
    "UnprocessableEntityError",
    "UserError",
    "__version__",
    "mint",
    "types",
]
