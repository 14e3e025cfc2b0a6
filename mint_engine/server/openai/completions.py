"""POST completions: texts that go on where the prompts end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from mint_engine.server import shares
from mint_engine.server.caller import Caller, get_caller
from mint_engine.server.openai.choice import Piece
from mint_engine.server.openai.completion_request import CompletionRequest
from mint_engine.server.openai.errors import OpenAIRoute
from mint_engine.server.openai.generation import Job, Prompt
from mint_engine.server.openai.logprobs import completion_logprobs
from mint_engine.server.openai.prompts import read_prompts, scored_prompt
from mint_engine.server.openai.respond import answer, stream
from mint_engine.server.openai.serving import Envelope, Served, serve
from mint_engine.server.state import ServerState, get_state
from mint_engine.types import SampleResponse

router = APIRouter(route_class=OpenAIRoute)


@router.post("/completions")
async def create_completion(
    body: CompletionRequest,
    request: Request,
    caller: Annotated[Caller, Depends(get_caller)],
    state: Annotated[ServerState, Depends(get_state)],
) -> Response:
    async with serve(request.app, state, caller, body.model, prompts=len(body.prompt)) as served:
        prompts = await shares.prompts.run(caller.owner, partial(read_prompts, body, served))
        job = Job(
            prompts=prompts,
            samples=body.samples,
            params=body.sampling_params(body.tokens or None),
            max_tokens=body.tokens,
            topk=body.logprobs or 0,
            score_prompt=bool(body.echo) and body.logprobs is not None,
        )
        # What the engine tells only at the end cannot be streamed before it.
        live = bool(body.stream) and not job.topk and not job.score_prompt and job.max_tokens != 0
        generation = served.start(job, live=live)
    form = CompletionFormat(body, prompts, served)
    if body.stream:
        return await stream(request, generation, form, include_usage=body.include_usage)
    return await answer(request, generation, form)


class CompletionFormat:
    """`text_completion` objects. A stream's chunks have the same shape."""

    def __init__(self, body: CompletionRequest, prompts: Sequence[Prompt], served: Served) -> None:
        self._body, self._prompts, self._vocabulary = body, prompts, served.vocabulary
        self._envelope = Envelope("cmpl", body.model, served)

    def opening(self, index: int, responses: list[SampleResponse] | None) -> tuple[Piece, dict[str, Any] | None]:
        """The prompt, if it is to be echoed."""
        if not self._body.echo:
            return Piece(), None
        which = index // self._body.samples
        prompt = self._prompts[which]
        tokens = scored_prompt(prompt, responses[which], self._vocabulary) if responses is not None else []
        piece = Piece(prompt.text, tokens if self._body.logprobs is not None else [])
        return piece, self.chunk(index, piece)

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None and (piece.tokens or not self._body.stream):
            logprobs = completion_logprobs(piece.tokens, self._vocabulary, alternatives=self._body.logprobs > 0)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    whole = chunk

    def envelope(self, choices: list[dict[str, Any]], *, stream: bool) -> dict[str, Any]:
        return self._envelope.around("text_completion", choices)
