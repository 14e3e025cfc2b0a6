"""Reverse KL and its gradient against transformers + PEFT in float64: values, every adapter gradient, splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_helpers import new_model, open_engine, train
from helpers import limits_of, load_decoder, our_gradients, peft_model, peft_parameters, relative, trained_adapter
from tiny_models import build_tiny

from mint_engine import reverse_kl
from mint_engine.adapters import Adapter, TrainState
from mint_engine.errors import NonFiniteError, NotFoundError, UserError
from mint_engine.models.decoder import Decoder
from mint_engine.reverse_kl import Reference, check_pairs, check_temperature, kl_and_gradient
from mint_engine.types import AdamParams, LoraConfig, ModelInput, ReverseKLDatum, ReverseKLOutput

VOCAB = 199


@pytest.fixture(scope="module")
def decoder(tiny_tied: Path) -> Decoder:
    return load_decoder(tiny_tied)


def make_pairs(lengths: Sequence[tuple[int, int, int]], seed: int = 0) -> list[ReverseKLDatum]:
    """Per (student prompt, reference prompt, completion) one datum; some weights are zero, some negative."""
    rng = np.random.default_rng(seed)
    data = []
    for own, other, n in lengths:
        completion = rng.integers(0, VOCAB, n)
        prompts = [rng.integers(0, VOCAB, k).tolist() for k in (own, other)]
        inputs = [ModelInput.from_ints([*prompt, *completion[:-1].tolist()]) for prompt in prompts]
        weights = rng.normal(size=n) * (rng.random(n) < 0.7)
        data.append(ReverseKLDatum(*inputs, target_tokens=completion, weights=weights))  # type: ignore[arg-type]
    return data


LENGTHS = [(3, 5, 4), (1, 1, 7), (8, 2, 1), (2, 6, 9)]


def run(
    decoder: Decoder, adapter: Adapter, reference: Reference, data: list[ReverseKLDatum], temperature: float, **kwargs
) -> tuple[ReverseKLOutput, TrainState]:
    state = TrainState(adapter)
    pairs = check_pairs(data, limits_of(decoder), limits_of(reference.decoder))
    with torch.no_grad():
        return reverse_kl.run(decoder, adapter, state, reference, pairs, temperature, **kwargs), state


def double_model(directory: Path, adapter: Adapter) -> torch.nn.Module:
    return peft_model(directory, adapter, torch.float64).double()


def plain(
    student: torch.nn.Module, reference: torch.nn.Module, data: list[ReverseKLDatum], temperature: float
) -> list[torch.Tensor]:
    """The formula, written down in float64 from the models' logits: one loss per datum, differentiable."""
    losses = []
    for d in data:
        n = len(d.target_tokens)
        with torch.no_grad():
            z_ref = reference(torch.tensor([d.reference_input.to_ints()])).logits[0, -n:].double()
        z = student(torch.tensor([d.student_input.to_ints()])).logits[0, -n:].double()
        p, q = torch.softmax(z / temperature, -1), torch.softmax(z_ref / temperature, -1)
        losses.append((d.weights.to_torch() * (p * (p.log() - q.log())).sum(-1)).sum())
    return losses


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_loss_and_gradients_equal_plain_torch_in_float64(decoder: Decoder, tiny_tied: Path, temperature: float) -> None:
    """Student and reference are adapters of different rank on one base, tied head included."""
    student = trained_adapter(decoder, LoraConfig(rank=4, seed=1), scale=0.1)
    teacher = trained_adapter(decoder, LoraConfig(rank=6, seed=2), scale=0.2)
    data = make_pairs(LENGTHS)
    out, state = run(decoder, student, Reference(decoder, teacher), data, temperature)
    model = double_model(tiny_tied, student)
    expected = plain(model, double_model(tiny_tied, teacher), data, temperature)
    torch.stack(expected).sum().backward()
    got = np.array([o["loss"].to_numpy()[0] for o in out.outputs])
    wanted = np.array([float(e.detach()) for e in expected])
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
    assert out.metrics["loss:sum"] == pytest.approx(wanted.sum(), rel=1e-5)
    assert min(abs(wanted)) > 0.05, "the two models differ"
    ours = our_gradients(student, state)
    for name, parameter in peft_parameters(model).items():
        assert parameter.grad is not None
        assert relative(ours[name], parameter.grad) < 2e-5, name


