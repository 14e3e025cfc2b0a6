"""`ModelInput`: what a model reads, as chunks of token ids laid end to end."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import field_validator

from mint_engine.types.base import RequestModel


def token_list(tokens: Any, where: str = "tokens") -> list[int]:
    """Token ids as a list of Python ints, from any sequence, numpy array or tensor of integers.

    Raises ValueError for anything else. Ranges are the engine's to check: it knows the vocabulary.
    """
    if isinstance(tokens, (str, bytes, Mapping)) or hasattr(tokens, "input_ids"):
        hint = "; encode it with the tokenizer" if isinstance(tokens, str) else "; pass its ['input_ids']"
        raise ValueError(f"{where}: expected a list of token ids, got {type(tokens).__name__}{hint}")
    if hasattr(tokens, "tolist"):
        tokens = tokens.tolist()
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        raise ValueError(f"{where}: expected a flat list of integer token ids ({error})") from None


class EncodedTextChunk(RequestModel):
    """A run of token ids. `tokens`: integers (any sequence, numpy array or tensor)."""

    tokens: list[int]
    type: Literal["encoded_text"] = "encoded_text"

    @field_validator("tokens", mode="before")
    @classmethod
    def _as_ints(cls, value: Any) -> list[int]:
        return token_list(value)

    @property
    def length(self) -> int:
        return len(self.tokens)


ModelInputChunk: TypeAlias = EncodedTextChunk


class ModelInput(RequestModel):
    """A sequence of chunks, read as one sequence of tokens. Text only: there are no image or audio chunks."""

    chunks: list[EncodedTextChunk]

    @field_validator("chunks", mode="before")
    @classmethod
    def _text_only(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"chunks: expected a list of EncodedTextChunk, got {type(value).__name__}")
        for i, chunk in enumerate(value):
            kind = chunk.get("type", "encoded_text") if isinstance(chunk, Mapping) else getattr(chunk, "type", None)
            if kind != "encoded_text":
                raise ValueError(
                    f"chunks[{i}]: expected an encoded_text chunk, got {kind or type(chunk).__name__}: "
                    "image and audio inputs are not supported"
                )
        return list(value)

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        """A single chunk of token ids."""
        return cls(chunks=[EncodedTextChunk(tokens=tokens)])  # type: ignore[arg-type]  # the validator makes a list

    @classmethod
    def of_tokens(cls, tokens: list[int]) -> ModelInput:
        """As `from_ints`, of a list of Python ints: it is neither checked nor copied."""
        return cls.model_construct(chunks=[EncodedTextChunk.model_construct(tokens=tokens)])

    @classmethod
    def empty(cls) -> ModelInput:
        return cls(chunks=[])

    def append(self, chunk: EncodedTextChunk) -> ModelInput:
        """A new input with one more chunk."""
        return ModelInput(chunks=[*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """A new input with one more token."""
        return self.append(EncodedTextChunk(tokens=[token]))

    def to_ints(self) -> list[int]:
        """All token ids, chunk after chunk."""
        return [token for chunk in self.chunks for token in chunk.tokens]

    def token_array(self) -> np.ndarray:
        """All token ids, int64 [N]. Raises OverflowError for an id beyond 64 bits."""
        return np.array(self.to_ints(), dtype=np.int64)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(chunk.length for chunk in self.chunks)
