"""Sampled tokens to text, one at a time: what has been said is never taken back.

A character may span tokens. Its bytes wait until it is whole, so no replacement character is ever emitted for one that
is merely unfinished; what is left unfinished when a sample ends is left out of the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
_CONTEXT = 6  # tokens of what came before that a decoder may need to see: word joining looks one or two back
_LONGEST = 16  # tokens one character may span before it is taken for broken bytes


class TextStream(Protocol):
    """The text of one sample."""

    def push(self, token: int) -> str:
        """What ``token`` adds to the text: often a word, "" inside a character."""


class ByteStream:
    """For vocabularies whose tokens are bytes: exact, whatever the model samples."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._bytes_of(token))


class DecodedStream:
    """For any other tokenizer: the difference that one more token makes to the decoded text.

    ``context``: the tokens before the sample, so that a word that continues the prompt keeps its space.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int]) -> None:
        self._decode = decode
        self._tokens = list(context[-_CONTEXT:])
        self._said = decode(self._tokens)
        self._waiting = 0

    def push(self, token: int) -> str:
        self._tokens.append(token)
        self._waiting += 1
        text = self._decode(self._tokens)
        if text.endswith(REPLACEMENT) and self._waiting < _LONGEST:
            return ""
        new = text[len(self._said) :]
        self._tokens = self._tokens[-_CONTEXT:]
        self._said, self._waiting = self._decode(self._tokens), 0
        return new
