"""What is taken out of an uploaded archive, and what is refused before anybody reads it."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import archives
import pytest
import torch
from archives import CONFIG, MODEL, tar_gz, tar_gz_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_engine.errors import UserError
from mint_engine.server.tar_members import Gunzip, members
from mint_engine.server.uploads import check_safetensors, unpack

_MODEL_BYTES = archives.model({"a": torch.ones(2, 3)})
_GOOD = {CONFIG: b"{}", MODEL: _MODEL_BYTES}


def _unpack(archive: bytes, directory: Path, max_bytes: int = 1 << 20) -> list[str]:
    unpack(io.BytesIO(archive), directory, max_bytes=max_bytes)
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "my-adapter/", f"{'long' * 30}/"])
def test_an_adapter_is_unpacked_whatever_tar_wrote_it(tmp_path: Path, format: int, prefix: str) -> None:
    archive = tar_gz({prefix + name: content for name, content in _GOOD.items()}, format=format)
    assert _unpack(archive, tmp_path) == [CONFIG, MODEL]
    assert (tmp_path / MODEL).read_bytes() == _MODEL_BYTES


def test_what_the_tar_program_packs_from_a_peft_directory_is_unpacked(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name, content in {**_GOOD, "README.md": b"# hello", "tokenizer.json": b"{}"}.items():
        (source / name).write_bytes(content)
    archive = subprocess.run(["tar", "-czf", "-", "-C", str(source), "."], check=True, capture_output=True).stdout
    assert _unpack(archive, target) == [CONFIG, MODEL]


def test_only_the_two_files_are_ever_written(tmp_path: Path) -> None:
    archive = tar_gz({**_GOOD, "README.md": b"x", "._README.md": b"x", "checkpoint_complete": b""})
    assert _unpack(archive, tmp_path) == [CONFIG, MODEL]


def _link(kind: bytes, name: str = MODEL) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("archive", "says"),
    [
        (tar_gz({**_GOOD, "../evil": b"x"}), r"'\.\.'"),
        (tar_gz({**_GOOD, "a/../../adapter_config.json": b"x"}), r"'\.\.'"),
        (tar_gz({**_GOOD, "/etc/cron.d/evil": b"x"}), "relative"),
        (tar_gz({**_GOOD, "a\\b": b"x"}), "relative"),
        (tar_gz({**_GOOD, "evil\nname": b"x"}), "relative"),
        (tar_gz_of(_link(tarfile.SYMTYPE)), "a symbolic link"),
        (tar_gz_of(_link(tarfile.LNKTYPE)), "a hard link"),
        (tar_gz_of(_link(tarfile.CHRTYPE)), "a character device"),
        (tar_gz_of(_link(tarfile.BLKTYPE)), "a block device"),
        (tar_gz_of(_link(tarfile.FIFOTYPE)), "a named pipe"),
        (tar_gz_of(_link(b"S")), "sparse"),
        (tar_gz_of(_link(b"V")), "of the kind"),
        (tar_gz({**_GOOD, "training_args.bin": b"\x80\x04"}), "never read"),
        (tar_gz({**_GOOD, "optimizer.pt": b"\x80\x04"}), "never read"),
        (tar_gz({**_GOOD, "modeling.py": b"import os"}), "does not belong"),
        (tar_gz({**_GOOD, "optimizer.safetensors": b""}), "does not belong"),
        (tar_gz([*_GOOD.items(), (CONFIG, b"{}")]), "twice"),
        (tar_gz({f"a/{CONFIG}": b"{}", f"b/{MODEL}": _MODEL_BYTES}), "one adapter"),
        (tar_gz({CONFIG: b"{}"}), f"lacks {MODEL}"),
        (tar_gz({MODEL: _MODEL_BYTES}), f"lacks {CONFIG}"),
        (tar_gz({}), "lacks"),
        (tar_gz({CONFIG: b" " * (2 << 20), MODEL: _MODEL_BYTES}), "at most"),
        (tar_gz({f"{i}/README.md": b"" for i in range(400)}), "members"),
        (b"", "cut short"),
        (b"not a gzip file", "tar.gz"),
        (gzip.compress(b"not a tar" * 100), "tar"),
        (tar_gz(_GOOD)[:-20], "cut short"),
        (tar_gz(_GOOD)[:40], "cut short"),
    ],
    # Not the archives themselves: their time of making would name the tests differently in each process.
    ids=lambda value: value if isinstance(value, str) else "archive",
)  # fmt: skip
def test_a_hostile_archive_is_refused_by_name(tmp_path: Path, archive: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        _unpack(archive, tmp_path, max_bytes=8 << 20)
    assert {path.name for path in tmp_path.iterdir()} <= {CONFIG, MODEL}


def test_an_archive_cut_anywhere_is_refused(tmp_path: Path) -> None:
    archive = tar_gz(_GOOD)
    for end in range(len(archive)):
        with pytest.raises(UserError):
            _unpack(archive[:end], tmp_path)


def test_a_bomb_is_refused_without_its_size_in_memory_or_on_disk(tmp_path: Path) -> None:
    size = 256 << 20
    info = tarfile.TarInfo(MODEL)
    info.size = size
    compressor = gzip.compress(info.tobuf() + bytes(size), compresslevel=1)
    assert len(compressor) < size // 100
    tracemalloc.start()
    with pytest.raises(UserError, match="at most 1048576 bytes unpacked"):
        _unpack(compressor, tmp_path, max_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1 << 20


@pytest.mark.parametrize("kind", [b"x", b"g", b"L"])
def test_an_extended_header_that_claims_gigabytes_is_not_read(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, 4 << 30
    with pytest.raises(UserError, match="at most 65536 bytes"):
        _unpack(gzip.compress(info.tobuf(tarfile.GNU_FORMAT)), tmp_path)


@pytest.mark.parametrize("key", ["size", "linkpath", "GNU.sparse.size"])
def test_an_extended_header_cannot_change_what_a_member_is(tmp_path: Path, key: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT, pax_headers={key: "7"}) as tar:
        tar.addfile(tarfile.TarInfo(CONFIG), io.BytesIO())
    with pytest.raises(UserError, match="extended tar header"):
        _unpack(buffer.getvalue(), tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2000), st.booleans())
def test_whatever_bytes_come_only_a_user_error_is_raised(data: bytes, wrap: bool) -> None:
    try:
        for member in members(Gunzip(io.BytesIO(gzip.compress(data) if wrap else data), 1 << 16)):
            member.content(1 << 16)
    except UserError:
        pass


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_archive_gives_a_user_error_or_the_same_names(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in _GOOD.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    raw = bytearray(buffer.getvalue())
    raw[data.draw(st.integers(0, 1023))] = data.draw(st.integers(0, 255))
    try:
        names = [m.name for m in members(Gunzip(io.BytesIO(gzip.compress(bytes(raw))), 1 << 20))]
    except UserError:
        return
    assert set(names) <= {CONFIG, MODEL}


def test_gzip_files_behind_one_another_and_padding_are_read_through(tmp_path: Path) -> None:
    plain = gzip.decompress(tar_gz(_GOOD))
    halves = gzip.compress(plain[:700]) + gzip.compress(plain[700:]) + bytes(1000)
    assert _unpack(halves, tmp_path) == [CONFIG, MODEL]


# ---- safetensors -----------------------------------------------------------------------------------------------------


def _file(tmp_path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def _tensor(begin: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_the_shapes_of_an_honest_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(archives.model({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}))
    assert check_safetensors(path) == {"a": (2, 3), "b": (4,)}


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"", b""),
        (b"[" * 100_000, b""),
        (b'{"a":' * 50_000, b""),
        (b"not json", b""),
        ([1, 2], b""),
        ({"a": 1}, b""),
        ({"a": {"dtype": "F32"}}, bytes(8)),
        ({"a": _tensor(dtype="I64")}, bytes(8)),
        ({"a": _tensor(dtype=["F32"])}, bytes(8)),
        ({"a": _tensor(shape=[3])}, bytes(8)),
        ({"a": _tensor(shape=[-2])}, bytes(8)),
        ({"a": _tensor(shape=[2.0])}, bytes(8)),
        ({"a": _tensor(shape=[True, 2])}, bytes(8)),
        ({"a": _tensor(shape=[2**62, 2**62])}, bytes(8)),
        ({"a": _tensor(shape=[0] * 1000, end=0)}, b""),
        ({"a": _tensor(shape="22")}, bytes(8)),
        ({"a": _tensor(end=16, shape=[4])}, bytes(8)),
        ({"a": _tensor()}, bytes(9)),
        ({"a": _tensor(), "b": _tensor()}, bytes(8)),
        ({"a": _tensor(), "b": _tensor(12, 20)}, bytes(20)),
        ({"a": _tensor(-8, 0)}, b""),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, body: bytes) -> None:
    with pytest.raises(UserError, match=r"x\.safetensors"):
        check_safetensors(_file(tmp_path, header, body))


@pytest.mark.parametrize("length", [0, 1, 10_000, 2**63])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(UserError, match="header"):
        check_safetensors(_file(tmp_path, {}, b"", length))


def test_a_pickle_under_another_name_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match="not a safetensors file"):
        check_safetensors(path)
