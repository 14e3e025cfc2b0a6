"""The clients: what a training script talks to."""

from mint_engine.client.admin_client import AdminClient
from mint_engine.client.futures import APIFuture
from mint_engine.client.loss_handle import LossHandle, PerDatumLossFn
from mint_engine.client.rest_client import RestClient
from mint_engine.client.sampling_client import SamplingClient
from mint_engine.client.service_client import ServiceClient
from mint_engine.client.training_client import TrainingClient

__all__ = [
    "APIFuture", "AdminClient", "LossHandle", "PerDatumLossFn", "RestClient", "SamplingClient", "ServiceClient",
    "TrainingClient",
]  # fmt: skip
