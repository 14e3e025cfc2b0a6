"""Decoding equals teacher forcing, with any number of neighbours and adapters."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import checked, limits_of, load_decoder, trained_adapter

from mint_engine import trainer
from mint_engine.adapters import Adapter
from mint_engine.errors import NonFiniteError, SampleCancelledError, UserError
from mint_engine.kv_cache import BLOCK_TOKENS
from mint_engine.models.decoder import Decoder
from mint_engine.prompt_scores import PromptQuery
from mint_engine.requests import Request
from mint_engine.sampler import Sampler
from mint_engine.sampling_rows import Job
from mint_engine.stopping import StopRule
from mint_engine.types import Datum, LoraConfig, ModelInput, SampleResponse, SamplingParams

VOCAB = 199


@pytest.fixture(scope="module")
def decoder(tiny_tied: Path) -> Decoder:
    return load_decoder(tiny_tied)


@pytest.fixture(scope="module")
def adapters(decoder: Decoder) -> list[Adapter | None]:
    """The base model and two adapters of different rank."""
    return [None, *(trained_adapter(decoder, LoraConfig(rank=r, seed=r), scale=0.1) for r in (4, 7))]


def make_sampler(decoder: Decoder, max_bytes: int = 1 << 24) -> Sampler:
    return Sampler(decoder, max_bytes, lambda: None)


def request(prompt: list[int], adapter: Adapter | None = None, n: int = 1, **kwargs) -> Request:
    query = kwargs.pop("query", PromptQuery())
    stop = kwargs.pop("stop_rule", StopRule())
    topk = kwargs.pop("topk", 0)
    params = SamplingParams(**{"max_tokens": 10, "seed": 5, **kwargs})
    ids = [str(i) for i in range(n)]
    return Request(adapter, np.array(prompt), n, params, stop, query, topk, ids)


def drain(sampler: Sampler, futures: list[Future]) -> list[SampleResponse]:
    with torch.no_grad():
        while sampler.step():
            pass
    return [f.result(timeout=0) for f in futures]


def teacher_forced(decoder: Decoder, adapter: Adapter | None, tokens: list[int]) -> np.ndarray:
    """Log-probabilities of tokens[1:] as the trainer computes them."""
    adapter = adapter or Adapter(decoder.groups, LoraConfig(rank=1))  # B = 0: the base model
    datum = Datum(
        ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    )
    out = trainer.run(decoder, adapter, None, *checked([datum], "cross_entropy", decoder))
    return out.loss_fn_outputs[0]["logprobs"].to_numpy()


def test_greedy_decoding_equals_transformers_generate(decoder: Decoder, tiny_tied: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_tied, dtype=torch.float32)
    sampler = make_sampler(decoder)
    prompts = [[3, 17, 5], list(range(40, 40 + BLOCK_TOKENS)), [9]]
    futures = [sampler.submit(request(p, temperature=0.0, max_tokens=40)) for p in prompts]
    for prompt, response in zip(prompts, drain(sampler, futures), strict=True):
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
            max_new_tokens=40, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert response.sequences[0].tokens == expected[0, len(prompt) :].tolist()
        assert response.sequences[0].stop_reason == "length"


def test_sampled_logprobs_are_those_of_the_trainer(decoder: Decoder, adapters: list) -> None:
    """All adapters and prompts decoded together; every sample re-scored by the training forward, alone."""
    # Against a float64 decoder either side is off by up to 1.5e-5 here (torch.mm or our GEMM alike).
    tolerance = 3e-5
    sampler = make_sampler(decoder)
    prompts = [[1, 2, 3], list(range(5, 5 + 2 * BLOCK_TOKENS + 3)), [100]]
    cases = [(p, a) for p in prompts for a in adapters]
    futures = [sampler.submit(request(p, a, n=3, max_tokens=BLOCK_TOKENS + 5)) for p, a in cases]
    for (prompt, adapter), response in zip(cases, drain(sampler, futures), strict=True):
        assert len({tuple(s.tokens) for s in response.sequences}) == 3, "three streams, three samples"
        for sequence in response.sequences:
            expected = teacher_forced(decoder, adapter, prompt + sequence.tokens)[len(prompt) - 1 :]
            np.testing.assert_allclose(sequence.logprobs, expected, atol=tolerance)


def test_logprobs_are_reported_under_the_tempered_distribution(decoder: Decoder) -> None:
    """log p_T(i) - log p_T(j) = (log p_1(i) - log p_1(j)) / T, as the cookbook's own check has it."""
    sampler = make_sampler(decoder)
    (got,) = drain(sampler, [sampler.submit(request([4, 5], n=40, max_tokens=1, temperature=4.0))])
    tempered = {s.tokens[0]: (s.logprobs or [])[0] for s in got.sequences}
    tokens = list(tempered)[:2]
    assert len(tokens) == 2
    one = [teacher_forced(decoder, None, [4, 5, t])[-1] for t in tokens]
    assert tempered[tokens[0]] - tempered[tokens[1]] == pytest.approx((one[0] - one[1]) / 4.0, abs=1e-5)


