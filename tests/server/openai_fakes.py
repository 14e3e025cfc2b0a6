"""An engine that samples what it is told to, and an application around the OpenAI face alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI
from tiny_tokenizer import save_byte_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mint_engine.errors import NotFoundError, SampleCancelledError, UserError
from mint_engine.server import caller
from mint_engine.server.openai import router
from mint_engine.types import ModelInput, SampledSequence, SampleResponse, SamplingParams

EOS = 256
VOCAB = 260  # padded
CONTEXT = 512
NOW = datetime(2026, 1, 1, tzinfo=UTC)
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """256 byte tokens and "<|end|>" (256)."""
    save_byte_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@dataclass
class Call:
    """One `sample` call."""

    prompt: list[int]
    num_samples: int
    params: SamplingParams
    options: dict[str, Any]
    future: Future[SampleResponse] = field(default_factory=Future)


@dataclass
class ScriptedEngine:
    """Sample j of every call is ``script[j]``, then the end of the sequence. Log-probabilities are -1, -2, ..."""

    tokens: PreTrainedTokenizerBase
    script: Sequence[bytes | list[int]] = (b"hello",)
    hold: threading.Event | None = None  # it waits for this ...
    hold_after: int = 1  # ... once it has sampled as many tokens
    waiting: int = 0
    refusal: Exception | None = None  # at once
    failure: Exception | None = None  # instead of the last token
    dtype: str = "float32"
    calls: list[Call] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    made: list[dict[str, Any]] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        return self.tokens

    def base_info(self) -> list[Any]:
        sizes = {"vocab_size": VOCAB, "max_context_length": CONTEXT}
        return [SimpleNamespace(name="tiny", directory="/tiny", eos_token_ids=(EOS,), **sizes)]

    def sampler_load(self, owner: str | None = None) -> tuple[int, int]:
        return self.waiting, 0

    def create_session(self, **options: Any) -> str:
        return "session"

    def create_sampler(self, session_id: str, **options: Any) -> Future[str]:
        self.made.append(options)
        return done(f"{session_id}:sample:{len(self.made)}")

    def get_sampler(self, sampler_id: str) -> None:
        if sampler_id in self.released:
            raise NotFoundError(sampler_id)

    def release(self, sampler_id: str) -> None:
        self.released.append(sampler_id)

    def sample(
        self, sampler_id: str, prompt: ModelInput, num_samples: int, params: SamplingParams, **options: Any
    ) -> Future[SampleResponse]:
        call = Call(prompt.to_ints(), num_samples, params, options)
        self.calls.append(call)
        self.loop = asyncio.get_running_loop()
        if self.refusal is not None:
            call.future.set_exception(self.refusal)
            return call.future
        threading.Thread(target=self._run, args=(call,), daemon=True).start()
        return call.future

    def cancel_sample(self, future: Future[SampleResponse]) -> None:
        self.cancelled.set()
        if not future.done():
            future.set_exception(SampleCancelledError("cancelled"))

    def _run(self, call: Call) -> None:
        on_token: Callable[[int, int, float], None] | None = call.options.get("on_token")
        topk = call.options.get("topk_sample_logprobs", 0)
        sequences = []
        for j in range(call.num_samples):
            said = self.script[j % len(self.script)]
            tokens = [*(self.ids(said) if isinstance(said, bytes) else said), EOS]
            reason = "stop"
            if call.params.max_tokens is not None and len(tokens) > call.params.max_tokens:
                tokens, reason = tokens[: call.params.max_tokens], "length"
            logprobs = [-float(i + 1) for i in range(len(tokens))]
            self._wait(0)
            for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
                if on_token is not None and not (self.failure and i == len(tokens) - 1):
                    on_token(j, token, logprob)
                self._wait(i + 1)
            top = [[(t + k, lp - k) for k in range(topk)] for t, lp in zip(tokens, logprobs, strict=True)]
            sequences.append(SampledSequence(reason, tokens, logprobs, top if topk else None))
        if call.future.done():
            return
        if self.failure is not None:
            call.future.set_exception(self.failure)
            return
        scores = [None, *(-0.5 for _ in call.prompt[1:])] if call.options.get("include_prompt_logprobs") else None
        k = call.options.get("topk_prompt_logprobs", 0)
        tops = [None, *([(t, -0.5), (0, -3.0)][:k] for t in call.prompt[1:])] if k else None
        call.future.set_result(SampleResponse(sequences, scores, tops, prompt_cache_hit_tokens=1))

    def _wait(self, sampled: int) -> None:
        if self.hold is not None and sampled == self.hold_after:
            self.started.set()
            self.hold.wait(30)

    def ids(self, said: bytes) -> list[int]:
        """The byte tokens of any bytes, also of some that are no text."""
        names = self.tokens.get_vocab()
        alphabet = dict(zip(range(256), _names(), strict=True))
        return [names[alphabet[byte]] for byte in said]


def _names() -> list[str]:
    from mint_engine.server.openai.vocabulary import _BYTES

    return [name for name, _ in sorted(_BYTES.items(), key=lambda item: item[1])]


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class FakeStore:
    """Knows the checkpoints it is given: tinker path -> directory."""

    def __init__(self, checkpoints: dict[str, str]) -> None:
        self.checkpoints = checkpoints

    def resolve(self, path: str, prefer: str | None = None) -> Any:
        path = path.replace("mint://", "tinker://")
        if path not in self.checkpoints:
            raise NotFoundError(f"path: there is no checkpoint {path}")
        record = SimpleNamespace(base_model="tiny", time=NOW)
        return SimpleNamespace(tinker_path=path, directory=Path(self.checkpoints[path]), record=record)

    def list_user_checkpoints(self, limit: int, offset: int, kinds: Sequence[str]) -> Any:
        assert kinds == ("sampler_weights",)
        page = list(self.checkpoints)[offset : offset + limit]
        return SimpleNamespace(checkpoints=[SimpleNamespace(tinker_path=path, time=NOW) for path in page])


def fake_app(engine: ScriptedEngine, checkpoints: dict[str, str] | None = None) -> FastAPI:
    """The router alone under /v1, every caller being "someone"."""

    def resolve_base(name: str) -> str:
        if name != "tiny":
            raise UserError(f"{name!r} is not served here; served are: tiny")
        return name

    someone = caller.Caller("someone", FakeStore({} if checkpoints is None else checkpoints))  # type: ignore[arg-type]
    app = FastAPI()
    app.state.mint = SimpleNamespace(
        engine=engine,
        resolve_base=resolve_base,
        promises=SimpleNamespace(on_stop=[], stopping=None),
        served=SimpleNamespace(names=["tiny"]),
        settings=SimpleNamespace(sample_queue_limit=4, max_resident_samplers=2),
    )
    app.include_router(router, prefix="/v1")
    app.dependency_overrides[caller.get_caller] = lambda: someone
    return app


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The URL of ``app`` on a real socket."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    started = threading.Event()
    startup = server.startup

    async def announce(*args: Any, **options: Any) -> None:
        await startup(*args, **options)
        started.set()

    server.startup = announce  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert started.wait(30)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
