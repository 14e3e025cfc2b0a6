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
    CheckpointError,
    EngineClosedError,
    MintError,
    ModelError,
    NonFiniteError,
    NotFoundError,
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

TinkerError = MintError
"""The Tinker SDK's name for the base class of its errors."""

__all__ = [
    "APIFuture",
    "AdamOptimizerConfig",
    "AdamParams",
    "Checkpoint",
    "CheckpointError",
    "CheckpointType",
    "Datum",
    "EncodedTextChunk",
    "EngineClosedError",
    "ForwardBackwardOutput",
    "ForwardBackwardResult",
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
    "UserError",
    "__version__",
    "mint",
    "types",
]
