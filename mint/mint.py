"""MinT's two calls beside the SDK's, under the names of PyPI's `mindlab-toolkit`.

They are methods of our clients, too: `RestClient.interpolate_checkpoints`,
`TrainingClient.forward_backward_reverse_kl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mint_engine.client import APIFuture, ServiceClient, TrainingClient
from mint_engine.errors import UserError
from mint_engine.types import InterpolateCheckpointsResponse, ReverseKLDatum, ReverseKLItemOutput, ReverseKLOutput

ForwardBackwardReverseKLResponse = ReverseKLOutput

__all__ = [
    "ForwardBackwardReverseKLResponse",
    "InterpolateCheckpointsResponse",
    "ReverseKLDatum",
    "ReverseKLItemOutput",
    "ReverseKLOutput",
    "forward_backward_reverse_kl",
    "forward_backward_reverse_kl_async",
    "interpolate_checkpoints",
    "interpolate_checkpoints_async",
]


def interpolate_checkpoints(
    service_client: ServiceClient,
    *,
    source_paths: Sequence[str],
    coefficients: Sequence[float],
    output_path: str | None = None,
    output_checkpoint_type: Literal["sampler"] = "sampler",
) -> InterpolateCheckpointsResponse:
    """A new sampler checkpoint, the weighted sum of others; `output_path` is its name. Waits for it."""
    return _interpolate(service_client, source_paths, coefficients, output_path, output_checkpoint_type).result()


async def interpolate_checkpoints_async(
    service_client: ServiceClient,
    *,
    source_paths: Sequence[str],
    coefficients: Sequence[float],
    output_path: str | None = None,
    output_checkpoint_type: Literal["sampler"] = "sampler",
) -> APIFuture[InterpolateCheckpointsResponse]:
    """The same; gives a future."""
    return _interpolate(service_client, source_paths, coefficients, output_path, output_checkpoint_type)


def forward_backward_reverse_kl(
    training_client: TrainingClient,
    *,
    reference_model_path: str,
    data: Sequence[ReverseKLDatum],
    temperature: float = 1.0,
    seq_id: int | None = None,
) -> ReverseKLOutput:
    """The reverse KL divergence to a saved model, and its gradients. Waits for them."""
    return _reverse_kl(training_client, reference_model_path, data, temperature, seq_id).result()


async def forward_backward_reverse_kl_async(
    training_client: TrainingClient,
    *,
    reference_model_path: str,
    data: Sequence[ReverseKLDatum],
    temperature: float = 1.0,
    seq_id: int | None = None,
) -> APIFuture[ReverseKLOutput]:
    """The same; gives a future."""
    return _reverse_kl(training_client, reference_model_path, data, temperature, seq_id)


def _interpolate(
    service: ServiceClient, paths: Sequence[str], coefficients: Sequence[float], name: str | None, kind: str
) -> APIFuture[InterpolateCheckpointsResponse]:
    if kind != "sampler":
        raise UserError(f"output_checkpoint_type: expected 'sampler', got {kind!r}")
    return service.create_rest_client().interpolate_checkpoints(paths, coefficients, name)


def _reverse_kl(
    trainer: TrainingClient, path: str, data: Sequence[ReverseKLDatum], temperature: float, seq_id: int | None
) -> APIFuture[ReverseKLOutput]:
    if seq_id is not None:
        raise UserError(f"seq_id: expected None, got {seq_id!r}: calls run in the order in which they are made")
    return trainer.forward_backward_reverse_kl(data, path, temperature)
