"""Base models resident in an engine: one copy each, shared by every training client and sampler."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mint_engine.datums import Limits
from mint_engine.device import machine_bytes
from mint_engine.gpu.memory import free_bytes
from mint_engine.interruption import Interruption
from mint_engine.models.config import ModelConfig, load_config
from mint_engine.models.decoder import ACTIVATION_BYTES, Decoder
from mint_engine.models.hub import ModelFiles, resolve_model
from mint_engine.models.tokenizer import load_tokenizer
from mint_engine.models.weights import WeightReader, validate
from mint_engine.sampler import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class BaseInfo:
    """A loaded base model in a few words.

    ``eos_token_ids`` end a sample. ``resident_bytes``: of its weights in memory, borders included.
    """

    name: str
    directory: Path
    architecture: str
    dtype: str
    device: str
    num_layers: int
    vocab_size: int
    max_context_length: int
    eos_token_ids: tuple[int, ...]
    resident_bytes: int


class Base:
    """A loaded base model with its sampler. ``name`` is what the caller asked for."""

    def __init__(self, files: ModelFiles, config: ModelConfig, decoder: Decoder, sampler: Sampler) -> None:
        self.name, self.directory = files.name, files.directory
        self.config, self.decoder, self.sampler = config, decoder, sampler
        self.limits = Limits(config.vocab_size, config.max_context_length)

    @property
    def info(self) -> BaseInfo:
        return BaseInfo(
            name=self.name,
            directory=self.directory,
            architecture=self.config.architecture,
            dtype=str(self.decoder.dtype).removeprefix("torch."),
            device=str(self.decoder.device),
            num_layers=self.config.num_layers,
            vocab_size=self.config.vocab_size,
            max_context_length=self.config.max_context_length,
            eos_token_ids=tuple(self.config.eos_token_ids),
            resident_bytes=self.decoder.resident_bytes,
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.directory)


class BaseModels:
    """Loads each base model once, however many ask for it at the same time."""

    def __init__(
        self,
        home: Path,
        dtype: torch.dtype,
        device: torch.device,
        cache_bytes: int,
        activation_bytes: int | None,
        on_load: Callable[[Sampler], None],
        wake: Callable[[], None],
        *,
        interruption: Interruption,
        weights: str | None = None,
        speculation: int = 0,
    ) -> None:
        self._home, self._dtype, self._device = home, dtype, device
        self._cache_bytes, self._activation_bytes = cache_bytes, activation_bytes
        self._on_load, self._wake, self._interruption = on_load, wake, interruption
        self._weights, self._speculation = weights, speculation
        self._lock = threading.Lock()
        self._loading: dict[str, Future[Base]] = {}

    @property
    def loaded(self) -> list[Base]:
        with self._lock:
            futures = list(self._loading.values())
        return [f.result() for f in futures if f.done() and f.exception() is None]

    def get(self, name: str) -> Base:
        """The base model of that name, loaded if need be (seconds or minutes; call it `Apart`).

        Raises:
            ModelError: the name resolves to nothing, or to something damaged or unsupported.
        """
        path = Path(name).expanduser()
        if name and path.is_dir():  # one copy, however its directory is spelled
            name = str(path.resolve())
            alias = next((base for base in self.loaded if str(base.directory) == name), None)
            if alias is not None:
                return alias
        with self._lock:
            future = self._loading.get(name)
            mine = future is None or (future.done() and future.exception() is not None)
            if mine:  # a load that failed may be tried again: the missing file may have come
                future = self._loading[name] = Future()
        assert future is not None
        if mine:
            try:
                future.set_result(self._load(name))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def _load(self, name: str) -> Base:
        files = resolve_model(name, self._home)
        config = load_config(files.directory)
        reader = WeightReader(files.directory)
        validate(reader, config)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True)
        with Progress(*columns, transient=True, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task(f"loading {name}", total=None)
            names = set(reader.names())
            progress.update(task, total=len(names))
            decoder = Decoder(
                config, reader, self._dtype, device=self._device, int8=self._weights == "int8",
                activation_bytes=self._activation_bytes or ACTIVATION_BYTES,
                on_tensor=lambda _: progress.advance(task),
            )  # fmt: skip
        fits = 8 * decoder.resident_bytes <= machine_bytes()
        decoder.keeps_words = self._weights == "twice" or (self._weights is None and fits)
        sampler = Sampler(
            decoder, self._cache_bytes, self._wake, speculation=self._speculation, interruption=self._interruption
        )
        if self._device.type == "cuda" and not self._activation_bytes:
            decoder.activation_bytes = free_bytes(self._device)  # now that weights and KV cache have theirs
        self._on_load(sampler)
        return Base(files, config, decoder, sampler)
