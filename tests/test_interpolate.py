"""Sums of checkpoints against dense matrices in float64: exact where the rank allows, else the best of that rank."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from engine_helpers import VOCAB, new_model, open_engine, sampled, train
from helpers import make_data, peft_logprobs, relative
from tiny_models import build_tiny

from mint_engine import interpolate
from mint_engine.checkpoint import AdapterMeta, read_adapter
from mint_engine.engine import Engine, checkpoints
from mint_engine.errors import NotFoundError, UserError
from mint_engine.interpolate import Source, check_coefficients, check_size, combine, needed_bytes
from mint_engine.off_thread import THREADS
from mint_engine.types import ModelInput, SamplingParams

MODULES = {"q_proj": (24, 16), "down_proj": (16, 40)}  # N, K


def source(rank: int, seed: int, *, live: int | None = None, alpha: float = 32, **meta) -> Source:
    """An adapter in memory; only ``live`` of its ranks are used, if given."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (n, k) in MODULES.items():
        name = f"base_model.model.model.layers.0.{module}"
        b = torch.randn(n, rank, generator=generator)
        b[:, rank if live is None else live :] = 0
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, k, generator=generator)
        tensors[f"{name}.lora_B.weight"] = b
    return Source(f"s{seed}", AdapterMeta("tiny", rank, alpha, tuple(MODULES), **meta), tensors)


