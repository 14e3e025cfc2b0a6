"""A tokenizer as this face needs it: text in, token by token out, and the bytes a token stands for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mint_engine.server.openai.detokenize import ByteStream, DecodedStream, TextStream
from mint_engine.server.openai.fields import sendable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_LEVEL = {"ByteLevel", "Fuse"}
_SENTENCEPIECE = {"Metaspace", "ByteFallback", "Replace", "Fuse", "Strip"}
_SPACE = "▁"


class Vocabulary:
    """Shared by all requests for a base model, from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Setting up truncation mutates a tokenizer, and a second thread in it then fails with "Already borrowed".
        self._lock = threading.Lock()
        self._added = {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special | set(tokenizer.all_special_ids)
        self._to_bytes = _byte_rule(tokenizer)
        self._size = len(tokenizer)
        self._cache: dict[int, bytes | None] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        sendable(text)
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token: a text needs at least its length over this many tokens."""
        return max((len(token) for token in self.tokenizer.get_vocab()), default=1)

    @property
    def beginning(self) -> int | None:
        """The token a text without a prompt begins after."""
        first = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if first is None else first

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """The text of a sample that follows the tokens ``context``. Special tokens have no text."""
        if self._to_bytes is None:
            return DecodedStream(self._decode, context)
        return ByteStream(lambda token: b"" if token in self._special else self.token_bytes(token) or b"")

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes ``token`` stands for, special ones by their name. None: this tokenizer cannot say."""
        if token in self._cache:
            return self._cache[token]
        found = self._bytes_of(token)
        if token < self._size:  # an id from outside may be any number: what is kept has an end
            self._cache[token] = found
        return found

    def token_string(self, token: int, *, prefix: str = "") -> str:
        """A token for display. Part of a character is shown as its bytes, ``prefix`` and ``\\xe2\\x82``."""
        raw = self.token_bytes(token)
        if raw is None:
            return str(self.tokenizer.decode([token]))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in raw)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _bytes_of(self, token: int) -> bytes | None:
        if token in self._added:
            return self._added[token].encode()
        name: Any = self.tokenizer.convert_ids_to_tokens(token)
        if name is None:  # models pad their vocabulary: such a token stands for nothing
            return b""
        return self._to_bytes(name) if self._to_bytes is not None else None


def _byte_rule(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes] | None:
    """How a token's name becomes bytes, from the tokenizer's own decoder; None if it is none of those we know."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    kinds = _kinds(json.loads(decoder.__getstate__()))
    if "ByteLevel" in kinds and kinds <= _BYTE_LEVEL:
        return _byte_level
    if kinds & {"Metaspace", "ByteFallback"} and kinds <= _SENTENCEPIECE:
        return _sentencepiece
    return None


def _kinds(decoder: dict[str, Any]) -> set[str]:
    if decoder["type"] == "Sequence":
        return set().union(*(_kinds(part) for part in decoder["decoders"]))
    if decoder["type"] == "Replace" and (decoder["pattern"], decoder["content"]) != ({"String": _SPACE}, " "):
        return {"Replace of something else"}
    return {decoder["type"]}


def _alphabet() -> dict[str, int]:
    """GPT-2's names for bytes: printable ones are themselves, the others the code points from 256 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _alphabet()


def _byte_level(name: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in name)
    except KeyError:
        return name.encode()


def _sentencepiece(name: str) -> bytes:
    # The decoder would drop the space at the beginning of a text; a sample is never at the beginning of one.
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        try:
            return bytes([int(name[3:5], 16)])
        except ValueError:
            pass
    return name.replace(_SPACE, " ").encode()
