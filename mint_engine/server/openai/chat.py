"""POST chat/completions: the assistant's next turn."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.openai.chat_request import ChatRequest
from mint_engine.server.openai.chat_template import render_chat
from mint_engine.server.openai.choice import Piece
from mint_engine.server.openai.errors import OpenAIRoute
from mint_engine.server.openai.generation import Job, Prompt
from mint_engine.server.openai.logprobs import chat_logprobs
from mint_engine.server.openai.respond import answer, stream
from mint_engine.server.openai.serving import Envelope, Served, serve
from mint_engine.server.shares import prompts
from mint_engine.server.state import ServerState, get_state
from mint_engine.types import SampleResponse

router = APIRouter(route_class=OpenAIRoute)


@router.post("/chat/completions")
async def create_chat_completion(
    body: ChatRequest,
    request: Request,
    caller: Annotated[Caller, Depends(get_caller)],
    state: Annotated[ServerState, Depends(get_state)],
) -> Response:
    async with serve(request.app, state, caller, body.model) as served:
        tokens = await prompts.run(caller.owner, partial(render, body, served))
        job = Job(
            prompts=[Prompt(tokens)],
            samples=body.samples,
            params=body.sampling_params(body.tokens),
            max_tokens=body.tokens,
            topk=body.top_logprobs or 0,
        )
        # Alternatives are told only at the end of a sample, so they cannot be streamed before it.
        generation = served.start(job, live=bool(body.stream) and not job.topk)
    form = ChatFormat(body, served)
    if body.stream:
        return await stream(request, generation, form, include_usage=body.include_usage)
    return await answer(request, generation, form)


def render(body: ChatRequest, served: Served) -> list[int]:
    served.check_size(sum(len(message.content or "") for message in body.messages), param="messages")
    text = render_chat(body, served.vocabulary)
    # There are tools, calls and the template's variables besides, and one thread at a time has the tokenizer.
    served.check_size(len(text), param="messages", what="the prompt of messages and tools")
    tokens = served.vocabulary.encode(text, add_special_tokens=False)  # the template writes them itself
    served.check_length(len(tokens), reserve=body.tokens or 1, param="messages")
    return tokens


class ChatFormat:
    """`chat.completion` objects, and `chat.completion.chunk` in a stream."""

    def __init__(self, body: ChatRequest, served: Served) -> None:
        self._logprobs, self._vocabulary = bool(body.logprobs), served.vocabulary
        self._envelope = Envelope("chatcmpl", body.model, served)

    def opening(self, index: int, responses: list[SampleResponse] | None) -> tuple[Piece, dict[str, Any] | None]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return Piece(), {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = chat_logprobs(piece.tokens, self._vocabulary) if self._logprobs and piece.tokens else None
        return {
            "index": index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": chat_logprobs(piece.tokens, self._vocabulary) if self._logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def envelope(self, choices: list[dict[str, Any]], *, stream: bool) -> dict[str, Any]:
        return self._envelope.around("chat.completion.chunk" if stream else "chat.completion", choices)