def test_a_seed_reproduces_a_request_in_other_company(decoder: Decoder, adapters: list) -> None:
    sampler = make_sampler(decoder)
    alone = drain(sampler, [sampler.submit(request([7, 8, 9], adapters[1], n=2, seed=42))])[0]
    futures = [
        sampler.submit(request([7, 8, 9], adapters[1], n=2, seed=42)), sampler.submit(request([1], adapters[2], n=5))
    ]  # fmt: skip
    again = drain(sampler, futures)[0]
    assert [s.tokens for s in again.sequences] == [s.tokens for s in alone.sequences]


def test_prompt_scores_equal_the_trainer_and_the_logits(decoder: Decoder, adapters: list, tiny_tied: Path) -> None:
    prompt = [11, 12, 13, 14, 15]
    targets = np.array([[1, -1], [2, 3], [-1, -1], [4, 5]])
    query = PromptQuery(logprobs=True, topk=3, targets=targets, alternatives=2)
    sampler = make_sampler(decoder)
    for adapter in adapters:
        (got,) = drain(sampler, [sampler.submit(request(prompt, adapter, n=0, query=query))])
        assert got.sequences == []
        expected = teacher_forced(decoder, adapter, prompt)
        assert got.prompt_logprobs is not None
        assert got.prompt_logprobs[0] is None
        np.testing.assert_allclose(got.prompt_logprobs[1:], expected, atol=1e-5)
        assert got.topk_prompt_logprobs is not None
        assert got.topk_prompt_logprobs[0] is None
        assert got.target_prompt_logprobs is not None
        scores = got.target_prompt_logprobs.to_numpy()
        for row in range(4):
            top = got.topk_prompt_logprobs[row + 1]
            assert top is not None
            assert [lp for _, lp in top] == sorted((lp for _, lp in top), reverse=True)
            for token, lp in [*top, *((t, s) for t, s in zip(targets[row], scores[row], strict=True) if t >= 0)]:
                single = teacher_forced(decoder, adapter, [*prompt[: row + 1], int(token)])[-1]
                # Where training's products are torch's, a logit of 20 is another sum.
                assert lp == pytest.approx(single, abs=1e-5, rel=1e-6)
        assert (scores[targets == -1] == 0).all()
        assert got.prompt_alt_tokens is not None
        assert got.prompt_alt_tokens.tokens.to_numpy().shape == (4, 2)


def test_only_the_last_n_prompt_tokens_are_scored_when_asked(decoder: Decoder) -> None:
    sampler = make_sampler(decoder)
    query = PromptQuery(logprobs=True, topk=1, last_n=2)
    (got,) = drain(sampler, [sampler.submit(request([1, 2, 3, 4, 5], n=0, query=query))])
    assert got.prompt_logprobs is not None
    assert [lp is None for lp in got.prompt_logprobs] == [True, True, True, False, False]
    np.testing.assert_allclose(got.prompt_logprobs[3:], teacher_forced(decoder, None, [1, 2, 3, 4, 5])[2:], atol=1e-5)


def test_a_stop_token_ends_a_sample_and_is_part_of_it(decoder: Decoder) -> None:
    sampler = make_sampler(decoder)
    free = drain(sampler, [sampler.submit(request([3, 17, 5], max_tokens=12, temperature=0.0))])[0].sequences[0]
    stop = free.tokens[4]
    cut = free.tokens[: free.tokens.index(stop) + 1]
    rule = StopRule(frozenset({stop}))
    got = drain(sampler, [sampler.submit(request([3, 17, 5], max_tokens=12, temperature=0.0, stop_rule=rule))])[0]
    assert got.sequences[0].tokens == cut
    assert got.sequences[0].stop_reason == "stop"
    assert len(got.sequences[0].logprobs or []) == len(cut)


