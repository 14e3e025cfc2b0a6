"""A GPU's decode steps, their launches repeated one by one on CPU tensors, against the CPU's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_decoder, relative, trained_adapter
from test_gpu_capture import NoHost

from mint_engine.adapters import Adapter
from mint_engine.gpu.capture import NoGraph
from mint_engine.gpu.decode import DecodePrograms, Step
from mint_engine.kernels import force_face
from mint_engine.kv_cache import KVCache
from mint_engine.models.config import load_config
from mint_engine.models.decoder import Decoder
from mint_engine.models.weights import WeightReader
from mint_engine.sampling import Draw, sample
from mint_engine.sampling_pass import Piece, _step, decode, prefill
from mint_engine.types import LoraConfig

REORDERED = 1e-5  # the same fp32 sums in another order, through three layers
with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def decoder(tiny_tied: Path) -> Decoder:
    return load_decoder(tiny_tied)


class Twins:
    """The same prompts in two caches: one for the CPU's decode step, one for programs. Unwritten cells are NaN."""

    def __init__(self, decoder: Decoder, prompts: Sequence[tuple[Adapter | None, int]]) -> None:
        self.decoder, self.caches, self.pieces = decoder, [], []
        generator = np.random.default_rng(0)
        tokens = [generator.integers(0, 199, n) for _, n in prompts]
        for _ in range(2):
            cache = KVCache(decoder.config, decoder.dtype, 1 << 20)
            cache.k.fill_(torch.nan)
            cache.v.fill_(torch.nan)
            pieces = [Piece(a, cache.open(), t, 0) for (a, _), t in zip(prompts, tokens, strict=True)]
            for piece in pieces:
                cache.reserve(piece.cache, len(piece.tokens))
                with torch.no_grad():
                    prefill(decoder, cache, [piece])
                piece.cache.length = len(piece.tokens)
            self.caches.append(cache)
            self.pieces.append(pieces)

    def next(self, which: int, rows: Sequence[int], seed: int, count: int = 1) -> list[Piece]:
        """``count`` more tokens for some of the sequences, with room for them."""
        out, generator = [], np.random.default_rng(seed)
        for i in rows:
            piece = self.pieces[which][i]
            self.caches[which].reserve(piece.cache, count)
            out.append(Piece(piece.adapter, piece.cache, generator.integers(0, 199, count), piece.cache.length))
            piece.cache.length += count
        return out

    def same(self, programs: DecodePrograms, rows: Sequence[int], seed: int, face: str | None, count: int = 1) -> None:
        with torch.no_grad():
            expected = decode(self.decoder, self.caches[0], self.next(0, rows, seed, count))
            step = _step(self.caches[1], self.next(1, rows, seed, count))
            with nullcontext() if face is None else force_face(face):
                found = programs.logits(step)
            draws = [Draw(1.0, -1, 1.0) if i % 3 else Draw(0.0, -1, 1.0) for i in range(len(expected))]
            uniforms = np.random.default_rng(seed).random(len(expected))
            temperatures = np.array([d.temperature for d in draws], np.float32)
            drawing = replace(step, temperatures=temperatures, uniforms=uniforms)
            with nullcontext() if face is None else force_face(face):  # the same step again, which changes nothing
                tokens, logprobs = (t.clone() for t in programs.draw(drawing))
        wanted = sample(expected, draws, uniforms.tolist())
        assert torch.equal(tokens, wanted[0])
        torch.testing.assert_close(logprobs, wanted[1], rtol=REORDERED, atol=REORDERED)
        assert found.shape == expected.shape
        assert relative(found, expected) < REORDERED
        for mine, own in ((self.caches[1].k, self.caches[0].k), (self.caches[1].v, self.caches[0].v)):
            torch.testing.assert_close(mine, own, rtol=REORDERED, atol=REORDERED, equal_nan=True)


def adapters(decoder: Decoder, *ranks: int) -> list[Adapter]:
    return [trained_adapter(decoder, LoraConfig(rank=rank, seed=rank)) for rank in ranks]


