"""The message classes: what is committed is what messages.proto says, and a process may hold the SDK's messages too."""

from __future__ import annotations

import pytest
from compile_messages import FOLDER, compiled
from google.protobuf import descriptor_pb2, descriptor_pool

from mint_engine.wire import WireError, messages


def test_the_committed_descriptor_is_that_of_the_proto_file():
    committed = descriptor_pb2.FileDescriptorSet.FromString((FOLDER / "messages.bin").read_bytes())
    assert committed == descriptor_pb2.FileDescriptorSet.FromString(compiled())


def test_our_messages_are_in_nobody_elses_way():
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("mint_engine.wire.Tensor")


def test_bytes_that_are_no_message_are_refused_with_a_sentence():
    with pytest.raises(WireError, match="expected a protobuf SampleResponse, got 3 other bytes"):
        messages.parse(messages.SampleResponse, b"\xff\xff\xff")