def delta(meta: AdapterMeta, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The change of each weight, float64."""
    names = [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")]
    return {
        n: meta.alpha / meta.rank * tensors[f"{n}.lora_B.weight"].double() @ tensors[f"{n}.lora_A.weight"].double()
        for n in names
    }


def wanted(sources: list[Source], coefficients: list[float]) -> dict[str, torch.Tensor]:
    parts = [delta(s.meta, dict(s.tensors)) for s in sources]
    return {n: sum((c * p[n] for c, p in zip(coefficients, parts, strict=True)), torch.zeros(())) for n in parts[0]}


# float32 factors: each of the product's two is rounded once.
ROUNDED = 2e-7


@pytest.mark.parametrize(
    ("sources", "coefficients"),
    [
        ([source(5, 1)], [1.0]),
        ([source(5, 1)], [-2.5]),
        ([source(6, 1, live=2), source(6, 2, live=3)], [0.9, 0.1]),
        ([source(3, 1, live=1), source(8, 2, live=4), source(4, 3, live=3)], [1.0, -0.5, 2.0]),
        ([source(4, 1, alpha=16), source(4, 1, alpha=64)], [1.0, 1.0]),
        ([source(30, 1), source(30, 2)], [0.3, 0.7]),  # more ranks than the matrices have dimensions
        ([source(4, 1), source(4, 1)], [1.0, -1.0]),  # nothing is left
    ],
)
def test_the_sum_is_exact_where_its_rank_allows(sources: list[Source], coefficients: list[float]) -> None:
    meta, tensors = combine(sources, coefficients)
    assert meta.rank == max(s.meta.rank for s in sources)
    assert (meta.alpha, meta.base_model, meta.target_modules) == (32, "tiny", tuple(MODULES))
    assert tensors.keys() == sources[0].tensors.keys()
    assert all(t.dtype == torch.float32 for t in tensors.values())
    got = delta(meta, tensors)
    scale = max(float(t.norm()) for s in sources for t in delta(s.meta, dict(s.tensors)).values())
    for name, expected in wanted(sources, coefficients).items():
        assert float((got[name] - expected).norm()) < ROUNDED * scale, name


def test_a_sum_of_higher_rank_becomes_the_best_approximation() -> None:
    """No matrix of that rank is nearer (Eckart and Young): what is lost are the smallest singular values."""
    sources, coefficients = [source(3, 1), source(4, 2), source(2, 3)], [0.5, 0.3, 0.2]
    meta, tensors = combine(sources, coefficients)
    got = delta(meta, tensors)
    for name, expected in wanted(sources, coefficients).items():
        u, s, vh = torch.linalg.svd(expected, full_matrices=False)
        best = u[:, :4] * s[:4] @ vh[:4]
        assert relative(got[name], best) < 1e-6
        assert float(s[4]) > 0.1, "the test loses something"


def test_factors_are_not_averaged() -> None:
    """The same adapter written with other factors gives the same sum: B -> B M, A -> M^-1 A changes nothing."""
    plain, other = source(4, 1, live=2), source(4, 2, live=2)
    mix = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    turned = Source(
        "turned", plain.meta, {n: mix.T @ t if "lora_A" in n else t @ mix for n, t in plain.tensors.items()}
    )
    results = [delta(*combine([s, other], [0.6, 0.4])) for s in (plain, turned)]
    for name, value in results[0].items():
        assert relative(results[1][name], value) < 1e-6


def test_what_cannot_be_added_is_refused_by_name() -> None:
    narrow = source(4, 2)
    fewer = {n: t for n, t in narrow.tensors.items() if "q_proj" in n}
    cases = [
        (source(4, 2), "trained on 'tiny', s2 on 'other'", {"base_model": "other"}),
        (Source("less", narrow.meta, fewer), "s1 adapts down_proj, q_proj, less q_proj", {}),
        (Source("bent", narrow.meta, {n: t[:, :8] if "lora_A" in n else t for n, t in narrow.tensors.items()}),
         r"is \[4, 16\] in s1, \[4, 8\] in bent", {}),
    ]  # fmt: skip
    for other, message, changes in cases:
        meta = AdapterMeta(**{**vars(other.meta), **changes})
        with pytest.raises(UserError, match=message):
            combine([source(4, 1), Source(other.path, meta, other.tensors)], [0.5, 0.5])
    for paths, coefficients, message in (
        ([], [], "expected at least one checkpoint"),
        (["a"], [], "expected 1 to match source_paths, got 0"),
        (["a", "b"], [1.0, float("inf")], "expected finite numbers, got inf at index 1"),
        (["a"], ["1"], "expected finite numbers, got '1' at index 0"),
        (["a"], [True], "expected finite numbers, got True"),
    ):
        with pytest.raises(UserError, match=message):
            check_coefficients(paths, coefficients)  # type: ignore[arg-type]
    assert check_coefficients(["a", "b"], [2, np.float32(0.5)]) == [2.0, 0.5]  # type: ignore[list-item]


def test_a_sum_that_is_too_large_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(name: str) -> torch.Tensor:
        raise AssertionError("read")

    sources = [Source(s.path, s.meta, s.tensors, unread) for s in (source(3, 1), source(4, 2))]
    check_size(sources, needed_bytes(sources))
    with pytest.raises(UserError, match=r"at most 9,999 bytes of memory, got 2 checkpoints with 7 ranks together"):
        check_size(sources, 9_999)
    monkeypatch.setattr(interpolate, "MAX_RANKS", 6)
    with pytest.raises(UserError, match=r"source_paths: expected .* at most 6 ranks together, got 7 in 2"):
        check_size(sources, 1 << 40)


def test_only_one_module_is_in_memory_at_a_time() -> None:
    sources, alive, most = [source(3, 1), source(4, 2)], weakref.WeakSet(), 0

    def read(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        nonlocal most
        alive.add(value := tensors[name].clone())
        most = max(most, len(alive))
        return value

    lazy = [Source(s.path, s.meta, s.tensors, partial(read, s.tensors)) for s in sources]
    meta, tensors = combine(lazy, [0.5, 0.5])
    expected = combine(sources, [0.5, 0.5])
    assert meta == expected[0]
    assert all(torch.equal(tensors[name], value) for name, value in expected[1].items())
    assert most <= len(sources)


# ---- through the engine ----------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with open_engine(tmp_path / "home") as made:
        yield made


def test_the_saved_sum_says_what_the_merged_weights_say(engine: Engine, tiny_tied: Path) -> None:
    """Versions of an EMA: the checkpoint, sampled by us, against a base model with the exact sum merged in float64."""
    session = engine.create_session()
    paths = []
    for rank, seed in ((4, 0), (6, 1)):
        model = new_model(engine, session, tiny_tied, rank=rank, seed=seed)
        for _ in range(2):
            train(engine, model, 2, seed=seed)
            paths.append(engine.save_weights_for_sampler(model, f"v{len(paths)}").result().path or "")
    coefficients = [0.4, 0.3, 0.2, 0.4]
    answer = engine.interpolate_checkpoints("local", paths, coefficients, output_name="ema").result()
    assert (answer.source_paths, answer.coefficients) == (paths, coefficients)
    assert answer.path.endswith("/sampler_weights/ema")
    assert answer.checkpoint_type == "sampler"
    assert engine.store.weights_info(answer.path).lora_rank == 6
    meta, tensors = read_adapter(engine.store.resolve(answer.path).directory)

    sources = [Source(p, *read_adapter(engine.store.resolve(p).directory)) for p in paths]
    exact = wanted(sources, coefficients)
    got = delta(meta, tensors)
    losses = [relative(got[name], value) for name, value in exact.items()]
    assert max(losses) < 0.5, "two adapters of rank 4 and 6 in one of rank 6"
    assert min(losses) > 1e-4, "rank 10 does not fit rank 6"

    # In float64: with log-probabilities around -20, PEFT's own float32 is off by more than the tolerance.
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_tied, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(plain, engine.store.resolve(answer.path).directory)
    data = make_data("cross_entropy", (8,), VOCAB, 3)
    with torch.no_grad():
        (expected,) = peft_logprobs(theirs, data)
    twin = engine.create_model_from_state(session, answer.path, optimizer=False).result()
    out = engine.forward(twin, data, "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
    np.testing.assert_allclose(out, expected.numpy(), atol=1e-5)


def test_one_source_with_coefficient_one_is_that_source(engine: Engine, tiny_tied: Path) -> None:
    session = engine.create_session()
    model = new_model(engine, session, tiny_tied)
    train(engine, model, 3)
    state, version = (engine.save_weights(model, "v").result().path, engine.save_weights_for_sampler(model, "v"))
    original = engine.create_sampler(session, model_path=version.result().path).result()
    for source_path in (state, version.result().path or ""):
        path = engine.interpolate_checkpoints("local", [source_path], [1]).result().path
        assert path.endswith("/sampler_weights/interpolated")
        copy = engine.create_sampler(session, model_path=path).result()
        for (tokens, lps), (expected, theirs) in zip(sampled(engine, copy), sampled(engine, original), strict=True):
            assert tokens == expected
            np.testing.assert_allclose(lps, theirs, atol=1e-5)
    nothing = engine.interpolate_checkpoints("local", [state], [0.0]).result().path
    base = engine.create_sampler(session, base_model=str(tiny_tied)).result()
    silent = engine.create_sampler(session, model_path=nothing).result()
    prompt, params = ModelInput.from_ints([1, 2, 3]), SamplingParams(max_tokens=8, seed=1)
    answers = [engine.sample(s, prompt, 1, params).result().sequences[0] for s in (silent, base)]
    assert answers[0].tokens == answers[1].tokens


def test_sums_belong_to_the_one_who_asked(engine: Engine, tiny_tied: Path, tmp_path: Path) -> None:
    alice = engine.create_session(owner="alice")
    model = new_model(engine, alice, tiny_tied)
    train(engine, model)
    mine = engine.save_weights_for_sampler(model, "v").result().path or ""
    path = engine.interpolate_checkpoints("alice", [mine, mine], [0.5, 0.5]).result().path
    run = engine.store.as_owner("alice").resolve(path).training_run_id
    assert run != model
    with pytest.raises(NotFoundError):
        engine.store.as_owner("bob").resolve(path)
    with pytest.raises(NotFoundError):
        engine.interpolate_checkpoints("bob", [mine], [1.0]).result()
    elsewhere = new_model(engine, alice, build_tiny("llama", tmp_path))
    foreign = engine.save_weights_for_sampler(elsewhere, "v").result().path or ""
    with pytest.raises(UserError, match="was trained on"):
        engine.interpolate_checkpoints("alice", [mine, foreign], [0.5, 0.5]).result()
    before = len(engine.store.as_owner("alice").list_user_checkpoints().checkpoints)
    with pytest.raises(UserError, match="coefficients"):
        engine.interpolate_checkpoints("alice", [mine], [1.0, 2.0]).result()
    assert len(engine.store.as_owner("alice").list_user_checkpoints().checkpoints) == before


def test_a_checkpoint_that_is_named_twice_counts_once(
    engine: Engine, tiny_tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.create_session()
    model = new_model(engine, session, tiny_tied)
    train(engine, model)
    path = engine.save_weights_for_sampler(model, "v").result().path or ""
    other = engine.save_weights_for_sampler(new_model(engine, session, tiny_tied, seed=1), "w").result().path or ""
    given: list[tuple[list[str], list[float]]] = []

    def combined(sources: list[Source], coefficients: list[float]) -> object:
        given.append(([s.path for s in sources], coefficients))
        return combine(sources, coefficients)

    monkeypatch.setattr(interpolate, "combine", combined)
    monkeypatch.setattr(interpolate, "MAX_RANKS", 8)
    paths, coefficients = [path, other, path.replace("tinker://", "mint://"), path], [0.5, 1.0, 0.25, 0.125]
    answer = engine.interpolate_checkpoints("local", paths, coefficients).result()
    assert given == [([path, other], [0.875, 1.0])]
    assert (answer.source_paths, answer.coefficients) == (paths, coefficients)
    with pytest.raises(UserError, match="expected finite numbers, got inf"):
        engine.interpolate_checkpoints("local", [path, path], [1e308, 1e308]).result()


def test_a_sum_that_is_too_large_leaves_nothing(
    engine: Engine, tiny_tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = engine.create_session()
    paths = []
    for seed in range(2):
        model = new_model(engine, session, tiny_tied, seed=seed)
        paths.append(engine.save_weights_for_sampler(model, "v").result().path or "")
    before = engine.store.list_user_checkpoints()
    with monkeypatch.context() as patch:
        patch.setattr(interpolate, "MAX_RANKS", 7)
        with pytest.raises(UserError, match="at most 7 ranks together, got 8 in 2"):
            engine.interpolate_checkpoints("local", paths, [0.5, 0.5]).result()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "machine_bytes", lambda: 80_000)
        with pytest.raises(UserError, match="at most 10,000 bytes of memory"):
            engine.interpolate_checkpoints("local", paths, [0.5, 0.5]).result()
    assert engine.store.list_user_checkpoints() == before
    assert engine.interpolate_checkpoints("local", paths, [0.5, 0.5]).result().path


def test_sums_are_computed_one_at_a_time_and_saves_go_on(
    engine: Engine, tiny_tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(engine, engine.create_session(), tiny_tied)
    path = engine.save_weights_for_sampler(model, "v").result().path or ""
    begun, held = [], threading.Event()

    def slow(*arguments: Any) -> object:
        begun.append(arguments)
        assert held.wait(30)
        return combine(*arguments)

    monkeypatch.setattr(interpolate, "combine", slow)
    sums = [engine.interpolate_checkpoints("local", [path], [1.0]) for _ in range(THREADS + 1)]
    try:
        assert engine.save_weights(model, "meanwhile").result(timeout=10).path
        assert len(begun) == 1
    finally:
        held.set()
    assert len({future.result().path for future in sums}) == len(sums)


def test_owners_take_turns_with_their_sums(engine: Engine, tiny_tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for many keeps another waiting for one of them, besides the one that is being computed."""
    paths, order, begun, held = {}, list[str](), threading.Event(), threading.Event()
    for owner in ("alice", "bob"):
        model = new_model(engine, engine.create_session(owner=owner), tiny_tied)
        paths[owner] = engine.save_weights_for_sampler(model, "v").result().path or ""

    def noted(sources: list[Source], coefficients: list[float]) -> object:
        begun.set()
        assert held.wait(30)
        order.append(next(owner for owner, path in paths.items() if path == sources[0].path))
        return combine(sources, coefficients)

    monkeypatch.setattr(interpolate, "combine", noted)
    sums = [engine.interpolate_checkpoints("alice", [paths["alice"]], [1.0])]
    assert begun.wait(30)
    sums += [engine.interpolate_checkpoints(who, [paths[who]], [1.0]) for who in ["alice"] * 3 + ["bob"] * 2]
    held.set()
    for future in sums:
        assert future.result(30).path
    assert order == ["alice", "alice", "bob", "alice", "bob", "alice"]