@pytest.mark.parametrize("ranks", [(), (4,), (4, 8), (16, 32)])
def test_a_step_is_that_of_the_cpu(decoder: Decoder, ranks: tuple[int, ...]) -> None:
    """The base model's rows beside adapters' (of ranks of 16: in tiles of their own); the shapes change on the way."""
    own: list[Adapter | None] = [None, None, None]
    for adapter in adapters(decoder, *ranks):
        own += [adapter, adapter]
    twins = Twins(decoder, [(a, 1 + 7 * i) for i, a in enumerate(own)])
    programs = DecodePrograms(decoder, twins.caches[1])
    everyone = list(range(len(own)))
    for seed, rows in enumerate([everyone, everyone, everyone[2:], everyone[-1:], everyone]):
        twins.same(programs, rows, seed, None)
    twins.same(programs, everyone, 9, None, count=3)  # as proposed tokens are


def test_a_program_serves_every_step_of_its_shape_and_is_recorded_at_the_second(decoder: Decoder) -> None:
    recorded = []

    def record(launch: Callable[[], None]) -> NoGraph:
        recorded.append(launch)
        return NoGraph(launch)

    (adapter,) = adapters(decoder, 4)
    twins = Twins(decoder, [(adapter, n) for n in (3, 30, 9, 5)])
    programs = DecodePrograms(decoder, twins.caches[1], record)
    for seed, rows in enumerate([(0, 1, 2), (0, 1, 2, 3), (1, 2, 3)]):
        twins.same(programs, rows, seed, None)
        assert len(recorded) == 2 * min(seed, 1)
    assert len(programs) == 2  # one for logits, one that draws
    (wide,) = adapters(decoder, decoder.borders.capacity + 16)  # moves the weights
    other = Twins(decoder, [(wide, 4)])
    other.same(DecodePrograms(decoder, other.caches[1]), (0,), 1, None)
    twins.same(programs, (0, 1, 2), 7, None)
    assert len(programs) == 2


def test_two_seats_of_one_adapter_are_refused(decoder: Decoder) -> None:
    (adapter,) = adapters(decoder, 4)
    one, table = np.zeros(2, np.int64), np.zeros((2, 1), np.int32)
    step = Step(one, one, one, table, np.ones(2, np.int32), [(adapter, 1), (None, 0), (adapter, 1)])
    with pytest.raises(ValueError, match="seats: expected one for each adapter"):
        DecodePrograms(decoder, KVCache(decoder.config, decoder.dtype, 1 << 20)).logits(step)


@pytest.mark.slow
@with_triton
@without_gpu
@pytest.mark.parametrize("ranks", [(4,), (16, 32)])
def test_interpreted_kernels_decode_as_the_cpu_does(decoder: Decoder, ranks: tuple[int, ...]) -> None:
    own = adapters(decoder, *ranks)
    twins = Twins(decoder, [(None, 5), *((a, 33) for a in own)])
    programs = DecodePrograms(decoder, twins.caches[1])
    for seed in range(2):
        twins.same(programs, range(1 + len(own)), seed, "triton")


@with_triton
@without_gpu
@pytest.mark.parametrize("ranks", [(), (4,), (16, 32)])
def test_nothing_in_a_step_waits_for_the_device(
    tiny_tied: Path,
    launches: list[str],
    ranks: tuple[int, ...],
) -> None:
    config = load_config(tiny_tied)
    with force_face("triton"), torch.no_grad():
        decoder = Decoder(config, WeightReader(tiny_tied), torch.bfloat16, device="meta")
        cache = KVCache(config, torch.bfloat16, 1 << 20, "meta")
        own = [Adapter(decoder.groups, LoraConfig(rank=rank), decoder.device) for rank in ranks]
        seats = [(a, 3) for a in own] or [(None, 3)]
        n = 3 * len(seats)
        step = Step(
            np.zeros(n, np.int64), np.full(n, 40), np.arange(n), np.zeros((n, 2), np.int32),
            np.full(n, 41, np.int32), seats,
        )  # fmt: skip
        programs = DecodePrograms(decoder, cache, lambda launch: pytest.fail("recorded"))
        assert programs.logits(step).shape == (n, config.vocab_size)
        first = list(launches)
        launches.clear()
        drawing = replace(step, temperatures=np.ones(n, np.float32), uniforms=np.zeros(n))
        assert programs.draw(drawing)[0].shape == (n,)
        second = list(launches)
        launches.clear()
        with NoHost():
            for program in programs._programs.values():
                program._launch()
    assert launches == first + second, "the launches of a shape are always the same"
    assert {"_cached", "_split", "_merge"} <= set(first)
    assert {"_sums", "_pick"} <= set(second)