def test_a_stop_string_may_span_tokens_and_nothing_is_trimmed() -> None:
    letters = "abcdefgh"
    rule = StopRule(frozenset(), ("cd",), lambda ids: "".join(letters[i] for i in ids))
    assert not rule.reached([0, 1, 2])
    assert rule.reached([0, 1, 2, 3])
    many = StopRule(frozenset(), ("cd", "h"), lambda ids: "".join(letters[i] for i in ids))
    assert many.reached([7])


def test_stop_rules_follow_the_request() -> None:
    def rule(**kwargs) -> StopRule:
        return StopRule.of(SamplingParams(**kwargs), (1, 2), lambda ids: "")

    assert rule().token_ids == {1, 2}
    assert rule(stop=[9]).token_ids == {1, 2, 9}
    assert rule(stop="x").strings == ("x",)
    assert rule(stop=[]) == StopRule()


def test_more_requests_than_the_cache_holds_wait_their_turn_and_all_finish(decoder: Decoder) -> None:
    config = decoder.config
    block_bytes = 2 * config.num_layers * BLOCK_TOKENS * config.num_kv_heads * config.head_dim * 4
    sampler = make_sampler(decoder, 4 * block_bytes)
    futures = [sampler.submit(request([1, 2, 3], n=2, seed=i, max_tokens=40)) for i in range(5)]
    roomy = make_sampler(decoder)
    same = [roomy.submit(request([1, 2, 3], n=2, seed=i, max_tokens=40)) for i in range(5)]
    for tight, wide in zip(drain(sampler, futures), drain(roomy, same), strict=True):
        assert [s.tokens for s in tight.sequences] == [s.tokens for s in wide.sequences]
    assert sampler._cache.blocks_available == 4, "everything was given back"


def test_a_request_that_can_never_fit_is_refused_at_once(decoder: Decoder) -> None:
    sampler = make_sampler(decoder, 1)
    with pytest.raises(UserError, match="do not fit the KV cache"):
        sampler.submit(request([1] * 40, max_tokens=40))
    full = [1] * decoder.config.max_context_length
    with pytest.raises(UserError, match="leave no room"):
        make_sampler(decoder).submit(request(full))


def test_the_end_of_the_context_ends_a_sample_with_length(decoder: Decoder) -> None:
    sampler = make_sampler(decoder)
    limit = limits_of(decoder).max_context_length
    (got,) = drain(sampler, [sampler.submit(request([1] * (limit - 3), max_tokens=None))])
    assert len(got.sequences[0].tokens) == 3
    assert got.sequences[0].stop_reason == "length"


def test_an_adapter_that_is_not_finite_never_becomes_a_sampler(decoder: Decoder, adapters: list) -> None:
    """In a shared border its infinities would reach its neighbours' rows."""
    broken = adapters[1].snapshot()
    broken.factors["unembed"].b[0][3, 1] = float("inf")
    with pytest.raises(NonFiniteError, match="weights that are not finite"):
        broken.snapshot()


def test_logits_that_are_not_finite_fail_the_request_and_not_the_sampler(tiny_tied: Path) -> None:
    decoder = load_decoder(tiny_tied)
    sampler = make_sampler(decoder)
    norm, decoder.norm = decoder.norm, decoder.norm * float("nan")
    future = sampler.submit(request([1, 2], n=3))
    with torch.no_grad():
        while sampler.step():
            pass
    with pytest.raises(NonFiniteError, match="logits: not finite"):
        future.result(timeout=0)
    decoder.norm = norm
    (got,) = drain(sampler, [sampler.submit(request([1, 2], n=3))])
    assert len(got.sequences) == 3
    assert sampler._cache.blocks_available == sampler._cache.num_blocks


