"""From a parsed request to the engine's call, and to bytes and back for a restart."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from mint_engine import wire
from mint_engine.errors import UserError
from mint_engine.wire import requests as bodies

if TYPE_CHECKING:
    from mint_engine.engine import Engine
    from mint_engine.server.caller import Caller

_JSON_BODIES: dict[str, type[bodies.WireRequest]] = {
    "OptimStep": bodies.OptimStepRequest,
    "SaveWeights": bodies.SaveWeightsRequest,
    "LoadWeights": bodies.LoadWeightsRequest,
    "SaveWeightsForSampler": bodies.SaveWeightsForSamplerRequest,
    "SaveWeightsExternal": bodies.SaveWeightsExternalRequest,
    "MintForwardBackwardReverseKL": bodies.ReverseKLRequest,
}


def start(engine: Engine, caller: Caller, request: Any) -> Callable[[], Future]:
    """A function that hands ``request`` to the engine. Raises UserError for values that cannot be."""
    match request:
        case wire.ForwardBackwardRequest(forward_only=True):
            return lambda: engine.forward(request.model_id, request.data, request.loss_fn, request.loss_fn_config)
        case wire.ForwardBackwardRequest():
            return lambda: engine.forward_backward(
                request.model_id, request.data, request.loss_fn, request.loss_fn_config
            )
        case bodies.OptimStepRequest():
            adam_params = request.adam_params()
            return lambda: engine.optim_step(request.model_id, adam_params)
        case bodies.SaveWeightsRequest():
            name = _name(request.path or f"state-{request.seq_id}")
            return lambda: engine.save_weights(
                request.model_id, name, ttl_seconds=request.ttl_seconds, overwrite=request.overwrite,
                user_metadata=request.user_metadata,
            )  # fmt: skip
        case bodies.LoadWeightsRequest(model_id=str() as model_id):
            return lambda: engine.load_weights(model_id, request.path, optimizer=request.optimizer, reader=caller.store)
        case bodies.SaveWeightsForSamplerRequest(path=str() as path):
            name = _name(path)
            return lambda: engine.save_weights_for_sampler(
                request.model_id, name, ttl_seconds=request.ttl_seconds, user_metadata=request.user_metadata,
                overwrite=request.overwrite,
            )  # fmt: skip
        case bodies.SaveWeightsForSamplerRequest():
            return lambda: engine.save_weights_for_sampler(
                request.model_id, sampler_seq=request.sampling_session_seq_id
            )
        case bodies.SaveWeightsExternalRequest():
            name = _name(request.path)
            return lambda: engine.save_weights_external(
                request.model_id, name, ttl_seconds=request.ttl_seconds, user_metadata=None,
                recipients=request.age_encryption_recipients,
            )  # fmt: skip
        case bodies.ReverseKLRequest():
            data = request.datums()
            return lambda: engine.forward_backward_reverse_kl(
                request.model_id, data, reference_model_path=request.reference_model_path,
                temperature=request.temperature, reader=caller.store,
            )  # fmt: skip
    raise TypeError(f"no operation for a {type(request).__name__}")


def dump(request: Any) -> bytes:
    """The request as bytes that `load` reads."""
    if isinstance(request, wire.ForwardBackwardRequest):
        return wire.encode_forward_backward(request)
    return request.model_dump_json(by_alias=True, exclude_none=True).encode()


def load(kind: str, body: bytes) -> Any:
    if kind in ("Forward", "ForwardBackward"):
        return wire.parse_forward_backward(body)
    return bodies.parse_request(_JSON_BODIES[kind], wire.parse_json(body))


def _name(name: str) -> str:
    """Clients take paths apart at their slashes."""
    if "/" in name:
        raise UserError(f"path: expected a name without '/', got {name!r}")
    return name
