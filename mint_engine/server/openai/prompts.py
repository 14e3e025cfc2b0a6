"""The prompts of a completion: read as tokens, and echoed with their scores."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from mint_engine.errors import UserError
from mint_engine.server.openai.choice import PlacedToken, Token
from mint_engine.server.openai.completion_request import CompletionRequest
from mint_engine.server.openai.generation import Prompt
from mint_engine.server.openai.serving import Served
from mint_engine.server.openai.vocabulary import Vocabulary
from mint_engine.types import SampleResponse


def read_prompts(body: CompletionRequest, served: Served) -> list[Prompt]:
    """The prompts as tokens, with their texts. An empty one is the beginning of a document."""
    vocabulary, prompts = served.vocabulary, []
    for i, prompt in enumerate(body.prompt):
        if isinstance(prompt, str):
            tokens = served.encode(prompt, reserve=body.tokens, param="prompt")
            if not tokens and vocabulary.beginning is None:
                raise UserError("prompt: expected at least one token: the model has none that begins a document")
            prompts.append(Prompt(tokens or [vocabulary.beginning or 0], prompt))
        else:
            served.check_length(len(prompt), reserve=body.tokens, param="prompt")
            served.check_tokens(prompt, param="prompt", where=f"prompt {i}")
            prompts.append(Prompt(prompt, _text(prompt, vocabulary)))
    return prompts


def scored_prompt(prompt: Prompt, response: SampleResponse, vocabulary: Vocabulary) -> list[PlacedToken]:
    """The tokens of a prompt with their scores and places. The first has no score: nothing comes before it."""
    scores = response.prompt_logprobs or [None] * len(prompt.tokens)
    tops = response.topk_prompt_logprobs or [None] * len(prompt.tokens)
    read = codecs.getincrementaldecoder("utf-8")("replace")
    placed: list[PlacedToken] = []
    at = 0
    for token, score, top in zip(prompt.tokens, scores, tops, strict=True):
        placed.append(PlacedToken(Token(token, score, top or ()), at))
        raw = vocabulary.token_bytes(token)
        if spelling := vocabulary.token_string(token) if raw is None else read.decode(raw):
            at = _after(prompt.text, at, spelling)
    return placed


def _text(tokens: Sequence[int], vocabulary: Vocabulary) -> str:
    reader = vocabulary.stream()
    return "".join(reader.push(token) for token in tokens)


def _after(text: str, at: int, spelling: str) -> int:
    """Where the text goes on behind a token. One that is not in the text (a beginning-of-sequence token that was added)
    does not move on; a space that the tokenizer put before the first word is not there either."""
    for found in (spelling, spelling.removeprefix(" ")):
        if found and text.startswith(found, at):
            return at + len(found)
    return at