def test_the_reference_may_be_another_base_and_the_head_may_be_frozen(
    decoder: Decoder, tiny_tied: Path, tmp_path: Path
) -> None:
    other_base = build_tiny("llama", tmp_path, seed=5)
    other = load_decoder(other_base)
    student = trained_adapter(decoder, LoraConfig(rank=4, seed=1, train_unembed=False), scale=0.1)
    teacher = trained_adapter(other, LoraConfig(rank=3, seed=2), scale=0.1)
    data = make_pairs(LENGTHS, seed=1)
    out, state = run(decoder, student, Reference(other, teacher), data, 1.3)
    model = double_model(tiny_tied, student)
    expected = torch.stack(plain(model, double_model(other_base, teacher), data, 1.3)).sum()
    expected.backward()
    assert out.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    ours = our_gradients(student, state)
    for name, parameter in peft_parameters(model).items():
        assert parameter.grad is not None
        assert relative(ours[name], parameter.grad) < 2e-5, name


def test_a_model_is_at_no_distance_from_itself(decoder: Decoder) -> None:
    """Same prompts, same weights: KL and gradient vanish, up to rounding."""
    student = trained_adapter(decoder, LoraConfig(rank=4, seed=1))
    pairs = [ReverseKLDatum(d.student_input, d.student_input, d.target_tokens, d.weights) for d in make_pairs(LENGTHS)]
    out, state = run(decoder, student, Reference(decoder, student.snapshot()), pairs, 1.0)
    assert abs(out.metrics["kl:mean"]) < 1e-6
    _, moved = run(decoder, student, Reference(decoder, None), pairs, 1.0)
    assert float(moved.grads.norm()) > 1e-2
    assert float(state.grads.norm()) < 1e-4 * float(moved.grads.norm())


