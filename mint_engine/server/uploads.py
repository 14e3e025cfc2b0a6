"""An uploaded PEFT adapter: from the bytes of a stranger's tar.gz to a directory that is safe to read.

`unpack` writes two files and no others, whatever the archive says; `check_safetensors` reads the model file's header
before anybody reads the file. What the adapter means is `adopt.py`'s business.
"""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from mint_engine.checkpoint import ADAPTER_CONFIG, ADAPTER_MODEL
from mint_engine.errors import UserError
from mint_engine.server.tar_members import Gunzip, Member, members

_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 16 << 20
_MAX_TENSORS = 100_000
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}

# What PEFT, trainers and this server's own archives put beside an adapter. None of it is needed here.
_IGNORED = {
    "README.md", "LICENSE", "checkpoint_complete", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "generation_config.json", "trainer_state.json", ".gitattributes", ".DS_Store",
}  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")


def unpack(file: BinaryIO, directory: Path, *, max_bytes: int) -> int:
    """Write `adapter_config.json` and `adapter_model.safetensors` of a tar.gz into `directory`.

    Both must be in one folder of the archive, once each. Nothing is ever written under a name from the archive.

    Args:
        max_bytes: of everything in the archive, unpacked.

    Returns: bytes written.

    Raises:
        UserError: anything else is in it, it is damaged, or it is larger than `max_bytes`.
    """
    folders: set[str] = set()
    sizes: dict[str, int] = {}
    for member in members(Gunzip(file, max_bytes)):
        path = _checked_path(member.name)
        if path.name in sizes:
            raise UserError(f"file: {path.name} is in the archive twice")
        if path.name == ADAPTER_CONFIG:
            (directory / ADAPTER_CONFIG).write_bytes(member.content(_MAX_CONFIG_BYTES))
        elif path.name == ADAPTER_MODEL:
            _write(member, directory / ADAPTER_MODEL)
        else:
            _check_ignored(path)
            continue
        folders.add(str(path.parent))
        sizes[path.name] = member.size
    for name in (ADAPTER_CONFIG, ADAPTER_MODEL):
        if name not in sizes:
            raise UserError(f"file: expected an archive with {ADAPTER_CONFIG} and {ADAPTER_MODEL}; it lacks {name}")
    if len(folders) > 1:
        raise UserError(f"file: expected one adapter, got files of several folders: {', '.join(sorted(folders))}")
    return sum(sizes.values())


def _write(member: Member, path: Path) -> None:
    with open(path, "wb") as out:
        for chunk in member.chunks():
            out.write(chunk)


def _checked_path(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
        raise UserError(f"file: expected relative names without '..', got {name[:200]!r}")
    return path


def _check_ignored(path: PurePosixPath) -> None:
    if path.name in _IGNORED or path.name.startswith("._"):  # "._": what macOS adds
        return
    if path.suffix in _PICKLES:
        raise UserError(f"file: {str(path)!r} may be pickled, and pickles are never read here: leave it out")
    raise UserError(
        f"file: {str(path)!r} does not belong to a PEFT adapter: expected {ADAPTER_CONFIG} and {ADAPTER_MODEL}"
    )


def read_config(directory: Path) -> dict[str, Any]:
    """`adapter_config.json`. Raises UserError if it is not a JSON object."""
    try:
        value = json.loads((directory / ADAPTER_CONFIG).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{ADAPTER_CONFIG}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{ADAPTER_CONFIG}: expected a JSON object, got {type(value).__name__}")
    return value


def check_safetensors(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file, by name, after checking that its header tells the truth about the file.

    Raises:
        UserError: sizes, offsets, types or names that do not agree with each other or with the file.
    """

    def problem(text: str) -> UserError:
        return UserError(f"{path.name}: {text}")

    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise problem(f"not a safetensors file: a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise problem("not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
        raise problem("not a safetensors file: its header is no list of tensors")
    header.pop("__metadata__", None)
    shapes: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        try:
            shape, (begin, end), width = tuple(entry["shape"]), entry["data_offsets"], _WIDTHS[entry["dtype"]]
            counts = (*shape, begin, end)
        except (KeyError, TypeError, ValueError):
            types = ", ".join(_WIDTHS)
            raise problem(f"{name[:200]!r}: expected a tensor of {types}, got {str(entry)[:200]}") from None
        if not all(type(n) is int and 0 <= n < 2**48 for n in counts) or len(shape) > 8:
            raise problem(f"{name[:200]!r}: damaged: {str(entry)[:200]}")
        if end - begin != width * math.prod(shape):
            raise problem(f"{name[:200]!r}: {end - begin} bytes do not hold {entry['dtype']} {list(shape)}")
        shapes[name] = shape
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise problem("its tensors overlap or leave gaps")
        position = end
    if position != size - 8 - length:
        raise problem(f"expected {position} bytes of tensors, got {size - 8 - length}")
    return shapes
