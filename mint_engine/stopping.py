"""When a sample ends. Generation stops at a whole token, and what ended it stays in the output (wire-protocol 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mint_engine.types import SamplingParams


@dataclass(frozen=True)
class StopRule:
    """Ends a sample at any of ``token_ids``, or when the text of its tokens contains any of ``strings``."""

    token_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] | None = None

    @classmethod
    def of(cls, params: SamplingParams, eos: Sequence[int], decode: Callable[[list[int]], str]) -> StopRule:
        """The rule of a request. End-of-sequence tokens always stop, unless ``stop=[]`` says that nothing does."""
        if params.stop == []:
            return cls()
        return cls(frozenset([*eos, *params.stop_token_ids]), tuple(params.stop_strings), decode)

    def reached(self, tokens: list[int]) -> bool:
        """True if the last of ``tokens`` (at least one) completes a stop. To be asked after every token."""
        if tokens[-1] in self.token_ids:
            return True
        if not self.strings or self.decode is None:
            return False
        # Every token but a special one adds at least one byte, so a string that ends now began in this window; a few
        # tokens more keep a character that spans tokens whole.
        window = max(len(s.encode()) for s in self.strings) + 4
        text = self.decode(tokens[-window:])
        return any(s in text for s in self.strings)
