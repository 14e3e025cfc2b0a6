"""Compiles mint_engine/wire/messages.proto into messages.bin: `python tests/wire/compile_messages.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

FOLDER = Path(__file__).resolve().parents[2] / "mint_engine" / "wire"


def compiled() -> bytes:
    """The serialized FileDescriptorSet of messages.proto as it is now, without comments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        code = protoc.main(["protoc", f"-I{FOLDER}", f"--descriptor_set_out={out}", str(FOLDER / "messages.proto")])
        assert code == 0, "protoc refused messages.proto"
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    return files.SerializeToString(deterministic=True)


if __name__ == "__main__":
    (FOLDER / "messages.bin").write_bytes(compiled())
