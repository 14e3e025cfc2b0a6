"""What a request is served with: the model it names, and what all requests of an application share."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from mint_engine import __version__
from mint_engine.server.failures import RestartingError
from mint_engine.server.openai.errors import ApiError
from mint_engine.server.openai.generation import Generation, Job
from mint_engine.server.openai.samplers import Samplers
from mint_engine.server.openai.vocabulary import Vocabulary
from mint_engine.server.routes.sampling import check_queue

if TYPE_CHECKING:
    from mint_engine.engine import Engine
    from mint_engine.server.caller import Caller
    from mint_engine.server.state import ServerState


@dataclass(frozen=True)
class Base:
    """A base model, as this face needs it."""

    name: str
    vocabulary: Vocabulary
    eos: frozenset[int]
    vocab_size: int
    context: int


@dataclass(frozen=True)
class Served:
    """The model of a request. Methods that tokenise take their time: call them in a thread."""

    engine: Engine
    sampler_id: str
    base: Base
    running: WeakSet[Generation]

    @property
    def vocabulary(self) -> Vocabulary:
        return self.base.vocabulary

    def encode(self, text: str, *, reserve: int, param: str) -> list[int]:
        self.check_size(len(text), param=param)
        tokens = self.vocabulary.encode(text)
        self.check_length(len(tokens), reserve=reserve, param=param)
        return tokens

    def check_size(self, characters: int, *, param: str, what: str | None = None) -> None:
        """Refuse a text that cannot fit before any work is spent on it. ``what``: its name, if not ``param``."""
        if characters > self.base.context * self.vocabulary.longest:
            raise _too_long(self.base.context, f"{what or param} has {characters} characters", param)

    def check_length(self, tokens: int, *, reserve: int, param: str) -> None:
        if tokens + reserve > self.base.context:
            asked = f"the request asks for {tokens + reserve} ({tokens} in {param}, {reserve} to sample)"
            raise _too_long(self.base.context, asked, param)

    def check_tokens(self, tokens: Sequence[int], *, param: str, where: str) -> None:
        """Refuse ids that the model does not have. Who turns them into text could not tell."""
        for i, token in enumerate(tokens):
            if not 0 <= token < self.base.vocab_size:
                message = f"expected token ids in [0, {self.base.vocab_size}), got {token} at index {i} ({where})"
                raise ApiError(400, f"{param}: {message}", param=param)

    def start(self, job: Job, *, live: bool) -> Generation:
        generation = Generation(self.engine, self.sampler_id, job, self.vocabulary, self.base.eos, live=live)
        self.running.add(generation)
        return generation


@asynccontextmanager
async def serve(
    app: FastAPI, state: ServerState, caller: Caller, model: str, *, prompts: int = 1
) -> AsyncIterator[Served]:
    """What ``model`` names, ready to sample. Start the generation inside.

    Raises:
        ApiError: 404, nothing that the caller can see; 400, more ``prompts`` than may ever wait.
        TryAgainLaterError: the sampler has enough waiting.
    """
    if prompts > (most := state.settings.sample_queue_limit):
        raise ApiError(400, f"prompt: expected at most {most} prompts in a request, got {prompts}", param="prompt")
    face = Face.of(app, state)
    check_queue(state, caller, prompts)
    async with face.samplers.use(caller, model) as (sampler_id, base_name):
        base = face.bases.get(base_name)
        if base is None:
            base = face.bases[base_name] = await run_in_threadpool(_describe, state.engine, base_name)
        yield Served(state.engine, sampler_id, base, face.running)


class Face:
    """What the requests of one application share: samplers and tokenizers. And what becomes of them when it stops:
    samples that have begun are finished, the others are refused with a status that lets clients try again."""

    def __init__(self, state: ServerState) -> None:
        self.samplers = Samplers(state.engine, state.resolve_base, state.settings.max_resident_samplers)
        self.bases: dict[str, Base] = {}
        self.running: WeakSet[Generation] = WeakSet()
        self._promises = state.promises
        state.promises.on_stop.append(self._stop)

    @classmethod
    def of(cls, app: FastAPI, state: ServerState) -> Face:
        face: Face | None = getattr(app.state, "openai", None)
        if face is None:
            face = app.state.openai = cls(state)
        return face

    def _stop(self) -> None:
        for generation in list(self.running):
            generation.withdraw(RestartingError(self._promises.stopping or "the server is restarting: try again"))


class Envelope:
    """What every object of one answer says of itself."""

    def __init__(self, prefix: str, model: str, served: Served) -> None:
        self._fields: dict[str, Any] = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint(served),
        }

    def around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._fields, "object": kind, "choices": choices}


def fingerprint(served: Served) -> str:
    """Changes when the same request with the same seed may be answered otherwise."""
    what = "|".join([__version__, torch.__version__, served.engine.dtype, served.base.name])
    return f"fp_{hashlib.sha256(what.encode()).hexdigest()[:10]}"


def _describe(engine: Engine, name: str) -> Base:
    """A base model that has been loaded, since a sampler of it exists."""
    tokenizer = engine.tokenizer(name)
    info = next(info for info in engine.base_info() if name in (info.name, str(info.directory)))
    return Base(name, Vocabulary(tokenizer), frozenset(info.eos_token_ids), info.vocab_size, info.max_context_length)


def _too_long(context: int, asked: str, param: str) -> ApiError:
    message = f"{param}: the model's context is {context} tokens, but {asked}"
    return ApiError(400, message, param=param, code="context_length_exceeded")
