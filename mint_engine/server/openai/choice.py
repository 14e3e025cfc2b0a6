"""One sample on its way to the client: its text, its tokens, its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mint_engine.server.openai.detokenize import TextStream
from mint_engine.server.openai.stop_strings import StopStrings

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """A token as the engine sampled it; ``top`` are the alternatives, most likely first.

    ``logprob`` None: nothing was there to predict it (the first token of a prompt).
    """

    id: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class PlacedToken:
    """A token and the character of the text at which it begins."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Piece:
    """What a sample has new: text, the tokens that text came from, and why it ended, once it has."""

    text: str = ""
    tokens: Sequence[PlacedToken] = ()
    finish_reason: FinishReason | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.finish_reason)


@dataclass
class _Group:
    """Tokens that became text together: those of one character, or one token."""

    start: int
    end: int
    tokens: list[Token]


@dataclass
class Choice:
    """Turns tokens into pieces. The pieces put together are the answer, however often the tokens were handed over.

    As in OpenAI's API, what ends a sample is not part of it: neither the end-of-sequence token nor a stop string, nor
    the log-probabilities of tokens that only a stop string came from. (The SDK protocol's samples do include them.) A
    token that a stop string cuts in two is listed whole.
    """

    text: TextStream
    start: int = 0  # where the text begins, for the offsets of its tokens
    stops: Sequence[str] = ()
    eos: frozenset[int] = frozenset()
    max_tokens: int | None = None
    count: int = 0  # tokens sampled, those that ended the sample included
    finished: bool = False
    _groups: list[_Group] = field(default_factory=list)
    _unread: list[Token] = field(default_factory=list)  # no text has come of these yet
    _length: int = 0  # characters decoded
    _emitted: int = 0  # characters let out

    def __post_init__(self) -> None:
        self._stop_strings = StopStrings(self.stops)

    def push(self, token: Token) -> Piece:
        """The next token. Once the sample has ended, further ones are ignored."""
        if self.finished:
            return Piece()
        self.count += 1
        if token.id in self.eos:
            return self.finish("stop")
        self._unread.append(token)
        new = self.text.push(token.id)
        if new:
            self._groups.append(_Group(self._length, self._length + len(new), self._unread))
            self._length, self._unread = self._length + len(new), []
        out, stopped = self._stop_strings.push(new)
        self._emitted += len(out)
        if stopped:
            self.finished = True
            return Piece(out, self._release(lambda group: group.start < self._emitted), "stop")
        if self.count == self.max_tokens:
            return self.finish("length", before=out)
        return Piece(out, self._release(lambda group: group.end <= self._emitted))

    def finish(self, reason: FinishReason, *, before: str = "") -> Piece:
        """Nothing more comes: let out what was held back. Empty if the sample had ended already."""
        if self.finished:
            return Piece()
        self.finished = True
        text = before + self._stop_strings.flush()
        self._groups.append(_Group(self._length, self._length, self._unread))
        return Piece(text, self._release(lambda group: True), reason)

    def _release(self, ready: Callable[[_Group], bool]) -> list[PlacedToken]:
        released: list[PlacedToken] = []
        while self._groups and ready(self._groups[0]):
            group = self._groups.pop(0)
            released += [PlacedToken(token, self.start + group.start) for token in group.tokens]
        return released
