"""The tokenizer of a model that lives on a server: from the Hugging Face cache, else from the server."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from mint_engine.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_BYTES = 256 * 2**20  # of all files, unpacked
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.(json|jinja|model|txt)")


def cached_directory(base_model: str) -> Path | None:
    """Where this machine has the model's tokenizer already, if it has: a directory, or Hugging Face's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from mint_engine.models.tokenizer import VOCABULARIES

    directory = Path(base_model)
    if directory.is_absolute() and any((directory / name).is_file() for name in VOCABULARIES):
        return directory
    try:
        found = [try_to_load_from_cache(base_model, name) for name in ("tokenizer_config.json", *VOCABULARIES)]
    except HFValidationError:  # no name of the hub
        return None
    config, *vocabularies = [Path(path) if isinstance(path, str) else None for path in found]
    return config.parent if config is not None and any(vocabularies) else None


def unpack(archive: bytes, base_model: str, home: Path | None = None) -> Path:
    """The directory of a tokenizer that the server sent as a zip or tar. Kept under `home`, named by its content.

    Only plain files whose names look like a tokenizer's are taken; nothing in them is ever run.

    Raises:
        ModelError: it is no such archive.
    """
    root = home or Path(os.environ.get("MINT_HOME") or Path.home() / ".mint-engine").expanduser()
    directory = root / "tokenizers" / hashlib.sha256(archive).hexdigest()[:32]
    if directory.is_dir():
        return directory
    try:
        files = _members(archive)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise ModelError(f"base_model: the server's tokenizer of {base_model!r} cannot be read: {error}") from error
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", dir=directory.parent))
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        temporary.replace(directory)
    except OSError:
        if not directory.is_dir():  # somebody else was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _members(archive: bytes) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    room = MOST_BYTES
    if archive[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(archive)) as bundle:
            for entry in bundle.infolist():
                if _NAME.fullmatch(entry.filename):
                    with bundle.open(entry) as source:
                        files[entry.filename] = source.read(room + 1)
                    room -= len(files[entry.filename])
                _check_room(room)
    else:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r|*") as tar:
            for member in tar:
                if member.isfile() and _NAME.fullmatch(member.name):
                    stream = tar.extractfile(member)
                    assert stream is not None, "a regular file has content"
                    files[member.name] = stream.read(room + 1)
                    room -= len(files[member.name])
                _check_room(room)
    if not files:
        raise ValueError("there is no tokenizer file in it")
    return files


def _check_room(room: int) -> None:
    if room < 0:
        raise ValueError(f"it is larger than {MOST_BYTES} bytes")


def load(directory: Path) -> PreTrainedTokenizerBase:
    from mint_engine.models.tokenizer import load_tokenizer

    return load_tokenizer(directory)


def from_hub(base_model: str) -> PreTrainedTokenizerBase:
    """From Hugging Face's hub, as the SDKs do.

    Raises:
        ModelError: it has none of that name.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
        raise ModelError(
            f"base_model: neither the server nor the hub has a tokenizer of {base_model!r}: {error}"
        ) from error
