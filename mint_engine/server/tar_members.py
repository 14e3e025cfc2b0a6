"""Reading a tar.gz that somebody else made, without believing anything it says.

Nothing is extracted here. Python's tarfile is not used: it follows sizes in extended headers into memory, and knows
links, devices and sparse files. We read regular files, and refuse the rest by name.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from mint_engine.errors import UserError

_BLOCK = 512
_CHUNK = 1 << 16
_MAX_EXTENDED_HEADER = 1 << 16
_MAX_HEADERS = 256
_GZIP = 31  # zlib's name for "a gzip stream with the largest window"
_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device",
    b"6": "a named pipe", b"S": "a sparse file", b"K": "a link with a long name",
}  # fmt: skip


class Gunzip:
    """A gzip file's content, at most `limit` bytes of it.

    Raises:
        UserError: it is not gzip, is damaged or cut short, or holds more than `limit` bytes.
    """

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._limit = file, limit
        self._inflate = zlib.decompressobj(_GZIP)
        self._pending, self._count = b"", 0

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, or fewer at the end."""
        parts: list[bytes] = []
        while size > 0 and (data := self._some(min(size, _CHUNK))):
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def _some(self, size: int) -> bytes:
        while True:
            if self._inflate.eof and not self._next_member():
                return b""
            compressed = self._pending or self._file.read(_CHUNK)
            try:
                data = self._inflate.decompress(compressed, size)
            except zlib.error as error:
                raise UserError(f"file: expected a tar.gz, got something else or a damaged one ({error})") from None
            self._pending = self._inflate.unconsumed_tail
            self._count += len(data)
            if self._count > self._limit:
                raise UserError(f"file: expected at most {self._limit} bytes unpacked, got more")
            if data:
                return data
            if not compressed and not self._inflate.eof:
                raise UserError("file: the tar.gz is cut short")

    def _next_member(self) -> bool:
        """gzip files may be several behind one another, and may be padded with zeros."""
        rest = self._inflate.unused_data
        while (rest := rest.lstrip(b"\0")) == b"":
            rest = self._file.read(_CHUNK)
            if not rest:
                return False
        self._inflate, self._pending = zlib.decompressobj(_GZIP), rest
        return True


@dataclass
class Member:
    """A regular file. `chunks` must be read before the next member is asked for, or is skipped."""

    name: str
    size: int
    _stream: Gunzip
    _left: int = field(init=False)

    def __post_init__(self) -> None:
        self._left = self.size

    def chunks(self) -> Iterator[bytes]:
        while self._left > 0:
            data = self._stream.read(min(self._left, _CHUNK))
            if not data:
                raise UserError(f"file: the archive ends inside {self.name!r}")
            self._left -= len(data)
            yield data

    def content(self, limit: int) -> bytes:
        """All of it. Raises UserError if it is more than `limit` bytes."""
        if self.size > limit:
            raise UserError(f"file: {self.name!r}: expected at most {limit} bytes, got {self.size}")
        return b"".join(self.chunks())

    def skip(self) -> None:
        for _ in self.chunks():
            pass
        self._stream.read(-self.size % _BLOCK)


def members(stream: Gunzip) -> Iterator[Member]:
    """The regular files of a tar, in order. Directories are passed over.

    Raises:
        UserError: a link, a device or anything else that is not a file; a damaged header; too many members.
    """
    long_name: str | None = None
    for _ in range(_MAX_HEADERS):
        header = stream.read(_BLOCK)
        if not header or header.count(0) == _BLOCK:
            while stream.read(_CHUNK):  # to the gzip's own end, where its checksum is
                pass
            return
        if len(header) < _BLOCK:
            raise UserError("file: the archive is cut short")
        kind = header[156:157]
        member = Member(long_name or _name(header), _size(header), stream)
        if kind in (b"x", b"g"):
            path = _pax_path(member.content(_MAX_EXTENDED_HEADER))
            long_name = path if kind == b"x" and path else long_name
        elif kind == b"L":
            long_name = _text(member.content(_MAX_EXTENDED_HEADER).rstrip(b"\0"))
        else:
            long_name = None
            directory = kind == b"5" or (kind in b"\0" and member.name.endswith("/"))
            if not directory and kind not in (b"0", b"\0", b"7"):
                what = _KINDS.get(kind, f"of the kind {kind!r}")
                raise UserError(f"file: {member.name!r} is {what}; expected regular files only")
            if directory and member.size:
                raise UserError(f"file: {member.name!r} is a directory with content")
            if not directory:
                yield member
        member.skip()
    raise UserError(f"file: expected an archive of at most {_MAX_HEADERS} members, got more")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"file: expected names in UTF-8, got {name[:100]!r}") from None


def _size(header: bytes) -> int:
    """Checks the header's checksum, too."""
    checksum = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    if _octal(header[148:156]) != checksum:
        raise UserError("file: not a tar archive inside the gzip, or a damaged one (a header's checksum is wrong)")
    return _octal(header[124:136])


def _octal(field_: bytes) -> int:
    text = field_.strip(b" \0")
    if not text:
        return 0
    if not all(c in b"01234567" for c in text):  # sizes from 8 GiB are written in another way: far above any limit
        raise UserError("file: a damaged tar header, or a member of more than 8 GiB")
    return int(text, 8)


def _pax_path(data: bytes) -> str | None:
    """The `path` of a pax extended header: records `<length> <key>=<value>\\n`."""
    path = None
    while data:
        length_text, space, _ = data[:20].partition(b" ")
        if not space or not length_text.isdigit() or not 5 <= (length := int(length_text)) <= len(data):
            raise UserError("file: a damaged extended tar header")
        key, _, value = data[len(length_text) + 1 : length - 1].partition(b"=")
        data = data[length:]
        if key == b"path":
            path = _text(value)
        elif key in (b"size", b"linkpath") or key.startswith(b"GNU.sparse"):
            raise UserError(f"file: an extended tar header with {key.decode()!r}; expected plain regular files")
    return path