def test_a_failing_request_takes_nobody_with_it(decoder: Decoder, adapters: list) -> None:
    """Its neighbours share prompt and adapter: requests are told apart by identity, not by equal fields."""
    sampler = make_sampler(decoder)

    def broken(ids: list[int]) -> str:
        raise ZeroDivisionError("the tokenizer's")

    rule = StopRule(frozenset(), ("x",), broken)
    futures = [
        sampler.submit(request([1, 2, 3], adapters[1], n=2, stop_rule=r)) for r in (StopRule(), rule, StopRule())
    ]
    with torch.no_grad():
        while sampler.step():
            pass
    assert isinstance(futures[1].exception(timeout=0), ZeroDivisionError)
    first, last = (f.result(timeout=0).sequences for f in (futures[0], futures[2]))
    assert [s.tokens for s in first] == [s.tokens for s in last]
    assert sampler._cache.blocks_available == sampler._cache.num_blocks


def test_without_max_tokens_a_sample_goes_as_far_as_context_and_cache_allow(decoder: Decoder) -> None:
    config = decoder.config
    block_bytes = 2 * config.num_layers * BLOCK_TOKENS * config.num_kv_heads * config.head_dim * 4
    small = make_sampler(decoder, 5 * block_bytes)
    (got,) = drain(small, [small.submit(request([1, 2, 3], n=2, max_tokens=None))])
    assert [len(s.tokens) for s in got.sequences] == [2 * BLOCK_TOKENS - 3] * 2, "five blocks, two for each"
    assert got.sequences[0].stop_reason == "length"


def test_without_max_tokens_samples_that_do_not_fit_side_by_side_take_turns(decoder: Decoder) -> None:
    """They are refused only where one alone could never fit."""
    config = decoder.config
    block_bytes = 2 * config.num_layers * BLOCK_TOKENS * config.num_kv_heads * config.head_dim * 4
    small = make_sampler(decoder, 5 * block_bytes)
    prompt = [1] * (4 * BLOCK_TOKENS - 2)
    (got,) = drain(small, [small.submit(request(prompt, n=4, max_tokens=None))])
    assert [len(s.tokens) for s in got.sequences] == [2] * 4, "to the end of the fourth block, two at a time"
    wide = make_sampler(decoder)
    (same,) = drain(wide, [wide.submit(request(prompt, n=4, max_tokens=2))])
    assert [s.tokens for s in got.sequences] == [s.tokens for s in same.sequences]
    with pytest.raises(UserError, match="4 samples of up to 161 tokens do not fit the KV cache of 160"):
        small.submit(request([1] * (5 * BLOCK_TOKENS), n=4, max_tokens=None))


@pytest.mark.parametrize("temperature", [1e-50, 1e-39, 1e-3])
def test_a_tiny_temperature_is_greedy(decoder: Decoder, temperature: float) -> None:
    sampler = make_sampler(decoder)
    cases = ((0.0, 1.0), (temperature, 1.0), (temperature, 0.5))
    futures = [sampler.submit(request([3, 17], temperature=t, top_p=p)) for t, p in cases]
    greedy, plain, filtered = (r.sequences[0] for r in drain(sampler, futures))
    assert plain.tokens == filtered.tokens == greedy.tokens
    assert np.isfinite(plain.logprobs or []).all()


def step(sampler: Sampler) -> bool:
    with torch.no_grad():
        return sampler.step()


def test_every_sampled_token_is_told_as_it_is_drawn(decoder: Decoder) -> None:
    """The calls of on_token spell out the answer, stop token included, and come before it."""
    sampler = make_sampler(decoder)
    told: list[tuple[int, int, float]] = []
    asked = request([1, 2, 3], n=3, max_tokens=6)
    asked.on_token = lambda *token: told.append(token)
    future = sampler.submit(asked)
    step(sampler)
    assert [index for index, _, _ in told] == [0, 1, 2] * 2, "the prompt's step and one decode step"
    assert not future.done()
    (got,) = drain(sampler, [future])
    for i, sequence in enumerate(got.sequences):
        assert [(t, lp) for index, t, lp in told if index == i] == list(
            zip(sequence.tokens, sequence.logprobs or [], strict=True)
        )


@pytest.mark.parametrize("error", [BrokenPipeError, asyncio.CancelledError, SystemExit])
def test_an_exception_in_on_token_fails_its_request_only(decoder: Decoder, error: type[BaseException]) -> None:
    """Also one that is no Exception: it would end the device's thread."""
    sampler = make_sampler(decoder)
    broken = request([1, 2, 3], n=2)

    def hang_up(index: int, token: int, logprob: float) -> None:
        raise error("the reader has gone")

    broken.on_token = hang_up
    futures = [sampler.submit(r) for r in (request([1, 2, 3], n=2), broken, request([1, 2, 3], n=2))]
    while step(sampler):
        pass
    assert isinstance(futures[1].exception(timeout=0), error)
    first, last = (f.result(timeout=0).sequences for f in (futures[0], futures[2]))
    assert [s.tokens for s in first] == [s.tokens for s in last]
    assert sampler.cache.blocks_available == sampler.cache.num_blocks