def test_splitting_a_call_into_passes_or_logits_into_parts_changes_nothing(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = trained_adapter(decoder, LoraConfig(rank=4, seed=1), scale=0.1)
    data, reference = make_pairs(LENGTHS), Reference(decoder, None)
    whole, expected = run(decoder, student, reference, data, 1.0)
    monkeypatch.setattr(reverse_kl, "_LOGITS_BYTES", 4 * VOCAB * 2)  # two rows
    split, got = run(decoder, student, reference, data, 1.0, max_tokens=1)
    assert relative(got.grads, expected.grads) < 1e-5
    for a, b in zip(split.outputs, whole.outputs, strict=True):
        np.testing.assert_allclose(a["loss"].to_numpy(), b["loss"].to_numpy(), rtol=1e-5, atol=1e-6)


def test_positions_of_weight_zero_cost_no_logits(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    student = trained_adapter(decoder, LoraConfig(rank=4, seed=1))
    seen: list[int] = []
    logits = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, x, seating: (seen.append(len(x)), logits(self, x, seating))[1])
    data = make_pairs(LENGTHS)
    out, _ = run(decoder, student, Reference(decoder, None), data, 1.0)
    active = sum(int((d.weights.to_numpy() != 0).sum()) for d in data)
    assert seen == [active, active]
    assert out.metrics["tokens:sum"] == active
    silent = [ReverseKLDatum(d.student_input, d.reference_input, d.target_tokens, [0.0] * len(d.target_tokens))  # type: ignore[arg-type]
              for d in data]  # fmt: skip
    out, state = run(decoder, student, Reference(decoder, None), silent, 1.0)
    assert out.loss == 0.0
    assert not state.grads.any()
    assert len(seen) == 2


def test_bfloat16_gradients_stay_close_to_float64(tiny_tied: Path) -> None:
    """At most three times the error of PEFT in bfloat16 on the same batch."""
    decoder = load_decoder(tiny_tied, torch.bfloat16)
    student = trained_adapter(decoder, LoraConfig(rank=4, seed=1), scale=0.1)
    teacher = trained_adapter(decoder, LoraConfig(rank=6, seed=2), scale=0.2)
    data = make_pairs(LENGTHS * 3, seed=4)
    out, state = run(decoder, student, Reference(decoder, teacher), data, 1.0)
    truth, rounded = double_model(tiny_tied, student), peft_model(tiny_tied, student, torch.bfloat16)
    expected = torch.stack(plain(truth, double_model(tiny_tied, teacher), data, 1.0))
    expected.sum().backward()
    coarse = torch.stack(plain(rounded, peft_model(tiny_tied, teacher, torch.bfloat16), data, 1.0))
    coarse.sum().backward()
    ours, wanted, theirs = our_gradients(student, state), peft_parameters(truth), peft_parameters(rounded)

    def flat(gradients: dict[str, torch.Tensor | None]) -> torch.Tensor:
        return torch.cat([g.flatten().double() for _, g in sorted(gradients.items()) if g is not None])

    exact = flat({name: p.grad for name, p in wanted.items()})
    assert relative(flat(dict(ours)), exact) < 3 * relative(flat({n: p.grad for n, p in theirs.items()}), exact)
    losses = torch.tensor([float(o["loss"].to_numpy()[0]) for o in out.outputs])
    assert relative(losses, expected.detach()) < 3 * relative(coarse.detach(), expected.detach())


def test_the_gradient_of_the_kernel_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    z, z_ref = (torch.randn(5, 37, dtype=torch.float64) * 3 for _ in range(2))
    z.requires_grad_()
    p, q = torch.softmax(z / 0.6, -1), torch.softmax(z_ref / 0.6, -1)
    expected = (p * (p.log() - q.log())).sum(-1)
    expected.sum().backward()
    kl, gradient = kl_and_gradient(z.detach(), z_ref, 0.6)
    torch.testing.assert_close(kl, expected.detach())
    torch.testing.assert_close(gradient, z.grad)


def test_what_cannot_be_is_refused_by_name(decoder: Decoder, tmp_path: Path) -> None:
    own = ModelInput.from_ints([1, 2, 3])
    limits = limits_of(decoder)

    def check(**changes) -> None:
        fields = {"student_input": own, "reference_input": own, "target_tokens": [2, 3], "weights": [1.0, 1.0]}
        check_pairs([ReverseKLDatum(**(fields | changes))], limits, limits)

    check()
    for changes, message in (
        ({"target_tokens": [1, 2, 3, 4], "weights": [1.0] * 4}, r"expected 1 to 3 tokens.*got 4 \(datum 0\)"),
        ({"reference_input": ModelInput.from_ints([1])}, r"shorter of student_input \(3\) and reference_input \(1\)"),
        ({"target_tokens": [], "weights": []}, "expected 1 to 3 tokens"),
        ({"target_tokens": [1, VOCAB]}, r"target_tokens \(datum 0\): expected token ids in \[0, 199\), got 199"),
        ({"weights": [1.0]}, r"weights: expected 2 values to match target_tokens, got 1 \(datum 0\)"),
        ({"weights": [1.0, float("nan")]}, "weights: expected finite numbers, got nan at index 1"),
        ({"student_input": ModelInput.empty()}, r"student_input \(datum 0\): expected at least one token"),
    ):
        with pytest.raises(UserError, match=message):
            check(**changes)
    with pytest.raises(UserError, match="expected at least one datum"):
        check_pairs([], limits, limits)
    for temperature in (0, -1.0, float("inf"), float("nan"), True, "1"):
        with pytest.raises(UserError, match="temperature: expected a finite number above 0"):
            check_temperature(temperature)  # type: ignore[arg-type]
    small = load_decoder(build_tiny("llama", tmp_path, vocab_size=64))
    with pytest.raises(UserError, match="vocabulary of 199, got 64"):
        check_pairs(make_pairs(LENGTHS), limits, limits_of(small))


def test_a_kl_that_is_not_finite_is_refused_and_leaves_no_trace(decoder: Decoder) -> None:
    student = trained_adapter(decoder, LoraConfig(rank=4, seed=1))
    state = TrainState(student)
    pairs = check_pairs(make_pairs(LENGTHS), limits_of(decoder), limits_of(decoder))
    with torch.no_grad(), pytest.raises(NonFiniteError, match=r"the reverse KL is nan \(datum 0, position"):
        reverse_kl.run(decoder, student, state, Reference(decoder, None), pairs, 1e-45)
    assert not state.grads.any()
    assert not state.has_grads


# ---- through the engine ----------------------------------------------------------------------------------------------


def test_a_student_learns_to_answer_without_the_prompt_its_teacher_had(tiny_tied: Path, tmp_path: Path) -> None:
    """Thirty steps towards a saved version that reads a longer prompt; calls pipelined, gradients added up."""
    with open_engine(tmp_path) as engine:
        session = engine.create_session()
        teacher, student = (new_model(engine, session, tiny_tied, seed=s) for s in (1, 2))
        train(engine, teacher, 3)
        path = engine.save_weights_for_sampler(teacher, "v").result().path or ""
        data = [
            ReverseKLDatum(d.student_input, d.reference_input, d.target_tokens, np.abs(d.weights.to_numpy()))  # type: ignore[arg-type]
            for d in make_pairs(LENGTHS)
        ]
        losses = []
        for _ in range(30):
            losses += [
                engine.forward_backward_reverse_kl(student, part, reference_model_path=path, temperature=1.0)
                for part in (data[:2], data[2:])
            ]
            step = engine.optim_step(student, AdamParams(learning_rate=5e-3))
        assert (step.result().metrics or {})["step"] == 30
        sums = [losses[i].result().loss + losses[i + 1].result().loss for i in range(0, 60, 2)]
        assert sums[-1] < 0.3 * sums[0], sums
        assert len(engine._references) == 1


def test_the_reference_is_any_checkpoint_one_may_read_or_the_base_itself(tiny_tied: Path, tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        alice, bob = (engine.create_session(owner=name) for name in ("alice", "bob"))
        student = new_model(engine, alice, tiny_tied)
        fresh = engine.save_weights(student, "fresh").result().path
        data = make_pairs(LENGTHS)

        def loss(path: str, model: str = student, **kwargs) -> float:
            return engine.forward_backward_reverse_kl(model, data, reference_model_path=path, **kwargs).result().loss

        assert loss(fresh) == pytest.approx(loss(str(tiny_tied)), abs=1e-4), "B is zero: the base model"
        train(engine, student, 2)
        assert loss(fresh) == pytest.approx(loss(str(tiny_tied)), abs=1e-4)
        other = new_model(engine, bob, tiny_tied)
        for path, error in (
            (fresh, NotFoundError),
            (f"tinker://{student}/weights/none", NotFoundError),
            ("", UserError),
        ):
            with pytest.raises(error):
                loss(path, other)
        assert loss(fresh, other, reader=engine.store.as_owner("alice")) is not None
        with pytest.raises(UserError, match="temperature"):
            loss(fresh, temperature=0.0)
        assert engine.optim_step(other, AdamParams()).result().metrics is not None


def test_a_refused_call_leaves_the_pending_gradients(tiny_tied: Path, tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        session = engine.create_session()
        model, twin = (new_model(engine, session, tiny_tied) for _ in range(2))
        data = make_pairs(LENGTHS)
        for m in (model, twin):
            engine.forward_backward_reverse_kl(m, data, reference_model_path=str(tiny_tied)).result()
        with pytest.raises(NonFiniteError):
            engine.forward_backward_reverse_kl(
                model, data, reference_model_path=str(tiny_tied), temperature=1e-45
            ).result()
        assert torch.equal(engine._models[model].state.grads, engine._models[twin].state.grads)
