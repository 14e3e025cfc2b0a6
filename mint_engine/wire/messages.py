"""The message classes of `messages.proto`.

They are made from a compiled descriptor, `messages.bin`, in a pool of their own: generated code would be tied to one
major version of protobuf, and would clash in a process that also holds the tinker SDK.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from mint_engine.wire.errors import WireError
from mint_engine.wire.structure import check_structure

_files = descriptor_pb2.FileDescriptorSet.FromString(
    resources.files("mint_engine.wire").joinpath("messages.bin").read_bytes()
)
_pool = descriptor_pool.DescriptorPool()
for _file in _files.file:
    _pool.Add(_file)


def _class(name: str) -> Any:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"mint_engine.wire.{name}"))


Tensor = _class("Tensor")
ForwardBackwardRequest = _class("ForwardBackwardRequest")
ForwardBackwardOutput = _class("ForwardBackwardOutput")
SampleResponse = _class("SampleResponse")

# enum DType, enum StopReason
FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
STOP, LENGTH = 0, 1


def parse(message_class: Any, body: bytes) -> Any:
    """A message from its bytes. Raises WireError for bytes that are none, or that are made to fill the memory."""
    check_structure(body, message_class.DESCRIPTOR)
    try:
        return message_class.FromString(body)
    except DecodeError:
        raise WireError(
            f"body: expected a protobuf {message_class.DESCRIPTOR.name}, got {len(body)} other bytes"
        ) from None