def test_a_failure_while_a_request_is_queued_harms_nobody_after_it(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that has failed does not stand in the queue: its step would break, for everybody in it."""
    sampler = make_sampler(decoder)
    append, failing = sampler._schedule.append, threading.Thread(target=lambda: sampler.fail(RuntimeError("a step's")))

    def slow(job: Job) -> None:
        failing.start()
        failing.join(0.1)
        append(job)

    with monkeypatch.context() as patched:
        patched.setattr(sampler._schedule, "append", slow)
        failed = sampler.submit(request([1, 2, 3]))
    failing.join()
    assert isinstance(failed.exception(timeout=0), RuntimeError)
    (got,) = drain(sampler, [sampler.submit(request([1, 2, 3]))])
    assert len(got.sequences) == 1


def test_a_cancelled_sample_frees_its_cache_at_the_next_step(decoder: Decoder) -> None:
    """Also blocks that its samples share and those only promised; its neighbour goes on undisturbed."""
    sampler = make_sampler(decoder)
    neighbour = sampler.submit(request([9, 8, 7], max_tokens=60))
    step(sampler)
    before = sampler.cache.blocks_available, sampler.cache.blocks_used
    long = sampler.submit(request(list(range(BLOCK_TOKENS + 3)), n=4, max_tokens=90))
    step(sampler)
    assert sampler.cache.blocks_available < before[0]
    assert (sampler.load(), sampler.running) == ((0, 0), 2)
    assert sampler.cancel(long)
    assert isinstance(long.exception(timeout=0), SampleCancelledError)
    assert not sampler.cancel(long), "it has been answered"
    step(sampler)
    assert (sampler.cache.blocks_available, sampler.cache.blocks_used) == before
    assert sampler.running == 1
    alone = make_sampler(decoder)
    expected = drain(alone, [alone.submit(request([9, 8, 7], max_tokens=60))])[0].sequences[0]
    assert drain(sampler, [neighbour])[0].sequences[0].tokens == expected.tokens


def test_the_last_sample_frees_its_cache_too_when_it_is_cancelled(decoder: Decoder) -> None:
    sampler = make_sampler(decoder)
    future = sampler.submit(request([1, 2, 3], n=2, max_tokens=60))
    step(sampler)
    assert sampler.cancel(future)
    assert step(sampler), "giving memory back is work"
    assert sampler.cache.blocks_available == sampler.cache.num_blocks
    assert not step(sampler)


def test_a_waiting_sample_that_is_cancelled_never_starts(decoder: Decoder) -> None:
    config = decoder.config
    block_bytes = 2 * config.num_layers * BLOCK_TOKENS * config.num_kv_heads * config.head_dim * 4
    sampler = make_sampler(decoder, 2 * block_bytes)
    told: list[int] = []
    running, waiting, last = (request([1, 2, 3], max_tokens=40, seed=i) for i in range(3))
    waiting.on_token = lambda index, token, logprob: told.append(token)
    futures = [sampler.submit(r) for r in (running, waiting, last)]
    step(sampler)
    assert sampler.load() == (2, 6), "the cache holds one of them"
    assert sampler.cancel(futures[1])
    assert isinstance(futures[1].exception(timeout=0), SampleCancelledError)
    assert sampler.load() == (1, 3)
    withdrawn = sampler.submit(request([1, 2, 3, 4]))
    assert sampler.load() == (2, 7)
    assert withdrawn.cancel(), "a future that has not begun can be cancelled the usual way, too"
    assert sampler.load() == (1, 3)
    drain(sampler, [futures[0], futures[2]])
    assert told == []
    assert sampler.cache.blocks_available == 2


def test_a_future_of_somebody_else_is_not_cancelled(decoder: Decoder) -> None:
    sampler, other = make_sampler(decoder), make_sampler(decoder)
    future = other.submit(request([1]))
    assert not sampler.cancel(future)
    drain(other, [future])
